"""Items that ranks hand each other arrive as they were sent, also where amounts differ."""

import numpy as np
import torch

from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from tests.ranks import run_ranks


def sent(rank: int) -> list:
    big = np.arange(1000 * rank, dtype=np.int16).reshape(-1, 10)
    return [rank, {"text": "é" * rank, "none": None}, big, big[:, ::2], torch.ones(rank)][
        : 4 + rank
    ]


def gather() -> None:
    with groups.process_groups(Layout()):
        _gather()
        _exchange()


def _gather() -> None:
    found = groups.gather_everywhere(sent(groups.rank()))
    expected = [item for each in range(3) for item in sent(each)]
    assert len(found) == 4 + 5 + 5
    same(found, expected)
    assert groups.gather_everywhere([]) == []
    found[2 + 4][:] = 7  # its own memory, which may be written


def _exchange() -> None:
    """Rank r has sent(r + to) for rank `to`, and nothing for rank 0."""
    mine = groups.rank()
    parts = [[] if to == 0 else sent(mine + to) for to in range(3)]
    found = groups.exchange_over_data_parallel(parts)
    assert len(found) == 3
    for origin, items in enumerate(found):
        same(items, [] if mine == 0 else sent(origin + mine))
    assert found[mine] is parts[mine]
    if mine == 1:
        found[2][2][:] = 7  # its own memory, which may be written


def same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, np.ndarray | torch.Tensor):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert bool((one == other).all())
        else:
            assert one == other


def test_items_of_three_ranks():
    run_ranks(3, gather)
