# SPDX-License-Identifier: Apache-2.0
"""Rollout correction: detached weights from ρ = π_old/μ, for the sides of the loss that ask for it.

ρ corrects for the difference between engine and trainer; r = π_θ/π_old is left to the loss. Without
rollout log-probs, π_old stands for μ and ρ ≡ 1. See `tokens.py` for shapes and policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.classic_branches import binary_kl
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.losses.names import check_name
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


def keep_within(rho: Tensor, low: float, high: float) -> Tensor:
    """1[low ≤ ρ ≤ high]: a mask without a weight."""
    return ((rho >= low) & (rho <= high)).to(rho.dtype)


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
    "token-mask": Weight("token", keep_within, low=0.5, high=2.0),
    "sequence-mask": Weight("sequence", keep_within, low=0.5, high=2.0),
}


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Which weights and rejections apply, and to which sign of the advantage.

    On the positive branch of UP any weight brings μ back in, which is what that branch leaves out;
    it is therefore off there unless asked for.
    """

    weight: str = "none"
    """none, decoupled, token-tis, sequence-tis, token-mis, sequence-mis, icepop, token-mask or
    sequence-mask."""
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
    outlier: float | None = None
    """Drop sequences that have a token with ρ above this (usual: 100); None: keep all."""
    m2: float | None = None
    """M2PO: drop the batch's tokens of largest (log ρ)² until the mean of the rest is below this
    (usual: .04); None: keep all."""
    binary_kl: float | None = None
    """KPop: drop tokens whose binary KL between π_old and μ, either way round, is above this; None:
    keep all."""
    positive: bool = False
    """Apply to tokens with A > 0."""
    negative: bool = True
    """Apply to tokens with A < 0."""

    def __post_init__(self) -> None:
        check_name("correction.weight", self.weight, ("none", *WEIGHTS))
        low, high = self.bounds
        if (low is not None and low < 0) or (high is not None and high < (low or 0.0)):
            raise UserError(
                f"correction.low, correction.high: {low}, {high} given; allowed: 0 <= low <= high"
            )
        if self.geometric is not None and not 0 < self.geometric[0] <= self.geometric[1]:
            raise UserError(
                f"correction.geometric: {self.geometric} given; allowed: 0 < low <= high"
            )
        for name in ("k3", "veto", "outlier", "m2", "binary_kl"):
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
        rejections = (self.geometric, self.k3, self.veto, self.outlier, self.m2, self.binary_kl)
        rejects = any(bound is not None for bound in rejections)
        return (self.weight != "none" or rejects) and (self.positive or self.negative)

    @property
    def of_tokens(self) -> str | None:
        """The first rule set here that treats the tokens of one sequence differently."""
        for name in ("m2", "binary_kl"):
            if getattr(self, name) is not None:
                return name
        of_token = self.weight != "none" and WEIGHTS[self.weight].level == "token"
        return "weight" if of_token else None


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
    if correction.outlier is not None:
        keep_B1 = keep_B1 & ~(guarded_exp(log_rho_BT) > correction.outlier).any(-1, keepdim=True)
    keep = keep_B1
    if correction.m2 is not None:
        keep = keep & (log_rho_BT.square() < t.statistics["m2_limit"])
    if correction.binary_kl is not None:
        p, q = (
            x_BT.clamp(max=0).exp()
            for x_BT in (t.old_log_probs_BT, t.old_log_probs_BT - log_rho_BT)
        )
        keep = keep & (torch.maximum(binary_kl(p, q), binary_kl(q, p)) <= correction.binary_kl)
    masked_out = weight == 0 if correction.bounds[0] is not None else torch.zeros_like(keep_B1)
    return weight * keep, masked_out | ~keep


def m2_limit(t: Tokens, mean: float) -> Tensor:
    """M2PO's threshold on (log ρ)² (arXiv 2510.01161; AReaL): tokens below it stay.

    Tokens are dropped from the largest down, those of equal value together, until the mean of the
    rest is below `mean`. No token is dropped where that already holds.
    """
    m2 = t.log_rho_BT.square()[t.mask_BT].sort().values
    if not len(m2):
        return torch.full_like(t.lengths_B1.sum(), math.inf)
    counts = torch.arange(1, len(m2) + 1, device=m2.device, dtype=m2.dtype)
    kept = int((m2.cumsum(0) / counts < mean).sum())  # the mean of the k smallest grows with k
    return m2[kept] if kept < len(m2) else torch.full_like(m2[0], math.inf)


def entropy_limit(t: Tokens, share: float) -> Tensor:
    """The quantile 1 − share of the tokens' entropy, interpolated as in torch.quantile."""
    entropy = t.entropy_BT[t.mask_BT].sort().values
    if not len(entropy):
        return torch.zeros_like(t.lengths_B1.sum())
    place = (1 - share) * (len(entropy) - 1)
    low = math.floor(place)
    high = min(low + 1, len(entropy) - 1)
    return torch.lerp(entropy[low], entropy[high], place - low)


def off_policy_sequences(t: Tokens, limit: float) -> Tensor:
    """`[B, 1]` bool: mean_t(log μ − log π_θ) > limit (DeepSeek-V3.2, arXiv 2512.02556).

    μ is the engine's log-prob, so that both sources of off-policyness count: the difference between
    engine and trainer, and the updates since.
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
