"""A model on this device against the same model in fp32 on the CPU, which goes first.

N response tokens of all sequences, R rows (inputs) of all sequences, L MoE layers, K experts each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu import models
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import relative
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings

LOSS = PolicyLossConfig.preset("up-grpo")
# Plain descent: the change of the weights is the gradient. The step is long enough not to be lost
# in the weights' own last digits.
DESCENT = OptimizerSettings(algorithm="sgd", lr=100.0, warmup_steps=0, clip_grad=0.0)
# For Adam's first step, g / (|g| + eps): with a large eps it depends smoothly on the gradient, as
# later steps do, and is not the sign of noise where a gradient is nearly 0.
ADAM = OptimizerSettings(lr=1.0, eps=1.0, warmup_steps=0)
# Between two orders of the same sums in fp32.
LIMITS = {"log-probs": 2e-5, "entropy": 2e-5, "gradient": 1e-3, "step": 1e-3}
BF16_LIMIT = 0.1  # of the mean |difference| of log-probs, in nats: grossly wrong, not rounded


def reference(job) -> Outcome:
    """Write what `against_reference` compares with to a file."""
    if torch.cuda.is_available():
        return Outcome(line="no reference", faults=("the GPU could not be hidden from torch",))
    folder = models.checkpoint(models.config(job.sizes.model), job.scratch / "model")
    given = models.samples(job.sizes)
    with groups.process_groups(Layout()):
        found = values(folder, given, "float32")
        found |= stepped(folder, held_to(given, found["routes"]))
    np.savez(job.scratch / "reference.npz", **found)
    return Outcome(
        line=f"{len(found['log_probs']):,} tokens, gradient norm {float(found['grad_norm']):.4g}",
        figures={"tokens": len(found["log_probs"]), "grad_norm": float(found["grad_norm"])},
    )


def values(folder: Path, given: list[Sample], dtype: str) -> dict[str, np.ndarray]:
    """[N] log-probs and entropy, [R, L, K] routes."""
    scored = MegatronActor(folder, Layout(), dtype=dtype).score(given)
    return {
        name: np.concatenate([getattr(one, name) for one in scored])
        for name in ("log_probs", "entropy", "routes")
    }


def held_to(given: list[Sample], routes_RLK: np.ndarray) -> list[Sample]:
    """The samples with their parts of all the routes."""
    ends = np.cumsum([len(sample.tokens) - 1 for sample in given])[:-1]
    parts = np.split(routes_RLK, ends)
    return [replace(sample, routes=part) for sample, part in zip(given, parts, strict=True)]


def stepped(folder: Path, given: list[Sample]) -> dict[str, np.ndarray]:
    """Gradient and Adam's step by Hugging Face names, and the gradient's norm."""
    found = {}
    for what, settings in (("gradient", DESCENT), ("step", ADAM)):
        actor = MegatronActor(folder, Layout(), optimizer=settings)
        before = {name: weight.clone() for name, weight in actor.export_weights()}
        update = actor.update(given, LOSS)
        for name, after in actor.export_weights():
            change = (before[name] - after) / settings.lr
            found[f"{what}/{name}"] = change.float().cpu().numpy()
        found["grad_norm"] = np.array(update.grad_norm)
    return found


def against_reference(job) -> Outcome:
    """Log-probs, gradient and step in fp32, held to the reference's experts: a near tie that falls
    the other way is no error. Then with the routers free, and in bf16."""
    file = job.scratch / "reference.npz"
    if not file.exists():
        return Outcome(line="nothing to compare with", faults=("the reference was not made",))
    expected = dict(np.load(file))
    folder, given = job.scratch / "model", models.samples(job.sizes)
    held = held_to(given, expected["routes"])
    with groups.process_groups(Layout()):
        found = values(folder, held, "float32") | stepped(folder, held)
        free = values(folder, given, "float32")
        bf16 = values(folder, held, "bfloat16")
    worst = {
        "log-probs": largest(found["log_probs"] - expected["log_probs"]),
        "entropy": largest(found["entropy"] - expected["entropy"]),
    }
    for what in ("gradient", "step"):
        worst[what] = max(
            relative(torch.from_numpy(found[name]), torch.from_numpy(array))
            for name, array in expected.items()
            if name.startswith(f"{what}/") and array.any()
        )
    faults = [
        f"{what} in fp32: {size:.2g} from the CPU's; at most {LIMITS[what]:g} is expected"
        for what, size in worst.items()
        if not size <= LIMITS[what]
    ]
    if not np.array_equal(found["routes"], expected["routes"]):
        faults.append("the experts that were given were not used")
    differ = float((free["routes"] != expected["routes"]).any(axis=-1).mean())
    off = float(np.abs(bf16["log_probs"] - expected["log_probs"]).mean())
    if not off <= BF16_LIMIT:
        faults.append(f"log-probs in bf16: {off:.2g} from the CPU's fp32 on average")
    return Outcome(
        line=f"fp32, experts held: log-probs to {worst['log-probs']:.1g}, gradient to "
        f"{worst['gradient']:.1g}, Adam's step to {worst['step']:.1g}; routers free: {differ:.2%} "
        f"differ; bf16: log-probs to {off:.2g} on average",
        figures=worst | {"routers that differ": differ, "bf16 mean log-prob difference": off},
        faults=tuple(faults),
    )


def largest(difference: np.ndarray) -> float:
    return float(np.abs(difference.astype(np.float64)).max())
