"""Log-probs and entropy where the vocabulary is split over the tensor-parallel ranks.

B sequences, S tokens, V vocabulary, v = V / tp of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def token_log_probs(
    logits_BSv: torch.Tensor, targets_BS: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log softmax(logits / temperature) at the targets, [B, S] in fp32, with gradient."""
    # Megatron's function works in place, on the copy that the division makes.
    return -vocab_parallel_cross_entropy(logits_BSv.float() / temperature, targets_BS)


@torch.no_grad()
def token_entropy(logits_BSv: torch.Tensor, temperature: float) -> torch.Tensor:
    """-sum_v p_v log p_v in nats with p = softmax(logits / temperature), [B, S] in fp32.

    With m the largest logit, z = sum exp(l - m): entropy = log z - sum (l - m) exp(l - m) / z.
    """
    logits = logits_BSv.float() / temperature
    group = parallel_state.get_tensor_model_parallel_group()
    largest = logits.amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest.unsqueeze(-1)
    weight = shifted.exp()
    sums = torch.stack([weight.sum(dim=-1), (weight * shifted).sum(dim=-1)])
    dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1] / sums[0]
