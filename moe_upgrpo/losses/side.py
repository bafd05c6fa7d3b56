# SPDX-License-Identifier: Apache-2.0
"""The contract of a loss: a `Side` for each sign of the advantage, and `Branch`, a loss as data.

Every loss here is `L_t = −A_t · f_t + e_t`. A *side* (one sign of A) is functions of `Tokens` and
the config, each of a few lines:

- `surrogate`  f, differentiable.
- `slope`      the coefficient of ∇log π_θ(t) in ∇f where no rule removes the gradient.
- `clip`       (below, above): where f's rule removes the gradient, by the bound that did it.
- `extra`      e, differentiable and not multiplied by A: a penalty, for instance. Most have none.
- `extra_slope`  ∂e/∂log π_θ(t). Both `[B, T]`, with any values at padding, or `[B, 1]` for each
  token of a sequence.
- `weight`     w, detached, where f = w·log π: two such sides need one product for both.
- `drop`       the tokens at which f is 0 whatever the functions above say; `clip` has them too.
- `factor`     detached, `[B, T]`: multiplies all of the above.

The oracle is c = slope·1[not clipped] − extra_slope/A: with the aggregation's weight w,
∂loss/∂log π_θ(t) = −w·A_t·c_t. Slope and clip are written from the papers' gradients, not by
differentiating f. Where A = 0 the extra term still acts, on the negative side ("A <= 0").

`[B, 1]` results belong to whole sequences. In a `coupled` loss, f of a sequence depends on all its
tokens; c is then the coefficient for an advantage that is constant in the sequence.

A side may look at the token's own numbers, its sequence's, the fields of `Context`, and
*statistics*: scalars over the whole batch, all micro-batches and ranks, which `Branch.statistics`
computes and `batch_statistics` hands out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING

from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.passes import exceeds
from moe_upgrpo.losses.tokens import MAX_LOG_RATIO, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from moe_upgrpo.losses.config import PolicyLossConfig as Config

    TensorFn = Callable[[Tokens, Config], Tensor]
    Bounds = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Side:
    """One sign of the advantage under one loss; see the head of this file."""

    surrogate: TensorFn
    slope: TensorFn
    clip: Callable[[Tokens, Config], Bounds] = lambda t, cfg: (None, None)
    extra: TensorFn | None = None
    extra_slope: TensorFn | None = None
    weight: TensorFn | None = None
    drop: TensorFn | None = None
    factor: TensorFn | None = None


ANY = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def starting_with(first: str) -> tuple[str, ...]:
    return (first, *(name for name in ANY if name != first))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A loss as data.

    positive, negative: its two sides; each may be combined with the other of another branch that
        shares an aggregation.
    c: the coefficients for A > 0 and A < 0, as the docs print them.
    aggregations: those it is defined with, the source's own first.
    fields: the config fields it reads.
    arguments: optional arguments of `policy_loss`, and fields of its `context`, that it reads.
    coupled: f of a sequence depends on all its tokens, so token-level weights do not apply.
    up: the negative side may serve under UP: at r = 1 it weighs a token as UP's positive branch
        does (c = 1), so that the two signs balance as they do in the loss itself.
    refuses: config fields that may not be used with it: factors that it has itself, or that its
        formula has no place for.
    statistics: name -> scalar over the whole batch, from all its tokens.
    statistics_of_policy: whether they look at the current log-probs; if not, they need no forward
        at the weights of the update.
    both: the functions of both sides as one, by the sign of A at each token. `policy_loss` calls
        it, for fewer passes over the batch, where the branch serves both signs. Its `clip` is not
        used.
    """

    positive: Side
    negative: Side
    c: tuple[str, str]
    aggregations: tuple[str, ...] = ANY
    fields: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    coupled: bool = False
    up: bool = True
    refuses: tuple[str, ...] = ()
    statistics: Callable[[Tokens, Config], dict[str, Tensor]] | None = None
    statistics_of_policy: bool = True
    both: Side | None = None
    source: str


def kept(function: TensorFn) -> TensorFn:
    """The function, computed once for a batch, with the graph of its first call."""

    @wraps(function)
    def once(t: Tokens, cfg: Config) -> Tensor:
        return t.once(function, lambda: function(t, cfg))

    return once


_ZERO_AT_PADDING: set[TensorFn] = set()


def zero_at_padding(function: TensorFn) -> TensorFn:
    """Mark an extra term, or its slope, that is a new tensor and 0 at padding by itself: it saves
    a pass."""
    _ZERO_AT_PADDING.add(function)
    return function


def is_new(function: TensorFn) -> bool:
    """Whether the function is marked by `zero_at_padding`."""
    return function in _ZERO_AT_PADDING


def beside(function: TensorFn, t: Tokens, cfg: Config) -> Tensor:
    """An extra term, or its slope, 0 at padding; `[B, 1]` as it is."""
    x = function(t, cfg)
    if is_new(function) or x.shape != t.advantages_BT.shape:
        return x
    return t.masked(x)


def above(ratio: Tensor, log_ratio: Tensor, limit: float) -> Tensor:
    """ratio > limit; with no limit, where the overflow guard of `guarded_exp` binds."""
    return exceeds(ratio, limit) if limit < math.inf else exceeds(log_ratio, MAX_LOG_RATIO)


def token_ratio(t: Tokens, cfg: Config) -> Tensor:
    return t.ratio_BT


def sequence_ratio(t: Tokens, cfg: Config) -> Tensor:
    return t.sequence_ratio_B1


def trajectory_ratio(t: Tokens, cfg: Config) -> Tensor:
    return t.trajectory_ratio_B1


def one(t: Tokens, cfg: Config) -> Tensor:
    return torch.ones_like(t.lengths_B1)
