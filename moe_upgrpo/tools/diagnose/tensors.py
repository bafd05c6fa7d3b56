# SPDX-License-Identifier: Apache-2.0
"""The tensors of two models of one architecture, and how some of them differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_upgrpo.rollout.hf import fp8_rounded

CAUSES = (
    "engine-dtype",
    "experts-permuted",
    "half-loaded-weights",
    "other-head",
    "router-dtype",
    "stale-weights",
    "tied-head",
)
"""The faults that tensors show; rounding to FP8 is numerics."""
_MOST = 0.9  # of the tensors with rows and columns: above it, all of the weights are others


@dataclass(frozen=True, kw_only=True)
class Unlike:
    """The cause that the differing tensors point to, and its words."""

    cause: str
    says: str
    of_head: bool = False


def compare(held: PreTrainedModel, right: PreTrainedModel, num_experts: int) -> Unlike | None:
    """Tell how the tensors `held` differ from the `right` ones; None where all are equal."""
    theirs = dict(right.state_dict())
    unlike = {
        name: (tensor, theirs[name])
        for name, tensor in held.state_dict().items()
        if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name])
    }
    if not unlike:
        return None
    count = f"{len(unlike)} of {len(theirs)} tensors of the engine are not the trainer's"
    if all(_is_cast(*both) for both in unlike.values()):
        types = sorted({str(held.dtype).removeprefix("torch.") for held, _ in unlike.values()})
        routers = all(".gate." in name or ".router." in name for name in unlike)
        return Unlike(
            cause="router-dtype" if routers else "engine-dtype",
            says=f"{count} but those in {' and '.join(types)} ({_where(unlike)})",
        )
    if all(_is_fp8(*both) for both in unlike.values()):
        return Unlike(cause="fp8", says=f"{count} but those rounded to FP8")
    if all(_is_permuted(*both, num_experts) for both in unlike.values()):
        return Unlike(
            cause="experts-permuted",
            says=f"{count} but the same experts in another order ({_where(unlike)})",
        )
    embedding = right.get_input_embeddings().weight
    heads = {n for n, p in held.state_dict().items() if n.startswith("lm_head")}
    if unlike.keys() <= heads:
        tied = all(
            tensor.shape == embedding.shape and torch.equal(tensor, embedding)
            for tensor, _ in unlike.values()
        )
        if tied:
            says = "the engine's head is its embedding, the trainer's is not"
            return Unlike(cause="tied-head", says=says, of_head=True)
        return Unlike(
            cause="other-head", says="the engine's head alone is not the trainer's", of_head=True
        )
    matrices = [name for name, tensor in theirs.items() if tensor.ndim >= 2]
    if len(unlike.keys() & set(matrices)) >= _MOST * len(matrices):
        return Unlike(cause="stale-weights", says=count)
    return Unlike(cause="half-loaded-weights", says=f"{count} ({_where(unlike)})")


def _where(unlike: dict) -> str:
    layers = sorted({int(p) for name in unlike for p in name.split(".") if p.isdigit()})
    outside = sorted(name for name in unlike if not any(p.isdigit() for p in name.split(".")))
    words = [f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:8]))}"] if layers else []
    return "; ".join(words + outside[:4])


def _is_cast(held: Tensor, right: Tensor) -> bool:
    return held.dtype != right.dtype and torch.equal(held, right.to(held.dtype))


def _is_fp8(held: Tensor, right: Tensor) -> bool:
    return right.ndim >= 2 and torch.equal(held, fp8_rounded(right))


def _is_permuted(held: Tensor, right: Tensor, num_experts: int) -> bool:
    """Whether the experts' slices are the same ones in another order."""
    if held.shape != right.shape or not num_experts or held.shape[0] != num_experts:
        return False
    slices = [
        sorted(
            row.view(torch.uint8).numpy().tobytes() for row in tensor.cpu().reshape(num_experts, -1)
        )
        for tensor in (held.contiguous(), right.contiguous())
    ]
    return slices[0] == slices[1]
