"""Megatron-Core's local experts, all of a rank in two grouped products, for machines without CUDA.

N tokens that were dispatched here, by expert; E experts of this rank, H hidden size, F of an
expert's share on this rank.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn.functional import grouped_mm, silu


class GroupedExperts(SequentialMLP):
    """SequentialMLP with its parameters and checkpoints, without its loop.

    experts.py:916 calls one expert after the other, each through Megatron's linear layers: with 64
    small experts nine tenths of a step went into calls. Those layers communicate nothing for an
    expert (layers.py:1011, 1286: the dispatcher does), so that two products are all that they are:
    y = (silu(x W_gateᵀ) ⊙ x W_upᵀ ⊙ p) W_downᵀ, p the token's gate, in the layout of any rank.
    """

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        tokens_NH = permuted_local_hidden_states
        ends_E = torch.as_tensor(tokens_per_expert).cumsum(0).to(tokens_NH.device, torch.int32)
        in_EHF = _stacked(self.local_experts, "linear_fc1")
        out_EFH = _stacked(self.local_experts, "linear_fc2")
        gate_NF, up_NF = grouped_mm(tokens_NH, in_EHF, offs=ends_E).chunk(2, dim=-1)
        inner_NF = silu(gate_NF) * up_NF
        inner_NF = (inner_NF * permuted_probs[:, None]).to(inner_NF.dtype)
        return grouped_mm(inner_NF, out_EFH, offs=ends_E), None


def _stacked(experts, linear: str) -> torch.Tensor:
    """`[E, in, out]`"""
    return torch.stack([getattr(expert, linear).weight for expert in experts]).transpose(1, 2)
