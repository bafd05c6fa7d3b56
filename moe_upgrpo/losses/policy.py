"""policy_loss: branches, correction and aggregation put together; the oracle of its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.aggregation import aggregation_weights
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.config import PolicyLossConfig
from moe_upgrpo.losses.correction import (
    correction_weights,
    entropy_limit,
    log_router_shift,
    m2_limit,
    off_policy_sequences,
)
from moe_upgrpo.losses.metrics import Metric
from moe_upgrpo.losses.side import Side
from moe_upgrpo.losses.tokens import (
    OF_TOKENS,
    Context,
    Tokens,
    check_shapes,
    guarded_exp,
    without_autocast,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The result of `policy_loss`.

    loss: scalar, to be backpropagated.
    per_token: `[B, T]`, −A·f before aggregation, 0 at padding.
    clipped: `[B, T]` bool, tokens with A ≠ 0 whose gradient the loss's own rule took away (a
        clip, a mask, a rejection); all tokens of a sequence where the rule is about the sequence.
    gradient_weight: `[B, T]`, |A|·c·w_b = |∂loss/∂log π_θ(t)|, c as in `gradient_coefficients`: how
        hard the token pulls; 0 at padding.
    metrics: name -> two sums; `merge_metrics`, `finalize_metrics` and `GLOSSARY` say the rest.
    """

    loss: Tensor
    per_token: Tensor
    clipped: Tensor
    gradient_weight: Tensor
    metrics: dict[str, Metric]


@without_autocast
def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None = None,
    router_log_probs: tuple[Tensor, Tensor] | None = None,
    context: Context | None = None,
    global_tokens: float | None = None,
    global_sequences: float | None = None,
) -> PolicyLoss:
    """loss = Σ_b w_b Σ_t (−A_bt·f_bt + e_bt), f and e the positive branch's where A > 0, else the
    negative's. Most losses have no e.

    Args:
        log_probs: `[B, T]` log π_θ of the response tokens, the only differentiable input.
        old_log_probs: `[B, T]` log π_old.
        advantages: `[B, T]`; for a loss of whole sequences (`coupled` in `BRANCHES`), one value for
            the tokens of a sequence that it takes.
        mask: `[B, T]` bool or 0/1; what lies behind it may be anything, NaN included.
        config: see `PolicyLossConfig`.
        rollout_log_probs: `[B, T]` log μ, for TOPR, the off-policy mask and the rollout correction;
            None: old_log_probs stands for it (bypass mode).
        router_log_probs: (current, old), two `[B, T, L, K]`: the router's log-probs of the old
            policy's experts; needed when `router_shift_floor` is set.
        context: what only some losses look at; see `Context`.
        global_tokens, global_sequences: denominators over all micro-batches and ranks; None: the
            local counts (of tokens, of non-empty sequences). With them, the losses of the
            micro-batches add up to the loss of the batch, and one without tokens (`[0, T]`,
            `[B, 0]`, a mask of zeros) has a loss of 0 with a graph and counts of 0. Without them
            its mean is that of nothing, which is an error.

    Numbers are float32, or float64 where log_probs are, also under torch.autocast; what is counted
    over tokens is float64.

    Raises:
        UserError: shapes that differ, a mask that selects nothing (without global denominators),
            unmasked values that are not finite, an argument that the config needs and is None,
            advantages of single tokens for a loss of whole sequences.
    """
    t = _tokens(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        config,
        rollout_log_probs,
        router_log_probs,
        context,
    )
    weights_B = aggregation_weights(
        t.lengths_B1.squeeze(-1),
        config.aggregation,
        global_tokens=global_tokens,
        global_sequences=global_sequences,
        token_sum_norm=config.token_sum_norm,
    )
    sides = _sides(t, config)
    # Both sides are finite for every token (padding is 0, exp is guarded), so the 0 in A⁺ or A⁻
    # removes the side not taken from value and gradient alike; `where` would not stop a NaN.
    per_token_BT = -_objective(t, config, *sides)
    for side in sides:
        if side.side.extra is not None:
            per_token_BT = per_token_BT + side.beside(t, side.side.extra(t, config))
    loss = (per_token_BT.sum(-1) * weights_B).sum()
    with torch.no_grad():
        gradient_weight_BT, shares = _pulls(t, config, sides, weights_B)
        clipped_BT, metrics = _measure(t, config, sides, shares)
    return PolicyLoss(loss, per_token_BT, clipped_BT, gradient_weight_BT, metrics)


@without_autocast
def gradient_coefficients(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None = None,
    router_log_probs: tuple[Tensor, Tensor] | None = None,
    context: Context | None = None,
) -> Tensor:
    """The oracle: c `[B, T]` with ∂loss/∂log π_θ(t) = −w_b·A_t·c_t, w_b from `aggregation_weights`.

    c = (slope·1[not clipped] − extra_slope/A)·correction weight; 0 at padding and where A = 0 (an
    extra term acts there too: `PolicyLoss.gradient_weight`). Arguments and errors as in
    `policy_loss`.
    """
    with torch.no_grad():
        t = _tokens(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            config,
            rollout_log_probs,
            router_log_probs,
            context,
        )
        c_BT = torch.zeros_like(t.advantages_BT)
        for side, here_BT in zip(_sides(t, config), (t.gain_BT > 0, t.pain_BT < 0), strict=True):
            c = side.coefficient(t, config)
            if side.side.extra_slope is not None:
                slope_BT = side.beside(t, side.side.extra_slope(t, config))
                c = c - slope_BT / torch.where(here_BT, t.advantages_BT, 1.0)
            c_BT = torch.where(here_BT, c, c_BT)
        return c_BT


@without_autocast
def batch_statistics(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None = None,
    router_log_probs: tuple[Tensor, Tensor] | None = None,
    context: Context | None = None,
) -> dict[str, Tensor]:
    """Statistics of a batch that `config` has a use for, to be given to each of its micro-batches.

    Arguments are those of `policy_loss`, of the whole batch: gather them over the ranks first,
    thresholds are no sums. Empty for a loss that looks at no more than its own tokens. The
    log-probs are the current ones: with those of an earlier forward the thresholds are that
    forward's.
    """
    with torch.no_grad():
        t = _tokens(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            config,
            rollout_log_probs,
            router_log_probs,
            context,
        )
        return _statistics(t, config)


@dataclass(frozen=True)
class _AppliedSide:
    """A side of the loss on this batch: its tokens' advantages, what its rules cut, its weight.

    here: the tokens of this side, A > 0 or A <= 0; None without an extra term.
    below, above: cut by a bound of the loss; dropped: by the correction or the off-policy mask;
    factor: detached weight. All `[B, T]`, `[B, 1]` or None.
    """

    side: Side
    here_BT: Tensor | None
    amount_BT: Tensor
    below: Tensor | None
    above: Tensor | None
    factor: Tensor | None
    dropped: Tensor | None

    @property
    def weighted_BT(self) -> Tensor:
        """The advantages of this side with its factor."""
        return self.amount_BT if self.factor is None else self.amount_BT * self.factor

    def beside(self, t: Tokens, extra: Tensor) -> Tensor:
        """The extra term, or its slope, at the tokens of this side, with the side's factor."""
        if self.here_BT is None:
            raise ValueError("here_BT: None given for a side with an extra term")
        extra_BT = torch.where(self.here_BT, extra, 0.0)
        return extra_BT if self.factor is None else extra_BT * self.factor

    def coefficient(self, t: Tokens, config: PolicyLossConfig) -> Tensor:
        """c of f, without the extra term; `[B, T]` or `[B, 1]`."""
        cut = _union(self.below, self.above, self.dropped)
        c = self.side.slope(t, config)
        if self.factor is not None:
            c = c * self.factor
        return c if cut is None else torch.where(cut, 0.0, c)


def _pulls(
    t: Tokens, config: PolicyLossConfig, sides: tuple[_AppliedSide, _AppliedSide], weights_B: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """|∂loss/∂log π_θ| of each token, and |Σ w·A·c| of each side."""
    pull_BT, shares = torch.zeros_like(t.advantages_BT), []
    for side in sides:
        side_BT = side.amount_BT * side.coefficient(t, config)
        shares.append((side_BT.sum(-1) * weights_B).sum().abs())
        pull_BT += side_BT
        if side.side.extra_slope is not None:
            pull_BT -= side.beside(t, side.side.extra_slope(t, config))
    return pull_BT.mul_(weights_B[:, None]).abs_(), shares


def _objective(
    t: Tokens, config: PolicyLossConfig, positive: _AppliedSide, negative: _AppliedSide
) -> Tensor:
    """A·f of each token; f once where it is one function for both signs."""
    if positive.side.surrogate is not negative.side.surrogate:
        f_p, f_n = (side.side.surrogate(t, config) for side in (positive, negative))
        return positive.weighted_BT * f_p + negative.weighted_BT * f_n
    if positive.factor is None and negative.factor is None:
        return t.advantages_BT * positive.side.surrogate(t, config)
    both_BT = positive.weighted_BT + negative.weighted_BT
    return both_BT * positive.side.surrogate(t, config)


def _sides(t: Tokens, config: PolicyLossConfig) -> tuple[_AppliedSide, _AppliedSide]:
    factors: dict[str, tuple[Tensor | None, Tensor | None]]
    factors = {"positive": (None, None), "negative": (None, None)}
    if config.top_entropy is not None:
        low_BT = t.entropy_BT < t.statistics["entropy_limit"]
        keep_BT = (~low_BT).to(t.advantages_BT.dtype)
        factors = {sign: (keep_BT, low_BT) for sign in factors}
    if config.correction.active:
        weight, dropped = correction_weights(t, config.correction)
        for sign in factors:
            if getattr(config.correction, sign):
                before, without = factors[sign]
                both = weight if before is None else weight * before
                factors[sign] = both, _union(dropped, without)
    if config.off_policy_limit is not None:
        before, without = factors["negative"]
        off_B1 = off_policy_sequences(t, config.off_policy_limit)
        on_B1 = (~off_B1).to(t.advantages_BT.dtype)
        both = on_B1 if before is None else before * on_B1
        factors["negative"] = both, _union(without, off_B1)
    positive, negative = config.sides
    here_p = here_n = None
    if positive.extra is not None or negative.extra is not None:
        here_p = t.advantages_BT > 0
        here_n = t.mask_BT & ~here_p
    return (
        _AppliedSide(positive, here_p, t.gain_BT, *positive.clip(t, config), *factors["positive"]),
        _AppliedSide(negative, here_n, t.pain_BT, *negative.clip(t, config), *factors["negative"]),
    )


def _statistics(t: Tokens, config: PolicyLossConfig) -> dict[str, Tensor]:
    """Those of the branches and of the factors of `config`, over the tokens of `t`."""
    found: dict[str, Tensor] = {}
    for branch in dict.fromkeys((config.positive, config.negative)):
        of_branch = BRANCHES[branch].statistics
        if of_branch is not None:
            found |= of_branch(t, config)
    if config.top_entropy is not None:
        found["entropy_limit"] = entropy_limit(t, config.top_entropy)
    if config.correction.active and config.correction.m2 is not None:
        found["m2_limit"] = m2_limit(t, config.correction.m2)
    return found


def _check_context(context: Context | None, config: PolicyLossConfig, rows: int) -> None:
    """UserError for a field of the context that the config needs and is None."""
    for name in (*OF_TOKENS, "groups"):
        if name in config.arguments and (context is None or getattr(context, name) is None):
            needing = [
                n for n in (config.positive, config.negative) if name in BRANCHES[n].arguments
            ]
            wanted = f"{needing[0]!r}" if needing else f"top_entropy = {config.top_entropy}"
            shape = "[B], one integer for each prompt" if name == "groups" else "[B, T]"
            raise UserError(
                f"context.{name}: None given, and {wanted} needs it; allowed: {shape} (see Context)"
            )
    groups = None if context is None else context.groups
    if "groups" in config.arguments and groups is not None and tuple(groups.shape) != (rows,):
        raise UserError(
            f"context.groups: shape {tuple(groups.shape)} given; allowed: ({rows},), one for each "
            "sequence"
        )


def _tokens(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: PolicyLossConfig,
    rollout_log_probs: Tensor | None,
    router_log_probs: tuple[Tensor, Tensor] | None,
    context: Context | None,
) -> Tokens:
    check_shapes(log_probs, {"rollout_log_probs": rollout_log_probs})
    _check_context(context, config, len(log_probs))
    log_shift_BT = None
    if config.router_shift_floor is not None:
        if router_log_probs is None:
            raise UserError(
                f"router_log_probs: None given, router_shift_floor is {config.router_shift_floor}; "
                "allowed: (current, old), two [B, T, L, K] (or router_shift_floor=None)"
            )
        current_BTLK, old_BTLK = router_log_probs
        log_shift_BT = log_router_shift(current_BTLK, old_BTLK, config.router_shift_floor)
    t = Tokens(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        rollout_log_probs=rollout_log_probs if "rollout_log_probs" in config.arguments else None,
        log_router_shift=log_shift_BT,
        context=context,
        reads=config.arguments,
    )
    given = None if context is None else context.statistics
    # Not under no_grad: what they look at is kept in `t`, where the losses look for its graph.
    if given is None:
        t.statistics = _statistics(t, config)
    else:
        device = t.advantages_BT.device
        t.statistics = _Given(
            (name, torch.as_tensor(x, device=device)) for name, x in given.items()
        )
    for sign, amount_BT in (("positive", t.gain_BT), ("negative", t.pain_BT)):
        if BRANCHES[getattr(config, sign)].coupled:
            _check_of_sequence(t, amount_BT, sign, getattr(config, sign))
    return t


class _Given(dict[str, "Tensor"]):
    """The statistics that were given. UserError for one that the loss reads and is not there."""

    def __missing__(self, name: str) -> Tensor:
        raise UserError(
            f"context.statistics: {', '.join(self) or 'none'} given, and the loss reads {name}; "
            "allowed: what batch_statistics returns for the same config (or statistics=None)"
        )


# Of the largest in the sequence: rounding, not advantages of single tokens.
_EQUAL = 1e-5


def _check_of_sequence(t: Tokens, amount_BT: Tensor, sign: str, branch: str) -> None:
    """UserError where a sequence has several advantages: a coupled f has no gradient for each."""
    if not amount_BT.numel():
        return
    # Of one sign, and 0 at padding: all tokens have the largest, or some have less.
    if sign == "positive":
        less_BT = amount_BT < amount_BT.amax(-1, keepdim=True) * (1 - _EQUAL)
    else:
        less_BT = amount_BT > amount_BT.amin(-1, keepdim=True) * (1 - _EQUAL)
    less_BT &= t.mask_BT
    if not less_BT.any():
        return
    b, smaller = less_BT.nonzero()[0].tolist()
    first, second = sorted((smaller, int(amount_BT[b].abs().argmax())))
    raise UserError(
        f"advantages: {t.advantages_BT[b, first]:.6g} at position {first} and "
        f"{t.advantages_BT[b, second]:.6g} at position {second} of sequence {b} given with {sign} "
        f"{branch!r}; allowed with losses of whole sequences: one advantage for all tokens of a "
        "sequence (or take a loss of single tokens: 'gspo-token' for 'gspo')"
    )


def _union(*hits: Tensor | None) -> Tensor | None:
    """Where any of these holds; None if all are None."""
    union = None
    for hit in hits:
        union = hit if union is None else union if hit is None else union | hit
    return union


def _measure(
    t: Tokens,
    config: PolicyLossConfig,
    sides: tuple[_AppliedSide, _AppliedSide],
    shares: list[Tensor],
) -> tuple[Tensor, dict[str, Metric]]:
    """`PolicyLoss.clipped` and the metrics; formulas in `metrics.GLOSSARY`. shares: |Σ w·A·c| of
    each side."""
    positive, negative = sides
    here_p_BT, here_n_BT = t.gain_BT > 0, t.pain_BT < 0
    here_p_B1, here_n_B1 = _counts_by_sign(t)
    tokens, positives, negatives = map(_sum, (t.lengths_B1, here_p_B1, here_n_B1))

    clipped_BT = torch.zeros_like(t.mask_BT)
    for side, here_BT in ((positive, here_p_BT), (negative, here_n_BT)):
        for cut in (side.below, side.above, side.dropped):
            if cut is not None:
                clipped_BT |= here_BT & cut

    def of_positives(hit: Tensor | None) -> Metric:
        return Metric(_count(hit, here_p_BT, here_p_B1), positives)

    def of_negatives(hit: Tensor | None) -> Metric:
        return Metric(_count(hit, here_n_BT, here_n_B1), negatives)

    counterpart = BRANCHES[config.negative].positive
    is_own = counterpart is positive.side
    beyond = positive.above if is_own else counterpart.clip(t, config)[1]
    raw_ratio_BT = t.ratio_BT if t.log_shift_BT is None else guarded_exp(t.raw_log_ratio_BT)
    ratio_size = _sample_size(t.masked(raw_ratio_BT), tokens)
    metrics = {
        "ppo_kl": Metric(-_sum(t.raw_log_ratio_BT), tokens),
        "ratio_mean": Metric(ratio_size.numerator, tokens),
        "ratio_effective_sample_size": ratio_size,
        "positive_fraction": Metric(positives, tokens),
        "negative_fraction": Metric(negatives, tokens),
        "clip_fraction": Metric(clipped_BT.count_nonzero(), tokens),
        "clip_fraction_positive": of_positives(clipped_BT),
        "clip_fraction_negative": of_negatives(clipped_BT),
        "clip_fraction_positive_upper": of_positives(positive.above),
        "clip_fraction_positive_lower": of_positives(positive.below),
        "clip_fraction_negative_upper": of_negatives(negative.above),
        "clip_fraction_negative_lower": of_negatives(negative.below),
        "positive_beyond_upper_fraction": of_positives(beyond),
        "gradient_share_positive": Metric(shares[0], shares[0] + shares[1]),
    }
    if "dual_clip" in BRANCHES[config.negative].fields and config.dual_clip is not None:
        beyond_dual = t.ratio_BT > config.dual if negative.above is None else negative.above
        metrics["dual_clip_fraction"] = of_negatives(beyond_dual)
    if config.off_policy_limit is not None:
        off_B1 = off_policy_sequences(t, config.off_policy_limit)
        metrics["off_policy_mask_fraction"] = of_negatives(off_B1)
    if t.log_shift_BT is not None:
        metrics["router_shift_mean"] = Metric(_sum(t.masked(t.log_shift_BT.exp())), tokens)
    if config.correction.active:
        on_p, on_n = config.correction.positive, config.correction.negative
        applies_BT = (here_p_BT & on_p) | (here_n_BT & on_n)
        weight, dropped = correction_weights(t, config.correction)
        weight_BT = (weight * applies_BT).expand_as(t.advantages_BT)
        applied, size = _sum(applies_BT), _sample_size(weight_BT, _sum(applies_BT))
        metrics["correction_weight_mean"] = Metric(size.numerator, applied)
        metrics["correction_zero_fraction"] = Metric(_sum(dropped & applies_BT), applied)
        metrics["correction_effective_sample_size"] = size
    return clipped_BT, metrics


def _counts_by_sign(t: Tokens) -> tuple[Tensor, Tensor]:
    """Tokens with A > 0 and with A < 0 of each sequence, `[B, 1]`."""
    sign_BT = t.advantages_BT.sign()
    surplus_B1, signed_B1 = sign_BT.sum(-1, keepdim=True), _dot(sign_BT, sign_BT)
    return (signed_B1 + surplus_B1) / 2, (signed_B1 - surplus_B1) / 2


def _sum(x_BT: Tensor) -> Tensor:
    """Σ, of the rows' sums in float64: whole numbers stay whole beyond the 2^24 of float32."""
    return x_BT.sum(-1).sum(dtype=torch.float64)


def _sample_size(weight_BT: Tensor, count: Tensor) -> Metric:
    """(Σw, Σw²) of `count` weights, the others 0.

    Σw² ≥ (Σw)²/N of real numbers; it is held to that, as rounding might make a sample of N tokens
    worth more than N.
    """
    sum_w, sum_w2 = _sum(weight_BT), _sum(_dot(weight_BT, weight_BT))
    return Metric(sum_w, torch.maximum(sum_w2, sum_w**2 / count.clamp(min=1) * (1 + 1e-14)))


def _dot(x_BT: Tensor, y: Tensor) -> Tensor:
    """Σ_t x·y, `[B, 1]`, of `[B, T]` with `[B, T]` or `[B, 1]`."""
    if y.shape[-1] == 1:
        return x_BT.sum(-1, keepdim=True) * y
    return torch.linalg.vecdot(x_BT, y)[:, None]


def _count(hit: Tensor | None, here_BT: Tensor, here_B1: Tensor) -> Tensor:
    """Tokens of one sign where `hit`, `[B, T]` or `[B, 1]`, holds."""
    if hit is None:
        return here_B1.new_zeros((), dtype=torch.float64)
    if hit.shape[-1] == 1:
        return _sum(hit * here_B1)
    return (hit & here_BT).count_nonzero()
