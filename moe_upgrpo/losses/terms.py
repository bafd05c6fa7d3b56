# SPDX-License-Identifier: Apache-2.0
"""Terms beside the policy loss: the KL divergence from a reference policy, the policy's entropy.

loss = policy loss + β·KL − α·H, each term averaged as the policy loss is: Σ_b w_b Σ_t of its tokens
with the weights of the loss's aggregation (verl's `use_kl_loss` and `entropy_coeff` do the same,
`verl/workers/actor/dp_actor.py`). Gradients by log π of the sampled token, d = log π_ref − log π:
k1 gives 1 (whose mean under π is 0: as a loss it has no effect on average), k2 gives −d, k3 gives
1 − e^d. The entropy's gradient is that of −Σ_v π log π over the whole vocabulary.

Shapes as in `tokens.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.aggregation import aggregation_weights
from moe_upgrpo.losses.config import PolicyLossConfig
from moe_upgrpo.losses.kl import KL_ESTIMATORS, kl_estimate
from moe_upgrpo.losses.metrics import Metric
from moe_upgrpo.losses.names import check_name
from moe_upgrpo.losses.tokens import check_shapes, mask_and_lengths, without_autocast

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Coefficients of the terms; with a coefficient of 0 a term is not computed."""

    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kl_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: {getattr(self, name)} given; allowed: 0 or more")
        check_name("kl_estimator", self.kl_estimator, KL_ESTIMATORS)

    @property
    def active(self) -> bool:
        return self.kl_coef > 0 or self.entropy_coef > 0


@without_autocast
def loss_terms(
    log_probs: Tensor,
    mask: Tensor,
    *,
    terms: LossTerms,
    config: PolicyLossConfig,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    global_tokens: float | None = None,
    global_sequences: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, Metric]]:
    """The terms by name, to be added to the loss, and the sums of KL and entropy over the tokens.

    Args:
        log_probs, mask: as in `policy_loss`.
        config: the policy loss's, for its aggregation.
        reference_log_probs: `[B, T]` log π_ref; needed with a `kl_coef`.
        entropy: `[B, T]` of π at each token, with its gradient; needed with an `entropy_coef`.
        global_tokens, global_sequences: as in `policy_loss`.

    Returns:
        `kl` (β·Σ w k) and `entropy` (−α·Σ w H), scalars; `kl` and `entropy`, sums over the tokens
        and their number. Those with a coefficient of 0 are left out.

    Raises:
        UserError: an input that a coefficient needs is None, shapes that differ, no token.
    """
    check_shapes(
        log_probs, {"mask": mask, "reference_log_probs": reference_log_probs, "entropy": entropy}
    )
    mask_BT, lengths_B1 = mask_and_lengths(mask)
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    weights_B = aggregation_weights(
        lengths_B1.squeeze(-1).to(dtype),
        config.aggregation,
        global_tokens=global_tokens,
        global_sequences=global_sequences,
        token_sum_norm=config.token_sum_norm,
    )
    values_BT = {}
    if terms.kl_coef:
        reference = _needed("reference_log_probs", reference_log_probs, "kl_coef", terms.kl_coef)
        current_BT, reference_BT = (
            torch.where(mask_BT, x.to(dtype), 0.0) for x in (log_probs, reference.detach())
        )
        values_BT["kl"] = terms.kl_coef, kl_estimate(current_BT, reference_BT, terms.kl_estimator)
    if terms.entropy_coef:
        entropy = _needed("entropy", entropy, "entropy_coef", terms.entropy_coef)
        values_BT["entropy"] = -terms.entropy_coef, torch.where(mask_BT, entropy.to(dtype), 0.0)
    tokens = mask_BT.count_nonzero()
    return (
        {n: c * (x_BT.sum(-1) * weights_B).sum() for n, (c, x_BT) in values_BT.items()},
        {
            n: Metric(x_BT.detach().sum(dtype=torch.float64), tokens)
            for n, (_, x_BT) in values_BT.items()
        },
    )


def _needed(name: str, given: Tensor | None, coefficient: str, value: float) -> Tensor:
    """The tensor that a coefficient needs; UserError where it is None."""
    if given is None:
        raise UserError(
            f"{name}: None given, {coefficient} is {value}; allowed: [B, T] (or {coefficient}=0)"
        )
    return given


@dataclass(frozen=True, kw_only=True)
class EntropyControl:
    """Adaptive entropy control of Skywork-OR1 (arXiv 2505.22312; its `EntController`,
    `verl/trainer/ppo/core_algos.py` of SkyworkAI/Skywork-OR1).

    After each step of mean entropy e: α ← clip(α + Δ where e < target, else α − Δ, least, most); in
    the next step the bonus is α·H where e < target, and none elsewhere. Theirs is the estimate
    mean(−log π_old) of the entropy; ours is the entropy itself.
    """

    target: float
    delta: float = 1e-4
    least: float = 0.0
    most: float = 5e-3

    def __post_init__(self) -> None:
        if not 0 <= self.target < math.inf:
            raise UserError(f"entropy_target: {self.target} given; allowed: 0 or more nats")
        if not 0 < self.delta < math.inf:
            raise UserError(f"entropy_delta: {self.delta} given; allowed: above 0")
        if not 0 <= self.least <= self.most < math.inf:
            raise UserError(
                f"entropy_coef_range: {self.least} {self.most} given; allowed: two numbers, 0 or "
                "more and the second not below the first"
            )

    def coefficient(self, start: float, entropies: Iterable[float]) -> float:
        """The bonus's coefficient after steps of these mean entropies, `start` in the first."""
        alpha, wanted = start, True
        for entropy in entropies:
            wanted = entropy < self.target
            alpha = alpha + self.delta if wanted else alpha - self.delta
            alpha = min(max(alpha, self.least), self.most)
        return alpha if wanted else 0.0
