"""The losses: for each, what one sign of the advantage contributes, and its gradient oracle.

Every loss here is `L_t = −A_t · f_t`. A *side* (one sign of A) is three functions of `Tokens` and
the config, each of a line or two:

- `surrogate`   f, differentiable.
- `coefficient` c, the oracle: with the aggregation's weight w_t, ∂loss/∂log π_θ(t) = −w_t·A_t·c_t.
                It is written from the paper's gradient, not by differentiating f.
- `clip`        (below, above): where f's own rule removes the gradient, by the bound that did it.

`[B, 1]` results belong to whole sequences. In a `coupled` loss, f of a sequence depends on all its
tokens; c is then the coefficient for an advantage that is constant in the sequence. Which sides
exist, which aggregations a loss is defined with and where it comes from is the table `BRANCHES`.
r, s, R: see `tokens.py`; sg: stop-gradient; εl, εh, C: `clip_low`, `clip_high`, `dual_clip`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_upgrpo.losses.tokens import MAX_LOG_RATIO, Tokens, guarded_exp

if TYPE_CHECKING:
    from moe_upgrpo.losses.config import PolicyLossConfig as Config

Bounds = tuple[Tensor | None, Tensor | None]


def no_clip(t: Tokens, cfg: "Config") -> Bounds:
    return None, None


def above(ratio: Tensor, log_ratio: Tensor, limit: float) -> Tensor:
    """ratio > limit; with no limit, where the overflow guard of `guarded_exp` binds."""
    return ratio > limit if limit < math.inf else log_ratio > MAX_LOG_RATIO


def within(ratio: Tensor, log_ratio: Tensor, low: float, high: float) -> Tensor:
    """ratio·1[low ≤ ratio ≤ high], and 0 beyond the overflow guard: the common shape of c."""
    keep = (ratio >= low) & (ratio <= high) & (log_ratio <= MAX_LOG_RATIO)
    return torch.where(keep, ratio, 0.0)


# --- UP's positive branch, and REINFORCE when it serves both signs ------------------------------


def log_likelihood(t: Tokens, cfg: "Config") -> Tensor:
    """f = log π, c = 1 (arXiv 2607.06987; verl `gpg`). Logged value: −A·log π."""
    return t.log_probs_BT


def self_ratio(t: Tokens, cfg: "Config") -> Tensor:
    """f = π/sg(π), c = 1: the same gradient. Logged value: −A, comparable with ratio losses."""
    return t.self_ratio_BT


def one(t: Tokens, cfg: "Config") -> Tensor:
    return torch.ones_like(t.advantages_BT)


# --- PPO/GRPO with dual clip (arXiv 1707.06347, 1912.09729; verl `vanilla`), DAPO ---------------
# min(rA, clip(r)A) is r cut at 1+εh for A > 0. For A < 0 it is r cut at 1−εl from below, which
# max(·, −A·C) then cuts at C: there εh never binds.


def ppo_positive(t: Tokens, cfg: "Config") -> Tensor:
    return t.ratio_BT.clamp(max=cfg.upper)


def ppo_positive_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return within(t.ratio_BT, t.log_ratio_BT, 0.0, cfg.upper)


def ppo_positive_clip(t: Tokens, cfg: "Config") -> Bounds:
    return None, above(t.ratio_BT, t.log_ratio_BT, cfg.upper)


def ppo_negative(t: Tokens, cfg: "Config") -> Tensor:
    return t.ratio_BT.clamp(cfg.lower, cfg.dual)


def ppo_negative_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return within(t.ratio_BT, t.log_ratio_BT, cfg.lower, cfg.dual)


def ppo_negative_clip(t: Tokens, cfg: "Config") -> Bounds:
    return t.ratio_BT < cfg.lower, above(t.ratio_BT, t.log_ratio_BT, cfg.dual)


# --- GSPO (arXiv 2507.18071): PPO's rule on s = (∏r)^(1/|y|), without a dual clip -----------------


def gspo_positive(t: Tokens, cfg: "Config") -> Tensor:
    return t.sequence_ratio_B1.clamp(max=cfg.upper)


def gspo_positive_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return within(t.sequence_ratio_B1, t.log_sequence_ratio_B1, 0.0, cfg.upper)


def gspo_positive_clip(t: Tokens, cfg: "Config") -> Bounds:
    return None, above(t.sequence_ratio_B1, t.log_sequence_ratio_B1, cfg.upper)


def gspo_negative(t: Tokens, cfg: "Config") -> Tensor:
    return t.sequence_ratio_B1.clamp(min=cfg.lower)


def gspo_negative_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return within(t.sequence_ratio_B1, t.log_sequence_ratio_B1, cfg.lower, math.inf)


def gspo_negative_clip(t: Tokens, cfg: "Config") -> Bounds:
    s, log_s = t.sequence_ratio_B1, t.log_sequence_ratio_B1
    return s < cfg.lower, above(s, log_s, math.inf)


# GSPO-token: s_t = sg(s)·π/sg(π), so that every token carries its own advantage and gradient.


def _gspo_token_ratio(t: Tokens) -> Tensor:
    own_log_ratio_BT = t.log_probs_BT - t.log_probs_BT.detach()
    return guarded_exp(t.log_sequence_ratio_B1.detach() + own_log_ratio_BT)


def gspo_token_positive(t: Tokens, cfg: "Config") -> Tensor:
    return _gspo_token_ratio(t).clamp(max=cfg.upper)


def gspo_token_negative(t: Tokens, cfg: "Config") -> Tensor:
    return _gspo_token_ratio(t).clamp(min=cfg.lower)


# --- TIC-GRPO (arXiv 2508.02833): the trajectory ratio R = ∏r, no 1/|y| ---------------------------
# f = R/|y| at each of the |y| tokens, so that a sequence sums to R and each token's gradient is R.


def _per_token(t: Tokens, whole_B1: Tensor) -> Tensor:
    return whole_B1 / t.lengths_B1.clamp(min=1)


def tic_upper(t: Tokens, cfg: "Config") -> Tensor:
    """min(R, 1+εh), whatever the sign."""
    return _per_token(t, t.trajectory_ratio_B1.clamp(max=cfg.upper))


def tic_upper_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return within(t.trajectory_ratio_B1, t.log_trajectory_ratio_B1, 0.0, cfg.upper)


def tic_upper_clip(t: Tokens, cfg: "Config") -> Bounds:
    return None, above(t.trajectory_ratio_B1, t.log_trajectory_ratio_B1, cfg.upper)


def tic_free(t: Tokens, cfg: "Config") -> Tensor:
    """min(R·A, min(R, 1+εh)·A) for A < 0, which is R·A: PPO's min undoes an upper-only clip."""
    return _per_token(t, t.trajectory_ratio_B1)


def tic_free_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return within(t.trajectory_ratio_B1, t.log_trajectory_ratio_B1, 0.0, math.inf)


def tic_free_clip(t: Tokens, cfg: "Config") -> Bounds:
    return None, above(t.trajectory_ratio_B1, t.log_trajectory_ratio_B1, math.inf)


# --- GMPO (arXiv 2507.20673; verl `geo_mean`): geometric mean of token ratios clipped in log space -


def gmpo_positive(t: Tokens, cfg: "Config") -> Tensor:
    return guarded_exp(t.mean_B1(t.log_ratio_BT.clamp(max=cfg.log_upper)))


def gmpo_positive_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    log_rho_B1 = t.mean_B1(t.log_ratio_BT.clamp(max=cfg.log_upper))
    keep_BT = (t.log_ratio_BT <= cfg.log_upper) & (log_rho_B1 <= MAX_LOG_RATIO)
    return torch.where(keep_BT, guarded_exp(log_rho_B1), 0.0)


def gmpo_positive_clip(t: Tokens, cfg: "Config") -> Bounds:
    mean_B1 = t.mean_B1(t.log_ratio_BT.clamp(max=cfg.log_upper))
    return None, (t.log_ratio_BT > cfg.log_upper) | (mean_B1 > MAX_LOG_RATIO)


def gmpo_negative(t: Tokens, cfg: "Config") -> Tensor:
    return guarded_exp(t.mean_B1(t.log_ratio_BT.clamp(min=cfg.log_lower)))


def gmpo_negative_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    log_rho_B1 = t.mean_B1(t.log_ratio_BT.clamp(min=cfg.log_lower))
    keep_BT = (t.log_ratio_BT >= cfg.log_lower) & (log_rho_B1 <= MAX_LOG_RATIO)
    return torch.where(keep_BT, guarded_exp(log_rho_B1), 0.0)


def gmpo_negative_clip(t: Tokens, cfg: "Config") -> Bounds:
    mean_B1 = t.mean_B1(t.log_ratio_BT.clamp(min=cfg.log_lower))
    return t.log_ratio_BT < cfg.log_lower, mean_B1 > MAX_LOG_RATIO


# --- CISPO (arXiv 2506.13585; verl `cispo`): the weight is truncated, the gradient never removed ---


def cispo(t: Tokens, cfg: "Config") -> Tensor:
    return t.ratio_BT.detach().clamp(cfg.lower, cfg.upper) * t.log_probs_BT


def cispo_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    return t.ratio_BT.clamp(cfg.lower, cfg.upper)


# --- DPPO (arXiv 2602.04879; verl `dppo_tv`, `dppo_kl`): drop tokens whose probability moved too far
# in the advantage's direction, by a binary divergence; the ratio is a truncated weight. -----------


def _probabilities(t: Tokens) -> tuple[Tensor, Tensor]:
    return (x.detach().clamp(max=0).exp() for x in (t.log_probs_BT, t.old_log_probs_BT))


def _moved_up_tv(t: Tokens, cfg: "Config") -> Bounds:
    p, p_old = _probabilities(t)
    return None, p - p_old > cfg.divergence_limit


def _moved_down_tv(t: Tokens, cfg: "Config") -> Bounds:
    p, p_old = _probabilities(t)
    return p - p_old < -cfg.divergence_limit, None


def binary_kl(p: Tensor, p_old: Tensor) -> Tensor:
    """KL(Bernoulli(p_old) ‖ Bernoulli(p)); 1e-8 under the second logarithm as in verl."""
    tiny = torch.finfo(p.dtype).tiny
    same = p_old * (p_old.clamp(min=tiny).log() - p.clamp(min=tiny).log())
    other = (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
    return same + other


def _moved_up_kl(t: Tokens, cfg: "Config") -> Bounds:
    p, p_old = _probabilities(t)
    return None, (binary_kl(p, p_old) > cfg.divergence_limit) & (p > p_old)


def _moved_down_kl(t: Tokens, cfg: "Config") -> Bounds:
    p, p_old = _probabilities(t)
    return (binary_kl(p, p_old) > cfg.divergence_limit) & (p < p_old), None


def _dppo(dropped: Callable[[Tokens, "Config"], Bounds]) -> "Side":
    def keep(t: Tokens, cfg: "Config") -> Tensor:
        below, above = dropped(t, cfg)
        return ~(above if below is None else below)

    def coefficient(t: Tokens, cfg: "Config") -> Tensor:
        """min(r, cap)·1[kept]"""
        return torch.where(keep(t, cfg), t.ratio_BT.detach().clamp(max=cfg.ratio_cap), 0.0)

    def surrogate(t: Tokens, cfg: "Config") -> Tensor:
        weight_BT = t.ratio_BT.detach().clamp(max=cfg.ratio_cap) * keep(t, cfg)
        return weight_BT * t.log_probs_BT

    return Side(surrogate, coefficient, dropped)


# --- TOPR (arXiv 2503.14286): negatives weighted by clip(∏ π/μ, 0, 1), μ the rollout policy --------


def _topr_weight(t: Tokens) -> Tensor:
    log_w_B1 = (t.raw_log_ratio_BT.detach() + t.log_rho_BT).sum(-1, keepdim=True)
    return log_w_B1.clamp(max=0).exp()


def topr_negative(t: Tokens, cfg: "Config") -> Tensor:
    return _topr_weight(t) * t.log_probs_BT


def topr_negative_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    log_w_B1 = (t.raw_log_ratio_BT + t.log_rho_BT).sum(-1, keepdim=True)
    return torch.where(log_w_B1 < 0, log_w_B1.exp(), 1.0)


# --- ASPO (arXiv 2510.06062; github wizard-III/Archer2.0, compute_policy_loss_archer): PPO's hard clip,
# then 1/r for positives, and a dual clip that caps the weight instead of removing the gradient. ----


def _aspo(log_q_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """value and gradient sg(w), the gradient stopping where log q was clamped."""
    return weight_BT * (log_q_BT - log_q_BT.detach()).exp()


def aspo_positive(t: Tokens, cfg: "Config") -> Tensor:
    log_q_BT = t.log_ratio_BT.clamp(max=cfg.log_of_upper)
    return _aspo(log_q_BT, guarded_exp(-log_q_BT.detach()).clamp(max=cfg.dual))


def aspo_positive_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    keep_BT = t.log_ratio_BT <= cfg.log_of_upper
    return torch.where(keep_BT, guarded_exp(-t.log_ratio_BT).clamp(max=cfg.dual), 0.0)


def aspo_positive_clip(t: Tokens, cfg: "Config") -> Bounds:
    return None, t.log_ratio_BT > cfg.log_of_upper


def aspo_negative(t: Tokens, cfg: "Config") -> Tensor:
    log_q_BT = t.log_ratio_BT.clamp(min=cfg.log_of_lower)
    return _aspo(log_q_BT, guarded_exp(log_q_BT.detach()).clamp(max=cfg.dual))


def aspo_negative_coefficient(t: Tokens, cfg: "Config") -> Tensor:
    keep_BT = t.log_ratio_BT >= cfg.log_of_lower
    return torch.where(keep_BT, t.ratio_BT.clamp(max=cfg.dual), 0.0)


def aspo_negative_clip(t: Tokens, cfg: "Config") -> Bounds:
    return t.log_ratio_BT < cfg.log_of_lower, None


# --- SAPO (arXiv 2511.20347; verl `sapo`): a sigmoid gate of width 1/τ instead of a clip ----------


def _sapo(temperature: str) -> "Side":
    def surrogate(t: Tokens, cfg: "Config") -> Tensor:
        """4/τ·σ(τ(r−1))"""
        tau = getattr(cfg, temperature)
        return torch.sigmoid(tau * (t.ratio_BT - 1)) * (4 / tau)

    def coefficient(t: Tokens, cfg: "Config") -> Tensor:
        """4σ(1−σ)·r"""
        gate_BT = torch.sigmoid(getattr(cfg, temperature) * (t.ratio_BT - 1))
        return 4 * gate_BT * (1 - gate_BT) * t.ratio_BT

    return Side(surrogate, coefficient, no_clip)


# --- r^γ: γ = 1 unclipped GRPO, γ = 0 REINFORCE; γ₊ = 0 is UP's positive branch -------------------


def _power(exponent: str) -> "Side":
    def coefficient(t: Tokens, cfg: "Config") -> Tensor:
        return guarded_exp(getattr(cfg, exponent) * t.log_ratio_BT)

    def surrogate(t: Tokens, cfg: "Config") -> Tensor:
        """sg(r^γ)·π/sg(π)"""
        return guarded_exp(getattr(cfg, exponent) * t.log_ratio_BT.detach()) * t.self_ratio_BT

    return Side(surrogate, coefficient, no_clip)


# --- the tables --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One sign of the advantage under one loss; see the head of this file."""

    surrogate: Callable[[Tokens, "Config"], Tensor]
    coefficient: Callable[[Tokens, "Config"], Tensor]
    clip: Callable[[Tokens, "Config"], Bounds]


ANY = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A loss as data.

    positive, negative: the sides it can serve; None where it has none of its own.
    aggregations: those it is defined with, the source's own first.
    fields: the config fields it reads (they are what the docs table lists).
    coupled: f of a sequence depends on all its tokens, so token-level weights do not apply.
    """

    positive: Side | None
    negative: Side | None
    aggregations: tuple[str, ...] = ANY
    fields: tuple[str, ...] = ()
    coupled: bool = False
    source: str


def _starting_with(first: str) -> tuple[str, ...]:
    return (first, *(name for name in ANY if name != first))


_LIKELIHOOD = Side(log_likelihood, one, no_clip)
_SELF_RATIO = Side(self_ratio, one, no_clip)
_PPO_POSITIVE = Side(ppo_positive, ppo_positive_coefficient, ppo_positive_clip)
_TIC_UPPER = Side(tic_upper, tic_upper_coefficient, tic_upper_clip)
_CISPO = Side(cispo, cispo_coefficient, no_clip)

BRANCHES: dict[str, Branch] = {
    "log-likelihood": Branch(
        positive=_LIKELIHOOD, negative=_LIKELIHOOD, source="arXiv 2607.06987; verl gpg"
    ),
    "self-ratio": Branch(positive=_SELF_RATIO, negative=_SELF_RATIO, source="arXiv 2607.06987"),
    "ppo": Branch(
        positive=_PPO_POSITIVE,
        negative=Side(ppo_negative, ppo_negative_coefficient, ppo_negative_clip),
        fields=("clip_low", "clip_high", "dual_clip"),
        source="arXiv 1707.06347, 1912.09729; verl vanilla",
    ),
    "gspo": Branch(
        positive=Side(gspo_positive, gspo_positive_coefficient, gspo_positive_clip),
        negative=Side(gspo_negative, gspo_negative_coefficient, gspo_negative_clip),
        aggregations=("seq-mean-token-mean",),
        fields=("clip_low", "clip_high"),
        coupled=True,
        source="arXiv 2507.18071",
    ),
    "gspo-token": Branch(
        positive=Side(gspo_token_positive, gspo_positive_coefficient, gspo_positive_clip),
        negative=Side(gspo_token_negative, gspo_negative_coefficient, gspo_negative_clip),
        aggregations=_starting_with("seq-mean-token-mean"),
        fields=("clip_low", "clip_high"),
        source="arXiv 2507.18071; verl gspo",
    ),
    "tic-upper": Branch(
        positive=_TIC_UPPER,
        negative=_TIC_UPPER,
        aggregations=("seq-mean-token-sum",),
        fields=("clip_high",),
        coupled=True,
        source="arXiv 2508.02833, min(R, 1+ε)·A",
    ),
    "tic-min": Branch(
        positive=_TIC_UPPER,
        negative=Side(tic_free, tic_free_coefficient, tic_free_clip),
        aggregations=("seq-mean-token-sum",),
        fields=("clip_high",),
        coupled=True,
        source="arXiv 2508.02833, min(R·A, min(R, 1+ε)·A)",
    ),
    "gmpo": Branch(
        positive=Side(gmpo_positive, gmpo_positive_coefficient, gmpo_positive_clip),
        negative=Side(gmpo_negative, gmpo_negative_coefficient, gmpo_negative_clip),
        aggregations=("seq-mean-token-mean",),
        fields=("clip_low", "clip_high"),
        coupled=True,
        source="arXiv 2507.20673; verl geo_mean",
    ),
    "cispo": Branch(
        positive=_CISPO,
        negative=_CISPO,
        fields=("clip_low", "clip_high"),
        source="arXiv 2506.13585; verl cispo",
    ),
    "dppo-tv": Branch(
        positive=_dppo(_moved_up_tv),
        negative=_dppo(_moved_down_tv),
        fields=("divergence_limit", "ratio_cap"),
        source="arXiv 2602.04879; verl dppo_tv",
    ),
    "dppo-kl": Branch(
        positive=_dppo(_moved_up_kl),
        negative=_dppo(_moved_down_kl),
        fields=("divergence_limit", "ratio_cap"),
        source="arXiv 2602.04879; verl dppo_kl",
    ),
    "topr": Branch(
        positive=_LIKELIHOOD,
        negative=Side(topr_negative, topr_negative_coefficient, no_clip),
        aggregations=_starting_with("seq-mean-token-sum"),
        source="arXiv 2503.14286",
    ),
    "aspo": Branch(
        positive=Side(aspo_positive, aspo_positive_coefficient, aspo_positive_clip),
        negative=Side(aspo_negative, aspo_negative_coefficient, aspo_negative_clip),
        fields=("clip_low", "clip_high", "dual_clip"),
        source="arXiv 2510.06062; wizard-III/Archer2.0 compute_policy_loss_archer",
    ),
    "sapo": Branch(
        positive=_sapo("sapo_tau_positive"),
        negative=_sapo("sapo_tau_negative"),
        aggregations=_starting_with("seq-mean-token-mean"),
        fields=("sapo_tau_positive", "sapo_tau_negative"),
        source="arXiv 2511.20347; verl sapo",
    ),
    "power": Branch(
        positive=_power("power_positive"),
        negative=_power("power_negative"),
        fields=("power_positive", "power_negative"),
        source="derived: c = r^γ",
    ),
}
