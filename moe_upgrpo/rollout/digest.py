# SPDX-License-Identifier: Apache-2.0
"""A digest of weights, so that both sides of a hand-over can say that they have the same.

It tells lost, stale, swapped and damaged tensors; it is no protection from malice. It is computed
where the tensors are, and does not depend on the order in which they come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch

_AT_ONCE = 1 << 18  # words


def tensor_sum(tensor: torch.Tensor) -> int:
    """Σ (2i + 1)·w_i mod 2^64; w_i: word i = 0, 1, ... of a tensor's bytes, eight to a word.

    The last word is filled up with zeros. One word changed always changes the sum.
    """
    bytes_B = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(bytes_B) % 8:
        bytes_B = torch.nn.functional.pad(bytes_B, (0, -len(bytes_B) % 8))
    elif bytes_B.storage_offset() % 8:  # of a part of something larger
        bytes_B = bytes_B.clone()
    words_N = bytes_B.view(torch.int64)
    odd_N = torch.arange(1, 2 * min(_AT_ONCE, len(words_N)) + 1, 2, device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words_N), _AT_ONCE):
        part_N = words_N[start : start + _AT_ONCE]
        total += _dot(part_N, odd_N[: len(part_N)]) + 2 * start * part_N.sum()
    return int(total) % 2**64


def _dot(a_N: torch.Tensor, b_N: torch.Tensor) -> torch.Tensor:
    # torch has it for integers on a CPU alone, where it is twice as fast.
    return torch.dot(a_N, b_N) if a_N.device.type == "cpu" else (a_N * b_N).sum()


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
