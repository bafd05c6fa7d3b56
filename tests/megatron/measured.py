"""Measurements to compare layouts by: one job for each layout measures all that is asked of it.

Random checkpoints: `tiny` (2 MoE layers), `mixed` (4 layers, the second one dense, gates not
renormalised), `dense` (4 layers without experts, embeddings tied), and one or two of each further
family, described in conftest.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_upgrpo.losses import LossTerms, PolicyLossConfig
from moe_upgrpo.megatron import groups, releases
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.megatron.tap import RECORDS

TEMPERATURE = 0.7
LOSSES = ("up-grpo", "up-gspo")
RECOMPUTE = ("none", "full")
LR = 0.1
SGD = OptimizerSettings(algorithm="sgd", lr=LR, warmup_steps=0, clip_grad=0)
NO_STEP = OptimizerSettings(algorithm="sgd", lr=0, warmup_steps=0, clip_grad=0)
# Adam with betas 0 steps by lr·g / (|g| + eps): with a huge eps that is SGD with lr / eps, to a
# relative |g| / eps. Megatron's DistributedOptimizer takes nothing but Adam.
EPS = 1e5
ADAM_AS_SGD = OptimizerSettings(
    lr=LR * EPS, beta1=0.0, beta2=0.0, eps=EPS, warmup_steps=0, clip_grad=0
)

LAYOUTS = {
    "TP2": ("tiny", 2, Layout(tp=2)),
    "EP2": ("tiny", 2, Layout(ep=2)),
    "TP2·EP2": ("tiny", 2, Layout(tp=2, ep=2)),
    "DP2": ("tiny", 2, Layout()),
    "TP2·EP2·DP2": ("tiny", 4, Layout(tp=2, ep=2)),
    "TP2·DP2": ("tiny", 4, Layout(tp=2)),
    "EP2·DP2": ("tiny", 4, Layout(ep=2)),
    "PP2": ("mixed", 2, Layout(pp=2)),
    "PP2·VPP2": ("mixed", 2, Layout(pp=2, vpp=2)),
    "TP2·PP2": ("mixed", 4, Layout(tp=2, pp=2)),
    "EP2·PP2": ("mixed", 4, Layout(ep=2, pp=2)),
    "TP2·EP2·PP2·VPP2": ("mixed", 4, Layout(tp=2, ep=2, pp=2, vpp=2)),
    "EP2 allgather": ("tiny", 2, Layout(ep=2, dispatcher="allgather")),
    "TP2·EP2 allgather": ("tiny", 2, Layout(tp=2, ep=2, dispatcher="allgather")),
    "TP2·EP2·ETP2 allgather": ("tiny", 4, Layout(tp=2, ep=2, etp=2, dispatcher="allgather")),
    "mixtral TP2·EP2": ("mixtral", 2, Layout(tp=2, ep=2)),
    "qwen2 TP2·EP2": ("qwen2", 2, Layout(tp=2, ep=2)),
    "olmoe TP2·EP2": ("olmoe", 2, Layout(tp=2, ep=2)),
    "deepseek EP2 allgather": ("deepseek", 2, Layout(ep=2, dispatcher="allgather")),
    "deepseek TP2·EP2·PP2·VPP2": ("deepseek", 4, Layout(tp=2, ep=2, pp=2, vpp=2)),
    "moonlight TP2·EP2": ("moonlight", 2, Layout(tp=2, ep=2)),
    "dense TP2": ("dense", 2, Layout(tp=2)),
    "dense PP2": ("dense", 2, Layout(pp=2)),
    "dense PP2·VPP2": ("dense", 2, Layout(pp=2, vpp=2)),
}
if releases.reduces_expert_gradients():  # else refused; tests/patches shows why
    LAYOUTS["TP2·ETP1"] = ("tiny", 2, Layout(tp=2, etp=1))
# On 4 processes or of one more family, and parts of layouts that are measured anyway.
SLOW = ("TP2·DP2", "EP2·DP2", "TP2·PP2", "EP2·PP2", "qwen2 TP2·EP2")


def as_parameters(names) -> list:
    """Parameters of a test, those of `SLOW` left to `make test-slow`."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


def make_samples() -> list[Sample]:
    """Sequences of mixed lengths with ratios and advantages that put every branch to work."""
    rng = np.random.default_rng(3)
    samples = []
    for i in range(8):
        prompt, response = int(rng.integers(2, 7)), int(rng.integers(1, 9))
        samples.append(
            Sample(
                tokens=rng.integers(2, 64, size=prompt + response),
                prompt_length=prompt,
                old_log_probs=rng.normal(-5, 2, size=response).astype(np.float32),
                rollout_log_probs=rng.normal(-5, 2, size=response).astype(np.float32),
                advantage=float(rng.normal()) if i != 5 else 0.0,
            )
        )
    return samples


def gradients_by_name(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """Gradients that the last update left in its buffers, under Hugging Face names.

    Without the routers' selection bias, which is no parameter and has none.
    """
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradients = {
        name: tensor.clone()
        for name, tensor in actor.export_weights()
        if not name.endswith("e_score_correction_bias")
    }
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gradients


def with_routes(samples, scored, change):
    return [
        replace(sample, routes=change(one.routes))
        for sample, one in zip(samples, scored, strict=True)
    ]


def with_reference(samples, scored):
    """A reference whose log-probs lie to either side of the policy's."""
    return [
        replace(s, reference_log_probs=one.log_probs + np.float32(0.5) * np.cos(one.log_probs))
        for s, one in zip(samples, scored, strict=True)
    ]


def uneven(native: list, planted: list, dp_rank: int) -> list:
    """One sequence on even ranks, two on odd ones, the last of them with routes to replay."""
    odd = dp_rank % 2
    return [*native[:odd], *planted[odd : odd + 1]]


def measure(layout: Layout, checkpoint, dtype: str = "float32") -> dict:
    """This rank's scores, updates and gradients, weights after a step; native and replayed."""
    with groups.process_groups(layout):
        dp_rank, dp_size = groups.data_parallel()
        share = len(make_samples()) // dp_size
        mine = make_samples()[dp_rank * share : (dp_rank + 1) * share]

        def actor(optimizer=None, recompute="none"):
            return MegatronActor(
                checkpoint,
                layout,
                dtype=dtype,
                temperature=TEMPERATURE,
                micro_batch_size=3,
                optimizer=optimizer,
                recompute=recompute,
            )

        def after_step(optimizer):
            trained = actor(optimizer)
            trained.update(mine, PolicyLossConfig.preset("up-grpo"))
            return {name: tensor.clone() for name, tensor in trained.export_weights()}

        frozen = actor()
        native = frozen.score(mine, record=RECORDS)
        batches = {"native": mine}
        if frozen.layer_ids and dtype == "float32":
            # The model's own routes, the ids of each row in another order, and every other expert
            # instead, as an engine might have chosen.
            batches["own"] = with_routes(mine, native, lambda routes: routes[:, :, ::-1])
            batches["planted"] = with_routes(mine, native, lambda r: (r + 3) % frozen.num_experts)
        result = {
            "dp_rank": dp_rank,
            "about": (frozen.layer_ids, frozen.top_k, frozen.num_experts, frozen.parameter_count()),
            "scored": {
                kind: native if kind == "native" else frozen.score(batch, record=RECORDS)
                for kind, batch in batches.items()
            },
            "one by one": frozen.score(mine, record=RECORDS, micro_batch_size=1),
            "uneven": frozen.score(
                uneven(mine, batches.get("planted", mine), dp_rank),
                record=RECORDS,
                micro_batch_size=1,
            ),
            "weights": {name: tensor.clone() for name, tensor in frozen.export_weights()},
            "update": {},
            "gradient": {},
        }
        for recompute in RECOMPUTE if dtype == "float32" else ("none",):
            trained = actor(NO_STEP, recompute)
            for kind, batch in batches.items():
                for loss in LOSSES if (kind, recompute) == ("native", "none") else LOSSES[:1]:
                    key = (kind, recompute, loss)
                    result["update"][key] = trained.update(
                        batch, PolicyLossConfig.preset(loss), record=RECORDS
                    )
                    result["gradient"][key] = gradients_by_name(trained)
        if dtype == "float32":
            trained = actor(NO_STEP)
            update = trained.update(
                with_reference(mine, native),
                PolicyLossConfig.preset("up-grpo"),
                terms=LossTerms(kl_coef=0.3, kl_estimator="k2", entropy_coef=0.2),
            )
            result["terms"] = (update, gradients_by_name(trained))
        result["sgd"] = after_step(SGD)
        result["distributed"] = after_step(ADAM_AS_SGD)
        return result
