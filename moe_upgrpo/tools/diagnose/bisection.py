# SPDX-License-Identifier: Apache-2.0
"""The bisection: each knob is turned alone, and the mismatch that this removes is measured.

An effect is paired, on the same tokens, with an interval by prompt. It stands out where it is more
than a change of batch shape alone moves the same figure by, prompt by prompt.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import holm
from moe_upgrpo.tools.diagnose.differences import Differences, Measure, Removed, removed
from moe_upgrpo.tools.diagnose.evidence import Finding
from moe_upgrpo.tools.diagnose.knobs import KNOBS, Bench, Knob, order
from moe_upgrpo.tools.diagnose.live import Live
from moe_upgrpo.tools.diagnose.live_faults import finding

SURE = 0.05
ROUNDING = 3e-5
"""Log-probs of two programs in fp32 differ by about this much (tests/engines/tolerance.py)."""
MEASURES: tuple[Measure, ...] = ("routers", "gap")


@dataclass(frozen=True, kw_only=True)
class Turned:
    """A knob's effect on each measure that both sides have."""

    knob: Knob
    effects: dict[Measure, Removed]
    seconds: float
    stands_out: bool = False  # removed more than the noise floor, by prompt, after Holm


@dataclass(kw_only=True)
class Bisection:
    """The knobs that were turned, and those that were not, with the reason."""

    findings: list[Finding] = field(default_factory=list)
    turned: list[Turned] = field(default_factory=list)
    not_tried: dict[str, str] = field(default_factory=dict)
    floor: dict[Measure, float] = field(default_factory=dict)
    base: dict[Measure, float] = field(default_factory=dict)
    alike: bool = False  # the two sides differ by no more than rounding: nothing was turned


def bisect(
    live: Live,
    *,
    minutes: float | None = None,
    console: Console | None = None,
    knobs: tuple[Knob, ...] = KNOBS,
) -> Bisection:
    """Turn each knob alone, the cheap and likely ones first, until the minutes are spent.

    Nothing is turned where engine and trainer agree to the rounding of fp32.
    """
    begun, bench, result = time.monotonic(), Bench(live=live), Bisection()
    bench.whole()
    unit = time.monotonic() - begun  # seconds for all sequences once; the first pass is the slowest
    result.base = {m: live.base.rate(m) for m in MEASURES if live.base.has(m)}
    noise = bench.noise()
    result.floor = {m: noise.rate(m) for m in MEASURES if noise.has(m)}
    large = [m for m in MEASURES if live.base.has(m) and _is_large(live.base, m)]
    if not large:
        result.alike = True
        why = "engine and trainer differ by no more than the rounding of fp32"
        result.not_tried = {knob.name: why for knob in knobs}
        return result
    with _progress(console) as progress:
        task = progress.add_task("turning knobs", total=len(knobs))
        for knob in order(knobs):
            progress.update(task, description=knob.does)
            if reason := _reason(knob, bench, minutes, time.monotonic() - begun, unit):
                result.not_tried[knob.name] = reason
            else:
                try:
                    result.turned.append(_turn(knob, bench, large))
                except UserError as error:  # transformers has no such twin
                    result.not_tried[knob.name] = str(error).splitlines()[0]
            progress.advance(task)
    result.turned = _judged(result.turned)
    result.findings = [_finding(one) for one in result.turned if one.stands_out]
    result.findings.sort(key=lambda found: -(found.share or 0))
    return result


def _is_large(base: Differences, measure: Measure) -> bool:
    """Whether there is something to explain: routers that differ, or a gap beyond rounding."""
    return base.rate(measure) > (ROUNDING if measure == "gap" else 0)


def _reason(
    knob: Knob, bench: Bench, minutes: float | None, spent_s: float, unit_s: float
) -> str | None:
    """Why a knob is not turned; None where it is."""
    if reason := knob.lacks(bench):
        return reason
    left_s = float("inf") if minutes is None else minutes * 60 - spent_s
    if left_s <= 0 or knob.cost * unit_s > left_s:
        return (
            f"it would take about {knob.cost * unit_s:.0f} s, and {max(left_s, 0):.0f} s of "
            f"--minutes {minutes:g} were left"
        )
    return None


def _turn(knob: Knob, bench: Bench, measures: Sequence[Measure]) -> Turned:
    """Turn a knob, and compare what it removed with what the batch shape moves, where that is known
    and is not the knob itself."""
    begun = time.monotonic()
    before, after = knob.turned(bench)
    gc.collect()
    held = knob.name != "batch-shape"
    effects = {
        m: removed(
            before, after, m, floor_P=bench.moved(m) if held and bench.whole().has(m) else None
        )
        for m in measures
        if before.has(m) and after.has(m)
    }
    return Turned(knob=knob, effects=effects, seconds=time.monotonic() - begun)


def _judged(turned: list[Turned]) -> list[Turned]:
    """Mark the knobs whose effect stands out, with Holm's correction over all that were tested."""
    effects = [(i, of) for i, one in enumerate(turned) for of in one.effects.values()]
    if not effects:
        return turned
    sure = {
        i
        for (i, of), p in zip(effects, holm([of.p for _, of in effects]), strict=True)
        if p < SURE and of.share is not None and of.share > 0
    }
    return [replace(one, stands_out=i in sure) for i, one in enumerate(turned)]


def _finding(one: Turned) -> Finding:
    """The knob's finding, for the routers where any differed before."""
    of = next(e for e in one.effects.values() if e.share is not None)
    return finding(one.knob.cause or one.knob.name, of, one.knob.does, kind="numerics")


def as_table(of: Bisection) -> dict[str, Any]:
    """Knobs and effects for a terminal or a page: title, says, columns and rows of texts."""
    floor = "; ".join(
        f"{rate:.2%} of routers" if measure == "routers" else f"{rate:.2e} nats"
        for measure, rate in of.floor.items()
    )
    rows = []
    for one in of.turned:
        for effect in one.effects.values():
            share = "" if effect.share is None else f"{effect.share:.0%}"
            if effect.low is not None and effect.high is not None:
                share += f" ({effect.low:.0%} to {effect.high:.0%})"
            stands = "yes" if one.stands_out else "no"
            rows.append([one.knob.does, str(effect), share, stands, f"{one.seconds:.1f}"])
    return {
        "title": "One knob at a time",
        "says": f"Noise floor, the engine against itself in other batches: {floor or 'none'}. A "
        "share below 0: the change made more of it. Above the floor: more than another batch shape "
        "moves it, by a paired test by prompt, with Holm's correction over all knobs.",
        "columns": ["change", "what it gave", "removed", "above the floor", "seconds"],
        "rows": rows,
    }


def _progress(console: Console | None) -> Progress:
    """A bar with the knob that is being turned; silent without a console."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console or Console(quiet=True),
        transient=True,
    )
