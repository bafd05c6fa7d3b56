"""The tap on this device: recorded routes replayed, planted ones used; the deterministic mode.

Routes are [rows, L MoE layers, K experts], one array for each sequence.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu import models
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import seconds
from benchmarks.gpu.parity import LOSS
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings

DTYPES = ("float32", "bfloat16")


def replay(job) -> Outcome:
    """A model's own routes change no more than a repetition does; planted ones are used."""
    folder = models.checkpoint(models.config(job.sizes.model), job.scratch / "model")
    given, figures, faults = models.samples(job.sizes), {}, []
    with groups.process_groups(Layout()):
        for dtype in DTYPES:
            actor = MegatronActor(folder, Layout(), dtype=dtype)
            first, second = actor.score(given), actor.score(given)
            own = actor.score(held_to(given, first))
            plan = planted(given, first, actor.num_experts)
            there = actor.score(plan, record=("routes", "gates"))
            trained = MegatronActor(
                folder, Layout(), dtype=dtype, recompute="full", optimizer=OptimizerSettings()
            ).update(plan, LOSS, record=("routes",))
            figures[dtype] = {
                "repetition": apart(first, second),
                "own routes": apart(first, own),
                "planted routes": apart(first, there),
                "routers recomputed otherwise": trained.recompute_flips,
            }
            used = [one.routes for one in (*there, *trained.scored)]
            for expected, array in zip([sample.routes for sample in plan] * 2, used, strict=True):
                if not np.array_equal(expected, array):
                    faults.append(f"{dtype}: planted experts were not used")
                    break
            # Sums in random order (atomic additions) are the noise of a repetition.
            noise = max(4 * figures[dtype]["repetition"], 1e-5 if dtype == "float32" else 0.05)
            if not torch.cuda.is_available():
                noise = 0.0
            if not figures[dtype]["own routes"] <= noise:
                faults.append(f"{dtype}: its own routes, replayed, changed the log-probs")
            if not figures[dtype]["planted routes"] > figures[dtype]["own routes"]:
                faults.append(f"{dtype}: planted experts changed nothing")
            if not all((one.gates > 0).all() for one in there):
                faults.append(f"{dtype}: planted experts without a weight")
    line = "; ".join(
        f"{dtype}: log-probs change by {f['own routes']:.2g} under their own routes, by "
        f"{f['repetition']:.2g} when repeated"
        for dtype, f in figures.items()
    )
    return Outcome(line=f"{line}; planted routes are used", figures=figures, faults=tuple(faults))


def held_to(given: list[Sample], scored: list[Scored]) -> list[Sample]:
    return [replace(sample, routes=one.routes) for sample, one in zip(given, scored, strict=True)]


def planted(given: list[Sample], scored: list[Scored], experts: int) -> list[Sample]:
    """The samples with random expert sets, in ascending order as they are recorded."""
    random = np.random.default_rng(1)
    made = []
    for sample, one in zip(given, scored, strict=True):
        rows, layers, top_k = one.routes.shape
        ranks = random.random((rows, layers, experts)).argsort(axis=-1)[..., :top_k]
        made.append(replace(sample, routes=np.sort(ranks, axis=-1).astype(np.int16)))
    return made


def apart(first: list[Scored], second: list[Scored]) -> float:
    """The largest difference of two log-probs of the same token."""
    pairs = zip(first, second, strict=True)
    return float(max(np.abs(a.log_probs - b.log_probs).max() for a, b in pairs))


def deterministic(job) -> Outcome:
    """Two actors take the same step and are the same to the last bit; what that costs."""
    folder = models.checkpoint(models.config(job.sizes.model), job.scratch / "model")
    given, figures, faults = models.samples(job.sizes), {}, []
    for dtype in DTYPES:
        taken = {}
        for mode in (True, False):
            with groups.process_groups(Layout(), deterministic=mode):
                one, two = (stepped(folder, given, dtype) for _ in range(2))
                changed = sum(not torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
                taken[mode] = {
                    "weights that differ": changed,
                    "log-probs": max(
                        float(np.abs(a - b).max()) for a, b in zip(one[1], two[1], strict=True)
                    ),
                    "seconds": one[2],
                }
        figures[dtype] = {"deterministic": taken[True], "as it is": taken[False]}
        if taken[True]["weights that differ"] or taken[True]["log-probs"]:
            faults.append(f"{dtype}: two runs of the same step differ")
    line = "; ".join(
        f"{dtype}: {f['deterministic']['weights that differ']} weights differ after a repeated "
        f"step, without the mode {f['as it is']['weights that differ']}; a step takes "
        f"{f['deterministic']['seconds'] / f['as it is']['seconds']:.2f} times as long"
        for dtype, f in figures.items()
    )
    return Outcome(line=line, figures=figures, faults=tuple(faults))


def stepped(folder, given, dtype) -> tuple[list[torch.Tensor], list[np.ndarray], float]:
    """Weights and log-probs after two steps, and the seconds of a third."""
    actor = MegatronActor(folder, Layout(), dtype=dtype, optimizer=OptimizerSettings())
    for _ in range(2):
        actor.update(given, LOSS)
    weights = [weight.clone() for _, weight in actor.export_weights()]
    log_probs = [one.log_probs for one in actor.score(given)]
    return weights, log_probs, seconds(lambda: actor.update(given, LOSS), 1)
