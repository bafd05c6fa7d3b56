"""Megatron-Core's own options that promise the same step, held to the step without them.

Three updates of several micro-batches each, with a clipped Adam, weights read in between as an
engine, a score and another actor do; and a state that is written with an option and read without.

Not covered: CUDA's streams, on which overlap is of use; NCCL; Transformer Engine.
"""

import pytest
import torch

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.checkpoint import load_state, save_state
from moe_upgrpo.megatron.experts import GroupedExperts
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.megatron.compare import assert_close
from tests.megatron.measured import make_samples
from tests.ranks import run_ranks

LOSS = PolicyLossConfig.preset("up-grpo")
SETTINGS = OptimizerSettings(lr=1e-2, warmup_steps=2, clip_grad=0.5, weight_decay=0.1)
# Of a tensor's largest entry. Adam divides by small moments, so what is summed in another order
# moves some entries by more than their rounding; a step moves them by 1e-2.
STEPS = 1e-4
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
        fewer = mine[: len(mine) // 2]  # and fewer micro-batches
        norms.append(actor.update(fewer, LOSS).grad_norm)
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
            assert_close(rank[name], expected[name], STEPS)
        for one, other in zip(rank["log_probs"], expected["log_probs"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        assert rank["grouped"]
        if "bucket_size" in OPTIONS[option] and sizes.pp == 1:  # one bucket on later stages
            assert rank["buckets"] > expected["buckets"]  # there is something to overlap
        if "optimizer_cpu_offload" in OPTIONS[option]:
            assert rank["optimizers"] == {"HybridDeviceOptimizer"}


def job(checkpoint, dtype: str, options: dict, source, target) -> dict:
    """Two updates, or what `source` holds; written to `target`; and what one update more gives."""
    layout = Layout()
    with groups.process_groups(layout):
        given = dict(dtype=dtype, micro_batch_size=1, optimizer=SETTINGS, megatron=options)
        actor = MegatronActor(checkpoint, layout, **given)
        rank, size = groups.data_parallel()
        mine = make_samples()[rank::size]
        if source is None:
            for _ in range(2):
                actor.update(mine, LOSS)
        else:
            load_state(source, actor)
        target.mkdir(exist_ok=True)
        save_state(target, actor)
        before = weights(actor)
        norm = actor.update(mine, LOSS).grad_norm
        return {"norm": norm, "before": before, "after": weights(actor)}


def assert_near(found: dict, expected: dict, dtype: str) -> None:
    """To rounding: fp32 to 1e-5 of each tensor's largest entry, bf16 to one unit of its own."""
    if dtype == "float32":
        assert_close(found, expected)
        return
    assert found.keys() == expected.keys() and len(expected) > 40
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("dtype", "writer", "reader"),
    [
        ("float32", "none", "offload"),
        ("float32", "half offloaded", "none"),
        ("float32", "weights too", "none"),
        ("bfloat16", "gradients", "none"),
        ("bfloat16", "none", "half offloaded"),
        ("bfloat16", "offload", "none"),
    ],
)
def test_a_state_goes_from_one_option_to_another_and_back(
    dtype, writer, reader, checkpoints, tmp_path
):
    tiny = checkpoints["tiny"]
    wrote = run_ranks(2, job, tiny, dtype, OPTIONS[writer], None, tmp_path / "first")
    read = run_ranks(2, job, tiny, dtype, OPTIONS[reader], tmp_path / "first", tmp_path / "second")
    again = run_ranks(2, job, tiny, dtype, OPTIONS[writer], tmp_path / "second", tmp_path / "third")
    for one, found, back in zip(wrote, read, again, strict=True):
        for name, tensor in one["before"].items():
            assert torch.equal(found["before"][name], tensor), name
            assert torch.equal(back["before"][name], tensor), name
            assert torch.equal(back["after"][name], one["after"][name]), name
        assert back["norm"] == one["norm"] == pytest.approx(found["norm"], rel=1e-5)
        assert_near(found["after"], one["after"], dtype)
        moved = (one["after"]["lm_head.weight"] - one["before"]["lm_head.weight"]).abs().max()
        assert moved > 1e-3


def one_rank(checkpoint, options: dict, dtype: str) -> tuple[list[float], dict]:
    with groups.process_groups(Layout()):
        given = dict(dtype=dtype, micro_batch_size=4, optimizer=SETTINGS, megatron=options)
        actor = MegatronActor(checkpoint, Layout(), **given)
        norms = [actor.update(make_samples(), LOSS).grad_norm for _ in range(2)]
        return norms, weights(actor)


@pytest.fixture(scope="module")
def alone(checkpoints):
    return {
        (name, dtype): one_rank(checkpoints[name], {}, dtype)
        for name, dtype in (("tiny", "float32"), ("tiny", "bfloat16"), ("deepseek", "float32"))
    }


@pytest.mark.parametrize(
    ("checkpoint", "option", "value"),
    [
        ("tiny", "bias_activation_fusion", "true"),
        ("tiny", "bias_dropout_fusion", "true"),
        ("tiny", "clone_scatter_output_in_embedding", "false"),
        ("tiny", "pad_buckets_for_high_nccl_busbw", "true"),
        ("tiny", "gradient_accumulation_fusion", "false"),
        ("tiny", "use_torch_optimizer_for_cpu_offload", "true"),
        ("deepseek", "moe_shared_expert_overlap", "true"),
    ],
)
def test_what_changes_no_number_changes_none(checkpoint, option, value, alone, checkpoints):
    options = {option: value} | (OFFLOAD if "offload" in option else {})
    norms, after = one_rank(checkpoints[checkpoint], options, "float32")
    expected_norms, expected = alone[checkpoint, "float32"]
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_close(after, expected, STEPS)


@pytest.mark.parametrize(
    ("option", "value", "dtype"),
    [
        ("grad_reduce_in_fp32", "false", "bfloat16"),
        ("reduce_scatter_with_fp32_accumulation", "true", "float32"),
        ("decoupled_weight_decay", "false", "float32"),
        ("apply_wd_to_qk_layernorm", "true", "float32"),
    ],
)
def test_what_changes_numbers_changes_them_a_little(option, value, dtype, alone, checkpoints):
    norms, after = one_rank(checkpoints["tiny"], {option: value}, dtype)
    expected_norms, expected = alone["tiny", dtype]
    # The first is that of the same weights.
    assert norms[0] == pytest.approx(expected_norms[0], rel=0.05)
    same = all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert same == (option == "reduce_scatter_with_fp32_accumulation")  # of one rank
