# SPDX-License-Identifier: Apache-2.0
"""Weights written as they come, so that no second copy of a model is in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_upgrpo.hugging_face.folder import INDEX, SINGLE
from moe_upgrpo.store.files import write_text


class ShardWriter:
    """Writer of a model folder's weights: a file whenever `part_bytes` have come together.

    The files have their names, and the folder its index, once `finish` was called: `SINGLE` for one
    file, else model-I-of-N.safetensors. At most `part_bytes` and one tensor are held.
    """

    def __init__(self, folder: Path, part_bytes: int):
        self._folder, self._part_bytes = folder, part_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._size = self._total = 0
        self._written: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a copy of a tensor, in the host's memory."""
        if self._held and self._size + tensor.nbytes > self._part_bytes:
            self._write()
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._size += tensor.nbytes

    def _write(self) -> None:
        file = self._folder / f"part-{len(self._written)}.safetensors"
        save_file(self._held, file, metadata={"format": "pt"})
        self._written.append((file, list(self._held)))
        self._total += self._size
        self._held, self._size = {}, 0

    def finish(self) -> None:
        """Write the last file, and give all of them their names."""
        if self._held:
            self._write()
        count, placed = len(self._written), {}
        for i, (file, names) in enumerate(self._written, start=1):
            final = SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            file.rename(self._folder / final)
            placed |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": placed}
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")
