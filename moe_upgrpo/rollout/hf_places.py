# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a checkpoint lie in transformers' model of it.

E experts of a layer, F their inner size, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

Place = tuple[str, tuple[int | slice, ...]]
"""A tensor of the model's state dict, and an index into it."""

_EXPERT = re.compile(r"(.*)\.(\d+)\.(?:(gate|w1)|(up|w3)|down|w2)(?:_proj)?\.weight")


def places(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Place]:
    """The place of each tensor of `state`, with which transformers has just filled the model.

    Each was found to hold the tensor's values, in the model's dtype. A tensor that is missing here
    is one that transformers converts in a way not known here: only it can load another.
    """
    held = model.state_dict()
    found = {}
    for name, tensor in state.items():
        for place, index in _candidates(name, tensor.shape):
            if place not in held:
                continue
            values = held[place][index]
            if values.shape == tensor.shape and torch.equal(values, tensor.to(values.dtype)):
                found[name] = (place, index)
                break
    return found


def tensors_at(model: nn.Module, found: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """The model's own tensors, or their parts, at these places: to copy into."""
    used = {place for place, _ in found.values()}
    # The others are not held: transformers may replace them meanwhile.
    held = {name: tensor for name, tensor in model.state_dict().items() if name in used}
    return {name: held[place][index] for name, (place, index) in found.items()}


def _candidates(name: str, shape: torch.Size) -> Iterator[Place]:
    """The same name; an expert's matrix in the [E, 2F, H] or [E, H, F] tensor of all experts."""
    name = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's checkpoints
    yield name, ()
    if match := _EXPERT.fullmatch(name):
        experts, expert, gate, up = match[1], int(match[2]), match[3], match[4]
        if not (gate or up):
            yield f"{experts}.down_proj", (expert,)
        else:
            first = 0 if gate else shape[0]
            yield f"{experts}.gate_up_proj", (expert, slice(first, first + shape[0]))
