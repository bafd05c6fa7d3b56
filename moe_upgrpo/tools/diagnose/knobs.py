# SPDX-License-Identifier: Apache-2.0
"""The settings that may make engine and trainer differ, and how each is turned to its exact form.

Knobs of the engine are turned on a twin (`live`), which is always transformers'. That the twin is a
stand-in is itself the knob `engine`, for engines other than transformers. `bisection` turns the
knobs, each alone.

Shape suffixes: P prompts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.tools import pair
from moe_upgrpo.tools.diagnose import models
from moe_upgrpo.tools.diagnose.differences import (
    Differences,
    Measure,
    Seen,
)
from moe_upgrpo.tools.diagnose.live import Live


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A setting that may make engine and trainer differ.

    name: of the knob, and of its cause in `causes.CAUSES` unless `cause` says otherwise. does: what
    turning it does, for a table. likely: 0 to 1, how often it is the cause. cost: forward passes
    over all sequences, including making twins. lacks: why it cannot be turned here; None where it
    can. turned: (before, after), both against the trainer; None: nothing here turns it.
    """

    name: str
    cause: str | None = None
    does: str
    likely: float = 0.0
    cost: float = 0.0
    lacks: Callable[[Bench], str | None] = lambda bench: None
    turned: Callable[[Bench], tuple[Differences, Differences]] | None = None


@dataclass(kw_only=True)
class Bench:
    """The pair, and the views that several knobs start from, each computed once."""

    live: Live
    _views: dict[str, Seen] = field(default_factory=dict)
    _differences: dict[str, Differences] = field(default_factory=dict)

    def view(self, name: str, look: Callable[[], Seen]) -> Seen:
        """The view of that name, computed once."""
        if name not in self._views:
            self._views[name] = look()
        return self._views[name]

    def kept(self, name: str, look: Callable[[], Seen]) -> Differences:
        """A view's differences from the trainer, computed once."""
        if name not in self._differences:
            self._differences[name] = self.live.compare(self.view(name, look))
        return self._differences[name]

    @property
    def is_twin(self) -> bool:
        """Whether the engine is transformers', so that a twin is the same engine made anew."""
        return isinstance(self.live.engine, HFEngine)

    def whole(self) -> Differences:
        """The engine, each sequence in one pass."""
        return self.kept("whole", lambda: self.live.whole(self.live.engine))

    def reshaped(self) -> Differences:
        """The engine with each sequence alone; a second pass where it chooses its own batches."""
        return self.kept("reshaped", lambda: self.live.whole(self.live.engine, at_once=1))

    def twin(self) -> Differences:
        """The twin in the engine's configured precision."""
        if self.is_twin:
            return self.whole()
        return self.kept("twin", self.live.twin_seen)

    def noise(self) -> Differences:
        """The engine against itself in another batch shape: the noise floor."""
        self.whole(), self.reshaped()
        return self.live.compare(self._views["whole"], self._views["reshaped"])

    def moved(self, measure: Measure) -> np.ndarray:
        """Measure how much the batch shape alone moves the difference from the trainer, [P]."""
        of, other = (d.sums(measure)[0] for d in (self.whole(), self.reshaped()))
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
    """Take the engine's set where the trainer's margin is 0 and either set is right."""
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
        turned=lambda bench: (bench.whole(), bench.reshaped()),
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
            "one process has one rank: `torchrun --nproc-per-node 2 benchmarks/micro/collectives.py"
            " --tp 2 --ep 2` runs a layout, and `moe-upgrpo train --analyse-every 1 --tp 2 --ep 2` "
            "measures the mismatch in it"
        ),
    ),
)


def order(knobs: tuple[Knob, ...] = KNOBS) -> list[Knob]:
    """Order the knobs by likelihood over cost; those that cannot be turned come last."""
    return sorted(knobs, key=lambda k: -k.likely / k.cost if k.turned else 1.0)
