# SPDX-License-Identifier: Apache-2.0
"""The verdict: three sentences, a table, and the same as JSON.

They say what differs; what causes how much of it; and whether that is within what is expected for
this model's shape and precision. Numbers are of the response tokens; intervals are 95%, by prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_upgrpo import __version__
from moe_upgrpo.errors import UserError
from moe_upgrpo.report.figures import number, percent, plural
from moe_upgrpo.stats import MIN_PROMPTS, ratio_interval, unseen_bound
from moe_upgrpo.store.files import parse_json
from moe_upgrpo.tools.diagnose import faults, logps, matching, signs
from moe_upgrpo.tools.diagnose.causes import CAUSES
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding

LEAST_TOLD = 0.01  # a cause of less appears in the table only

if TYPE_CHECKING:
    from moe_upgrpo.tools.diagnose.expected import Expected

Form = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured number, its interval by prompt where there is one, and what it measures."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    of: str = ""

    def shown(self, form: Form) -> str:
        if self.low is None or self.high is None:
            return form(self.value)
        return f"{form(self.value)} ({form(self.low)} to {form(self.high)})"


@dataclass(kw_only=True)
class Measured:
    """Distance of the two sides. None: not compared.

    left: share of routers that differ once the faults that were found are mended.
    """

    routers: Figure | None = None
    left: Figure | None = None
    gap: Figure | None = None
    by_layer: dict[int, float] = field(default_factory=dict)
    shapes: str | None = None
    """Both sides' shapes, where they do not fit each other."""


@dataclass(kw_only=True)
class Diagnosis:
    """The causes that were found, faults first, and the measurements."""

    about: str
    measured: Measured
    findings: list[Finding]
    not_tried: dict[str, str]
    tried: int
    sentences: tuple[str, str, str]
    expected: Expected | None = None
    row: dict[str, Any] | None = None
    alarms: list[str] = field(default_factory=list)
    since: dict[str, Any] | None = None
    tables: list[dict[str, Any]] = field(default_factory=list)
    """Further tables of the page: title, says, columns and rows of texts."""

    @property
    def first(self) -> Finding | None:
        """The first cause: a fault, or else the one that explains most."""
        return self.findings[0] if self.findings else None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: null for what is not known."""
        measured = asdict(self.measured)
        measured["by_layer"] = {str(k): v for k, v in self.measured.by_layer.items()}
        return _finite(
            {
                "moe_upgrpo": __version__,
                "about": self.about,
                "sentences": list(self.sentences),
                "first_cause": self.first.cause if self.first else None,
                "findings": [asdict(f) | {"what": _cause(f.cause)} for f in self.findings],
                "measured": measured,
                "expected": asdict(self.expected) if self.expected else None,
                "tests": self.tried,
                "not_tried": self.not_tried,
                "alarms": self.alarms,
                "since": self.since,
                "row": self.row,
                "tables": self.tables,
            }
        )


def _cause(name: str) -> dict[str, Any]:
    return asdict(CAUSES[name])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(
    evidence: Evidence, left: Evidence | None, by_layer: Sequence[float] | None
) -> Measured:
    """Measure how far the two sides differ, before and after the faults that were found."""
    found = Measured(gap=_gap(evidence))
    if evidence.rollout_routes and evidence.train_routes and evidence.layer_ids:
        if matching.fit(evidence):
            found.routers = _routers(evidence)
            rates = matching.by_layer(evidence)
            found.by_layer = dict(zip(evidence.layer_ids, map(float, rates), strict=False))
        else:
            sides = (evidence.rollout_routes[0].shape, evidence.train_routes[0].shape)
            axes = "[tokens, layers, top-k] of a sequence"
            found.shapes = f"engine {list(sides[0])} and trainer {list(sides[1])} ({axes})"
        if left is not None and matching.fit(left) and any(x.any() for x in matching.counted(left)):
            found.left = _routers(left)
    elif (layers := evidence.columns.get("layers_mismatched")) and evidence.layer_ids:
        L = len(evidence.layer_ids)
        differ, compared = [float(np.nansum(x)) for x in layers], [len(x) * L for x in layers]
        found.routers = _figure(evidence, "routers that differ", differ, compared, "share")
    if by_layer and not found.by_layer:
        found.by_layer = dict(zip(evidence.layer_ids, by_layer, strict=True))
    return found


def _routers(evidence: Evidence) -> Figure:
    differ = matching.sum_of(matching.differing(evidence))
    compared = matching.sum_of(matching.counted(evidence))
    return _figure(evidence, "routers that differ", differ, compared, "share")


def _gap(evidence: Evidence) -> Figure | None:
    if evidence.logp_rollout is None or evidence.logp_train is None:
        return None
    gaps = logps.gaps(evidence)
    sizes = [float(np.abs(x).sum()) for x in gaps]
    counts = [float(len(x)) for x in gaps]
    if not sum(counts):
        return None
    return _figure(evidence, "mean |log-prob gap|, nats", sizes, counts, "magnitude", "tokens")


def _figure(evidence, name, parts, wholes, scale, of="(token, layer) pairs") -> Figure:
    part_P, whole_P = (matching.by_prompt(evidence, x) for x in (parts, wholes))
    known = whole_P > 0
    value, low, high = ratio_interval(part_P[known], whole_P[known], scale=scale)
    if scale == "share" and value in (0, 1) and known.sum() >= MIN_PROMPTS:
        bound = unseen_bound(whole_P[known])
        low, high = (0.0, bound) if value == 0 else (1 - bound, 1.0)
    ends = [None if math.isnan(x) else x for x in (low, high)]
    return Figure(name=name, value=value, low=ends[0], high=ends[1], of=f"{sum(wholes):,.0f} {of}")


def look(
    evidence: Evidence, *, named: Sequence[Finding] = (), replay: str = "none"
) -> faults.Found:
    """The faults and shares that records show, without a model: faults first.

    named: faults that reading the records has shown already.
    """
    found = faults.find(evidence)
    first = [*named, *found.findings]
    if unused := signs.replay_unused(evidence, replay):
        first.insert(0, unused)
    numerics = signs.numerics(found.left)
    seen = {one.cause for one in first}
    found.findings = first + [one for one in numerics if one.cause not in seen]
    return found


def sentences(
    measured: Measured,
    findings: Sequence[Finding],
    tried: int,
    expected: Expected | None,
    why_not: str,
) -> tuple[str, str, str]:
    """Exactly three: what differs, what causes it, and whether it is expected.

    why_not: why nothing is expected, in that case.
    """
    return (
        f"{_differs(measured)}.",
        f"{_causes(measured, findings, tried)}.",
        f"{_within(measured, findings, expected, why_not)}.",
    )


def _differs(measured: Measured) -> str:
    if measured.shapes:
        text = f"The two sides' routes have different shapes, {measured.shapes}"
    elif measured.routers is None:
        text = "No routes are compared"
    elif not measured.routers.value:
        text = f"None of {measured.routers.of} has other experts on the two sides"
    else:
        shown = measured.routers.shown(percent)
        text = f"Engine and trainer choose other experts in {shown} of {measured.routers.of}"
    if measured.gap is None:
        return f"{text}; no log-probs are compared"
    if not measured.gap.value:
        return f"{text}, and no log-prob differs"
    return (
        f"{text}, and a token's log-prob differs by {measured.gap.shown(number)} nats in the mean"
    )


def _causes(measured: Measured, findings: Sequence[Finding], tried: int) -> str:
    named = [one for one in findings if one.kind == "fault"]
    if not named:
        looked = f"No fault was found in {plural(tried, 'test')}"
        if not (measured.routers and measured.routers.value) and not (
            measured.gap and measured.gap.value > logps.LEAST_GAP
        ):
            return f"{looked}, and nothing is left to explain"
        told = [one for one in findings if one.share is None or one.share >= LEAST_TOLD][:3]
        if not told:
            return f"{looked}, and the records alone do not say what else causes it"
        shares = "; ".join(f"{CAUSES[one.cause].says}: {explains(one)}" for one in told)
        return f"{looked}; of what differs, {shares}"
    first, *more = named
    text = f"The cause is that {CAUSES[first.cause].says}: {explains(first)} ({first.shown_by})"
    if more:
        others = "; ".join(f"{CAUSES[one.cause].says}, {explains(one)}" for one in more[:3])
        text += f"; beside it, {others}"
    return text


def explains(finding: Finding) -> str:
    """Say how much a cause explains."""
    what = "routers that differ" if finding.measure == "routers" else "gap"
    if finding.share is None:
        compared = "log-probs" if what == "gap" else "experts"
        return f"until it is mended, {compared} cannot be compared further"
    ends = ""
    if finding.low is not None and finding.high is not None:
        ends = f" ({percent(finding.low)} to {percent(finding.high)})"
    return f"it explains {percent(finding.share)}{ends} of the {what}"


def _within(
    measured: Measured, findings: Sequence[Finding], expected: Expected | None, why_not: str
) -> str:
    fault = any(one.kind == "fault" and one.measure == "routers" for one in findings)
    rate = measured.left if fault else measured.routers
    if rate is None:
        if fault:
            return "How much then differs is not known until that is mended"
        return "Whether that is expected is not known: there is an expectation for routers only"
    if expected is None:
        left = f", {rate.shown(percent)} with the fault mended," if fault else ""
        return f"Whether that{left} is expected is not known: {why_not}"
    bounds = f"{percent(expected.low)} to {percent(expected.high)}"
    place = _place(rate, expected)
    chance = rate.low is None and place in ("below", "above")
    doubt = f"; with fewer than {MIN_PROMPTS} prompts told apart, that may be chance" * chance
    shown = rate.shown(percent)
    differ = f"With that mended {shown} of routers differ, which" if fault else f"That, {shown},"
    return f"{differ} is {place} the {bounds} expected of this model's shape and precision{doubt}"


def _place(rate: Figure, expected: Expected) -> str:
    """Where a rate lies relative to the expected range; if it has an interval, the whole interval
    must lie outside the range to count as outside."""
    low, high = (rate.value if end is None else end for end in (rate.low, rate.high))
    if expected.low <= rate.value <= expected.high:
        return "within"
    if low <= expected.high and high >= expected.low:
        return "not clearly outside"
    return "below" if rate.value < expected.low else "above"


def read_before(path: Path) -> dict[str, Any]:
    """An earlier diagnosis.json.

    Raises:
        UserError: no such file, or none that a diagnosis wrote.
    """
    try:
        written = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--before {path}: {error.strerror or error}; the diagnosis.json that an earlier "
            "moe-upgrpo diagnose wrote is needed."
        ) from None
    found = parse_json(written, f"--before {path}")
    known = isinstance(found, dict) and isinstance(found.get("measured"), dict)
    if not known or not isinstance(found.get("findings"), list):
        raise UserError(f"--before {path} is no diagnosis.json of moe-upgrpo diagnose.")
    return found


def since(before: dict[str, Any], diagnosis: Diagnosis) -> dict[str, Any]:
    """Changes since an earlier diagnosis: in the figures, and causes that are gone or new."""
    changed: dict[str, Any] = {"figures": []}
    for name in ("routers", "gap"):
        now = getattr(diagnosis.measured, name)
        then = before["measured"].get(name)
        if (
            now is None
            or not isinstance(then, dict)
            or not isinstance(then.get("value"), float | int)
        ):
            continue
        removed = 1 - now.value / then["value"] if then["value"] else None
        changed["figures"].append(
            {"name": now.name, "then": then["value"], "now": now.value, "removed": removed}
        )
    names = [
        [
            f["cause"]
            for f in before["findings"]
            if isinstance(f, dict) and f.get("kind") == "fault"
        ],
        [f.cause for f in diagnosis.findings if f.kind == "fault"],
    ]
    changed["gone"] = [name for name in names[0] if name not in names[1]]
    changed["new"] = [name for name in names[1] if name not in names[0]]
    changed["says"] = _said_since(changed)
    return changed


def _said_since(changed: dict[str, Any]) -> str:
    parts = []
    for one in changed["figures"]:
        form = percent if one["name"].startswith("routers") else number
        text = f"{one['name']} {form(one['then'])} → {form(one['now'])}"
        if one["removed"] is not None and one["removed"] > 0:
            text += f", {percent(one['removed'])} removed"
        elif one["removed"] is not None and one["removed"] < 0:
            text += f", {percent(-one['removed'])} more"
        parts.append(text)
    if changed["gone"]:
        parts.append(f"no longer found: {', '.join(changed['gone'])}")
    if changed["new"]:
        parts.append(f"found now: {', '.join(changed['new'])}")
    return f"Since the earlier diagnosis: {'; '.join(parts) or 'nothing that was measured then'}."


def as_text(diagnosis: Diagnosis) -> str:
    """The diagnosis as the text of diagnosis.json."""
    return json.dumps(diagnosis.to_json(), indent=1, allow_nan=False) + "\n"
