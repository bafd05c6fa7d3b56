"""The bisection: each knob turned alone, and what of the mismatch that takes away.

An effect is paired, of the same tokens, with an interval by prompt, and counts where it is more
than the same engine differs by in a batch of another shape: the noise floor.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import holm
from moe_upgrpo.tools.diagnose.differences import UNITS, Measure, Removed, removed
from moe_upgrpo.tools.diagnose.evidence import Finding
from moe_upgrpo.tools.diagnose.knobs import KNOBS, Bench, Knob, order
from moe_upgrpo.tools.diagnose.live import Live
from moe_upgrpo.tools.diagnose.live_faults import finding

SURE = 0.05
ROUNDING = 3e-5
"""Log-probs of two programs in fp32 differ by about this (tests/engines/tolerance.py)."""
MEASURES: tuple[Measure, ...] = ("routers", "gap")


@dataclass(frozen=True, kw_only=True)
class Turned:
    """A knob's effect on each measure that both sides have."""

    knob: Knob
    effects: dict[Measure, Removed]
    seconds: float
    stands_out: bool = False  # more was taken away than the noise floor, by prompt, after Holm


@dataclass(kw_only=True)
class Bisection:
    """Everything that was turned, and what was not, with the reason."""

    findings: list[Finding] = field(default_factory=list)
    turned: list[Turned] = field(default_factory=list)
    not_tried: dict[str, str] = field(default_factory=dict)
    floor: dict[Measure, float] = field(default_factory=dict)
    base: dict[Measure, float] = field(default_factory=dict)
    above_floor: bool = True


def bisect(
    live: Live,
    *,
    minutes: float | None = None,
    console: Console | None = None,
    knobs: tuple[Knob, ...] = KNOBS,
) -> Bisection:
    """Turn each knob alone, the cheap and likely first, until the minutes are spent.

    Nothing is turned where engine and trainer differ by no more than the engine from itself.
    """
    begun, bench, result = time.monotonic(), Bench(live=live), Bisection()
    whole = bench.whole()
    unit = time.monotonic() - begun  # of a forward of all sequences; the first is the slowest
    known = [m for m in MEASURES if whole.has(m)]
    result.base = {m: live.base.rate(m) for m in MEASURES if live.base.has(m)}
    floors = {m: bench.floor(m) for m in known}
    result.floor = {m: float(np.abs(floors[m]).sum() / whole.sums(m)[1].sum()) for m in known}
    above = {m: floor_P for m, floor_P in floors.items() if _is_above(bench, m, floor_P)}
    result.above_floor = bool(above)
    if not above:
        why = "engine and trainer differ by no more than the engine from itself"
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
                    result.turned.append(_turn(knob, bench, above))
                except (UserError, ValueError, NotImplementedError, ImportError) as error:
                    # transformers refuses what a model or this machine has not
                    result.not_tried[knob.name] = str(error).splitlines()[0]
            progress.advance(task)
    result.turned = _judged(result.turned)
    result.findings = [_finding(one) for one in result.turned if one.stands_out]
    result.findings.sort(key=lambda found: -(found.share or 0))
    return result


def _is_above(bench: Bench, measure: Measure, floor_P: np.ndarray) -> bool:
    """Whether a mismatch is more than the noise floor, and a gap more than fp32's rounding."""
    whole = bench.whole()
    if measure == "gap" and whole.rate(measure) < ROUNDING:
        return False
    return float(whole.sums(measure)[0].sum()) > 2 * float(np.abs(floor_P).sum())


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


def _turn(knob: Knob, bench: Bench, floors: dict[Measure, np.ndarray]) -> Turned:
    """Turn it, and hold what it took away against the floors of the measures that are above."""
    begun = time.monotonic()
    before, after = knob.turned(bench)
    gc.collect()
    # The batch shape is what the floor is made of: it cannot be held against itself.
    held = {} if knob.name == "batch-shape" else floors
    effects = {
        m: removed(before, after, m, floor_P=held.get(m))
        for m in floors
        if before.has(m) and after.has(m)
    }
    return Turned(knob=knob, effects=effects, seconds=time.monotonic() - begun)


def _judged(turned: list[Turned]) -> list[Turned]:
    """Mark the knobs whose effect stands out, with Holm's correction over all that was tested."""
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
    """The knob's finding, of the routers where any differed before."""
    of = next(e for e in one.effects.values() if e.share is not None)
    return finding(one.knob.cause or one.knob.name, of, one.knob.does, kind="numerics")


def as_table(of: Bisection) -> dict[str, Any]:
    """What was turned, for a terminal or a page: title, says, columns and rows of texts."""
    base = [f"{_number(rate, m)} {UNITS[m]}" for m, rate in of.base.items()]
    floor = [f"{_number(rate, m)} {UNITS[m]}" for m, rate in of.floor.items()]
    says = f"Engine and trainer: {', '.join(base)}; noise floor: {', '.join(floor)}."
    if not of.above_floor:
        says += " No more than the noise floor: no knob was turned."
    rows = []
    for one in of.turned:
        row = [one.knob.name, one.knob.does]
        for measure in MEASURES:
            row += _cells(one.effects.get(measure))
        rows.append([*row, "yes" if one.stands_out else "no", f"{one.seconds:.1f}"])
    ends = [f"{UNITS[m]}, {part}" for m in MEASURES for part in ("before → after", "removed")]
    columns = ["knob", "turned to", *ends, "above the floor", "s"]
    return {"title": "One knob at a time", "says": says, "columns": columns, "rows": rows}


def _number(rate: float, measure: Measure) -> str:
    return f"{rate:.2%}" if measure == "routers" else f"{rate:.2e}"


def _cells(of: Removed | None) -> list[str]:
    if of is None:
        return ["", ""]
    change = f"{_number(of.before, of.measure)} → {_number(of.after, of.measure)}"
    if of.share is None:
        return [change, "nothing to remove"]
    ends = "" if of.low is None else f" ({of.low:.0%} to {of.high:.0%})"
    return [change, f"{of.share:.0%}{ends}"]


def _progress(console: Console | None) -> Progress:
    """A bar with the knob that is being turned; silent without a console."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console or Console(quiet=True),
        transient=True,
    )
