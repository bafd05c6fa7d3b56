"""Stand-ins for the parts that a CPU lacks of what verl's wide settings need, by plain meaning.

- `Attention`: attention over packed sequences and over context-parallel shards of them, which
  Megatron's local attention refuses. Transformer Engine's is what runs on a GPU.
- `linear_cross_entropy`: verl's Triton kernel of `use_fused_kernels`, by verl's own functions.
- `fused_dispatch`, `fused_combine`: DeepEP's kernels, which take CUDA, by gathering and summing.
- `Adapters`: LoRA as Megatron-Bridge has it, which is not installed; of the attention.
- `dynamic_context_parallel`: the names that Megatron-Core gave to its groups after 0.16, and its
  scheduler (NVIDIA/Megatron-LM#5154), which shares out sequences in a fixed way here.
"""

import copy
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType


def gathered(x, group) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def own_of_sum(x, group) -> torch.Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x[dist.get_rank(group)]


class Gather(torch.autograd.Function):
    """[...] of every rank -> [ranks, ...]."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx, grad):
        return own_of_sum(grad.clone(), ctx.group), None


class SumOfOwn(torch.autograd.Function):
    """[ranks, ...] of every rank -> this rank's [...] of their sum."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return own_of_sum(x.clone(), group)

    @staticmethod
    def backward(ctx, grad):
        return gathered(grad, ctx.group), None


class Attention(DotProductAttention):
    """Causal attention, sequence by sequence; padding is on the right, so no mask is needed."""

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        def attend(q, k, v):
            return super(Attention, self).forward(q, k, v, None, attn_mask_type=AttnMaskType.causal)

        if packed_seq_params is None:
            return attend(query, key, value)
        group = packed_seq_params.cp_group or parallel_state.get_context_parallel_group()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        ends = packed_seq_params.cu_seqlens_q_padded.tolist()
        shards = [
            x[None] if size == 1 else Gather.apply(x, group) for x in (query, key, value)
        ]  # [ranks, tokens, heads, ·]
        parts = []
        for start, end in pairwise(ends):
            half = (end - start) // (2 * size)
            if size == 1:
                mine = [x[0, start:end, None] for x in shards]
                parts.append(attend(*mine))
                continue
            # Rank r holds the r-th piece from the front and the r-th from the back.
            at = [start // size, start // size + half, start // size + 2 * half]
            whole = [
                torch.cat(
                    [x[r, at[0] : at[1]] for r in range(size)]
                    + [x[r, at[1] : at[2]] for r in reversed(range(size))]
                )[:, None]
                for x in shards
            ]
            out = attend(*whole)
            back = end - start - (rank + 1) * half
            parts += [out[rank * half : (rank + 1) * half], out[back : back + half]]
        return torch.cat(parts).squeeze(1)


def linear_cross_entropy(hidden, weight, labels, temperature, reduction, group):
    """Log-probs and entropies, each [tokens], of this rank's part of the vocabulary."""
    from verl.utils.megatron.tensor_parallel import (
        vocab_parallel_entropy,
        vocab_parallel_log_probs_from_logits,
    )

    assert reduction == "none" and isinstance(temperature, float)
    logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), weight)
    logits = logits / temperature
    entropy = vocab_parallel_entropy(logits)
    return vocab_parallel_log_probs_from_logits(logits.clone(), labels.reshape(-1)), entropy


def fused_dispatch(x, token_indices, token_probs, num_experts, group, **kwargs):
    """Each rank takes the tokens that chose one of its experts, by their numbers on that rank."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    first, local = rank * (num_experts // size), num_experts // size
    x, probs = (Gather.apply(y, group).flatten(0, 1) for y in (x, token_probs))
    chosen = gathered(token_indices, group).flatten(0, 1)
    mine = (chosen >= first) & (chosen < first + local)
    kept = mine.any(dim=1)
    indices = torch.where(mine, chosen - first, -1)[kept]
    counts = torch.bincount(indices[indices >= 0], minlength=local)
    return x[kept], indices, torch.where(mine, probs, 0.0)[kept], counts, kept


def fused_combine(x, group, handle, **kwargs):
    """The sum over ranks of what their experts made of each token, to the rank it came from."""
    whole = x.new_zeros(len(handle), x.shape[1]).masked_scatter(handle[:, None], x)
    return SumOfOwn.apply(whole.unflatten(0, (dist.get_world_size(group), -1)), group), None


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank addition; zero at first, as LoRA's is."""

    def __init__(self, to_wrap, rank: int):
        super().__init__()
        self.to_wrap, self.enabled = to_wrap, True
        size_out, size_in = to_wrap.weight.shape
        options = dict(dtype=to_wrap.weight.dtype)
        self.down = torch.nn.Parameter(torch.linspace(-0.1, 0.1, rank * size_in, **options))
        self.up = torch.nn.Parameter(torch.zeros(size_out, rank, **options))

    def forward(self, x):
        out, bias = self.to_wrap(x)
        if self.enabled:
            out = out + x @ self.down.view(self.up.shape[1], -1).T @ self.up.T
        return out, bias


class Adapters:
    """Answers that the engine asks of Megatron-Bridge's PEFT object."""

    def __call__(self, model):
        for parameter in model.parameters():
            parameter.requires_grad = False
        for layer in model.decoder.layers:
            for name in ("linear_qkv", "linear_proj"):
                wrapped = Adapter(getattr(layer.self_attention, name), rank=2)
                setattr(layer.self_attention, name, wrapped)

    @contextmanager
    def disable_adapter(self, chunks):
        found = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Adapter)]
        assert found
        for adapter in found:
            adapter.enabled = False
        yield
        for adapter in found:
            adapter.enabled = True


class Scheduler:
    """Megatron-Core's DefaultDynamicCPScheduler, as verl calls it.

    The two longest sequences on all ranks, one after the other, the others one to a rank.
    """

    def __init__(self, *, dp_size, cp_size, **kwargs):
        self.ranks = dp_size * cp_size

    def get_groups_and_subsamples(self, lengths: list[tuple[int, int]]):
        ids = [i for i, _ in sorted(lengths, key=lambda pair: -pair[1])]
        shared, rest = ids[:2], ids[2:]
        alone = [rest[i : i + self.ranks] for i in range(0, len(rest), self.ranks)]
        assert all(len(ids) == self.ranks for ids in alone)
        return [[[i]] * self.ranks for i in shared] + [[[i] for i in ids] for ids in alone]


def dynamic_context_parallel():
    """Put the newer names into this process's Megatron-Core."""
    from megatron.core.datasets import data_schedule

    data_schedule.DefaultDynamicCPScheduler = Scheduler
    initialize = parallel_state.initialize_model_parallel

    def initialize_model_parallel(*args, dynamic_context_parallel=False, **kwargs):
        initialize(*args, hybrid_context_parallel=dynamic_context_parallel, **kwargs)
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        parallel_state._HYBRID_DP_CP_GROUPS[1] = alone[dist.get_rank()]

    parallel_state.initialize_model_parallel = initialize_model_parallel
    parallel_state.get_dynamic_data_context_parallel_groups = (
        parallel_state.get_hybrid_data_context_parallel_groups
    )
    forward = attention.SelfAttention.forward

    def with_the_batchs_group(self, *args, packed_seq_params=None, **kwargs):
        groups = copy.copy(self.pg_collection)
        if packed_seq_params is not None and packed_seq_params.cp_group is not None:
            groups.cp = packed_seq_params.cp_group
        self.pg_collection, before = groups, self.pg_collection
        try:
            return forward(self, *args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self.pg_collection = before

    attention.SelfAttention.forward = with_the_batchs_group
