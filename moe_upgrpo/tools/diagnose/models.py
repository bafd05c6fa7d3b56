# SPDX-License-Identifier: Apache-2.0
"""Changes to a transformers model, to make a twin with."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The module that chooses the experts in each MoE layer: the sibling of its experts."""
    modules = dict(model.named_modules())
    found = []
    for name in modules:
        if not name.endswith(".experts"):
            continue
        owner = modules[name.removesuffix(".experts")]
        beside = [getattr(owner, gate, None) for gate in ("gate", "router")]
        found += [module for module in beside if module is not None][:1]
    return found


def route_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the routers compute in `dtype`: their weights and inputs are cast to it, and their
    outputs back to the types they had before."""
    for router in routers(model):
        weight = next(router.parameters())
        with torch.no_grad():  # to learn the type of each output
            outputs = router(weight.new_zeros(1, weight.shape[-1]))
        types = [value.dtype if _is_float(value) else None for value in outputs]
        router.to(dtype)
        router.register_forward_pre_hook(
            lambda module, args: tuple(x.to(dtype) if _is_float(x) else x for x in args)
        )
        router.register_forward_hook(
            lambda module, args, outputs, types=types: tuple(
                x if of is None else x.to(of) for x, of in zip(outputs, types, strict=True)
            )
        )


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def tie_head(model: PreTrainedModel) -> None:
    """Share the head with the embedding, as in a model that ties them."""
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight.data)
