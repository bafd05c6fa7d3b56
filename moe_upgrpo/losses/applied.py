# SPDX-License-Identifier: Apache-2.0
"""A side of the loss on a batch, and what the loss did to its tokens: its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.correction import correction_weights, off_policy_sequences
from moe_upgrpo.losses.metrics import Metric
from moe_upgrpo.losses.passes import add_product_, keep, keep_, of_sign
from moe_upgrpo.losses.side import Side, beside, is_new, one
from moe_upgrpo.losses.tokens import MAX_LOG_RATIO, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from moe_upgrpo.losses.config import PolicyLossConfig as Config
    from moe_upgrpo.losses.side import TensorFn


@dataclass(frozen=True)
class AppliedSide:
    """A side of the loss on this batch: what its rules cut, and its weight.

    positive: A > 0, else A <= 0. below, above: cut by a bound of the loss; dropped: cut by the
    correction or the off-policy mask; factor: detached weight. All `[B, T]`, `[B, 1]` or None.
    """

    side: Side
    positive: bool
    below: Tensor | None
    above: Tensor | None
    factor: Tensor | None
    dropped: Tensor | None

    @property
    def weighs(self) -> bool:
        """Whether a factor is on this side."""
        return self.factor is not None or self.side.factor is not None

    @property
    def cuts(self) -> list[Tensor]:
        return [cut for cut in (self.below, self.above, self.dropped) if cut is not None]

    def amount(self, t: Tokens, config: Config, own: Tensor | None = None) -> Tensor:
        """The advantages of this side, 0 at other tokens and dropped ones, with its factors. own:
        the value of `Side.factor`, if it is at hand."""
        amount_BT = t.gain_BT if self.positive else t.pain_BT
        if self.factor is not None:
            amount_BT *= self.factor
        if self.side.factor is not None:
            amount_BT *= self.side.factor(t, config) if own is None else own
        drop = self.side.drop
        return amount_BT if drop is None else keep_(amount_BT, drop(t, config))

    def value(
        self, t: Tokens, config: Config, amount_BT: Tensor, to: Tensor | None = None
    ) -> Tensor:
        """A·f at the tokens of this side, from its `amount`, and 0 elsewhere; added to `to`, which
        it overwrites."""
        w = self.side.weight
        if w is None:
            f = self.side.surrogate(t, config)
            return amount_BT * f if to is None else add_product_(to, amount_BT, f)
        value_BT = t.times_log_probs(amount_BT if w is one else amount_BT * w(t, config))
        return value_BT if to is None else to.add_(value_BT)

    def _times_factors(self, x: Tensor, t: Tokens, config: Config) -> Tensor:
        if self.factor is not None:
            x = x * self.factor
        return x if self.side.factor is None else x * self.side.factor(t, config)

    def beside(self, t: Tokens, function: TensorFn, config: Config) -> Tensor:
        """The extra term, or its slope, at the tokens of this side, with the side's factors."""
        # Padding has A = 0, which is not positive: on that side, the choice by sign masks.
        extra = function(t, config) if self.positive else beside(function, t, config)
        of_sequences = extra.shape != t.advantages_BT.shape
        if of_sequences:
            extra = extra.expand_as(t.advantages_BT)
            extra = extra if self.positive else t.masked(extra)
        new = is_new(function) and not of_sequences and not torch.is_grad_enabled()
        extra = of_sign(extra, t.advantages_BT, self.positive, out=extra if new else None)
        return self._times_factors(extra, t, config)

    def coefficient(self, t: Tokens, config: Config) -> Tensor:
        """c of f, without the extra term; `[B, T]` or `[B, 1]`."""
        c = self._times_factors(self.side.slope(t, config), t, config)
        cut = union(*self.cuts)
        return c if cut is None else torch.where(cut, 0.0, c)


def amounts(
    t: Tokens, config: Config, positive: AppliedSide, negative: AppliedSide
) -> tuple[Tensor, Tensor]:
    """`amount` of each side, once, as the graph keeps them. A factor of both is not kept beside
    them."""

    def make() -> tuple[Tensor, Tensor]:
        factor = positive.side.factor
        own = factor(t, config) if factor and factor is negative.side.factor else None
        return positive.amount(t, config, own), negative.amount(t, config, own)

    made: tuple[Tensor, Tensor] = t.once("amounts", make)
    return made


def of_both(config: Config, name: str) -> TensorFn | None:
    """The sides' function of that name, where one serves both signs."""
    branch = BRANCHES[config.positive]
    if config.positive == config.negative and branch.both is not None:
        found: TensorFn | None = getattr(branch.both, name)
        return found
    positive, negative = (getattr(side, name) for side in config.sides)
    return positive if positive is negative else None


def amount_of_both(
    t: Tokens, config: Config, positive: AppliedSide, negative: AppliedSide
) -> Tensor | None:
    """The sides' `amount`s in one tensor: A, without what one rule drops for both signs; None where
    a factor, or a rule of its own, sets a side apart."""
    if positive.weighs or negative.weighs:
        return None
    drop = of_both(config, "drop")
    if drop is not None:
        return keep(t.advantages_BT, drop(t, config))
    return None if positive.side.drop or negative.side.drop else t.advantages_BT


def union(*hits: Tensor | None) -> Tensor | None:
    """Where any of these holds; None if all are None."""
    found = None
    for hit in hits:
        found = hit if found is None else found if hit is None else found | hit
    return found


class _OfSign:
    """The tokens of one sign, and those among them that a rule hits; each rule is counted once."""

    def __init__(self, here_BT: Tensor):
        self.here_BT = here_BT
        self.count = here_BT.count_nonzero().double()
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # with the rule, to keep its id

    def hit(self, rule: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rule, `[B, T]` or `[B, 1]`, hits, and how often."""
        if id(rule) not in self._seen:
            hit_BT = self.here_BT & rule
            self._seen[id(rule)] = rule, hit_BT, hit_BT.count_nonzero()
        _, hit_BT, count = self._seen[id(rule)]
        return hit_BT, count

    def share(self, rule: Tensor | None) -> Metric:
        return Metric(
            torch.zeros_like(self.count) if rule is None else self.hit(rule)[1], self.count
        )

    def cut(self, side: AppliedSide) -> tuple[Tensor | None, Tensor]:
        """Where any of the side's rules hits, and how often."""
        hits = [self.hit(cut) for cut in side.cuts]
        where_BT = union(*(hit_BT for hit_BT, _ in hits))
        if where_BT is None:
            return None, torch.zeros_like(self.count)
        return where_BT, hits[0][1] if len(hits) == 1 else where_BT.count_nonzero()


def measure(
    t: Tokens, config: Config, positive: AppliedSide, negative: AppliedSide
) -> tuple[Tensor, dict[str, Metric]]:
    """`PolicyLoss.clipped` and all metrics except the gradient's; formulas: `metrics.GLOSSARY`."""
    tokens = _sum(t.lengths_B1)
    log_ratio, ratio_size = _of_ratio(t, tokens)
    of_p, of_n = _OfSign(t.positive_BT), _OfSign(t.negative_BT)
    (cut_p, count_p), (cut_n, count_n) = of_p.cut(positive), of_n.cut(negative)
    clipped_BT = union(cut_p, cut_n)
    if clipped_BT is None:
        clipped_BT = torch.zeros_like(t.mask_BT)
    counterpart = BRANCHES[config.negative].positive
    is_own = counterpart is positive.side
    beyond = positive.above if is_own else counterpart.clip(t, config)[1]
    metrics = {
        "ppo_kl": Metric(-log_ratio, tokens),
        "ratio_mean": Metric(ratio_size.numerator, tokens),
        "ratio_effective_sample_size": ratio_size,
        "positive_fraction": Metric(of_p.count, tokens),
        "negative_fraction": Metric(of_n.count, tokens),
        "clip_fraction": Metric(count_p + count_n, tokens),
        "clip_fraction_positive": Metric(count_p, of_p.count),
        "clip_fraction_negative": Metric(count_n, of_n.count),
        "clip_fraction_positive_upper": of_p.share(positive.above),
        "clip_fraction_positive_lower": of_p.share(positive.below),
        "clip_fraction_negative_upper": of_n.share(negative.above),
        "clip_fraction_negative_lower": of_n.share(negative.below),
        "positive_beyond_upper_fraction": of_p.share(beyond),
    }
    if "dual_clip" in BRANCHES[config.negative].fields and config.dual_clip is not None:
        beyond_dual = t.ratio_BT > config.dual if negative.above is None else negative.above
        metrics["dual_clip_fraction"] = of_n.share(beyond_dual)
    if config.off_policy_limit is not None:
        metrics["off_policy_mask_fraction"] = of_n.share(
            off_policy_sequences(t, config.off_policy_limit)
        )
    if t.log_shift_BT is not None:
        metrics["router_shift_mean"] = Metric(_sum(t.masked(t.log_shift_BT.exp())), tokens)
    if config.correction.active:
        on_p, on_n = config.correction.positive, config.correction.negative
        applies_BT = (t.positive_BT & on_p) | (t.negative_BT & on_n)
        weight, dropped = correction_weights(t, config.correction)
        weight_BT = torch.where(applies_BT, weight, 0.0)
        applied = applies_BT.count_nonzero().double()
        size = _sample_size(weight_BT, applied)
        metrics["correction_weight_mean"] = Metric(size.numerator, applied)
        metrics["correction_zero_fraction"] = Metric(
            (dropped & applies_BT).count_nonzero(), applied
        )
        metrics["correction_effective_sample_size"] = size
    return clipped_BT, metrics


def _of_ratio(t: Tokens, tokens: Tensor) -> tuple[Tensor, Metric]:
    """Σ log r and the sample size of r, without RSPO's γ."""
    log_ratio_BT = t.raw_log_ratio_BT.detach()
    log_ratio = _sum(log_ratio_BT)
    if t.log_shift_BT is None and t.has_ratio:
        ratio_BT = t.ratio_BT.clone()
    else:
        ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp_()
    return log_ratio, _sample_size(t.of_finite_(ratio_BT), tokens)


def _sum(x_BT: Tensor) -> Tensor:
    """Σ of the rows' sums, in float64: integers stay exact beyond float32's 2^24."""
    return x_BT.sum(-1).sum(dtype=torch.float64)


def _sample_size(weight_BT: Tensor, count: Tensor) -> Metric:
    """(Σw, Σw²) of `count` weights (the others are 0), which are squared in place.

    Σw² ≥ (Σw)²/N holds for real numbers and is enforced here: rounding might make a sample of N
    tokens worth more than N.
    """
    sum_w, sum_w2 = _sum(weight_BT), _sum(weight_BT.square_())
    return Metric(sum_w, torch.maximum(sum_w2, sum_w**2 / count.clamp(min=1) * (1 + 1e-14)))
