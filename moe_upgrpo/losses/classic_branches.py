# SPDX-License-Identifier: Apache-2.0
"""Losses on a token's or a sequence's ratio: what each sign of the advantage contributes, and c.

The contract is `side.py`; the table of all losses is `branches.py`.
r, s, R: see `tokens.py`; sg: stop-gradient; εl, εh, C: `clip_low`, `clip_high`, `dual_clip`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.passes import clamp, exceeds, falls_below, ratio_to_itself
from moe_upgrpo.losses.side import (
    Branch,
    Side,
    above,
    kept,
    one,
    sequence_ratio,
    starting_with,
    token_ratio,
    trajectory_ratio,
)
from moe_upgrpo.losses.tokens import MAX_LOG_RATIO, Tokens, guarded_exp

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_upgrpo.losses.config import PolicyLossConfig as Config
    from moe_upgrpo.losses.side import Bounds, TensorFn


# --- UP's positive branch, and REINFORCE when it serves both signs


def log_likelihood(t: Tokens, cfg: Config) -> Tensor:
    """f = log π, c = 1 (arXiv 2607.06987; verl `gpg`). Logged value: −A·log π."""
    return t.log_probs_BT


def self_ratio(t: Tokens, cfg: Config) -> Tensor:
    """f = π/sg(π), c = 1: the same gradient. Logged value: −A, comparable with ratio losses."""
    return t.self_ratio_BT


# --- PPO/GRPO with dual clip (arXiv 1707.06347, 1912.09729; verl `vanilla`), DAPO
# min(rA, clip(r)A) is r cut at 1+εh for A > 0. For A < 0 it is r cut at 1−εl from below, which
# max(·, −A·C) then cuts at C: there εh never binds.


def ppo_positive(t: Tokens, cfg: Config) -> Tensor:
    return clamp(t.ratio_BT, high=cfg.upper)


def ppo_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, above(t.ratio_BT, t.log_ratio_BT, cfg.upper)


def ppo_negative(t: Tokens, cfg: Config) -> Tensor:
    return clamp(t.ratio_BT, cfg.lower, cfg.dual)


def ppo_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    return falls_below(t.ratio_BT, cfg.lower), above(t.ratio_BT, t.log_ratio_BT, cfg.dual)


# --- GSPO (arXiv 2507.18071): PPO's rule on s = (∏r)^(1/|y|), without a dual clip


def gspo_positive(t: Tokens, cfg: Config) -> Tensor:
    return t.sequence_ratio_B1.clamp(max=cfg.upper)


def gspo_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, above(t.sequence_ratio_B1, t.log_sequence_ratio_B1, cfg.upper)


def gspo_negative(t: Tokens, cfg: Config) -> Tensor:
    return t.sequence_ratio_B1.clamp(min=cfg.lower)


def gspo_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    s_B1, log_s_B1 = t.sequence_ratio_B1, t.log_sequence_ratio_B1
    return s_B1 < cfg.lower, above(s_B1, log_s_B1, math.inf)


# GSPO-token: s_t = sg(s)·π/sg(π), so that every token carries its own advantage and gradient.


def gspo_token_positive(t: Tokens, cfg: Config) -> Tensor:
    return clamp(t.token_sequence_ratio_BT, high=cfg.upper)


def gspo_token_negative(t: Tokens, cfg: Config) -> Tensor:
    return clamp(t.token_sequence_ratio_BT, low=cfg.lower)


# --- TIC-GRPO (arXiv 2508.02833): the trajectory ratio R = ∏r, no 1/|y|
# f = R/|y| at each of the |y| tokens, so that a sequence sums to R and each token's gradient is R.


def tic_upper(t: Tokens, cfg: Config) -> Tensor:
    """min(R, 1+εh), whatever the sign."""
    return t.trajectory_ratio_B1.clamp(max=cfg.upper) / t.lengths_B1.clamp(min=1)


def tic_upper_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, above(t.trajectory_ratio_B1, t.log_trajectory_ratio_B1, cfg.upper)


def tic_free(t: Tokens, cfg: Config) -> Tensor:
    """min(R·A, min(R, 1+εh)·A) for A < 0, which is R·A: PPO's min undoes an upper-only clip."""
    return t.trajectory_ratio_B1 / t.lengths_B1.clamp(min=1)


def tic_free_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, above(t.trajectory_ratio_B1, t.log_trajectory_ratio_B1, math.inf)


# --- GMPO (arXiv 2507.20673; verl `geo_mean`): ρ, the geometric mean of ratios clipped in log space


@kept
def gmpo_log_positive(t: Tokens, cfg: Config) -> Tensor:
    """log ρ"""
    return t.mean_B1(clamp(t.log_ratio_BT, high=cfg.log_space_upper))


def gmpo_positive(t: Tokens, cfg: Config) -> Tensor:
    return guarded_exp(gmpo_log_positive(t, cfg))


def gmpo_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    beyond_B1 = gmpo_log_positive(t, cfg) > MAX_LOG_RATIO
    return None, exceeds(t.log_ratio_BT, cfg.log_space_upper) | beyond_B1


@kept
def gmpo_log_negative(t: Tokens, cfg: Config) -> Tensor:
    """log ρ"""
    return t.mean_B1(clamp(t.log_ratio_BT, low=cfg.log_space_lower))


def gmpo_negative(t: Tokens, cfg: Config) -> Tensor:
    return guarded_exp(gmpo_log_negative(t, cfg))


def gmpo_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    below_BT = falls_below(t.log_ratio_BT, cfg.log_space_lower)
    return below_BT, gmpo_log_negative(t, cfg) > MAX_LOG_RATIO


# --- CISPO (arXiv 2506.13585; verl `cispo`): a truncated weight; no token loses its gradient


def cispo_weight(t: Tokens, cfg: Config) -> Tensor:
    return t.ratio_BT.detach().clamp(cfg.lower, cfg.upper)


def cispo(t: Tokens, cfg: Config) -> Tensor:
    return cispo_weight(t, cfg) * t.log_probs_BT


# --- DPPO (arXiv 2602.04879; verl `dppo_tv`, `dppo_kl`): the ratio is a truncated weight; tokens
# whose probability moved too far in the advantage's direction, by a binary divergence, are dropped


def dppo_weight(t: Tokens, cfg: Config) -> Tensor:
    return t.ratio_BT.detach().clamp(max=cfg.ratio_cap)


def dppo(t: Tokens, cfg: Config) -> Tensor:
    return dppo_weight(t, cfg) * t.log_probs_BT


def moved_tv(t: Tokens, cfg: Config) -> tuple[Tensor, Tensor]:
    """Where π − π_old is above δ, and where it is below −δ"""

    def compute() -> tuple[Tensor, Tensor]:
        p, p_old = t.probabilities()
        moved_BT, limit = p.sub_(p_old), cfg.divergence_limit
        return exceeds(moved_BT, limit), falls_below(moved_BT, -limit)

    found: tuple[Tensor, Tensor] = t.once("moved", compute)
    return found


def moved_up_tv(t: Tokens, cfg: Config) -> Tensor:
    return moved_tv(t, cfg)[0]


def moved_down_tv(t: Tokens, cfg: Config) -> Tensor:
    return moved_tv(t, cfg)[1]


def binary_kl(p: Tensor, p_old: Tensor) -> Tensor:
    """KL(Bernoulli(p_old) ‖ Bernoulli(p)); 1e-8 under the second logarithm as in verl."""
    tiny = torch.finfo(p.dtype).tiny
    taken = p_old * (p_old.clamp(min=tiny).log() - p.clamp(min=tiny).log())
    return taken + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()


@kept
def far_kl(t: Tokens, cfg: Config) -> Tensor:
    return binary_kl(*t.probabilities()) > cfg.divergence_limit


@kept
def moved_up_kl(t: Tokens, cfg: Config) -> Tensor:
    return far_kl(t, cfg) & (t.raw_log_ratio_BT.detach() > 0)


@kept
def moved_down_kl(t: Tokens, cfg: Config) -> Tensor:
    return far_kl(t, cfg) & (t.raw_log_ratio_BT.detach() < 0)


def dppo_side(dropped: TensorFn, *, upwards: bool) -> Side:
    def clip(t: Tokens, cfg: Config) -> Bounds:
        return (None, dropped(t, cfg)) if upwards else (dropped(t, cfg), None)

    return Side(dppo, dppo_weight, clip, weight=dppo_weight, drop=dropped)


def by_sign(upwards: TensorFn, downwards: TensorFn) -> TensorFn:
    """Where `upwards` holds for A > 0, and `downwards` elsewhere."""

    def dropped(t: Tokens, cfg: Config) -> Tensor:
        up_BT, down_BT = upwards(t, cfg), downwards(t, cfg)
        return (up_BT & t.positive_BT) | (down_BT & ~t.positive_BT)

    return dropped


def dppo_both(upwards: TensorFn, downwards: TensorFn) -> Side:
    return dppo_side(by_sign(upwards, downwards), upwards=True)


# --- TOPR (arXiv 2503.14286): negatives weighted by clip(∏ π/μ, 0, 1), μ the rollout policy


@kept
def topr_weight(t: Tokens, cfg: Config) -> Tensor:
    log_weight_B1 = (t.raw_log_ratio_BT.detach() + t.log_rho_BT).sum(-1, keepdim=True)
    return log_weight_B1.clamp(max=0).exp()


def topr_negative(t: Tokens, cfg: Config) -> Tensor:
    return topr_weight(t, cfg) * t.log_probs_BT


# --- ASPO (arXiv 2510.06062; github wizard-III/Archer2.0, `compute_policy_loss_archer`): PPO's hard
# clip, then 1/r for positives, and a dual clip that caps the weight but keeps the gradient


def aspo_positive_weight(t: Tokens, cfg: Config) -> Tensor:
    log_ratio_BT = t.log_ratio_BT.detach().clamp(max=cfg.log_of_upper)
    return guarded_exp(log_ratio_BT.neg_()).clamp_(max=cfg.dual)


def aspo_positive(t: Tokens, cfg: Config) -> Tensor:
    return ratio_to_itself(t.log_ratio_BT, high=cfg.log_of_upper)


def aspo_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, exceeds(t.log_ratio_BT, cfg.log_of_upper)


def aspo_negative_weight(t: Tokens, cfg: Config) -> Tensor:
    return t.ratio_BT.detach().clamp(cfg.lower, cfg.dual)


def aspo_negative(t: Tokens, cfg: Config) -> Tensor:
    return ratio_to_itself(t.log_ratio_BT, low=cfg.log_of_lower)


def aspo_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    return falls_below(t.log_ratio_BT, cfg.log_of_lower), None


# --- SAPO (arXiv 2511.20347; verl `sapo`): a sigmoid gate of width 1/τ instead of a clip


def sapo_side(temperature: Callable[[Tokens, Config], Tensor | float]) -> Side:
    @kept
    def gate(t: Tokens, cfg: Config) -> Tensor:
        return torch.sigmoid((t.ratio_BT - 1) * temperature(t, cfg))

    def surrogate(t: Tokens, cfg: Config) -> Tensor:
        """4/τ·σ(τ(r−1))"""
        return gate(t, cfg) * (4 / temperature(t, cfg))

    def slope(t: Tokens, cfg: Config) -> Tensor:
        """4σ(1−σ)·r"""
        sigma_BT = gate(t, cfg)
        return torch.addcmul(sigma_BT, sigma_BT, sigma_BT, value=-1).mul_(t.ratio_BT).mul_(4)

    return Side(surrogate, slope)


@kept
def sapo_temperature(t: Tokens, cfg: Config) -> Tensor:
    """τ of each token"""
    return t.by_sign(cfg.sapo_tau_positive, cfg.sapo_tau_negative)


# --- r^γ: γ = 1 unclipped GRPO, γ = 0 REINFORCE; γ₊ = 0 is UP's positive branch


def power_side(exponent: str) -> Side:
    @kept
    def weight(t: Tokens, cfg: Config) -> Tensor:
        gamma = getattr(cfg, exponent)
        if gamma in (0, 1):
            return one(t, cfg) if gamma == 0 else t.ratio_BT.detach()
        return guarded_exp(gamma * t.log_ratio_BT.detach())

    def surrogate(t: Tokens, cfg: Config) -> Tensor:
        """sg(r^γ)·π/sg(π)"""
        return weight(t, cfg) * t.self_ratio_BT

    return Side(surrogate, weight)


# --- the table

LIKELIHOOD = Side(log_likelihood, one, weight=one)
SELF_RATIO = Side(self_ratio, one)
TIC_UPPER = Side(tic_upper, trajectory_ratio, tic_upper_clip)
CISPO = Side(cispo, cispo_weight, weight=cispo_weight)

CLASSIC_BRANCHES: dict[str, Branch] = {
    "log-likelihood": Branch(
        positive=LIKELIHOOD,
        negative=LIKELIHOOD,
        c=("1", "1"),
        up=False,
        source="arXiv 2607.06987; verl gpg",
    ),
    "self-ratio": Branch(
        positive=SELF_RATIO,
        negative=SELF_RATIO,
        c=("1", "1"),
        up=False,
        source="arXiv 2607.06987",
    ),
    "ppo": Branch(
        positive=Side(ppo_positive, token_ratio, ppo_positive_clip),
        negative=Side(ppo_negative, token_ratio, ppo_negative_clip),
        c=("r·1[r ≤ 1+εh]", "r·1[1−εl ≤ r ≤ C]"),
        fields=("clip_low", "clip_high", "dual_clip"),
        source="arXiv 1707.06347, 1912.09729; verl vanilla",
    ),
    "gspo": Branch(
        positive=Side(gspo_positive, sequence_ratio, gspo_positive_clip),
        negative=Side(gspo_negative, sequence_ratio, gspo_negative_clip),
        c=("s·1[s ≤ 1+εh]", "s·1[s ≥ 1−εl]"),
        aggregations=("seq-mean-token-mean",),
        fields=("clip_low", "clip_high"),
        coupled=True,
        source="arXiv 2507.18071",
    ),
    "gspo-token": Branch(
        positive=Side(gspo_token_positive, sequence_ratio, gspo_positive_clip),
        negative=Side(gspo_token_negative, sequence_ratio, gspo_negative_clip),
        c=("s·1[s ≤ 1+εh]", "s·1[s ≥ 1−εl]"),
        aggregations=starting_with("seq-mean-token-mean"),
        fields=("clip_low", "clip_high"),
        source="arXiv 2507.18071; verl gspo",
    ),
    "tic-upper": Branch(
        positive=TIC_UPPER,
        negative=TIC_UPPER,
        c=("R·1[R ≤ 1+εh]", "R·1[R ≤ 1+εh]"),
        aggregations=("seq-mean-token-sum",),
        fields=("clip_high",),
        coupled=True,
        source="arXiv 2508.02833 read as min(R, 1+ε)·A",
    ),
    "tic-min": Branch(
        positive=TIC_UPPER,
        negative=Side(tic_free, trajectory_ratio, tic_free_clip),
        c=("R·1[R ≤ 1+εh]", "R"),
        aggregations=("seq-mean-token-sum",),
        fields=("clip_high",),
        coupled=True,
        source="arXiv 2508.02833 read as min(R·A, min(R, 1+ε)·A)",
    ),
    "gmpo": Branch(
        positive=Side(gmpo_positive, gmpo_positive, gmpo_positive_clip),
        negative=Side(gmpo_negative, gmpo_negative, gmpo_negative_clip),
        c=("ρ·1[log r ≤ εh]", "ρ·1[log r ≥ −εl]"),
        aggregations=("seq-mean-token-mean",),
        fields=("clip_low", "clip_high"),
        coupled=True,
        source="arXiv 2507.20673; verl geo_mean",
    ),
    "cispo": Branch(
        positive=CISPO,
        negative=CISPO,
        c=("clip(r, 1−εl, 1+εh)", "clip(r, 1−εl, 1+εh)"),
        fields=("clip_low", "clip_high"),
        source="arXiv 2506.13585; verl cispo",
    ),
    "dppo-tv": Branch(
        positive=dppo_side(moved_up_tv, upwards=True),
        negative=dppo_side(moved_down_tv, upwards=False),
        both=dppo_both(moved_up_tv, moved_down_tv),
        c=("min(r, cap)·1[π−π_old ≤ δ]", "min(r, cap)·1[π−π_old ≥ −δ]"),
        fields=("divergence_limit", "ratio_cap"),
        source="arXiv 2602.04879; verl dppo_tv",
    ),
    "dppo-kl": Branch(
        positive=dppo_side(moved_up_kl, upwards=True),
        negative=dppo_side(moved_down_kl, upwards=False),
        both=dppo_both(moved_up_kl, moved_down_kl),
        c=("min(r, cap)·1[kl ≤ δ or π ≤ π_old]", "min(r, cap)·1[kl ≤ δ or π ≥ π_old]"),
        fields=("divergence_limit", "ratio_cap"),
        source="arXiv 2602.04879; verl dppo_kl",
    ),
    "topr": Branch(
        positive=LIKELIHOOD,
        negative=Side(topr_negative, topr_weight, weight=topr_weight),
        c=("1", "min(∏π/μ, 1)"),
        aggregations=starting_with("seq-mean-token-sum"),
        arguments=("rollout_log_probs",),
        up=False,
        source="arXiv 2503.14286",
    ),
    "aspo": Branch(
        positive=Side(aspo_positive, one, aspo_positive_clip, factor=aspo_positive_weight),
        negative=Side(aspo_negative, one, aspo_negative_clip, factor=aspo_negative_weight),
        c=("min(1/r, C)·1[r ≤ 1+εh]", "min(r, C)·1[r ≥ 1−εl]"),
        fields=("clip_low", "clip_high", "dual_clip"),
        source="arXiv 2510.06062; wizard-III/Archer2.0",
    ),
    "sapo": Branch(
        positive=sapo_side(lambda t, cfg: cfg.sapo_tau_positive),
        negative=sapo_side(lambda t, cfg: cfg.sapo_tau_negative),
        both=sapo_side(sapo_temperature),
        c=("4σ(1−σ)·r, σ = σ(τ₊(r−1))", "4σ(1−σ)·r, σ = σ(τ₋(r−1))"),
        aggregations=starting_with("seq-mean-token-mean"),
        fields=("sapo_tau_positive", "sapo_tau_negative"),
        source="arXiv 2511.20347; verl sapo",
    ),
    "power": Branch(
        positive=power_side("power_positive"),
        negative=power_side("power_negative"),
        c=("r^γ₊", "r^γ₋"),
        fields=("power_positive", "power_negative"),
        source="derived: c = r^γ",
    ),
}
