# SPDX-License-Identifier: Apache-2.0
"""A digest of weights, so that both sides of a hand-over can say that they have the same.

It tells lost, stale, swapped and damaged tensors; it is no protection from malice. It is computed
where the tensors are, and does not depend on the order in which they come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch

_AT_ONCE = 1 << 18  # numbers of a tensor
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_sum(tensor: torch.Tensor) -> int:
    """Σ (2i + 1)·w_i mod 2^64; w_i: the bits of a tensor's number i = 0, 1, ... as an integer."""
    words_N = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words_N), _AT_ONCE):
        part = words_N[start : start + _AT_ONCE].long()
        places = torch.arange(start, start + len(part), device=part.device)
        total += (part * (2 * places + 1)).sum()
    return int(total) % 2**64


class Digest:
    """The digest of the tensors that were added: of their names, types, shapes and numbers."""

    def __init__(self):
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        self._lines[name] = f"{about} {tensor_sum(tensor):016x}\n"

    def through(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the tensors on, and add them."""
        for name, tensor in named_tensors:
            self.add(name, tensor)
            yield name, tensor

    def value(self) -> str:
        """64 hexadecimal digits."""
        lines = "".join(self._lines[name] for name in sorted(self._lines))
        return hashlib.sha256(lines.encode()).hexdigest()
