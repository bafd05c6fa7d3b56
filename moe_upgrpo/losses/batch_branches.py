# SPDX-License-Identifier: Apache-2.0
"""Losses that look at the whole batch: covariances, groups, counts. They need `Context`.

The contract is `side.py`; the table of all losses is `branches.py`. A threshold is a statistic of
the batch: `batch_statistics` computes it from all micro-batches and ranks; without it each
micro-batch has its own, as in the stacks that these losses come from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.classic_branches import (
    ppo_negative,
    ppo_negative_clip,
    ppo_positive,
    ppo_positive_clip,
)
from moe_upgrpo.losses.side import Branch, Side, above, token_ratio
from moe_upgrpo.losses.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from moe_upgrpo.losses.config import PolicyLossConfig as Config
    from moe_upgrpo.losses.side import Bounds


# --- The covariance of advantage and log-prob (arXiv 2505.22617; verl `clip_cov`, `kl_cov`)


def means(t: Tokens) -> dict[str, Tensor]:
    """Means over the tokens of the batch; 0 where it has none."""
    tokens = t.lengths_B1.sum().clamp(min=1)
    return {
        "mean_advantage": t.advantages_BT.sum() / tokens,
        "mean_log_prob": t.log_probs_BT.detach().sum() / tokens,
    }


def covariance(t: Tokens, mean: dict[str, Tensor]) -> Tensor:
    """(A − mean A)·(log π − mean log π) of each token."""
    log_prob_BT = t.log_probs_BT.detach() - mean["mean_log_prob"]
    return log_prob_BT.mul_(t.advantages_BT - mean["mean_advantage"])


def share_of_tokens(t: Tokens, share: float) -> int:
    return max(int(share * float(t.lengths_B1.sum(dtype=torch.float64))), 1)


# clip-cov: PPO's loss, and of the unclipped tokens with a covariance in a range a few, drawn at
# random, lose it. Drawn are those with the smallest numbers of `Context.draws`.


def in_covariance_range(t: Tokens, cfg: Config, mean: dict[str, Tensor]) -> Tensor:
    """Unclipped tokens with a covariance in the range. mean: that of `t.statistics`, which may be
    about to be made."""

    def compute() -> Tensor:
        low, high = cfg.covariance_range
        cov_BT = covariance(t, mean)
        r_BT = t.ratio_BT.detach()
        above_BT, below_BT = t.positive_BT & (r_BT > cfg.upper), t.negative_BT & (r_BT < cfg.lower)
        return (cov_BT > low) & (cov_BT < high) & ~(above_BT | below_BT) & t.mask_BT

    return t.once("covariance range", compute)


def clip_cov_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    mean = means(t)
    draws = t.draws_BT[in_covariance_range(t, cfg, mean)].sort().values
    count = min(share_of_tokens(t, cfg.covariance_share), len(draws))
    limit = draws[count - 1] if count else torch.full_like(mean["mean_advantage"], -1.0)
    return {**mean, "draw_limit": limit}


def drawn(t: Tokens, cfg: Config) -> Tensor:
    def choose() -> Tensor:
        chosen_BT = t.draws_BT <= t.statistics["draw_limit"]
        return chosen_BT & in_covariance_range(t, cfg, t.statistics)

    return t.once("drawn", choose)


def clip_cov_positive(t: Tokens, cfg: Config) -> Tensor:
    return ppo_positive(t, cfg).masked_fill(drawn(t, cfg), 0.0)


def clip_cov_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    above_BT = ppo_positive_clip(t, cfg)[1]
    return None, drawn(t, cfg) if above_BT is None else above_BT | drawn(t, cfg)


def clip_cov_negative(t: Tokens, cfg: Config) -> Tensor:
    return ppo_negative(t, cfg).masked_fill(drawn(t, cfg), 0.0)


def clip_cov_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    below_BT, above_BT = ppo_negative_clip(t, cfg)
    return drawn(t, cfg) if below_BT is None else below_BT | drawn(t, cfg), above_BT


# kl-cov: −A·r without a clip, and the tokens of largest covariance pay |Δ|.


def kl_cov_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    mean = means(t)
    cov = covariance(t, mean)[t.mask_BT]
    if not len(cov):
        return {**mean, "covariance_limit": torch.full_like(mean["mean_advantage"], math.inf)}
    top = cov.topk(share_of_tokens(t, cfg.covariance_share)).values
    return {**mean, "covariance_limit": top[-1]}


def penalised(t: Tokens, cfg: Config) -> Tensor:
    """The penalty's coefficient at each token"""

    def choose() -> Tensor:
        cov_BT = covariance(t, t.statistics)
        chosen_BT = (cov_BT >= t.statistics["covariance_limit"]) & t.mask_BT
        return chosen_BT.to(cov_BT.dtype) * cfg.covariance_kl

    return t.once("penalised", choose)


def free_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, above(t.ratio_BT, t.log_ratio_BT, math.inf)


def kl_cov_penalty(t: Tokens, cfg: Config) -> Tensor:
    return t.raw_log_ratio_BT.abs() * penalised(t, cfg)


def kl_cov_penalty_slope(t: Tokens, cfg: Config) -> Tensor:
    return t.raw_log_ratio_BT.sign() * penalised(t, cfg)


# --- VAPO's positive-example term (arXiv 2504.05118, eq. 10; NeMo-RL): PPO, and the mean negative
# log-likelihood of the positive tokens. The term has their number as denominator, over the batch.


def vapo_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    tokens = t.lengths_B1.sum()
    positive = (t.advantages_BT > 0).sum().to(tokens.dtype)
    return {"tokens_per_positive": tokens / positive.clamp(min=1)}


def vapo_nll(t: Tokens, cfg: Config) -> Tensor:
    """−μ·log π·N/N⁺: token-mean divides by N."""
    return t.log_probs_BT * (-cfg.positive_nll * t.statistics["tokens_per_positive"])


def vapo_nll_slope(t: Tokens, cfg: Config) -> Tensor:
    scale = -cfg.positive_nll * t.statistics["tokens_per_positive"]
    return scale.expand_as(t.lengths_B1)


# --- REAL (arXiv 2602.05630; ms-swift `real`): a group's responses as a classification
# log(1 + Σ_neg e^(s/τ)) + log(1 + Σ_pos e^(−s/τ)), s = mean log r, summed over the groups that have
# both signs, divided by the number of groups. |A| has no part in it.


def real_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    """Sequences for each group, of those that are not empty: what turns 1/S into 1/groups."""
    alive_B = t.lengths_B1[:, 0] > 0
    groups = max(len(t.groups_B[alive_B].unique()), 1)
    return {"sequences_per_group": alive_B.sum().to(t.lengths_B1.dtype) / groups}


def of_group(t: Tokens, cfg: Config, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """log(1 + Σ e^(∓s/τ)) of a sequence's own sign in its group, the sequences that it is of, and
    the exponent of each; `[B, 1]`. No group where the other sign is missing."""

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        alive_B = t.lengths_B1[:, 0] > 0
        positive_B = (t.advantages_BT > 0).any(-1)
        mine_B = alive_B & (positive_B if sign > 0 else ~positive_B)
        others_B = alive_B & (~positive_B if sign > 0 else positive_B)
        same_BB = t.groups_B[:, None] == t.groups_B[None, :]
        mixed_B = (same_BB & others_B).any(-1) & mine_B
        exponent_B1 = t.log_sequence_ratio_B1 * (-sign / cfg.real_tau)
        # e^x of the group's own sign, and e^0 for the 1
        inside_BB = torch.where(same_BB & mine_B, exponent_B1.T, -math.inf)
        inside_BB = torch.cat([inside_BB, torch.zeros_like(t.lengths_B1)], dim=-1)
        shared_B1 = (same_BB & mine_B).sum(-1, keepdim=True).clamp(min=1)
        value_B1 = inside_BB.logsumexp(-1, keepdim=True)
        return value_B1, mixed_B[:, None].to(value_B1.dtype) / shared_B1, exponent_B1

    return t.once(f"group {sign}", compute)


def real_side(sign: int) -> Side:
    def extra(t: Tokens, cfg: Config) -> Tensor:
        """The group's term, in equal parts to each token of its sequences of this sign."""
        value_B1, part_B1, _ = of_group(t, cfg, sign)
        scale = t.statistics["sequences_per_group"]
        return value_B1 * (part_B1 * scale / t.lengths_B1.clamp(min=1))

    def extra_slope(t: Tokens, cfg: Config) -> Tensor:
        """∓softmax weight of the sequence/(τ·|y|)"""
        value_B1, part_B1, exponent_B1 = of_group(t, cfg, sign)
        weight_B1 = (exponent_B1 - value_B1).exp() * (part_B1 > 0)
        scale = t.statistics["sequences_per_group"] * (-sign / cfg.real_tau)
        return weight_B1 * (scale / t.lengths_B1.clamp(min=1))

    return Side(nothing, nothing, extra=extra, extra_slope=extra_slope)


def nothing(t: Tokens, cfg: Config) -> Tensor:
    return torch.zeros_like(t.lengths_B1)


KL_COV = Side(token_ratio, token_ratio, free_clip, kl_cov_penalty, kl_cov_penalty_slope)

BATCH_BRANCHES: dict[str, Branch] = {
    "clip-cov": Branch(
        positive=Side(clip_cov_positive, token_ratio, clip_cov_positive_clip),
        negative=Side(clip_cov_negative, token_ratio, clip_cov_negative_clip),
        c=("r·1[r ≤ 1+εh, not drawn]", "r·1[1−εl ≤ r ≤ C, not drawn]"),
        fields=("clip_low", "clip_high", "dual_clip", "covariance_share", "covariance_range"),
        arguments=("draws",),
        statistics=clip_cov_statistics,
        source="arXiv 2505.22617; verl clip_cov",
    ),
    "kl-cov": Branch(
        positive=KL_COV,
        negative=KL_COV,
        c=("r − k·sign(Δ)·1[top]/A", "r − k·sign(Δ)·1[top]/A"),
        fields=("covariance_share", "covariance_kl"),
        statistics=kl_cov_statistics,
        source="arXiv 2505.22617; verl kl_cov",
    ),
    "vapo": Branch(
        positive=Side(ppo_positive, token_ratio, ppo_positive_clip, vapo_nll, vapo_nll_slope),
        negative=Side(ppo_negative, token_ratio, ppo_negative_clip),
        c=("r·1[r ≤ 1+εh] + μN/(N⁺A)", "r·1[1−εl ≤ r ≤ C]"),
        aggregations=("token-mean",),
        fields=("clip_low", "clip_high", "dual_clip", "positive_nll"),
        up=False,  # its negative side is ppo's
        statistics=vapo_statistics,
        source="arXiv 2504.05118 eq. 10; NeMo-RL",
    ),
    "real": Branch(
        positive=real_side(1),
        negative=real_side(-1),
        c=("G·e^(−s/τ)/(1+Σ₊)/(τ|y|A)", "G·e^(s/τ)/(1+Σ₋)/(τ|y||A|)"),
        aggregations=("seq-mean-token-sum",),
        fields=("real_tau",),
        arguments=("groups",),
        coupled=True,
        up=False,
        refuses=("correction", "off_policy_limit", "top_entropy"),
        statistics=real_statistics,
        source="arXiv 2602.05630; ms-swift real",
    ),
}
