# SPDX-License-Identifier: Apache-2.0
"""The policy loss with a stack's own weight for each token, such as a rollout correction."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.presets import coupled
from moe_upgrpo.losses import (
    GLOSSARY,
    PolicyLoss,
    PolicyLossConfig,
    aggregation_weights,
    policy_loss,
)
from moe_upgrpo.losses.metrics import mean


def check_rollout_weights(config: PolicyLossConfig, option: str, *, of_tokens: bool) -> None:
    """Raise UserError where the stack's weights for the rollout do not go with the loss.

    option: as the user wrote it. of_tokens: whether tokens of a sequence have different weights.
    """
    if "topr" in (config.positive, config.negative) or config.correction.active:
        raise UserError(
            f"{option}: given with a loss that corrects for the rollout itself; it would be done "
            "twice. Leave out one of them"
        )
    if of_tokens and (whole := coupled(config)):
        raise UserError(
            f"{option}: a weight for each token given with {whole[0]}, a loss of whole sequences; "
            "allowed: weights of sequences (or take gspo-token)"
        )


def required(rollout_log_probs: Tensor | None, by: str) -> Tensor:
    """The rollout's log-probs. Raises UserError if `by` needs them and there are none."""
    if rollout_log_probs is None:
        raise UserError(
            f"rollout_log_probs: None given; {by} needs one for each response token, and the "
            "engine gave none, or of another number"
        )
    return rollout_log_probs


def weighted_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None,
    global_tokens: float | None,
    global_sequences: float | None,
) -> tuple[Tensor, PolicyLoss]:
    """Σ of the tokens' losses with `weights` [B, T], over the denominators of the unweighted loss.

    Raises UserError: the loss needs the rollout's log-probs, and there are none.
    """
    reads = "rollout_log_probs" in config.arguments
    # Without any token the sum is 0, whatever the divisor.
    totals = {"global_tokens": global_tokens or None, "global_sequences": global_sequences}
    result = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        config=config,
        rollout_log_probs=required(rollout_log_probs, "the loss") if reads else None,
        **totals,
    )
    return weighted_sum(result, mask, weights, config, **totals), result


def weighted_sum(
    result: PolicyLoss,
    mask: Tensor,
    weights: Tensor,
    config: PolicyLossConfig,
    **totals: float | None,
) -> Tensor:
    """Σ of the tokens' losses with `weights`, over the denominators of the unweighted loss.

    mask: boolean [B, T]. totals: `global_tokens` and `global_sequences`, as for the loss itself.
    """
    per_sequence_B = aggregation_weights(
        mask.sum(-1).to(result.per_token.dtype),
        config.aggregation,
        token_sum_norm=config.token_sum_norm,
        **totals,
    )
    weighted_BT = result.per_token * torch.where(mask, weights, 0.0)
    return (weighted_BT.sum(-1) * per_sequence_B).sum()


def summed_means(result: PolicyLoss, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """(numerator, denominator) over the ranks of `group`, of metrics that are their quotient."""
    pairs = {n: pair for n, pair in result.metrics.items() if GLOSSARY[n].value is mean}
    device = result.per_token.device
    sums = torch.tensor([[float(x) for x in pair] for pair in pairs.values()], device=device)
    dist.all_reduce(sums, group=group)
    return dict(zip(pairs, sums, strict=True))
