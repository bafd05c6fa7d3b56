# SPDX-License-Identifier: Apache-2.0
"""Differences between two sides on the same tokens, by prompt, and the part a change removed.

Shape suffixes: P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_upgrpo.record import known_rows
from moe_upgrpo.routing import ComparisonKind, compare_routes
from moe_upgrpo.stats import jackknifed, sign_flip_test

Measure = Literal["routers", "gap"]
UNITS: dict[Measure, str] = {"routers": "of routers differ", "gap": "mean |gap|"}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One side's view of some sequences, at their response tokens only; None: not known."""

    routes: list[np.ndarray] | None  # B × [T, L, K]
    log_probs: list[np.ndarray] | None  # B × [T]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Sums by prompt: differing routers among those compared, and |gap| of the tokens."""

    routers_P: np.ndarray | None
    pairs_P: np.ndarray
    gap_P: np.ndarray | None
    tokens_P: np.ndarray
    by_layer: np.ndarray | None = None  # [L], the share of routers that differ

    def has(self, measure: Measure) -> bool:
        """Whether the measure was taken."""
        return (self.routers_P if measure == "routers" else self.gap_P) is not None

    def sums(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """Numerators and denominators [P]."""
        if measure == "routers":
            return self.routers_P, self.pairs_P
        return self.gap_P, self.tokens_P

    def rate(self, measure: Measure) -> float | None:
        """The share of routers, or the mean |gap| in nats."""
        if not self.has(measure):
            return None
        numerators_P, denominators_P = self.sums(measure)
        return float(numerators_P.sum() / denominators_P.sum())

    def text(self, measure: Measure) -> str:
        """The rate as text."""
        rate = self.rate(measure)
        if rate is None:
            return "not known"
        return f"{rate:.2%}" if measure == "routers" else f"{rate:.2e}"


def differences(
    first: Seen, second: Seen, *, prompt: Sequence[int], num_experts: int
) -> Differences:
    """Two sides' differences, summed over the sequences of each prompt.

    Routes are compared in the rows that a router of each side wrote; the other rows are a fault of
    their own.

    Raises:
        UserError: nothing to compare, or routes that cannot be those of the same tokens.
    """
    known = first.log_probs if first.log_probs is not None else first.routes
    lengths = np.array([len(of_sequence) for of_sequence in known])
    _, prompt_B = np.unique(np.asarray(prompt), return_inverse=True)
    prompt_N = np.repeat(prompt_B, lengths)
    prompts = int(prompt_B.max()) + 1

    def summed(values_N: np.ndarray) -> np.ndarray:
        return np.bincount(prompt_N, weights=values_N, minlength=prompts)

    tokens_P = summed(np.ones(len(prompt_N)))
    pairs_P = tokens_P
    routers_P = by_layer = gap_P = None
    if first.routes is not None and second.routes is not None and first.routes[0].shape[1]:
        both = [np.concatenate(side.routes) for side in (first, second)]
        written_N = known_rows(*both, num_experts=num_experts)
        counts = compare_routes(
            *both,
            num_experts=num_experts,
            valid=written_N,
            kind=ComparisonKind.FREE_RUNNING,
        )
        pairs_P = summed(written_N) * counts.num_layers
        routers_P = summed(counts.routers_per_token.numpy())
        by_layer = counts.router_mismatch_by_layer.numpy()
    if first.log_probs is not None and second.log_probs is not None:
        gaps = np.concatenate(first.log_probs).astype(np.float64) - np.concatenate(second.log_probs)
        gap_P = summed(np.abs(gaps))
    return Differences(
        routers_P=routers_P,
        pairs_P=pairs_P,
        gap_P=gap_P,
        tokens_P=tokens_P,
        by_layer=by_layer,
    )


@dataclass(frozen=True, kw_only=True)
class Removed:
    """The part of a difference that a change removed: 1 − after / before, and its interval by
    prompt; below 0 where it added some. p: of the null that nothing was removed, one-sided, signs
    by prompt."""

    measure: Measure
    before: float
    after: float
    share: float | None  # None: there was nothing before
    low: float | None  # None, as high: too few prompts for an interval
    high: float | None
    p: float

    def __str__(self) -> str:
        form = ".2%" if self.measure == "routers" else ".2e"
        return f"{self.before:{form}} → {self.after:{form}} {UNITS[self.measure]}"


def removed(
    before: Differences, after: Differences, measure: Measure, *, floor_P: np.ndarray | None = None
) -> Removed:
    """The part of a measure that a change removed, on the same tokens before and after.

    floor_P: how much the same side differs from itself without any change; that much counts as 0.
    """
    before_P, size_P = before.sums(measure)
    after_P, _ = after.sums(measure)
    fell_P = before_P - after_P
    share = low = high = None
    if before_P.sum() > 0:
        share, low, high = jackknifed(
            lambda sums: 1 - sums[..., 1] / sums[..., 0],
            np.stack([before_P, after_P], axis=1),
            scale="signed",
        )
        low, high = (None if np.isnan(end) else float(end) for end in (low, high))
    return Removed(
        measure=measure,
        before=float(before_P.sum() / size_P.sum()),
        after=float(after_P.sum() / size_P.sum()),
        share=share,
        low=low,
        high=high,
        p=sign_flip_test(fell_P - (0 if floor_P is None else np.abs(floor_P))),
    )
