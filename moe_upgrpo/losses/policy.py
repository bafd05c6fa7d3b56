"""policy_loss: the branches, the correction and the aggregation put together; and its oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses.aggregation import aggregation_weights
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.config import PolicyLossConfig
from moe_upgrpo.losses.correction import correction_weights, log_router_shift, off_policy_sequences
from moe_upgrpo.losses.metrics import Metric
from moe_upgrpo.losses.tokens import Tokens, guarded_exp

RouterLogProbs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar to backpropagate. per_token `[B, T]`: −A·f, before aggregation, 0 at padding.

    clipped `[B, T]` bool: tokens with A ≠ 0 whose gradient the loss's own rule took away (a clip, a
    mask or a rejection); every token of the sequence where the rule is about the sequence.
    metrics: name -> sums to be merged with `merge_metrics`; see `metrics.GLOSSARY`.
    """

    loss: Tensor
    per_token: Tensor
    clipped: Tensor
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class _Factors:
    """Detached factor on each side's loss, where it is 0 by rule, and the metrics about it."""

    positive: Tensor | float
    negative: Tensor | float
    dropped_positive: Tensor | None
    dropped_negative: Tensor | None


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None = None,
    router_log_probs: RouterLogProbs | None = None,
    global_tokens: float | None = None,
    global_sequences: float | None = None,
) -> PolicyLoss:
    """loss = Σ_b w_b Σ_t −A_bt·f_bt, f the positive branch's where A > 0 and the negative's elsewhere.

    Args:
        log_probs: `[B, T]` log π_θ of the response tokens, the only differentiable input.
        old_log_probs: `[B, T]` log π_old.
        advantages: `[B, T]`.
        mask: `[B, T]` bool or 0/1; what lies behind it may be anything, NaN included.
        config: see `PolicyLossConfig`.
        rollout_log_probs: `[B, T]` log μ for TOPR, the off-policy mask and the rollout correction;
            None: old_log_probs stands for it (bypass mode).
        router_log_probs: two `[B, T, L, K]`, the router's log-probs of the old policy's experts under
            the current and the old weights; needed when `router_shift_floor` is set.
        global_tokens, global_sequences: denominators over all micro-batches and ranks; None: the
            local counts (of tokens, of non-empty sequences). With them, the losses of the
            micro-batches add up to the loss of the batch.

    Raises:
        UserError: shapes that differ, a mask that selects nothing (without global denominators),
            unmasked values that are not finite, an argument that the config needs and was not given.
    """
    t = _tokens(
        log_probs, old_log_probs, advantages, mask, config, rollout_log_probs, router_log_probs
    )
    weights_B = aggregation_weights(
        t.lengths_B1.squeeze(-1),
        config.aggregation,
        global_tokens=global_tokens,
        global_sequences=global_sequences,
        token_sum_norm=config.token_sum_norm,
    )
    positive, negative = config.sides
    # Both sides are finite for every token (padding is 0, exp is guarded), so a product with 0
    # leaves nothing of the side not taken, neither in the value nor in the gradient.
    gain_BT, pain_BT = t.advantages_BT.clamp(min=0), t.advantages_BT.clamp(max=0)
    factors = _factors(t, config)
    per_token_BT = -(
        gain_BT * positive.surrogate(t, config) * factors.positive
        + pain_BT * negative.surrogate(t, config) * factors.negative
    )
    loss = (per_token_BT.sum(-1) * weights_B).sum()
    with torch.no_grad():
        clipped_BT, metrics = _clips_and_metrics(t, config, factors, weights_B)
    return PolicyLoss(loss, per_token_BT, clipped_BT, metrics)


def gradient_coefficients(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None = None,
    router_log_probs: RouterLogProbs | None = None,
) -> Tensor:
    """The oracle: c `[B, T]`, correction included, with ∂loss/∂log π_θ(t) = −w_b·A_t·c_t.

    w_b is `aggregation_weights`; arguments and errors as in `policy_loss`. 0 at padding and where
    A = 0. For losses of whole sequences the advantage has to be constant in each sequence.
    """
    with torch.no_grad():
        t = _tokens(
            log_probs, old_log_probs, advantages, mask, config, rollout_log_probs, router_log_probs
        )
        positive, negative = config.sides
        factors = _factors(t, config)
        return torch.where(
            t.advantages_BT > 0,
            positive.coefficient(t, config) * factors.positive,
            torch.where(
                t.advantages_BT < 0, negative.coefficient(t, config) * factors.negative, 0.0
            ),
        )


def _tokens(
    log_probs, old_log_probs, advantages, mask, config, rollout_log_probs, router_log_probs
) -> Tokens:
    log_shift_BT = None
    if config.router_shift_floor is not None:
        if router_log_probs is None:
            raise UserError(
                f"router_log_probs: None given; router_shift_floor={config.router_shift_floor} needs "
                "(current, old), two tensors [B, T, L, K]; or set router_shift_floor=None"
            )
        log_shift_BT = log_router_shift(*router_log_probs, config.router_shift_floor)
    return Tokens(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        rollout_log_probs=rollout_log_probs,
        log_router_shift=log_shift_BT,
    )


def _factors(t: Tokens, config: PolicyLossConfig) -> _Factors:
    factor = {"positive": 1.0, "negative": 1.0}
    dropped: dict[str, Tensor | None] = {"positive": None, "negative": None}
    if config.correction.active:
        weight, zeroed = correction_weights(t, config.correction)
        for sign in factor:
            if getattr(config.correction, sign):
                factor[sign], dropped[sign] = weight, zeroed
    if config.off_policy_limit is not None:
        off_B1 = off_policy_sequences(t, config.off_policy_limit)
        factor["negative"] = factor["negative"] * ~off_B1
        zeroed = dropped["negative"]
        dropped["negative"] = off_B1 if zeroed is None else zeroed | off_B1
    return _Factors(
        factor["positive"], factor["negative"], dropped["positive"], dropped["negative"]
    )


def _clips_and_metrics(
    t: Tokens, config: PolicyLossConfig, factors: _Factors, weights_B: Tensor
) -> tuple[Tensor, dict[str, Metric]]:
    positive, negative = config.sides
    is_positive_BT, is_negative_BT = t.advantages_BT > 0, t.advantages_BT < 0
    tokens = t.lengths_B1.sum()
    positives, negatives = is_positive_BT.sum(), is_negative_BT.sum()
    nothing = torch.zeros((), dtype=torch.bool, device=tokens.device)

    below_p, above_p = (nothing if x is None else x for x in positive.clip(t, config))
    below_n, above_n = (nothing if x is None else x for x in negative.clip(t, config))
    beyond = BRANCHES[config.negative].positive.clip(t, config)[1]
    cut_p = below_p | above_p
    cut_n = below_n | above_n
    if factors.dropped_positive is not None:
        cut_p = cut_p | factors.dropped_positive
    if factors.dropped_negative is not None:
        cut_n = cut_n | factors.dropped_negative
    clipped_BT = (is_positive_BT & cut_p) | (is_negative_BT & cut_n)

    raw_ratio_BT = (
        t.ratio_BT if t.log_ratio_BT is t.raw_log_ratio_BT else guarded_exp(t.raw_log_ratio_BT)
    )
    padding = t.mask_BT.numel() - tokens  # a padded token has ratio 1
    sum_ratio = raw_ratio_BT.sum() - padding
    sum_ratio2 = torch.linalg.vector_norm(raw_ratio_BT) ** 2 - padding

    def share(positive_side: Tensor, sign_BT: Tensor) -> Tensor:
        return (positive_side & sign_BT).sum()

    weights_B1 = weights_B[:, None]
    pull_p = (
        t.advantages_BT.clamp(min=0)
        * (positive.coefficient(t, config) * factors.positive)
        * weights_B1
    ).sum()
    pull_n = -(
        t.advantages_BT.clamp(max=0)
        * (negative.coefficient(t, config) * factors.negative)
        * weights_B1
    ).sum()
    metrics = {
        "ppo_kl": Metric(-t.raw_log_ratio_BT.sum(), tokens),
        "ratio_mean": Metric(sum_ratio, tokens),
        "ratio_effective_sample_size": Metric(sum_ratio, sum_ratio2),
        "positive_fraction": Metric(positives, tokens),
        "negative_fraction": Metric(negatives, tokens),
        "clip_fraction": Metric(clipped_BT.sum(), tokens),
        "clip_fraction_positive_upper": Metric(share(above_p, is_positive_BT), positives),
        "clip_fraction_positive_lower": Metric(share(below_p, is_positive_BT), positives),
        "clip_fraction_negative_upper": Metric(share(above_n, is_negative_BT), negatives),
        "clip_fraction_negative_lower": Metric(share(below_n, is_negative_BT), negatives),
        "positive_beyond_upper_fraction": Metric(
            share(nothing if beyond is None else beyond, is_positive_BT), positives
        ),
        "gradient_share_positive": Metric(pull_p, pull_p + pull_n),
    }
    return clipped_BT, metrics
