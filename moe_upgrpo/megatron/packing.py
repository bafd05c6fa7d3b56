# SPDX-License-Identifier: Apache-2.0
"""A micro-batch as the model sees it: padded, or its sequences one after the other in one row.

In a packed one everything but attention computes real tokens only, and attention takes each
sequence by itself. With context parallelism each rank has a part of the padded rows. The loss
always sees all rows, padded.

B sequences, S padded length, L MoE layers, K experts each; R real tokens, N with padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import context
from moe_upgrpo.megatron.batch import Batch
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.tap import NO_ROUTE

# Transformer Engine's attention kernels that take neither packed sequences nor parts of sequences.
_OTHER_KERNELS = ("unfused", "local")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The tensors of a `Batch` that the model sees: `[B, S]`, or `[1, N]` where `packed` is set."""

    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    targets_BS: torch.Tensor
    mask_BS: torch.Tensor
    routes_BSLK: torch.Tensor | None
    packed: PackedSeqParams | None = None  # the padding, where there is some, as a last sequence
    real_R: torch.Tensor | None = None  # the place in the batch's [B·S] of each packed token
    shape: tuple[int, int] | None = None  # B, S of the batch

    def in_batch(self, output_BSx: torch.Tensor) -> torch.Tensor:
        """The model's output for these inputs as `[B, S, x]` of the batch, 0 where there is no
        token. A collective of the context-parallel ranks."""
        if context.size() > 1:
            return context.whole(output_BSx.transpose(0, 1), sums_gradient=False).transpose(0, 1)
        if self.real_R is None:
            return output_BSx
        real_Rx = output_BSx[0, : len(self.real_R)]
        B, S = self.shape
        flat = real_Rx.new_zeros(B * S, real_Rx.shape[1]).index_copy(0, self.real_R, real_Rx)
        return flat.view(B, S, -1)


def padded(batch: Batch) -> Inputs:
    """Inputs of the shape that the batch has, or this context-parallel rank's part of them."""
    tensors = {
        "tokens_BS": batch.tokens_BS,
        "positions_BS": batch.positions_BS,
        "targets_BS": batch.targets_BS,
        "mask_BS": batch.mask_BS,
        "routes_BSLK": batch.routes_BSLK,
    }
    if context.size() > 1:
        tensors = {n: t if t is None else context.mine(t, 1) for n, t in tensors.items()}
    return Inputs(**tensors)


def pack(batch: Batch, lengths: Sequence[int], *, multiple_of: int = 1, least: int = 1) -> Inputs:
    """Inputs of the batch's sequences, of these lengths, in one row.

    N is a multiple of `multiple_of` (sequence parallelism shards it) and at least `least`; the rest
    of the row is one more sequence, of token 0, for which the routers choose freely.
    """
    real = sum(lengths)
    padding = -(-max(real, least) // multiple_of) * multiple_of - real
    segments = [*lengths, padding] if padding else [*lengths]
    shape, device = tuple(batch.tokens_BS.shape), batch.tokens_BS.device
    real_R = torch.cat(
        [torch.arange(0), *(torch.arange(n) + b * shape[1] for b, n in enumerate(lengths))]
    ).to(device)

    def packed(tensor_BSx: torch.Tensor, fill: int) -> torch.Tensor:
        real_Rx = tensor_BSx.flatten(0, 1)[real_R]
        filling = real_Rx.new_full((padding, *real_Rx.shape[1:]), fill)
        return torch.cat([real_Rx, filling])[None]

    offsets = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)
    routes_BSLK = batch.routes_BSLK
    return Inputs(
        tokens_BS=packed(batch.tokens_BS, 0),
        positions_BS=torch.cat([torch.arange(n, device=device) for n in segments])[None],
        targets_BS=packed(batch.targets_BS, 0),
        mask_BS=packed(batch.mask_BS, False),
        routes_BSLK=None if routes_BSLK is None else packed(routes_BSLK, NO_ROUTE),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=max(segments),
            max_seqlen_kv=max(segments),
        ),
        real_R=real_R,
        shape=shape,
    )


def check_attention(
    passed: Mapping[str, Any],
    layout: Layout,
    *,
    packing: bool,
    dtype: str,
    transformer_engine: bool,
) -> None:
    """Raise UserError for packing with context parallelism, or where Transformer Engine's attention
    takes no packed sequences, or no parts of them.

    passed: fields of Megatron's TransformerConfig that the user gave. Attention without
    Transformer Engine takes both with every family, every other layout and number type.
    """
    if packing:
        layout.check_packing()
    if not transformer_engine or not (packing or layout.cp > 1):
        return
    kernel = passed.get("attention_backend")
    wrong = {
        f"--dtype {dtype}": dtype != "bfloat16",
        f"--megatron.attention_backend {getattr(kernel, 'name', kernel)}": (
            getattr(kernel, "name", None) in _OTHER_KERNELS
        ),
    }
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention") if packing else ():
        wrong[f"--megatron.{name} true"] = bool(passed.get(name))
    if given := [option for option, is_wrong in wrong.items() if is_wrong]:
        asked, what, without = f"--cp {layout.cp}", "parts of sequences", ""
        if packing:
            asked, what, without = "--packing", "packed sequences", " and not in FP8"
        raise UserError(
            f"{asked} with {' and '.join(given)}: Transformer Engine's attention takes {what} in "
            f"bfloat16 alone, by its flash or fused kernels{without}. Change that, or leave out "
            f"{asked}."
        )
