# SPDX-License-Identifier: Apache-2.0
"""Count the experts that two rows share, in one Triton kernel that reads each id once.

For at most 16 experts per row of at most 1,024. `moe_upgrpo.routing.shared` has the plain form.

Shape suffixes: R rows, r rows of a program, k places of a row, filled up to a power of two.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHOSEN, MOST_EXPERTS = 16, 1024
_ROWS = 128


def count_shared(first_RK: Tensor, second_RK: Tensor, *, num_experts: int) -> tuple[Tensor, bool]:
    """|S ∩ S'| for each row, uint8 ``[R]``, and whether all rows are sets of K experts."""
    R, K = first_RK.shape
    shared_R = torch.empty(R, dtype=torch.uint8, device=first_RK.device)
    refused = torch.zeros(1, dtype=torch.int32, device=first_RK.device)
    _count[(triton.cdiv(R, _ROWS),)](
        first_RK.contiguous(),
        second_RK.contiguous(),
        shared_R,
        refused,
        R,
        num_experts,
        K=K,
        PLACES=triton.next_power_of_2(K),
        ROWS=_ROWS,
    )
    return shared_R, not int(refused)


@triton.jit
def _count(
    first,
    second,
    shared,
    refused,
    R,
    num_experts,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place_k = tl.arange(0, PLACES)
    at_rk = row_r[:, None] * K + place_k[None, :]
    is_id_rk = (row_r < R)[:, None] & (place_k < K)[None, :]
    first_rk = tl.load(first + at_rk, mask=is_id_rk, other=0).to(tl.int32)
    second_rk = tl.load(second + at_rk, mask=is_id_rk, other=0).to(tl.int32)
    outside_rk = (first_rk < 0) | (first_rk >= num_experts)
    outside_rk |= (second_rk < 0) | (second_rk >= num_experts)
    # The filling equals nothing in its own row and nothing in the other.
    first_rk = tl.where(is_id_rk, first_rk, -1 - place_k[None, :])
    second_rk = tl.where(is_id_rk, second_rk, -1 - PLACES - place_k[None, :])
    count_r = tl.sum(_equal(first_rk, second_rk), axis=1)
    own_r = tl.sum(_equal(first_rk, first_rk) + _equal(second_rk, second_rk), axis=1)
    bad_r = (own_r != 2 * PLACES) | (tl.sum(outside_rk.to(tl.int32), axis=1) > 0)
    tl.store(shared + row_r, count_r.to(tl.uint8), mask=row_r < R)
    tl.store(refused + 0 * row_r, 1, mask=bad_r & (row_r < R))


@triton.jit
def _equal(a_rk, b_rk):
    """For each place of a row, the number of places of the other with the same id, [r, k]."""
    return tl.sum((a_rk[:, :, None] == b_rk[:, None, :]).to(tl.int32), axis=2)
