"""Engine and trainer on this device: the log-prob gap split into terms, and routes by layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.gpu import models
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.parity import LOSS
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.record import gap_terms
from moe_upgrpo.rollout.base import Rollout, SamplingConfig
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.routing import ComparisonKind
from moe_upgrpo.train.analysis import compare_responses, trainer_noise_floor


def sampled(job, folder, **engine) -> tuple[list[Rollout], list[Sample]]:
    """Responses of the hf engine in bf16, and the same as samples."""
    made = HFEngine(folder, "bfloat16", **engine)
    prompts = [sample.tokens[: sample.prompt_length] for sample in models.samples(job.sizes)]
    rollouts = made.generate(
        prompts, SamplingConfig(max_new_tokens=job.sizes.response), samples_per_prompt=1, seed=0
    )
    made.close()
    return rollouts, [
        Sample(
            tokens=np.concatenate([rollout.prompt_ids, rollout.response_ids]),
            prompt_length=len(rollout.prompt_ids),
            rollout_log_probs=rollout.logp_rollout,
            advantage=1.0 if i % 2 else -1.0,
        )
        for i, rollout in enumerate(rollouts)
    ]


def decomposition(job) -> Outcome:
    """The four terms after one step; they add up to the gap."""
    folder = models.checkpoint(models.config(job.sizes.model), job.scratch / "model")
    with groups.process_groups(Layout()):
        rollouts, given = sampled(job, folder)
        actor = MegatronActor(
            folder,
            Layout(),
            dtype="bfloat16",
            optimizer=OptimizerSettings(lr=1e-3, warmup_steps=0),
        )
        native = actor.score(given)
        routes = [rollout.routes.astype(np.int16) for rollout in rollouts]
        held = actor.score([replace(s, routes=r) for s, r in zip(given, routes, strict=True)])
        actor.update(given, LOSS)
        on_old = [replace(s, routes=n.routes) for s, n in zip(given, native, strict=True)]
        counterpart = actor.score(on_old, record=())
        train = actor.update(given, LOSS).log_probs
    rollout = np.concatenate([one.logp_rollout for one in rollouts])
    current = np.concatenate(train)
    terms = gap_terms(
        "none",
        rollout=rollout,
        native=np.concatenate([one.log_probs for one in native]),
        held=np.concatenate([one.log_probs for one in held]),
        counterpart=np.concatenate([one.log_probs for one in counterpart]),
        train=current,
    )
    gap = current.astype(np.float64) - rollout
    left = float(np.abs(sum(terms.values()) - gap).max())
    sizes = {name: float(np.abs(term).mean()) for name, term in terms.items()}
    faults = [f"{name} is 0 for every token" for name, size in sizes.items() if not size > 0]
    if not left < 1e-9:
        faults.append(f"the terms miss the gap by {left:.2g}")
    if not sizes["gap_numerics"] < 0.5:
        faults.append("on the same experts, trainer and engine are far apart")
    parts = ", ".join(f"{name.removeprefix('gap_')} {size:.2g}" for name, size in sizes.items())
    return Outcome(
        line=f"mean |gap| {np.abs(gap).mean():.2g} nats: {parts}",
        figures={"mean |gap|": float(np.abs(gap).mean()), "terms": sizes, "left over": left},
        # With bf16 and tiny sizes no router may shift: the arithmetic is not at fault.
        faults=tuple(f for f in faults if job.on_card or "is 0 for" not in f),
    )


def by_layer(job) -> Outcome:
    """Routers whose experts differ between engine and trainer, for bf16 and FP8 weights, and how
    much the trainer differs from itself."""
    folder = models.checkpoint(models.config(job.sizes.model), job.scratch / "model")
    figures = {}
    with groups.process_groups(Layout()):
        actor = MegatronActor(folder, Layout(), dtype="bfloat16")
        for weights in ("as-trained", "fp8"):
            rollouts, given = sampled(job, folder, weights=weights)
            scored = actor.score(given)
            found = compare_responses(
                [rollout.routes for rollout in rollouts],
                [one.routes for one in scored],
                given,
                num_experts=actor.num_experts,
                kind=ComparisonKind.FREE_RUNNING,
            )
            gap = np.concatenate([one.log_probs for one in scored]) - np.concatenate(
                [rollout.logp_rollout for rollout in rollouts]
            )
            figures[weights] = {
                "routers": found.router_mismatch_rate,
                "routers by layer": [round(x, 5) for x in found.router_mismatch_by_layer.tolist()],
                "mean |log-prob gap|": float(np.abs(gap).mean()),
                "tokens": found.tokens_compared,
            }
        floor = trainer_noise_floor(actor, given).sums
    noise = {
        name: metric.numerator / metric.denominator
        for name, metric in floor.items()
        if metric.denominator
    }
    bf16, fp8 = figures["as-trained"], figures["fp8"]
    faults = []
    if not bf16["mean |log-prob gap|"] < 0.5:
        faults.append("bf16 engine and trainer are far apart")
    if not fp8["mean |log-prob gap|"] > bf16["mean |log-prob gap|"]:
        faults.append("weights rounded to FP8 are as near as those that were not")

    def layers(found) -> str:
        return ", ".join(f"{x:.2%}" for x in found["routers by layer"])

    return Outcome(
        line=f"routers with other experts, bf16: {bf16['routers']:.2%} (by layer {layers(bf16)}), "
        f"FP8: {fp8['routers']:.2%} ({layers(fp8)})",
        figures=figures | {"trainer against itself": noise},
        faults=tuple(faults),
    )
