# SPDX-License-Identifier: Apache-2.0
"""Methods compared over the same seeds, with a correction for comparing several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moe_upgrpo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``difference`` = mean over seeds of (method − other); the interval is not corrected."""

    method: str
    other: str
    seeds: int
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of m p-values, in the order given.

    With p_(1) ≤ ... ≤ p_(m): adjusted p_(i) = min(1, max_{j ≤ i} (m − j + 1) p_(j)). It bounds the
    chance of any false rejection whatever the dependence. Holm, Scand. J. Statist. 6 (1979); scipy
    has Benjamini-Hochberg but not Holm.

    Raises:
        UserError: no p-value, or one outside [0, 1].
    """
    p_M = np.asarray(p_values, dtype=float)
    if p_M.ndim != 1 or len(p_M) == 0 or not ((p_M >= 0) & (p_M <= 1)).all():
        raise UserError(f"holm takes p-values in [0, 1], at least one, got {p_values}")
    order_M = np.argsort(p_M, kind="stable")
    stepped_M = np.maximum.accumulate(p_M[order_M] * np.arange(len(p_M), 0, -1))
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.minimum(stepped_M, 1)
    return adjusted_M


def mean_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and Student's t interval, mean ± t_{n−1} · s / √n; for one value the ends are NaN.

    Raises:
        UserError: no value, or one that is not finite.
    """
    x_N = np.asarray(values, dtype=float)
    if x_N.ndim != 1 or len(x_N) == 0 or not np.isfinite(x_N).all():
        raise UserError(f"an interval takes finite figures, at least one, got {values}")
    mean = float(x_N.mean())
    if len(x_N) == 1:
        return mean, float("nan"), float("nan")
    reach = stats.t.ppf((1 + confidence) / 2, len(x_N) - 1) * x_N.std(ddof=1) / np.sqrt(len(x_N))
    return mean, float(mean - reach), float(mean + reach)


def compare_pairs(
    results: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    *,
    confidence: float = 0.95,
    common_seeds: bool = False,
) -> list[Comparison]:
    """Each pair (method, other) seed by seed: paired t-test, Holm over the pairs.

    Assumes differences near normal; with three seeds only large ones can show. Where every
    difference is 0 the p-value is 1.

    Args:
        results: method → seed → figure.
        pairs: the pairs to compare, in this order.
        common_seeds: use the seeds that both methods of a pair have, instead of raising where they
            differ; for figures that not every run has.

    Raises:
        UserError: no pair, a pair with an unknown method or of a method with itself, a pair with
            different seeds or fewer than two, or a figure that is not finite.
    """
    if not pairs:
        raise UserError("a comparison needs at least one pair")
    found = []
    for method, other in pairs:
        for name in (method, other):
            if name not in results:
                raise UserError(f"{name!r} has no results, known: {sorted(results)}")
            if not np.isfinite(list(results[name].values())).all():
                raise UserError(f"{name} has a figure that is not finite: {dict(results[name])}")
        if method == other:
            raise UserError(f"{method} is compared with itself")
        first, second = results[method], results[other]
        seeds = sorted({*first} & {*second})
        if not common_seeds and not len(seeds) == len(first) == len(second):
            raise UserError(
                f"{method} has seeds {sorted(first)}, {other} has {sorted(second)}: a paired "
                "comparison needs the same seeds of both"
            )
        if len(seeds) < 2:
            raise UserError(
                f"a paired comparison needs at least two seeds, got {seeds} of {method} and {other}"
            )
        d_N = np.array([first[seed] - second[seed] for seed in seeds])
        difference, low, high = mean_interval(d_N, confidence)
        # The t-test would divide by a standard deviation of 0.
        same = np.ptp(d_N) == 0
        p_value = float(d_N[0] == 0) if same else float(stats.ttest_1samp(d_N, 0).pvalue)
        found.append((method, other, len(seeds), difference, low, high, p_value))
    return [
        Comparison(
            method=method,
            other=other,
            seeds=seeds,
            difference=difference,
            low=low,
            high=high,
            p_value=p_value,
            p_holm=float(p_holm),
        )
        for (method, other, seeds, difference, low, high, p_value), p_holm in zip(
            found, holm([row[-1] for row in found]), strict=True
        )
    ]


def compare_paired(
    results: Mapping[str, Mapping[int, float]], *, baseline: str, confidence: float = 0.95
) -> list[Comparison]:
    """Compare every other method with the baseline: `compare_pairs` of all with one.

    Args:
        results: method → seed → figure.
        baseline: the method that the others are compared with.

    Raises:
        UserError: no such baseline, no other method, or as in `compare_pairs`.
    """
    if baseline not in results or len(results) < 2:
        raise UserError(
            f"comparison needs the baseline {baseline!r} and another method, got {sorted(results)}"
        )
    pairs = [(method, baseline) for method in results if method != baseline]
    return compare_pairs(results, pairs, confidence=confidence)
