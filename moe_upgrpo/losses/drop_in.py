# SPDX-License-Identifier: Apache-2.0
"""The UP-GRPO loss under the name and signature that verl's trainer calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.aggregation import AGGREGATIONS
from moe_upgrpo.losses.config import PolicyLossConfig
from moe_upgrpo.losses.policy import policy_loss

if TYPE_CHECKING:
    from torch import Tensor


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """UP-GRPO as in the appendix of its post: −A·log π where A > 0, dual-clip PPO elsewhere.

    Args:
        old_log_prob, log_prob, advantages, response_mask: `[B, T]`.
        cliprange: ε, for whichever of the next two is None.
        cliprange_low, cliprange_high: εl, εh. (εh never binds: see `branches.ppo_negative`.)
        clip_ratio_c: C > 1, the dual clip.
        loss_agg_mode: as in verl 0.9.1, `token-sum` or a name in `AGGREGATIONS`;
            `seq-mean-token-sum-norm` divides by T.

    Returns:
        (pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower): the scalar loss; the share of tokens with
        A ≤ 0 and r < 1−εl; the mean of log π_old − log π over all tokens; the share of tokens with
        A ≤ 0 and r > C. Both shares are of the tokens with A ≤ 0; without any they are 0.

    Raises:
        UserError: as `policy_loss`, no clip range given, an unknown mode; a batch without tokens,
        except with `token-sum`, whose loss is then 0. (The post's snippet returns NaN or inf where
        this raises, and for log-ratios beyond exp's range; elsewhere the two agree.)
    """
    modes = ("token-sum", *AGGREGATIONS)
    if loss_agg_mode not in modes:
        raise UserError(f"loss_agg_mode: {loss_agg_mode!r} given; allowed: {', '.join(modes)}")
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    if low is None or high is None:
        raise UserError(
            f"cliprange: None given with cliprange_low {cliprange_low} and cliprange_high "
            f"{cliprange_high}; allowed: cliprange, or both others"
        )
    config = PolicyLossConfig(
        clip_low=low,
        clip_high=high,
        dual_clip=clip_ratio_c,
        # The sum over all tokens is their mean with a denominator of 1.
        aggregation="token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode,
        token_sum_norm=max(response_mask.shape[-1], 1),
    )
    result = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        config=config,
        global_tokens=1 if loss_agg_mode == "token-sum" else None,
    )
    kl_sum, tokens = result.metrics["ppo_kl"]
    positives = result.metrics["positive_fraction"].numerator
    not_positive = tokens - positives
    lower, upper = (
        result.metrics[f"clip_fraction_negative_{bound}"].numerator for bound in ("lower", "upper")
    )

    def share(part: Tensor | float, whole: Tensor | float) -> Tensor:
        return torch.as_tensor(part / (whole + 1e-8)).to(result.loss)

    return (
        result.loss,
        share(lower, not_positive),
        share(kl_sum, tokens),
        share(upper, not_positive),
    )
