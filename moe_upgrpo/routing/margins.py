# SPDX-License-Identifier: Apache-2.0
"""Margins of a router's choice of experts: N tokens, E experts in G groups."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_margins(scores_NE: Tensor, top_k: int) -> Tensor:
    """s_(K) − s_(K+1), [N] float32: how far the router's own choice is from another set.

    s are the scores that the top-k is taken over: logits (Qwen3-MoE), probabilities where the
    softmax comes first, scores with the selection bias where the router has one. Where the router
    chooses groups of experts first, s are the scores of the chosen groups (`of_best_groups`): a set
    with experts of another group may be nearer. Infinite where every expert is chosen.
    """
    if top_k == scores_NE.shape[1]:
        return scores_NE.new_full(scores_NE.shape[:1], torch.inf, dtype=torch.float32)
    best = scores_NE.float().topk(top_k + 1, dim=1).values
    return best[:, -2] - best[:, -1]


def of_best_groups(scores_NE: Tensor, top_k: int, groups: int, kept: int) -> Tensor:
    """The scores with −inf outside the chosen groups, as Megatron-Core chooses them: those with
    the largest sums of their best top_k / kept scores (moe_utils.py:554)."""
    scores_NGX = scores_NE.unflatten(1, (groups, -1))
    best_NG = scores_NGX.topk(top_k // kept, dim=2).values.sum(dim=2)
    chosen_NG = torch.zeros_like(best_NG, dtype=torch.bool)
    chosen_NG.scatter_(1, best_NG.topk(kept, dim=1).indices, True)
    return scores_NGX.masked_fill(~chosen_NG.unsqueeze(2), -torch.inf).flatten(1)
