# SPDX-License-Identifier: Apache-2.0
"""The tail of a ratio: its quantiles, its Pareto index, and counts that ranks can add.

Shape suffixes: N tokens, M of them in the tail, B bins.
"""

import math
from collections.abc import Sequence

import numpy as np

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "p99_99": 0.9999}
"""Quantiles of |log ratio|; each is given if a token lies beyond it: the last from 10,000 tokens
on."""

POSITION_EDGES = tuple(16 * 2**i for i in range(12))
"""Bins of a token's position: below 16, then doubling, 16,384 to 32,767, and from 32,768 on."""

_PER_DECADE, _SMALLEST, _LARGEST = 20, -7, 3
# Bin 0 is below the first edge; the last bin begins at the last edge.
_EDGES = 10.0 ** (np.arange(_PER_DECADE * (_LARGEST - _SMALLEST) + 1) / _PER_DECADE + _SMALLEST)
BINS = len(_EDGES) + 1


def position_bins(positions_N: np.ndarray) -> np.ndarray:
    """The bin of each position, 0..12."""
    return np.searchsorted(POSITION_EDGES, positions_N, side="right")


def log_counts(log_ratios_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count log-ratios above 0, and those that are not, in each bin of their size, ``[B]``.

    Bins are 12% wide. NaN log-ratios are in neither.
    """
    x_N = np.asarray(log_ratios_N, np.float64)
    x_N = x_N[~np.isnan(x_N)]
    bins_N = np.searchsorted(_EDGES, np.abs(x_N), side="right")
    above_N = x_N > 0
    above_B, others_B = (np.bincount(bins_N[side], minlength=BINS) for side in (above_N, ~above_N))
    return above_B, others_B


def _spread(counts_B: np.ndarray, most: int) -> np.ndarray:
    """The largest sizes behind the counts, descending, at most `most`: a bin's sizes are spread
    evenly over it in logarithms."""
    found, left = [], most
    for b in np.flatnonzero(counts_B)[::-1]:
        count = int(counts_B[b])
        if not b:  # smaller than 1e-7: rounding
            found.append(np.zeros(min(count, left)))
            break
        low = _EDGES[b - 1]
        high = _EDGES[b] if b < len(_EDGES) else _EDGES[-1] * 10 ** (1 / _PER_DECADE)
        take = min(count, left)
        places = (count - np.arange(take) - 0.5) / count
        found.append(low * (high / low) ** places)
        left -= take
        if not left:
            break
    return np.concatenate(found) if found else np.empty(0)


def quantiles(counts_B: np.ndarray) -> dict[str, float]:
    """`QUANTILES` of sizes from their counts, to a bin's width, without those beyond which no token
    lies."""
    total = int(counts_B.sum())
    found = {}
    for name, q in QUANTILES.items():
        if (1 - q) * total < 1 - 1e-9:
            continue
        rank = total - math.ceil(q * total - 1e-9) + 1  # of the smallest that q of all reach
        found[name] = float(_spread(counts_B, rank)[-1])
    return found


def pareto_k_of_counts(above_B: np.ndarray, below_B: np.ndarray) -> float:
    """The tail index k of the ratios behind `log_counts`, to a bin's width, as in PSIS; NaN where
    there is no tail to fit.

    A generalised Pareto distribution is fitted to the M = min(N/5, 3√N) largest (Vehtari, Simpson,
    Gelman, Yao and Gabry, Pareto smoothed importance sampling, JMLR 25, 2024). Above .5 the
    variance of the ratios is infinite, above .7 a sample does not give their mean, above 1 they
    have none.
    """
    total = int(above_B.sum() + below_B.sum())
    wanted = _tail_size(total) + 1
    logs = _spread(above_B, wanted)
    if len(logs) < wanted:  # the rest are below 1, the nearest to 1 first
        less = -_spread(below_B, int(below_B.sum()))[::-1]
        logs = np.concatenate([logs, less[: wanted - len(logs)]])
    return _fitted(np.exp(np.minimum(logs, 700.0)))


def _tail_size(total: int) -> int:
    return math.ceil(min(0.2 * total, 3 * math.sqrt(total)))


def _fitted(largest: np.ndarray) -> float:
    """k of the M largest beyond the one after them, all descending."""
    if len(largest) < 6:
        return math.nan
    excess_M = (largest[:-1] - largest[-1])[::-1]
    if not excess_M[len(excess_M) // 4] > 0:
        return math.nan
    return generalised_pareto_k(excess_M[excess_M > 0])


def generalised_pareto_k(excess_M: Sequence[float]) -> float:
    """Shape of a generalised Pareto distribution, by Zhang and Stephens (Technometrics 51, 2009)
    with the weak prior of PSIS, worth ten values of k = .5; ``excess_M`` above 0, ascending."""
    x_M = np.asarray(excess_M, np.float64)
    size = len(x_M)
    tries = 30 + int(math.sqrt(size))
    quarter = x_M[int(size / 4 + 0.5) - 1]
    b_T = (1 - np.sqrt(tries / (np.arange(1, tries + 1) - 0.5))) / (3 * quarter) + 1 / x_M[-1]
    k_T = np.log1p(-b_T[:, None] * x_M).mean(axis=1)
    likelihood_T = size * (np.log(-b_T / k_T) - k_T - 1)
    weights_T = np.exp(likelihood_T - likelihood_T.max())
    weights_T /= weights_T.sum()
    weights_T[weights_T < 10 * np.finfo(float).eps] = 0
    b = (b_T * weights_T).sum() / weights_T.sum()
    k = np.log1p(-b * x_M).mean()
    return float((size * k + 10 * 0.5) / (size + 10))
