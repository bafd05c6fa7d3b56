# SPDX-License-Identifier: Apache-2.0
"""Words in place of a picture: what it shows, from the numbers that it draws."""

from collections.abc import Callable, Iterable
from typing import Any

from moe_upgrpo.report.figures import Entry, number, percent

_MOST = 8  # curves described; with more, only their number is given


def alt(title: str, entries: Iterable[Entry], *, is_share: bool, several: bool) -> str:
    """A sentence for each curve: where it begins and ends, its lowest and highest points."""
    form = percent if is_share else number
    told = [text for entry in entries if (text := _told(entry, form, several))]
    left = f" And {len(told) - _MOST} more." if len(told) > _MOST else ""
    return f"{title}. {' '.join(told[:_MOST])}{left}".strip()


def _told(entry: Entry, form: Callable[[float], str], several: bool) -> str:
    label = entry.get("label") or "rates"
    if several:
        label = f"{entry['run']}, {label}"
    if "value" in entry:
        return f"{label}: {form(entry['value'])} throughout."
    if "layer_ids" in entry and "steps" in entry:  # a heat map
        cells = [
            (rate, layer, step)
            for step, rates in zip(entry["steps"], entry["rates"], strict=True)
            for layer, rate in zip(entry["layer_ids"], rates, strict=True)
            if rate is not None
        ]
        if not cells:
            return ""
        rate, layer, step = max(cells)
        low = min(cells)[0]
        return f"From {percent(low)} to {percent(rate)}, highest in layer {layer} at step {step}."
    points = _points(entry)
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return ""
    (first, a), (last, b) = known[0], known[-1]
    if len(known) == 1:
        return f"{label}: {form(a)} at {first}."
    (lowest, low), (highest, high) = (f(known, key=lambda point: point[1]) for f in (min, max))
    text = f"{label}: {form(a)} at {first}, {form(b)} at {last}"
    if len(known) > 2:
        text += f"; lowest {form(low)} at {lowest}, highest {form(high)} at {highest}"
    return f"{text}."


def _points(entry: Entry) -> list[tuple[str, float | None]]:
    if "rows" in entry:
        return [(_group(entry["by"], row["group"]), row["rate"]) for row in entry["rows"]]
    if "shares" in entry:
        shares = zip(entry["layers"], entry["shares"], strict=True)
        return [(f"{m} layer{'s' * (m != 1)}", share) for m, share in shares]
    if "layer_ids" in entry:
        rates = zip(entry["layer_ids"], entry["rates"], strict=True)
        return [(f"layer {layer}", rate) for layer, rate in rates]
    steps = zip(entry["steps"], entry["values"], strict=True)
    return [(f"step {step}", value) for step, value in steps]


def _group(by: str, group: Any) -> str:
    if not isinstance(group, list | tuple):
        return f"{by} {group}" if by in ("layer", "step", "token") else str(group)
    low, high = (number(end) if isinstance(end, float) else str(end) for end in group)
    span = low if low == high else f"{low} to {high}"
    return f"{by} {span}"
