"""Methods compared over the same seeds, with a correction for comparing several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moe_upgrpo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``difference`` = mean over seeds of (method − baseline); the interval is not corrected."""

    method: str
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
    has Benjamini-Hochberg and no Holm.

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


def compare_paired(
    results: Mapping[str, Mapping[int, float]], *, baseline: str, confidence: float = 0.95
) -> list[Comparison]:
    """Every other method against the baseline, seed by seed: paired t-test, Holm over methods.

    Assumes differences near normal; with three seeds only large ones can show. Where every
    difference is 0 the p-value is 1.

    Args:
        results: method → seed → figure.
        baseline: the method that the others are compared with.

    Raises:
        UserError: no such baseline, nothing beside it, fewer than two seeds, methods run on
            different seeds, or a figure that is not finite.
    """
    if baseline not in results or len(results) < 2:
        raise UserError(
            f"comparison needs the baseline {baseline!r} and another method, got {sorted(results)}"
        )
    seeds = sorted(results[baseline])
    for method, by_seed in results.items():
        if sorted(by_seed) != seeds:
            raise UserError(
                f"{method} has seeds {sorted(by_seed)}, {baseline} has {seeds}: a paired "
                "comparison needs the same seeds of both"
            )
        if not np.isfinite(list(by_seed.values())).all():
            raise UserError(f"{method} has a figure that is not finite: {dict(by_seed)}")
    if len(seeds) < 2:
        raise UserError(f"a paired comparison needs at least two seeds, got {seeds}")

    base = np.array([results[baseline][seed] for seed in seeds])
    found = []
    for method, by_seed in results.items():
        if method == baseline:
            continue
        differences = np.array([by_seed[seed] for seed in seeds]) - base
        if np.ptp(differences) == 0:  # the t-test would divide by a standard deviation of 0
            p_value, low, high = float(differences[0] == 0), differences[0], differences[0]
        else:
            test = stats.ttest_1samp(differences, 0)
            p_value, (low, high) = test.pvalue, test.confidence_interval(confidence)
        found.append((method, differences.mean(), low, high, p_value))
    adjusted = holm([row[-1] for row in found])
    return [
        Comparison(
            method=method,
            seeds=len(seeds),
            difference=float(difference),
            low=float(low),
            high=float(high),
            p_value=float(p_value),
            p_holm=float(p_holm),
        )
        for (method, difference, low, high, p_value), p_holm in zip(found, adjusted, strict=True)
    ]
