"""Rollout correction: detached weights from ρ = π_old/μ, for the sides of the loss that ask for it.

ρ corrects for the engine not being the trainer; r = π_θ/π_old stays the loss's own business. With
no rollout log-probs π_old stands for μ and ρ ≡ 1. See `tokens.py` for shapes and policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.losses.tokens import Tokens, guarded_exp

if TYPE_CHECKING:
    from torch import Tensor


def plain(rho: Tensor, low: float | None, high: float | None) -> Tensor:
    """ρ: decoupled PPO (arXiv 2110.00641)."""
    return rho


def truncate(rho: Tensor, low: float | None, high: float) -> Tensor:
    """min(ρ, high): truncated importance sampling."""
    return rho.clamp(max=high)


def mask_out(rho: Tensor, low: float, high: float) -> Tensor:
    """ρ·1[low ≤ ρ ≤ high]: masked importance sampling, IcePop."""
    return torch.where((rho >= low) & (rho <= high), rho, 0.0)


@dataclass(frozen=True)
class Weight:
    """level: ρ_t of each token, or ∏_t ρ_t of the sequence; low and high: default bounds, None
    where the rule has none."""

    level: str
    rule: Callable[[Tensor, Any, Any], Tensor]
    low: float | None = None
    high: float | None = None


WEIGHTS: dict[str, Weight] = {
    "decoupled": Weight("token", plain),
    "token-tis": Weight("token", truncate, high=2.0),
    "sequence-tis": Weight("sequence", truncate, high=2.0),
    "token-mis": Weight("token", mask_out, low=0.5, high=2.0),
    "sequence-mis": Weight("sequence", mask_out, low=0.5, high=2.0),
    "icepop": Weight("token", mask_out, low=0.5, high=5.0),
}


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Which weights and rejections apply, and to which sign of the advantage.

    On the positive branch of UP any weight brings μ back in, which is what that branch leaves out;
    it is therefore off there unless asked for.
    """

    weight: str = "none"
    """none, decoupled, token-tis, sequence-tis, token-mis, sequence-mis or icepop."""
    low: float | None = None
    """Lower bound of the weight; None: the rule's own (mis .5, icepop .5)."""
    high: float | None = None
    """Upper bound of the weight; None: the rule's own (tis 2, mis 2, icepop 5)."""
    geometric: tuple[float, float] | None = None
    """Keep sequences with exp(mean log ρ) in these bounds (usual: .999 1.001); None: keep all."""
    k3: float | None = None
    """Keep sequences with mean(ρ − log ρ − 1) at most this (usual: .01); None: keep all."""
    veto: float | None = None
    """Drop sequences that have a token with ρ below this (usual: 1e-4); None: keep all."""
    positive: bool = False
    """Apply to tokens with A > 0."""
    negative: bool = True
    """Apply to tokens with A < 0."""

    def __post_init__(self) -> None:
        if self.weight != "none" and self.weight not in WEIGHTS:
            raise UserError(
                f"correction.weight: {self.weight!r} given; allowed: none, {', '.join(WEIGHTS)}"
            )
        low, high = self.bounds
        if (low is not None and low < 0) or (high is not None and high < (low or 0.0)):
            raise UserError(
                f"correction.low, correction.high: {low}, {high} given; allowed: 0 <= low <= high"
            )
        if self.geometric is not None and not 0 < self.geometric[0] <= self.geometric[1]:
            raise UserError(
                f"correction.geometric: {self.geometric} given; allowed: 0 < low <= high"
            )
        for name in ("k3", "veto"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"correction.{name}: {value} given; allowed: a number > 0, or None")

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        rule = WEIGHTS.get(self.weight, Weight("token", plain))
        low = rule.low if self.low is None else self.low
        return low, rule.high if self.high is None else self.high

    @property
    def active(self) -> bool:
        rejects = (self.geometric, self.k3, self.veto) != (None, None, None)
        return (self.weight != "none" or rejects) and (self.positive or self.negative)

    @property
    def token_level(self) -> bool:
        return self.weight != "none" and WEIGHTS[self.weight].level == "token"


def correction_weights(t: Tokens, correction: RolloutCorrection) -> tuple[Tensor, Tensor]:
    """The factor on the loss and where a rule made it 0, each `[B, T]` or `[B, 1]`."""
    log_rho_BT = t.log_rho_BT
    weight = torch.ones_like(t.lengths_B1)
    if correction.weight != "none":
        rule = WEIGHTS[correction.weight]
        log_rho = log_rho_BT if rule.level == "token" else log_rho_BT.sum(-1, keepdim=True)
        weight = rule.rule(guarded_exp(log_rho), *correction.bounds)
    keep_B1 = torch.ones_like(t.lengths_B1, dtype=torch.bool)
    if correction.geometric is not None:
        low, high = correction.geometric
        geometric_B1 = guarded_exp(t.mean_B1(log_rho_BT))
        keep_B1 = keep_B1 & (geometric_B1 >= low) & (geometric_B1 <= high)
    if correction.k3 is not None:
        k3_BT = k3(torch.zeros_like(log_rho_BT), log_rho_BT)
        keep_B1 = keep_B1 & (t.mean_B1(k3_BT) <= correction.k3)
    if correction.veto is not None:
        keep_B1 = keep_B1 & ~(guarded_exp(log_rho_BT) < correction.veto).any(-1, keepdim=True)
    masked_out = weight == 0 if correction.bounds[0] is not None else torch.zeros_like(keep_B1)
    return weight * keep_B1, masked_out | ~keep_B1


def off_policy_sequences(t: Tokens, limit: float) -> Tensor:
    """`[B, 1]` bool: mean_t(log μ − log π_θ) > limit (DeepSeek-V3.2, arXiv 2512.02556).

    μ is the engine's log-prob, so that both sources of off-policyness count: the engine's
    difference and the updates since.
    """
    return -t.mean_B1(t.raw_log_ratio_BT.detach() + t.log_rho_BT) > limit


def log_router_shift(current_BTLK: Tensor, old_BTLK: Tensor, floor: float) -> Tensor:
    """log γ `[B, T]` of RSPO (arXiv 2510.23027): γ = max(exp(−mean_{l,k} |Δ log p|), floor).

    Args:
        current_BTLK, old_BTLK: router log-probs, under the current and the old weights, of the
            experts that the old policy activated.
        floor: γ_min in (0, 1]. The weight multiplies r before any clip; it carries no gradient.
    """
    if current_BTLK.shape != old_BTLK.shape or current_BTLK.dim() != 4:
        raise UserError(
            f"router_log_probs: shapes {tuple(current_BTLK.shape)} and {tuple(old_BTLK.shape)} "
            "given; allowed: two equal shapes [B, T, L, K]"
        )
    dtype = torch.promote_types(current_BTLK.dtype, torch.float32)
    shift_BTLK = (current_BTLK.detach().to(dtype) - old_BTLK.detach().to(dtype)).abs()
    return (-shift_BTLK.flatten(2).mean(-1)).clamp(min=math.log(floor))
