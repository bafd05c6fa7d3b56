# SPDX-License-Identifier: Apache-2.0
"""Core attention by torch's scaled_dot_product_attention, where Transformer Engine is not used.

S positions, B sequences, A query heads, G key/value heads of this rank, D their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from moe_upgrpo.errors import UserError

# What a config can ask of DotProductAttention and not of this class, with the value that asks
# nothing. A release without a field cannot be asked for it.
_PLAIN = {
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "context_parallel_size": 1,
    "apply_query_key_layer_scaling": False,
}


class CausalAttention(MegatronModule):
    """Causal attention whose kernels keep neither scores nor their softmax.

    DotProductAttention (dot_product_attention.py:155) makes both for every pair of positions, in
    the forward and again in the backward. Padding on the right needs no mask: what stands before it
    does not look there. k_channels, v_channels: MLA's head widths, which the tensors show too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **_,
    ):
        super().__init__(config=config)
        for name, plain in _PLAIN.items():
            if getattr(config, name, plain) != plain:
                raise UserError(
                    f"{name}={getattr(config, name)!r}: attention without Transformer Engine takes "
                    f"{plain!r} alone. Leave it at that."
                )
        self.softmax_scale = softmax_scale  # None: 1/√D, torch's own

    def forward(
        self,
        query_SBAD,
        key_SBGD,
        value_SBGD,
        attention_mask=None,
        *,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        """[S, B, A·D], D the values' width."""
        for name, given in {
            "attention_mask": attention_mask,
            "attention_bias": attention_bias,
            "packed_seq_params": packed_seq_params,
        }.items():
            if given is not None:
                raise ValueError(f"{name}: CausalAttention takes sequences padded on the right.")
        scale = self.softmax_scale or query_SBAD.shape[-1] ** -0.5
        width = value_SBGD.shape[-1]
        query, key, value = (
            tensor.permute(1, 2, 0, 3) for tensor in _one_width(query_SBAD, key_SBGD, value_SBGD)
        )
        grouped = query.shape[1] != key.shape[1]
        if grouped and query.is_cuda and query.dtype == torch.float32:
            # The only kernel for fp32 that keeps no scores takes as many keys as queries.
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
            grouped = False
        out_BASD = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out_BASD[..., :width].permute(2, 0, 1, 3).flatten(2)


def _one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with zeros up to the widest head: MLA's values have a width of their own, for
    which torch falls back to making all scores. Zeros add nothing to a product."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == widest else F.pad(tensor, (0, widest - tensor.shape[-1]))
        for tensor in tensors
    ]
