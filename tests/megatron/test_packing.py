"""Packed micro-batches compute what padded ones do, from real tokens only.

Against padded micro-batches of 3 in one process, by whole_work.py's measurements: scores
and records, updates with routes to replay, gradient, metrics, one step. TOLERANCE as between
layouts. Not covered: attention on CUDA, Transformer Engine's among it; here every sequence is a
call of its own.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import passthrough
from moe_upgrpo.megatron.batch import Sample, make_batch
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.packing import check_attention, pack
from moe_upgrpo.megatron.tap import NO_ROUTE
from tests.megatron.measured import make_samples
from tests.megatron.test_token_budgets import BUDGET
from tests.megatron.whole_work import (
    FIELDS,
    assert_equals,
    assert_own_routes_change_no_bit,
    measure,
)
from tests.ranks import run_ranks

LAYOUTS = {
    "TP2·EP2": ("tiny", 2, Layout(tp=2, ep=2), {"micro_batch_tokens": BUDGET}),
    "PP2": ("mixed", 2, Layout(pp=2), {"micro_batch_size": 3}),
    "PP2·VPP2": ("mixed", 2, Layout(pp=2, vpp=2), {"micro_batch_tokens": BUDGET}),
    "EP2 allgather": ("tiny", 2, Layout(ep=2, dispatcher="allgather"), {"micro_batch_size": 3}),
    "TP2·EP2·DP2": (
        *("tiny", 4, Layout(tp=2, ep=2)),
        {"micro_batch_tokens": BUDGET, "recompute": "full"},
    ),
    "EP2·PP2": ("mixed", 4, Layout(ep=2, pp=2), {"micro_batch_tokens": BUDGET}),
    "deepseek TP2·EP2·PP2·VPP2": (
        *("deepseek", 4, Layout(tp=2, ep=2, pp=2, vpp=2)),
        {"micro_batch_tokens": BUDGET, "recompute": "full"},
    ),
}
MAIN = ("TP2·EP2",)  # processor time; the others are the same kind


@pytest.mark.bits
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("mixed", {"micro_batch_size": 3}),
        ("mixed", {"micro_batch_tokens": BUDGET, "recompute": "full"}),
        ("deepseek", {"micro_batch_tokens": BUDGET}),  # latent attention, YaRN
        *(
            pytest.param(name, {"micro_batch_tokens": BUDGET}, marks=pytest.mark.slow)
            for name in ("dense", "mixtral", "moonlight", "olmoe", "qwen2")
        ),
    ],
)
def test_one_process_computes_real_tokens_alone_and_the_same(
    checkpoint, options, checkpoints, fixed
):
    found = measure(Layout(), checkpoints[checkpoint], packing=True, **options)
    assert_equals([found], fixed(checkpoint))
    assert_own_routes_change_no_bit([found])
    real = sum(len(sample.tokens) for sample in make_samples())
    rows, lengths = zip(*found["shapes"], strict=True)
    assert set(rows) == {1} and sum(lengths) == real
    assert "recompute" in options or sorted(found["computed"]) == [*range(8)]
    if "micro_batch_tokens" in options:
        assert max(lengths) <= BUDGET
        for a, b in zip(found["again"], found["scored"]["native"], strict=True):
            assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def measure_packed(layout: Layout, checkpoint, options: dict) -> dict:
    return measure(layout, checkpoint, packing=True, **options)


@pytest.mark.bits
@pytest.mark.parametrize(
    "name", [n if n in MAIN else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_a_layout_equals_one_process(name, checkpoints, fixed):
    checkpoint, world_size, layout, options = LAYOUTS[name]
    ranks = run_ranks(
        world_size, measure_packed, layout, checkpoints[checkpoint], options, timeout_s=240
    )
    assert_equals(ranks, fixed(checkpoint))
    assert_own_routes_change_no_bit(ranks)
    for rank in ranks:
        shapes = rank["shapes"]
        assert {rows for rows, _ in shapes} == {1}
        assert all(length % layout.tp == 0 for _, length in shapes)
        if layout.vpp > 1 or layout.dispatcher == "allgather":
            assert {length for _, length in shapes} == {ranks[0]["shapes"][0][1]}


def a_sample(first: int, tokens: int, routes=None) -> Sample:
    return Sample(
        tokens=np.arange(first, first + tokens),
        prompt_length=1,
        advantage=1.0,
        routes=None if routes is None else np.full((tokens - 1, 1, 2), [routes, 0]),
    )


def test_packed_rows_by_hand():
    """Three sequences of 3, 2 and 4 tokens to a multiple of 4: three rows of padding."""
    batch = make_batch([a_sample(10, 3, routes=5), a_sample(20, 2), a_sample(30, 4, routes=7)])
    inputs = pack(batch, [3, 2, 4], multiple_of=4)
    assert inputs.tokens_BS.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 33, 0, 0, 0]]
    assert inputs.positions_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]]
    masked = inputs.targets_BS[inputs.mask_BS]
    assert masked.tolist() == [11, 12, 21, 31, 32, 33]
    first = inputs.routes_BSLK[0, :, 0, 0].tolist()
    assert first == [5, 5, NO_ROUTE, NO_ROUTE, NO_ROUTE, 7, 7, 7, *[NO_ROUTE] * 4]
    assert inputs.packed.cu_seqlens_q.tolist() == [0, 3, 5, 9, 12]
    assert inputs.packed.max_seqlen_q == 4 and inputs.packed.qkv_format == "thd"

    output_1Nx = torch.arange(24.0).view(1, 12, 2).requires_grad_()
    back_BSx = inputs.in_batch(output_1Nx)
    assert back_BSx[..., 0].tolist() == [[0, 2, 4, 0], [6, 8, 0, 0], [10, 12, 14, 16]]
    back_BSx.sum().backward()
    assert output_1Nx.grad[0, :, 1].tolist() == [1] * 9 + [0] * 3


def test_as_long_as_the_longest_of_other_ranks_and_without_a_sequence():
    exact = pack(make_batch([a_sample(10, 4)]), [4])
    assert exact.packed.cu_seqlens_q.tolist() == [0, 4] and exact.tokens_BS.shape == (1, 4)
    longer = pack(make_batch([a_sample(10, 4)]), [4], multiple_of=2, least=5)
    assert longer.packed.cu_seqlens_q.tolist() == [0, 4, 6]
    empty = pack(make_batch([]), [], multiple_of=2)
    assert empty.packed.cu_seqlens_q.tolist() == [0, 2] and not empty.mask_BS.any()
    assert empty.in_batch(torch.ones(1, 2, 1)).tolist() == [[[0.0]]]


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        ("float32", {}, "--dtype float32"),
        ("bfloat16", {"attention_backend": "unfused"}, "attention_backend unfused"),
        ("bfloat16", {"attention_backend": "local"}, "attention_backend local"),
        ("bfloat16", {"fp8_dot_product_attention": "true"}, "fp8_dot_product_attention true"),
    ],
)
def test_what_transformer_engine_cannot_pack_is_refused_and_said(dtype, options, words):
    given = passthrough.read(options, here=False).transformer, Layout()
    with pytest.raises(UserError, match=rf"--packing with .*{words}.* in bfloat16 alone, by its"):
        check_attention(*given, packing=True, dtype=dtype, transformer_engine=True)
    check_attention(*given, packing=True, dtype=dtype, transformer_engine=False)
    check_attention(*given, packing=False, dtype=dtype, transformer_engine=True)


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        ("float32", {}, "--dtype float32"),
        ("bfloat16", {"attention_backend": "unfused"}, "attention_backend unfused"),
    ],
)
def test_what_transformer_engine_cannot_divide_is_refused_and_said(dtype, options, words):
    given = passthrough.read(options, here=False).transformer, Layout(cp=2)
    with pytest.raises(UserError, match=rf"--cp 2 with .*{words}: .* parts of sequences in bfl"):
        check_attention(*given, packing=False, dtype=dtype, transformer_engine=True)
    check_attention(*given, packing=False, dtype=dtype, transformer_engine=False)


def test_what_transformer_engine_can_pack_and_divide_is_taken():
    given = {"attention_backend": SimpleNamespace(name="flash")}
    here = {"dtype": "bfloat16", "transformer_engine": True}
    check_attention(given, Layout(tp=2), packing=True, **here)
    check_attention({"fp8_dot_product_attention": True}, Layout(cp=2), packing=False, **here)
    with pytest.raises(UserError, match=r"--packing with --cp 2: .*--micro-batch-tokens"):
        check_attention(given, Layout(cp=2), packing=True, **here)
