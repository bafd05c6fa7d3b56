"""Attention for the ranks of slime and miles: over packed sequences and with context parallelism,
which Megatron's local one refuses."""

import copy
import functools
from argparse import Namespace
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import attention
from megatron.core.transformer.attention import apply_rotary_pos_emb
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

ALLGATHER_CP = False


def set_layout(allgather_cp: bool) -> None:
    """allgather_cp: each rank has one piece of all sequences together, else two of every one."""
    global ALLGATHER_CP
    ALLGATHER_CP = allgather_cp
    attention.apply_rotary_pos_emb = functools.partial(rotated, apply_rotary_pos_emb)


class Attention(DotProductAttention):
    """Causal, sequence by sequence. Under context parallelism each rank makes the whole of it."""

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        length = len(query) * parallel_state.get_context_parallel_world_size()
        if packed_seq_params is None:  # bshd
            ends, mine = [0, length], zigzag(0, length)
        else:
            ends = packed_seq_params.cu_seqlens_q.tolist()
            pieces = [contiguous(length)] if ALLGATHER_CP else [zigzag(*x) for x in pairwise(ends)]
            mine = torch.cat(pieces)
        q, k, v = (
            whole(x[:, None] if packed_seq_params else x, mine, length) for x in (query, key, value)
        )
        parts = [
            super(Attention, self).forward(
                *(x[start:end] for x in (q, k, v)), None, attn_mask_type=AttnMaskType.causal
            )
            for start, end in pairwise(ends)
        ]
        out = torch.cat(parts)[mine]
        return out.squeeze(1) if packed_seq_params else out


def zigzag(start: int, end: int) -> torch.Tensor:
    """The positions of a whole sequence that this context-parallel rank has."""
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    chunks = torch.arange(start, end).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - rank - 1]] if size > 1 else chunks)


def contiguous(length: int) -> torch.Tensor:
    size = parallel_state.get_context_parallel_world_size()
    return torch.arange(length).chunk(size)[parallel_state.get_context_parallel_rank()]


def whole(part, mine, length):
    if len(part) == length:
        return part
    everything = part.new_zeros(length, *part.shape[1:]).index_copy(0, mine, part)
    return dist.nn.all_reduce(everything, group=parallel_state.get_context_parallel_group())


def rotated(original, t, freqs, *args, cu_seqlens=None, **kwargs):
    """Megatron's rotary embedding, whose packed rows are those of the zigzag alone."""
    if not ALLGATHER_CP or cu_seqlens is None:
        return original(t, freqs, *args, cu_seqlens=cu_seqlens, **kwargs)
    length = int(cu_seqlens[-1])
    alone = Namespace(size=lambda: 1, rank=lambda: 0)
    every = original(
        whole(t, contiguous(length), length), freqs, *args, cu_seqlens=cu_seqlens,
        **(kwargs | {"cp_group": alone}),
    )  # fmt: skip
    return every[contiguous(length)]
