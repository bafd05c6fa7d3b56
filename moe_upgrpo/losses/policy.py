# SPDX-License-Identifier: Apache-2.0
"""`policy_loss`: branches, correction and aggregation put together; its gradient's oracle."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.aggregation import aggregation_weights
from moe_upgrpo.losses.applied import (
    AppliedSide,
    amount_of_both,
    amounts,
    measure,
    of_both,
    union,
)
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
from moe_upgrpo.losses.passes import keep, keep_, of_sign
from moe_upgrpo.losses.side import beside, one
from moe_upgrpo.losses.tokens import (
    OF_TOKENS,
    Context,
    Tokens,
    check_shapes,
    without_autocast,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Measures(NamedTuple):
    """Measures of a loss and of its tokens; see `PolicyLoss`."""

    clipped: Tensor
    gradient_weight: Tensor
    metrics: dict[str, Metric]


class PolicyLoss:
    """The result of `policy_loss`. What is not a part of the loss is computed when first asked for.

    loss: scalar, to be backpropagated.
    per_token: `[B, T]`, −A·f before aggregation, 0 at padding.
    clipped: `[B, T]` bool, tokens with A ≠ 0 whose gradient the loss's own rule took away (a
        clip, a mask, a rejection); all tokens of a sequence where the rule is about the sequence.
    gradient_weight: `[B, T]`, |A|·c·w_b = |∂loss/∂log π_θ(t)|, c as in `gradient_coefficients`: how
        hard the token pulls; 0 at padding.
    metrics: name -> two sums; `merge_metrics`, `finalize_metrics` and `GLOSSARY` explain them.
    """

    def __init__(self, loss: Tensor, per_token: Tensor, measure: Callable[[], Measures]):
        self.loss, self.per_token = loss, per_token
        self._measure: Callable[[], Measures] | None = measure

    @cached_property
    def _measures(self) -> Measures:
        assert self._measure is not None
        found = self._measure()
        self._measure = None  # it holds the batch
        return found

    @property
    def clipped(self) -> Tensor:
        return self._measures.clipped

    @property
    def gradient_weight(self) -> Tensor:
        return self._measures.gradient_weight

    @property
    def metrics(self) -> dict[str, Metric]:
        return self._measures.metrics


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
        context: inputs that only some losses use; see `Context`.
        global_tokens, global_sequences: denominators over all micro-batches and ranks; None: the
            local counts (of tokens, of non-empty sequences). With them, the losses of the
            micro-batches add up to the loss of the batch, and one without tokens (`[0, T]`,
            `[B, 0]`, a mask of zeros) has a loss of 0 with a graph and counts of 0. Without them it
            is an error, the mean of nothing.

    Numbers are float32, or float64 where log_probs are, also under torch.autocast; what is counted
    over tokens is float64.

    Raises:
        UserError: shapes that differ, a mask that selects nothing (without global denominators),
            unmasked values that are not finite, an argument that the config needs but that is None,
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
    objective_BT = _objective(t, config, *sides)
    extra_BT = _extra(t, config, *sides)
    t.forget()
    # Not made from `per_token`, whose sign would cost the backward one more pass.
    of_B = objective_BT.sum(-1) if extra_BT is None else objective_BT.sum(-1) - extra_BT.sum(-1)
    loss = (of_B * -weights_B).sum()
    per_token_BT = objective_BT.neg_()
    if extra_BT is not None:
        per_token_BT += extra_BT
    return PolicyLoss(loss, per_token_BT, lambda: _measures(weights_B, t, config, *sides))


@without_autocast
def _measures(
    weights_B: Tensor,
    t: Tokens,
    config: PolicyLossConfig,
    positive: AppliedSide,
    negative: AppliedSide,
) -> Measures:
    with torch.no_grad():
        clipped_BT, metrics = measure(t, config, positive, negative)
        pulls_BT, shares = _pulls(t, config, positive, negative, weights_B, clipped_BT)
    metrics["gradient_share_positive"] = Metric(shares[0], shares[0] + shares[1])
    return Measures(clipped_BT, pulls_BT, metrics)


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
        here = t.positive_BT, t.negative_BT
        for side, here_BT in zip(_sides(t, config), here, strict=True):
            c = side.coefficient(t, config)
            if side.side.extra_slope is not None:
                slope_BT = side.beside(t, side.side.extra_slope, config)
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
    """Statistics of a batch that `config` needs, to be given to each of its micro-batches.

    Arguments are those of `policy_loss`, for the whole batch: gather them over the ranks first,
    since thresholds cannot be summed. Empty for a loss that looks only at its own tokens. The
    log-probs are the current ones; with those of an earlier forward, the thresholds are that
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


def _pulls(
    t: Tokens,
    config: PolicyLossConfig,
    positive: AppliedSide,
    negative: AppliedSide,
    weights_B: Tensor,
    clipped_BT: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """|∂loss/∂log π_θ| of each token, and |Σ w·A·c| of each side."""
    weight_BT = _weight_of_log_probs(t, config, positive, negative)
    slope = of_both(config, "slope")
    if weight_BT is not None:
        pull_BT = weight_BT
    elif slope is not None and not (positive.weighs or negative.weighs):
        pull_BT = t.advantages_BT * slope(t, config)
    else:
        of_positive_BT, of_negative_BT = amounts(t, config, positive, negative)
        pull_BT = of_positive_BT * positive.side.slope(t, config)
        pull_BT.addcmul_(of_negative_BT, negative.side.slope(t, config))
    if positive.cuts or negative.cuts:  # not in place: the graph holds the weight of log π
        pull_BT = keep_(pull_BT, clipped_BT) if weight_BT is None else keep(pull_BT, clipped_BT)
    both_B = pull_BT.sum(-1)
    positive_B = of_sign(pull_BT, t.advantages_BT, positive=True).sum(-1)
    shares = [(x_B * weights_B).sum().abs() for x_B in (positive_B, both_B - positive_B)]
    extra_BT = _extra(t, config, positive, negative, slope=True)
    if extra_BT is not None:
        pull_BT = pull_BT - extra_BT if pull_BT is weight_BT else pull_BT.sub_(extra_BT)
    w_B1 = weights_B[:, None]
    pull_BT = pull_BT * w_B1 if pull_BT is weight_BT else pull_BT.mul_(w_B1)
    return pull_BT.abs_(), (shares[0], shares[1])


def _objective(
    t: Tokens, config: PolicyLossConfig, positive: AppliedSide, negative: AppliedSide
) -> Tensor:
    """A·f of each token; f once where it is one function for both signs."""
    weight_BT = _weight_of_log_probs(t, config, positive, negative)
    if weight_BT is not None:
        return t.times_log_probs(weight_BT)
    f = of_both(config, "surrogate")
    amount_BT = None if f is None else amount_of_both(t, config, positive, negative)
    if f is not None and amount_BT is not None:
        return amount_BT * f(t, config)
    of_positive_BT, of_negative_BT = amounts(t, config, positive, negative)
    if f is not None:
        return (of_positive_BT + of_negative_BT) * f(t, config)
    # one after the other, to save f's memory
    objective_BT = positive.value(t, config, of_positive_BT)
    return negative.value(t, config, of_negative_BT, to=objective_BT)


def _weight_of_log_probs(
    t: Tokens, config: PolicyLossConfig, positive: AppliedSide, negative: AppliedSide
) -> Tensor | None:
    """A·w of each token where f = w·log π for both signs, else None; w once where it is one
    function. The graph keeps it, so it is here for `_pulls` as well."""
    of_positive, of_negative = positive.side.weight, negative.side.weight
    if of_positive is None or of_negative is None:
        return None

    def compute() -> Tensor:
        w = of_both(config, "weight")
        amount_BT = None if w is None else amount_of_both(t, config, positive, negative)
        if w is not None and amount_BT is not None:
            return amount_BT if w is one else amount_BT * w(t, config)
        weight_BT = positive.amount(t, config)
        if of_positive is not one:
            weight_BT *= of_positive(t, config)
        return weight_BT.addcmul_(negative.amount(t, config), of_negative(t, config))

    made: Tensor = t.once("weight of log π", compute)
    return made


def _extra(
    t: Tokens,
    config: PolicyLossConfig,
    positive: AppliedSide,
    negative: AppliedSide,
    slope: bool = False,
) -> Tensor | None:
    """The term beside A·f of each token, or its slope; None without one."""
    name = "extra_slope" if slope else "extra"
    if positive.side.extra is None and negative.side.extra is None:
        return None
    e = of_both(config, name)
    if e is not None and not (positive.weighs or negative.weighs):
        return t.of_tokens(beside(e, t, config))
    found = [
        side.beside(t, function, config)
        for side in (positive, negative)
        if (function := getattr(side.side, name)) is not None
    ]
    return found[0] if len(found) == 1 else found[0] + found[1]


def _sides(t: Tokens, config: PolicyLossConfig) -> tuple[AppliedSide, AppliedSide]:
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
                factors[sign] = both, union(dropped, without)
    if config.off_policy_limit is not None:
        before, without = factors["negative"]
        off_B1 = off_policy_sequences(t, config.off_policy_limit)
        on_B1 = (~off_B1).to(t.advantages_BT.dtype)
        both = on_B1 if before is None else before * on_B1
        factors["negative"] = both, union(without, off_B1)
    positive, negative = config.sides
    return (
        AppliedSide(positive, True, *positive.clip(t, config), *factors["positive"]),
        AppliedSide(negative, False, *negative.clip(t, config), *factors["negative"]),
    )


def _statistics(t: Tokens, config: PolicyLossConfig) -> dict[str, Tensor]:
    """Statistics of the branches and of the factors of `config`, over the tokens of `t`."""
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
    """Raise UserError for a field of the context that the config needs but that is None."""
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
    # Not under no_grad: `t` keeps what they compute, and the losses need its graph.
    if given is None:
        t.statistics = _statistics(t, config)
    else:
        device = t.advantages_BT.device
        t.statistics = _Given(
            (name, torch.as_tensor(x, device=device)) for name, x in given.items()
        )
    if BRANCHES[config.positive].coupled:
        _check_of_sequence(t, t.gain_BT, "positive", config.positive)
    if BRANCHES[config.negative].coupled:
        _check_of_sequence(t, t.pain_BT, "negative", config.negative)
    return t


class _Given(dict[str, "Tensor"]):
    """The statistics that were passed in. UserError for a missing one that the loss reads."""

    def __missing__(self, name: str) -> Tensor:
        raise UserError(
            f"context.statistics: {', '.join(self) or 'none'} given, and the loss reads {name}; "
            "allowed: what batch_statistics returns for the same config (or statistics=None)"
        )


# As a share of the largest in the sequence: such differences are rounding, not token advantages.
_EQUAL = 1e-5


def _check_of_sequence(t: Tokens, amount_BT: Tensor, sign: str, branch: str) -> None:
    """Refuse a sequence with several advantages: a coupled f has no gradient for each."""
    if not amount_BT.numel():
        return
    # All have one sign, and padding is 0: either every token has the largest, or some have less.
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
