"""Sequences in parts on the context-parallel ranks compute what one process does.

By whole_work.py's measurements: scores and records, updates with routes to replay,
gradient, metrics, one step; TOLERANCE as between layouts. A replay of a layout's own routes changes
no bit. Not covered: Transformer Engine's attention, CUDA, more than two parts.
"""

from unittest import mock

import numpy as np
import pytest
import torch

from moe_upgrpo.megatron import context
from moe_upgrpo.megatron.layout import Layout
from tests.megatron.whole_work import (
    assert_equals,
    assert_own_routes_change_no_bit,
    measure,
)
from tests.ranks import run_ranks

BUDGET = 32  # the longest has 13 tokens, 16 in four chunks
LAYOUTS = {
    "CP2·EP2": ("tiny", 2, Layout(cp=2, ep=2), {"micro_batch_tokens": BUDGET}),
    "CP2": ("mixed", 2, Layout(cp=2), {"micro_batch_size": 3, "recompute": "full"}),
    "dense CP2": ("dense", 2, Layout(cp=2), {"micro_batch_size": 3}),
    "CP2·DP2": ("tiny", 4, Layout(cp=2), {"micro_batch_tokens": BUDGET}),
    "CP2·TP2": ("mixed", 4, Layout(cp=2, tp=2), {"micro_batch_size": 3}),
    "CP2·TP2·EP2": ("olmoe", 4, Layout(cp=2, tp=2, ep=2), {"micro_batch_tokens": BUDGET}),
    "CP2·EP2 allgather": (
        *("tiny", 2, Layout(cp=2, ep=2, dispatcher="allgather")),
        {"micro_batch_size": 3},
    ),
    "CP2·PP2": ("mixed", 4, Layout(cp=2, pp=2), {"micro_batch_tokens": BUDGET}),
    "CP2·PP2·VPP2": ("mixed", 4, Layout(cp=2, pp=2, vpp=2), {"micro_batch_size": 3}),
    "deepseek CP2·EP2": (
        *("deepseek", 2, Layout(cp=2, ep=2)),
        {"micro_batch_tokens": BUDGET, "recompute": "full"},
    ),
    "qwen2 CP4": ("qwen2", 4, Layout(cp=4), {"micro_batch_size": 3}),
}
MAIN = ("CP2·EP2",)  # processor time; the others are the same kind


def measure_layout(layout: Layout, checkpoint, options: dict) -> dict:
    return measure(layout, checkpoint, **options)


@pytest.mark.bits
@pytest.mark.parametrize(
    "name", [n if n in MAIN else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_a_layout_equals_one_process(name, checkpoints, fixed):
    checkpoint, world_size, layout, options = LAYOUTS[name]
    ranks = run_ranks(
        world_size, measure_layout, layout, checkpoints[checkpoint], options, timeout_s=240
    )
    assert_equals(ranks, fixed(checkpoint))
    assert_own_routes_change_no_bit(ranks)
    for rank in ranks:
        # Half of them, in two chunks, each divided again by sequence parallelism.
        assert all(length % (2 * layout.tp) == 0 for _, length in rank["shapes"])
        assert max(length for _, length in rank["shapes"]) <= 16 // layout.cp


def of(rank: int, size: int):
    return mock.patch.multiple(context, rank=lambda: rank, size=lambda: size)


@pytest.mark.parametrize(("size", "length"), [(1, 6), (2, 8), (4, 24)])
def test_the_parts_of_all_ranks_are_the_whole(size, length):
    positions_BS = torch.arange(2 * length).view(2, length)
    parts = []
    for rank in range(size):
        with of(rank, size):
            parts.append(context.mine(positions_BS, 1))
            places = context.places(length)
    assert {part.shape for part in parts} == {(2, length // size)}
    assert torch.equal(torch.cat(parts, 1)[:, places], positions_BS)


def test_parts_by_hand():
    """Eight positions on two ranks: the first and the last quarter, and those between."""
    tokens_S = torch.arange(10, 18)
    with of(0, 2):
        assert context.chunks() == (0, 3)
        assert context.mine(tokens_S, 0).tolist() == [10, 11, 16, 17]
    with of(1, 2):
        assert context.chunks() == (1, 2)
        assert context.mine(tokens_S, 0).tolist() == [12, 13, 14, 15]
        assert context.places(8).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
        parts_BSL = np.array([[10, 11, 16, 17, 12, 13, 14, 15]] * 2)[..., None]
        ordered_BSL = context.in_order(parts_BSL)
        assert ordered_BSL[1, :, 0].tolist() == [*range(10, 18)]
        # As it lies in memory: what is compared and sent of it is then not copied first.
        assert ordered_BSL.flags.c_contiguous
