"""The ways to count shared experts, against Python's sets.

The Triton kernel runs in Triton's interpreter where there is no GPU.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from moe_upgrpo.routing import shared

RUNS_HERE = find_spec("triton") and (torch.cuda.is_available() or os.getenv("TRITON_INTERPRET"))
if RUNS_HERE:
    from moe_upgrpo.routing import shared_triton
    from moe_upgrpo.routing.shared_triton import count_shared as kernel
else:
    kernel = None
needs_triton = pytest.mark.skipif(
    not RUNS_HERE, reason="needs CUDA, or Triton's interpreter: make test-triton"
)

FORMS = [
    pytest.param(shared.count_shared, id="by the device"),
    pytest.param(shared.plain, id="plain"),
    pytest.param(kernel, id="triton", marks=needs_triton),
]


def device(form) -> str:
    return "cuda" if torch.cuda.is_available() and form is not shared.count_shared else "cpu"


def rows(top_k: int, experts: int, dtype: torch.dtype, count: int = 301):
    """Both sides: every other row is the same set in another order, the rest any two sets."""
    rng = np.random.default_rng(top_k)
    first = np.stack([rng.permutation(experts)[:top_k] for _ in range(count)])
    second = np.stack([rng.permutation(experts)[:top_k] for _ in range(count)])
    second[::2] = first[::2, ::-1]
    return torch.from_numpy(first).to(dtype), torch.from_numpy(second).to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("top_k", "experts", "dtype"),
    [
        (1, 4, torch.uint8),
        (2, 8, torch.int64),
        (6, 64, torch.int32),
        (8, 128, torch.uint8),
        (8, 256, torch.uint8),
        (10, 512, torch.int16),
        (16, 1024, torch.int16),
    ],
)
def test_counts_are_those_of_sets(form, top_k, experts, dtype):
    first, second = rows(top_k, experts, dtype)
    expected = [len({*a} & {*b}) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert expected[0] == top_k and (top_k == 1 or len({*expected}) > 1)
    found, all_sets = form(first.to(device(form)), second.to(device(form)), num_experts=experts)
    assert all_sets and found.dtype == torch.uint8
    assert found.tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [[3, 3, 1], [0, 1, 12], [0, -1, 2], [0, 0, 0]])
def test_a_row_that_is_no_set_is_seen_on_either_side(form, side, bad):
    sides = rows(3, 12, torch.int16, 200)
    sides[side][170] = torch.tensor(bad)
    found = form(*(ids.to(device(form)) for ids in sides), num_experts=12)
    assert not found[1]
    sides[side][170] = torch.tensor([3, 2, 1])
    assert form(*(ids.to(device(form)) for ids in sides), num_experts=12)[1]


@needs_triton
def test_the_kernel_is_taken_where_it_can_be():
    """On CUDA, within its sizes."""
    assert shared_triton.MOST_CHOSEN == 16
    assert shared.form("cuda", top_k=16, num_experts=1024) is kernel
    assert shared.form("cuda", top_k=17, num_experts=1024) is shared.plain
    assert shared.form("cuda", top_k=8, num_experts=1025) is shared.plain
    assert shared.form("cpu", top_k=8, num_experts=128) not in (kernel, shared.plain)
