"""One setting after the other turned to its exact form, and what of the mismatch that takes away.

Each knob is turned alone. Its effect is paired, of the same tokens, with an interval by prompt, and
counts where it is more than the same engine differs by in a batch of another shape: the noise
floor. Knobs of the engine are turned on a twin (`live`), of transformers, whatever the engine is:
that it is a stand-in is the knob `engine`, for the engines that are not transformers'.

Shape suffixes: P prompts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.stats import holm
from moe_upgrpo.tools import pair
from moe_upgrpo.tools.diagnose import models
from moe_upgrpo.tools.diagnose.differences import (
    UNITS,
    Differences,
    Measure,
    Removed,
    Seen,
    removed,
)
from moe_upgrpo.tools.diagnose.evidence import Finding
from moe_upgrpo.tools.diagnose.live import Live
from moe_upgrpo.tools.diagnose.live_faults import finding

SURE = 0.05
ROUNDING = 3e-5
"""Log-probs of two programs in fp32 differ by about this (tests/engines/tolerance.py)."""
MEASURES: tuple[Measure, ...] = ("routers", "gap")


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A setting that may make engine and trainer differ.

    name: of the knob, and of its cause in `causes.CAUSES` unless `cause` says otherwise. does: what
    turning it does, for a table. likely: 0 to 1, how often it is the cause. cost: forwards of all
    sequences, twins made included. lacks: why it cannot be turned here; None where it can. turned:
    (before, after), both against the trainer; None: nothing here turns it.
    """

    name: str
    cause: str | None = None
    does: str
    likely: float = 0.0
    cost: float = 0.0
    lacks: Callable[[Bench], str | None] = lambda bench: None
    turned: Callable[[Bench], tuple[Differences, Differences]] | None = None


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


@dataclass(kw_only=True)
class Bench:
    """The pair, and the views that several knobs begin from, each computed once."""

    live: Live
    _kept: dict[str, Differences] = field(default_factory=dict)

    def kept(self, name: str, view: Callable[[], Seen]) -> Differences:
        """A view's differences from the trainer, remembered by a name."""
        if name not in self._kept:
            self._kept[name] = self.live.compare(view())
        return self._kept[name]

    @property
    def is_twin(self) -> bool:
        """Whether the engine is transformers', so that a twin is the engine made anew."""
        return isinstance(self.live.engine, HFEngine)

    def whole(self) -> Differences:
        """The engine, each sequence in one pass."""
        return self.kept("whole", lambda: self.live.whole(self.live.engine))

    def one_by_one(self) -> Differences:
        """The same in another batch shape: each sequence alone, or one more pass."""
        return self.kept("one by one", lambda: self.live.whole(self.live.engine, at_once=1))

    def twin(self) -> Differences:
        """The twin as the engine is said to be."""
        if self.is_twin:
            return self.whole()
        return self.kept("twin", self.live.twin_seen)

    def floor(self, measure: Measure) -> np.ndarray:
        """What the engine differs by from itself over batch shapes, [P]: the noise floor."""
        of, other = (d.sums(measure)[0] for d in (self.whole(), self.one_by_one()))
        return of - other


def _twin_with(bench: Bench, **changes) -> tuple[Differences, Differences]:
    return bench.twin(), bench.live.compare(bench.live.twin_seen(**changes))


def _experts(model, name: str) -> None:
    model.set_experts_implementation(name)


def _attention(model) -> None:
    model.set_attn_implementation("eager")


def _fp32_routers(model) -> None:
    models.route_in(model, torch.float32)


def _without_ties(bench: Bench) -> tuple[Differences, Differences]:
    """Where the trainer's margin is 0 either set is as good: the engine's stands for its own."""
    live = bench.live
    routes = [
        np.where((native.margins == 0)[..., None], rollout.routes, native.routes)
        for native, rollout in zip(live.native, live.rollouts, strict=True)
    ]
    return live.base, live.compare(live.as_sampled, live.seen(routes, None))


def _trainer_fp32(bench: Bench) -> tuple[Differences, Differences]:
    live = bench.live
    actor = pair.start_actor(live.options, dtype="float32")
    after = live.compare(live.as_sampled, live.scored(actor))
    del actor
    gc.collect()
    return live.base, after


def _no_experts(bench: Bench) -> str | None:
    return None if bench.live.actor.layer_ids else "a dense model has no routers"


def _not_bf16(bench: Bench) -> str | None:
    dtype = bench.live.options.engine_dtype
    return None if dtype != "float32" else "the engine is in float32 already"


def _router_lacks(bench: Bench) -> str | None:
    return _no_experts(bench) or _not_bf16(bench)


KNOBS: tuple[Knob, ...] = (
    Knob(
        name="batch-shape",
        does="each sequence alone in its batch",
        likely=0.2,
        cost=2,
        lacks=lambda bench: None if bench.is_twin else "the engine batches as it likes",
        turned=lambda bench: (bench.whole(), bench.one_by_one()),
    ),
    Knob(
        name="prefill-decode",
        does="whole sequences in one pass in place of token by token from the cache",
        likely=0.2,
        cost=1,
        turned=lambda bench: (bench.live.base, bench.whole()),
    ),
    Knob(
        name="engine",
        does="transformers in place of the engine, at its precision",
        likely=0.5,
        cost=2,
        lacks=lambda bench: "the engine is transformers'" if bench.is_twin else None,
        turned=lambda bench: (bench.whole(), bench.twin()),
    ),
    Knob(
        name="fp8",
        does="the weights as trained in place of rounded to FP8",
        likely=1.0,
        cost=2,
        lacks=lambda bench: (
            None if bench.live.weights == "fp8" else "the engine's weights are not rounded"
        ),
        turned=partial(_twin_with, weights="as-trained"),
    ),
    Knob(
        name="engine-dtype",
        does="the engine in float32",
        likely=0.9,
        cost=2,
        lacks=_not_bf16,
        turned=partial(_twin_with, dtype="float32"),
    ),
    Knob(
        name="trainer-dtype",
        does="the trainer in float32",
        likely=0.8,
        cost=3,
        lacks=lambda bench: (
            None if bench.live.options.dtype != "float32" else "the trainer is in float32 already"
        ),
        turned=_trainer_fp32,
    ),
    Knob(
        name="router-dtype",
        does="the engine's routers in float32, the rest as it is",
        likely=0.5,
        cost=2,
        lacks=_router_lacks,
        turned=partial(_twin_with, prepare=_fp32_routers),
    ),
    Knob(
        name="experts-backend",
        does="experts one after the other in place of a grouped product",
        likely=0.3,
        cost=4,
        lacks=_no_experts,
        turned=partial(_twin_with, prepare=partial(_experts, name="eager")),
    ),
    Knob(
        name="experts-backend, batched",
        cause="experts-backend",
        does="experts in one batched product in place of a grouped one",
        likely=0.1,
        cost=4,
        lacks=_no_experts,
        turned=partial(_twin_with, prepare=partial(_experts, name="batched_mm")),
    ),
    Knob(
        name="attention-kernel",
        does="attention in plain products and a softmax in place of SDPA",
        likely=0.2,
        cost=2,
        turned=partial(_twin_with, prepare=_attention),
    ),
    Knob(
        name="top-k-ties",
        does="routers whose last chosen and first left expert score the same left out",
        likely=0.1,
        cost=0.1,
        lacks=_no_experts,
        turned=_without_ties,
    ),
    Knob(
        name="cuda-graphs",
        does="the engine without CUDA graphs",
        lacks=lambda bench: (
            "no GPU here, so no CUDA graphs"
            if not torch.cuda.is_available()
            else "start the engine with enforce_eager (vLLM) or --disable-cuda-graph (SGLang) and "
            "run again: graphs are set when an engine starts"
        ),
    ),
    Knob(
        name="parallelism",
        does="another tensor or expert parallelism of the trainer",
        lacks=lambda bench: (
            "one process has one rank: `torchrun --nproc-per-node 2 benchmarks/collectives.py --tp "
            "2 --ep 2` runs a layout, and `moe-upgrpo train --analyse-every 1 --tp 2 --ep 2` "
            "measures the mismatch in it"
        ),
    ),
)


def order(knobs: tuple[Knob, ...] = KNOBS) -> list[Knob]:
    """Cheap and likely knobs first: by likely / cost. Those that nothing turns come last."""
    return sorted(knobs, key=lambda k: -k.likely / k.cost if k.turned else 1.0)


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
