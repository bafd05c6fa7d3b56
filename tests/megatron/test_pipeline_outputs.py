"""A pipeline stage frees the outputs that it has sent; what is computed: test_layouts.py.

Not covered: NCCL.
"""

from unittest import mock

import pytest
from megatron.core.pipeline_parallel import schedules

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from tests.megatron.measured import NO_STEP, make_samples
from tests.ranks import run_ranks

MICRO_BATCHES = 3


def freed(folder, layout: Layout) -> list[tuple[int, int]]:
    """On this rank: elements of each output before and after Megatron frees it, or would."""
    left = []
    free = schedules.deallocate_output_tensor

    def watched(output, wanted=False):
        if isinstance(output, list):  # newer releases: it comes back here for each of them
            free(output, wanted)
        elif output is not None:
            before = output.numel()
            free(output, wanted)
            left.append((before, output.numel()))

    with (
        groups.process_groups(layout),
        mock.patch.object(schedules, "deallocate_output_tensor", watched),
    ):
        actor = MegatronActor(folder, layout, optimizer=NO_STEP, micro_batch_size=3)
        update = actor.update(make_samples(), PolicyLossConfig.preset("up-grpo"))
        assert update.grad_norm > 0
    return left


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=2, vpp=2)], ids=str)
def test_outputs_are_freed_where_they_are_sent_by_then(layout, checkpoints):
    """Not between interleaved stages, whose messages overlap with what follows."""
    first, last = run_ranks(2, freed, checkpoints["mixed"], layout)
    assert len(first) >= MICRO_BATCHES
    hidden = [before for before, _ in first]
    assert min(hidden) > 32  # [S, B, 32]
    after = [after for _, after in first]
    assert after == ([1] * MICRO_BATCHES if layout.vpp == 1 else hidden)
    if layout.vpp == 1:
        assert last == [(1, 1)] * MICRO_BATCHES  # the losses
