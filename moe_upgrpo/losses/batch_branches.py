# SPDX-License-Identifier: Apache-2.0
"""Losses that depend on the whole batch: covariances, groups, counts. They need `Context`.

The contract is `side.py`; the table of all losses is `branches.py`. A threshold is a statistic of
the batch: `batch_statistics` computes it from all micro-batches and ranks; without it each
micro-batch computes its own, as in the stacks that these losses come from.
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
from moe_upgrpo.losses.passes import exceeds, falls_below
from moe_upgrpo.losses.side import Branch, Side, above, token_ratio, zero_at_padding
from moe_upgrpo.losses.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from moe_upgrpo.losses.config import PolicyLossConfig as Config
    from moe_upgrpo.losses.side import Bounds, TensorFn


# --- The covariance of advantage and log-prob (arXiv 2505.22617; verl `clip_cov`, `kl_cov`)


def means(t: Tokens, log_probs_BT: Tensor) -> dict[str, Tensor]:
    """Means over the batch's tokens; 0 if it has none."""
    tokens = t.lengths_B1.sum().clamp(min=1)
    return {
        "mean_advantage": t.advantages_BT.sum() / tokens,
        "mean_log_prob": log_probs_BT.sum() / tokens,
    }


def covariance(t: Tokens, mean: dict[str, Tensor], log_probs_BT: Tensor) -> Tensor:
    """(A − mean A)·(log π − mean log π) of each token."""
    return (log_probs_BT - mean["mean_log_prob"]).mul_(t.advantages_BT - mean["mean_advantage"])


def share_of_tokens(t: Tokens, share: float) -> int:
    return max(int(share * float(t.lengths_B1.sum(dtype=torch.float64))), 1)


# clip-cov: PPO's loss without a few tokens, drawn at random from the unclipped ones whose
# covariance is in a range: those with the smallest numbers in `Context.draws`.


def in_covariance_range(t: Tokens, cfg: Config, mean: dict[str, Tensor]) -> Tensor:
    """Unclipped tokens with a covariance in the range. mean: as in `t.statistics`, which may not
    exist yet."""

    def compute() -> Tensor:
        low, high = cfg.covariance_range
        cov_BT = covariance(t, mean, t.log_probs_BT.detach())
        above_BT = t.positive_BT & exceeds(t.ratio_BT, cfg.upper)
        below_BT = t.negative_BT & falls_below(t.ratio_BT, cfg.lower)
        within_BT = exceeds(cov_BT, low) & falls_below(cov_BT, high)
        return within_BT & ~(above_BT | below_BT) & t.mask_BT

    return t.once("covariance range", compute)


def clip_cov_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    mean = means(t, t.log_probs_BT.detach())
    draws = t.draws_BT[in_covariance_range(t, cfg, mean)].sort().values
    count = min(share_of_tokens(t, cfg.covariance_share), len(draws))
    limit = draws[count - 1] if count else torch.full_like(mean["mean_advantage"], -1.0)
    return {**mean, "draw_limit": limit}


def drawn(t: Tokens, cfg: Config) -> Tensor:
    def choose() -> Tensor:
        chosen_BT = t.draws_BT <= t.statistics["draw_limit"]
        return chosen_BT & in_covariance_range(t, cfg, t.statistics)

    return t.once("drawn", choose)


def clip_cov_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    above_BT = ppo_positive_clip(t, cfg)[1]
    return None, drawn(t, cfg) if above_BT is None else above_BT | drawn(t, cfg)


def clip_cov_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    below_BT, above_BT = ppo_negative_clip(t, cfg)
    return drawn(t, cfg) if below_BT is None else below_BT | drawn(t, cfg), above_BT


# kl-cov: −A·r without a clip, and the tokens of largest covariance pay |Δ|.


def kl_cov_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    log_probs_BT = t.log_probs_BT.detach()
    mean = means(t, log_probs_BT)
    cov_BT = covariance(t, mean, log_probs_BT)
    cov = cov_BT[t.mask_BT]
    if not len(cov):
        return {**mean, "covariance_limit": torch.full_like(mean["mean_advantage"], math.inf)}
    limit = cov.topk(share_of_tokens(t, cfg.covariance_share)).values[-1]
    penalised(t, cfg, cov_BT, limit)  # while the covariances are at hand
    return {**mean, "covariance_limit": limit}


def penalised(
    t: Tokens, cfg: Config, cov_BT: Tensor | None = None, limit: Tensor | None = None
) -> Tensor:
    """The penalty's coefficient at each token. cov_BT, limit: as in `t.statistics`, which may not
    exist yet."""

    def choose() -> Tensor:
        cov, low = cov_BT, limit
        if cov is None or low is None:
            cov = covariance(t, t.statistics, t.log_probs_BT.detach())
            low = t.statistics["covariance_limit"]
        chosen_BT = (cov >= low) & t.mask_BT
        return chosen_BT.to(cov.dtype) * cfg.covariance_kl

    return t.once("penalised", choose)


def free_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, above(t.ratio_BT, t.log_ratio_BT, math.inf)


@zero_at_padding
def kl_cov_penalty(t: Tokens, cfg: Config) -> Tensor:
    return t.raw_log_ratio_BT.abs() * penalised(t, cfg)


@zero_at_padding
def kl_cov_penalty_slope(t: Tokens, cfg: Config) -> Tensor:
    return t.raw_log_ratio_BT.sign() * penalised(t, cfg)


# --- VAPO's positive-example term (arXiv 2504.05118, eq. 10; NeMo-RL): PPO, and the mean negative
# log-likelihood of the positive tokens. The term is divided by their number in the batch.


def vapo_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    tokens = t.lengths_B1.sum()
    positive = t.positive_BT.count_nonzero().to(tokens.dtype)
    return {"tokens_per_positive": tokens / positive.clamp(min=1)}


def vapo_nll(t: Tokens, cfg: Config) -> Tensor:
    """−μ·log π·N/N⁺: token-mean divides by N."""
    return t.raw_log_probs_BT * (-cfg.positive_nll * t.statistics["tokens_per_positive"])


def vapo_nll_slope(t: Tokens, cfg: Config) -> Tensor:
    scale = -cfg.positive_nll * t.statistics["tokens_per_positive"]
    return scale.expand_as(t.lengths_B1)


# --- REAL (arXiv 2602.05630; ms-swift `real`): a group's responses as a classification
# log(1 + Σ_neg e^(s/τ)) + log(1 + Σ_pos e^(−s/τ)), s = mean log r, summed over the groups that have
# both signs, divided by the number of groups. |A| has no part in it.


def real_statistics(t: Tokens, cfg: Config) -> dict[str, Tensor]:
    """Non-empty sequences per group, the number that turns 1/S into 1/groups."""
    alive_B = t.lengths_B1[:, 0] > 0
    groups = max(len(t.groups_B[alive_B].unique()), 1)
    return {"sequences_per_group": alive_B.sum().to(t.lengths_B1.dtype) / groups}


def of_group(t: Tokens, cfg: Config, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """log(1 + Σ e^(∓s/τ)) over a sequence's own sign in its group, the sequence's share in it, and
    its exponent; `[B, 1]`. The share is 0 where the group lacks the other sign."""

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        alive_B = t.lengths_B1[:, 0] > 0
        positive_B = t.gain_BT.sum(-1) > 0
        mine_B = alive_B & (positive_B if sign > 0 else ~positive_B)
        others_B = alive_B & (~positive_B if sign > 0 else positive_B)
        group_B = t.groups_B.unique(return_inverse=True)[1]

        def in_group(x_B: Tensor) -> Tensor:
            """The sum over a sequence's group."""
            return x_B.new_zeros(len(x_B)).index_add(0, group_B, x_B)[group_B]

        mine_B, others_B = mine_B.to(t.lengths_B1.dtype), others_B.to(t.lengths_B1.dtype)
        mixed_B = (in_group(others_B) > 0) * mine_B
        exponent_B = t.log_sequence_ratio_B1[:, 0] * (-sign / cfg.real_tau)
        # e^x of the group's own sign, and e^0 for the 1; the largest of them is factored out
        largest_B = exponent_B.detach() * mine_B
        largest_B = largest_B.new_zeros(len(largest_B)).scatter_reduce(
            0, group_B, largest_B, "amax"
        )[group_B]
        inside_B = torch.where(mine_B > 0, exponent_B - largest_B, -math.inf).exp()
        value_B = largest_B + (in_group(inside_B) + (-largest_B).exp()).log()
        part_B = mixed_B / in_group(mine_B).clamp(min=1)
        return value_B[:, None], part_B[:, None], exponent_B[:, None]

    return t.once(f"group {sign}", compute)


def real_side(sign: int) -> Side:
    def extra(t: Tokens, cfg: Config) -> Tensor:
        """The group's term, spread evenly over the tokens of its sequences of this sign."""
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


def of_both_signs(name: str) -> TensorFn:
    """A group's term, or its slope, for both signs: each sign's is 0 at sequences of the other."""

    def both(t: Tokens, cfg: Config) -> Tensor:
        positive, negative = (
            getattr(side, name)(t, cfg) for side in (REAL_POSITIVE, REAL_NEGATIVE)
        )
        added: Tensor = positive + negative
        return added

    return both


def nothing(t: Tokens, cfg: Config) -> Tensor:
    return torch.zeros_like(t.lengths_B1)


REAL_POSITIVE, REAL_NEGATIVE = real_side(1), real_side(-1)
KL_COV = Side(token_ratio, token_ratio, free_clip, kl_cov_penalty, kl_cov_penalty_slope)

BATCH_BRANCHES: dict[str, Branch] = {
    "clip-cov": Branch(
        positive=Side(ppo_positive, token_ratio, clip_cov_positive_clip, drop=drawn),
        negative=Side(ppo_negative, token_ratio, clip_cov_negative_clip, drop=drawn),
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
        statistics_of_policy=False,
        source="arXiv 2504.05118 eq. 10; NeMo-RL",
    ),
    "real": Branch(
        positive=REAL_POSITIVE,
        negative=REAL_NEGATIVE,
        both=Side(
            nothing,
            nothing,
            extra=of_both_signs("extra"),
            extra_slope=of_both_signs("extra_slope"),
        ),
        c=("G·e^(−s/τ)/(1+Σ₊)/(τ|y|A)", "G·e^(s/τ)/(1+Σ₋)/(τ|y||A|)"),
        aggregations=("seq-mean-token-sum",),
        fields=("real_tau",),
        arguments=("groups",),
        coupled=True,
        up=False,
        refuses=("correction", "off_policy_limit", "top_entropy"),
        statistics=real_statistics,
        statistics_of_policy=False,
        source="arXiv 2602.05630; ms-swift real",
    ),
}
