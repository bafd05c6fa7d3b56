# SPDX-License-Identifier: Apache-2.0
"""Count the experts that two rows share, in the quickest way for the device that holds the rows.

Shape suffixes: R rows = (token, layer) pairs, K experts per row.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from moe_upgrpo.extras import is_there
from moe_upgrpo.routing.sets import are_ascending, ascending, not_in, repeated, unequal


def count_shared(first_RK: Tensor, second_RK: Tensor, *, num_experts: int) -> tuple[Tensor, bool]:
    """|S ∩ S'| for each row, uint8 ``[R]``, and whether all rows are sets of K experts.

    Where one is not (an id outside [0, num_experts), or twice), the counts mean nothing.
    """
    count = form(first_RK.device.type, top_k=first_RK.shape[1], num_experts=num_experts)
    return count(first_RK, second_RK, num_experts=num_experts)


def form(device: str, *, top_k: int, num_experts: int) -> Callable[..., tuple[Tensor, bool]]:
    """The quickest form for a type of device: on CUDA a Triton kernel where that is installed."""
    if device == "cpu":
        return _on_cpu
    if device == "cuda" and is_there("triton"):
        from moe_upgrpo.routing import shared_triton

        if top_k <= shared_triton.MOST_CHOSEN and num_experts <= shared_triton.MOST_EXPERTS:
            return shared_triton.count_shared
    return plain


def _on_cpu(first_RK: Tensor, second_RK: Tensor, *, num_experts: int) -> tuple[Tensor, bool]:
    """Compare sets in ascending order first: most rows are equal, and a CPU sees that at once."""
    K = first_RK.shape[1]
    first, second = (_ascending(ids_RK.numpy(), num_experts) for ids_RK in (first_RK, second_RK))
    if first is None or second is None:
        return torch.zeros(len(first_RK), dtype=torch.uint8), False
    rows = unequal(first, second).nonzero()[0]
    shared_R: ndarray = np.full(len(first), K, dtype=np.uint8)
    shared_R[rows] -= not_in(first[rows], second[rows]).sum(axis=1, dtype=np.uint8)
    return torch.from_numpy(shared_R), True


def _ascending(ids_RK: ndarray, num_experts: int) -> ndarray | None:
    """The rows as sets in ascending order, in the narrowest type; None where a row is not a set."""
    if ids_RK.min() < 0 or ids_RK.max() >= num_experts:
        return None
    ids_RK = ids_RK.astype(np.uint8 if num_experts <= 256 else np.int16, copy=False)
    if are_ascending(ids_RK):
        return ids_RK
    sets_RK = ascending(ids_RK)
    return None if repeated(sets_RK).any() else sets_RK


def plain(first_RK: Tensor, second_RK: Tensor, *, num_experts: int) -> tuple[Tensor, bool]:
    """Count equal slots among all K × K pairs, in whole-array operations on the narrowest type."""
    R, K = first_RK.shape
    shared_KR = torch.zeros(K, R, dtype=torch.uint8, device=first_RK.device)
    first_2KR, second_2KR = (_columns(ids_RK, num_experts) for ids_RK in (first_RK, second_RK))
    if first_2KR is None or second_2KR is None:
        return shared_KR[0], False
    for rotation in range(K):
        shared_KR += first_2KR[:K] == second_2KR[rotation : rotation + K]
    return shared_KR.sum(dim=0, dtype=torch.uint8), True


def _columns(ids_RK: Tensor, num_experts: int) -> Tensor | None:
    """The K columns twice, ``[2K, R]``; None where a row is not a set.

    Rows p and p + r then hold, for all p < K at once, slot p beside slot p + r (mod K), and K
    rotations pair every slot with every other.
    """
    # As Python integers: beside a uint8 tensor, a bound of 256 would itself wrap to 0.
    lowest, highest = (int(bound) for bound in torch.aminmax(ids_RK))
    if lowest < 0 or highest >= num_experts:
        return None
    narrow = torch.uint8 if num_experts <= 256 else torch.int16
    columns_2KR, K = ids_RK.t().to(narrow).repeat(2, 1), ids_RK.shape[1]
    for rotation in range(1, K // 2 + 1):  # later ones repeat the pairs of earlier ones
        if (columns_2KR[:K] == columns_2KR[rotation : rotation + K]).any():
            return None
    return columns_2KR
