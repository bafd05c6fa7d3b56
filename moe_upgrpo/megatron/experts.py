# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's local experts, all of a rank in two grouped products, without Transformer Engine.

N tokens that were dispatched here, by expert; E experts of this rank, H hidden size, F the inner
size of an expert's share on this rank; I → O one of its two linear layers.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from moe_upgrpo.megatron.elementwise import gated


class GroupedExperts(SequentialMLP):
    """SequentialMLP with its parameters and checkpoints, without its loop.

    experts.py:916 calls one expert after the other, each through Megatron's linear layers: with 64
    small experts nine tenths of a step went into calls. Those layers communicate nothing for an
    expert (layers.py:1011, 1286: the dispatcher does), so two products do all their work, in any
    layout: y = (silu(x W_gateᵀ) ⊙ x W_upᵀ ⊙ p) W_downᵀ, p the token's gate.
    """

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        tokens_NH = permuted_local_hidden_states
        ends_E = torch.as_tensor(tokens_per_expert).cumsum(0).to(tokens_NH.device, torch.int32)
        into = [expert.linear_fc1.weight for expert in self.local_experts]
        out_of = [expert.linear_fc2.weight for expert in self.local_experts]
        inner_NF = gated(_GroupedProduct.apply(tokens_NH, ends_E, *into), permuted_probs)
        return _GroupedProduct.apply(inner_NF, ends_E, *out_of), None


class _GroupedProduct(torch.autograd.Function):
    """Each token times the transposed weight [O, I] of its expert.

    The kernel wants the weights in one tensor. That copy is made again in the backward rather than
    kept: in a model of many experts it would be as large as the model.
    """

    @staticmethod
    def forward(ctx, tokens_NI, ends_E, *weights):
        ctx.save_for_backward(tokens_NI, ends_E, *weights)
        return grouped_mm(tokens_NI, torch.stack(weights).transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_NO):
        tokens_NI, ends_E, *weights = ctx.saved_tensors
        gradient_NO = gradient_NO.contiguous()
        of_tokens_NI, of_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            of_tokens_NI = grouped_mm(gradient_NO, torch.stack(weights), offs=ends_E)
        if any(ctx.needs_input_grad[2:]):
            of_weights = grouped_mm(gradient_NO.t(), tokens_NI, offs=ends_E).unbind()
        return of_tokens_NI, None, *of_weights


def gather_before(chunk: DistributedDataParallel) -> None:
    """Make grouped experts wait for their weights under overlap_param_gather.

    Megatron waits where a module that holds a weight is called (distributed_data_parallel.py:470),
    and the linear layers of grouped experts never are: stale weights would be used silently.
    """
    wait = chunk._make_forward_pre_hook()

    def wait_for_all(experts: GroupedExperts, *_) -> None:
        for module in experts.modules():
            wait(module)

    for module in chunk.modules():
        if isinstance(module, GroupedExperts):
            module.register_forward_pre_hook(wait_for_all)
