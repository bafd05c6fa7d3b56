# SPDX-License-Identifier: Apache-2.0
"""Core attention by torch's kernels, where Transformer Engine is not used.

S positions, B sequences, A query heads and G key/value heads of this rank, D their width, N tokens
of packed sequences.
"""

from __future__ import annotations

import math
from functools import lru_cache
from inspect import signature

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import context

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None

# Fields by which a config asks for more than this class does, with the values that ask for nothing.
# A release without a field cannot ask for it.
_PLAIN = {
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
}


class CausalAttention(MegatronModule):
    """Causal attention whose kernels keep neither scores nor their softmax.

    DotProductAttention (dot_product_attention.py:155) makes both for every pair of positions, in
    the forward and again in the backward. Padding on the right needs no mask: the tokens before it
    do not attend to it. k_channels, v_channels: MLA's head widths, which the tensors show too.
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
        """[S, B, A·D], D the values' width; with `packed_seq_params`, [N, A, D] -> [N, A·D]."""
        for name, given in {
            "attention_mask": attention_mask,
            "attention_bias": attention_bias,
        }.items():
            if given is not None:
                raise ValueError(f"{name}: CausalAttention takes sequences padded on the right.")
        scale = self.softmax_scale or query_SBAD.shape[-1] ** -0.5
        width = value_SBGD.shape[-1]
        in_parts = self.config.context_parallel_size > 1
        if in_parts:
            key_SBGD, value_SBGD = (
                context.whole(part, sums_gradient=True) for part in (key_SBGD, value_SBGD)
            )
        given = _one_width(query_SBAD, key_SBGD, value_SBGD)
        if in_parts:
            return _attend_in_parts(*given, scale)[..., :width].flatten(2)
        if packed_seq_params is None:
            return _attend(*given, scale)[..., :width].flatten(2)
        if _takes_varlen(given[0]):
            return _attend_packed(*given, scale, packed_seq_params)[..., :width].flatten(1)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outs = [
            _attend(*(part_SAD.unsqueeze(1) for part_SAD in of_sequence), scale)
            for of_sequence in zip(*(tensor.split(lengths) for tensor in given), strict=True)
        ]
        return torch.cat(outs)[..., :width].flatten(1)


def _attend(query_SBAD, key_SBGD, value_SBGD, scale: float) -> torch.Tensor:
    """[S, B, A, D], D the width of queries, keys and values; queries are at the last S keys."""
    query, key, value = (
        tensor.permute(1, 2, 0, 3) for tensor in (query_SBAD, key_SBGD, value_SBGD)
    )
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and query.dtype == torch.float32:
        # The only kernel for fp32 that keeps no scores takes as many keys as queries.
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        grouped = False
    causal, lengths = {"is_causal": True}, (query.shape[2], key.shape[2])
    if lengths[0] < lengths[1]:
        mask = causal_lower_right(*lengths) if query.is_cuda else _mask(*lengths, query.dtype)
        causal = {"attn_mask": mask}
    out_BASD = F.scaled_dot_product_attention(
        query, key, value, scale=scale, enable_gqa=grouped, **causal
    )
    return out_BASD.permute(2, 0, 1, 3)


@lru_cache(maxsize=8)  # one of each length, and not one of each layer
def _mask(queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask that CUDA's kernels do without: -inf where a key comes after the query."""
    return torch.full((queries, keys), -math.inf, dtype=dtype).triu_(keys - queries + 1)


def _attend_in_parts(query_sBAD, key_SBGD, value_SBGD, scale: float) -> torch.Tensor:
    """[s, B, A, D], attention of this context-parallel rank's two chunks to all ranks' keys."""
    chunk = len(query_sBAD) // 2
    ends = [(number + 1) * chunk for number in context.chunks()]
    return torch.cat(
        [
            _attend(query, key_SBGD[:end], value_SBGD[:end], scale)
            for query, end in zip(query_sBAD.split(chunk), ends, strict=True)
        ]
    )


def _takes_varlen(query_NAD: torch.Tensor) -> bool:
    """Whether torch has its kernel for sequences of mixed lengths, and it takes these: CUDA's
    FlashAttention. Without the argument enable_gqa it needs as many key heads as query heads."""
    here = varlen is not None and "enable_gqa" in signature(varlen.varlen_attn).parameters
    half = query_NAD.dtype in (torch.bfloat16, torch.float16)
    return here and query_NAD.is_cuda and half and query_NAD.shape[-1] <= 256


def _attend_packed(query_NAD, key_NGD, value_NGD, scale: float, packed) -> torch.Tensor:
    """Attention [N, A, D] in one call. Never run yet: it takes a GPU."""
    return varlen.varlen_attn(
        query_NAD,
        key_NGD,
        value_NGD,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query_NAD.shape[1] != key_NGD.shape[1],
    )


def _one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, padded with zeros to the widest head: MLA's values have another width than its
    keys, for which torch falls back to making all scores. Zeros add nothing to a product."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == widest else F.pad(tensor, (0, widest - tensor.shape[-1]))
        for tensor in tensors
    ]
