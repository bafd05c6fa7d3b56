# SPDX-License-Identifier: Apache-2.0
"""Sequences split over the context-parallel ranks, and their parts put together again.

C ranks; a sequence of S positions is cut into 2C chunks of S / 2C. Rank r has chunks r and
2C − 1 − r, so that each has as many pairs of positions to attend to, as in Megatron-Core's rotary
embedding (rope_utils.py:49) and in Transformer Engine's attention.
"""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


def size() -> int:
    """C, the number of context-parallel ranks."""
    return parallel_state.get_context_parallel_world_size()


def rank() -> int:
    """r, this rank's index among them."""
    return parallel_state.get_context_parallel_rank()


def chunks() -> tuple[int, int]:
    """The numbers of this rank's two chunks."""
    return rank(), 2 * size() - 1 - rank()


def mine(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part of a tensor that has all S positions along `dim`."""
    parts = tensor.chunk(2 * size(), dim)
    return torch.cat([parts[chunk] for chunk in chunks()], dim)


def places(length: int) -> torch.Tensor:
    """[S]: the place of each position where the parts of all ranks follow one another."""
    C = size()
    chunk_S = torch.arange(length) // (length // (2 * C))
    first_S = chunk_S < C
    part_S = torch.where(first_S, 2 * chunk_S, 2 * (2 * C - 1 - chunk_S) + 1)
    return part_S * (length // (2 * C)) + torch.arange(length) % (length // (2 * C))


def in_order(array_BS: np.ndarray) -> np.ndarray:
    """Put the parts of all ranks, one after the other along S, into the order of positions."""
    return np.take(array_BS, places(array_BS.shape[1]).numpy(), axis=1)  # an index: in F order


def whole(part: torch.Tensor, *, sums_gradient: bool) -> torch.Tensor:
    """Join the ranks' parts to all S positions along the first dimension. A collective.

    With `sums_gradient` the gradient of a part is the sum over all ranks' uses of the whole; else
    this rank's alone, for a whole that all ranks use in the same way.
    """
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(
        part.contiguous(), tensor_parallel_output_grad=sums_gradient, group=group
    )
    return gathered[places(len(gathered)).to(part.device)]
