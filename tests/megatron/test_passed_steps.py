"""Megatron-Core's own options that promise the same step, held to the step without them.

Three updates of several micro-batches each, with a clipped Adam, weights read in between as an
engine, a score and another actor do; and a state that is written with an option and read without.

Not covered: CUDA's streams, on which overlap is of use; NCCL; Transformer Engine.
"""

import pytest

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.experts import GroupedExperts
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.megatron.compare import assert_close
from tests.megatron.measured import make_samples
from tests.ranks import run_ranks

LOSS = PolicyLossConfig.preset("up-grpo")
SETTINGS = OptimizerSettings(lr=1e-2, warmup_steps=2, clip_grad=0.5, weight_decay=0.1)
LAYOUTS = {
    "TP2·EP2": ("tiny", Layout(tp=2, ep=2)),
    "DP2": ("tiny", Layout()),
    "PP2·VPP2": ("mixed", Layout(pp=2, vpp=2)),
}
OFFLOAD = {"optimizer_cpu_offload": "true"}
OPTIONS = {
    "none": {},
    "gradients": {"overlap_grad_reduce": "true", "bucket_size": "4000"},
    "weights too": {
        "overlap_grad_reduce": "true",
        "overlap_param_gather": "true",
        "bucket_size": "4000",
    },
    "offload": OFFLOAD,
    "half offloaded": OFFLOAD
    | {"optimizer_offload_fraction": "0.5", "overlap_cpu_optimizer_d2h_h2d": "true"},
}


def weights(actor: MegatronActor) -> dict:
    return {name: tensor.clone() for name, tensor in actor.export_weights()}


def steps(layout: Layout, checkpoint, options: dict, dtype: str = "float32") -> dict:
    """Norms of three updates, and the weights as they are read in several ways."""
    with groups.process_groups(layout):
        given = dict(dtype=dtype, micro_batch_size=1)
        actor = MegatronActor(checkpoint, layout, optimizer=SETTINGS, megatron=options, **given)
        behind = MegatronActor(checkpoint, layout, **given)
        rank, size = groups.data_parallel()
        samples = make_samples()
        mine = samples[rank * len(samples) // size : (rank + 1) * len(samples) // size]
        norms = [actor.update(mine, LOSS).grad_norm for _ in range(2)]
        behind.take_weights(actor)
        norms.append(actor.update(mine, LOSS).grad_norm)
        scored = actor.score(mine)
        modules = [module for chunk in actor.chunks for module in chunk.modules()]
        return {
            "dp_rank": rank,
            "norms": norms,
            "log_probs": [one.log_probs for one in scored],
            "taken": weights(behind),
            "weights": weights(actor),
            "buckets": sum(
                len(chunk.bucket_groups + chunk.expert_parallel_bucket_groups)
                for chunk in actor.chunks
            ),
            "grouped": sum(isinstance(module, GroupedExperts) for module in modules),
            "optimizers": {
                type(part.optimizer).__name__ for part in actor.optimizer.chained_optimizers
            },
        }


@pytest.fixture(scope="module")
def plain(checkpoints):
    """Layout -> what its ranks give without options."""
    done = {}

    def of(name: str) -> list[dict]:
        if name not in done:
            checkpoint, layout = LAYOUTS[name]
            done[name] = run_ranks(2, steps, layout, checkpoints[checkpoint], {})
        return done[name]

    return of


CASES = [
    *((layout, option) for layout in ("TP2·EP2", "DP2") for option in list(OPTIONS)[1:]),
    ("PP2·VPP2", "weights too"),
]


@pytest.mark.parametrize(("layout", "option"), CASES, ids=[", ".join(case) for case in CASES])
def test_the_steps_are_those_without_the_option(layout, option, plain, checkpoints):
    checkpoint, sizes = LAYOUTS[layout]
    ranks = run_ranks(2, steps, sizes, checkpoints[checkpoint], OPTIONS[option])
    for rank, expected in zip(ranks, plain(layout), strict=True):
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert len(set(rank["norms"])) == 3
        for name in ("taken", "weights"):
            assert_close(rank[name], expected[name])
        for one, other in zip(rank["log_probs"], expected["log_probs"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        assert rank["grouped"]
        if "bucket_size" in OPTIONS[option]:
            assert rank["buckets"] > expected["buckets"]  # there is something to overlap
        if "optimizer_cpu_offload" in OPTIONS[option]:
            assert rank["optimizers"] == {"HybridDeviceOptimizer"}
