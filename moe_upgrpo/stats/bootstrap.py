"""Bootstrap by sequence: percentile intervals of ratios of sums.

The tokens of a sequence share its prompt, its reward and every earlier mismatch, so the sequence
is what was drawn independently, and whole sequences are drawn again (Davison and Hinkley, Bootstrap
Methods and their Application, 1997: hierarchical data in section 3.8, percentile intervals in 5.3).
A figure is a ratio of sums, Σ_s num_s / Σ_s den_s, and both sums are drawn together.

Shape suffixes: N rows (tokens), S sequences, G groups, R resamples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from moe_upgrpo.errors import UserError

# Random indices drawn at once: 2^22 of them are 32 MiB.
_DRAWS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Rate:
    """``numerator / denominator`` of a group, and its interval by resampling sequences.

    ``sequences`` of them have rows in the group; with fewer than two, ``low`` and ``high`` are NaN:
    one sequence says nothing about the others.
    """

    group: Any
    numerator: float
    denominator: float
    rate: float
    low: float
    high: float
    sequences: int


def cluster_sums(
    values_N: np.ndarray, clusters_N: np.ndarray, groups_N: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_array:
    """Sum of the rows of each sequence and group: sparse ``[S, G]`` = ``shape``.

    Args:
        values_N: numbers ``[N]``.
        clusters_N: the sequence of each row, 0..S-1.
        groups_N: the group of each row, 0..G-1.
    """
    entries = (np.asarray(values_N, dtype=np.float64), (clusters_N, groups_N))
    return sparse.coo_array(entries, shape=shape).tocsr()


def resampled_sums(
    sums_SG: np.ndarray | sparse.csr_array, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """``[R, G]``: the column sums when S of the S rows are drawn with replacement, R times.

    Raises:
        UserError: no rows, or no resamples.
    """
    num_sequences, num_groups = sums_SG.shape
    if num_sequences == 0 or resamples < 1:
        raise UserError(
            "a bootstrap needs at least one sequence and one resample, got "
            f"{num_sequences} sequences and resamples={resamples}"
        )
    out_RG = np.empty((resamples, num_groups))
    begin = 0
    for counts_CS in _draws(num_sequences, resamples, seed):
        end = begin + len(counts_CS)
        out_RG[begin:end] = counts_CS @ sums_SG
        begin = end
    return out_RG


def _draws(num_sequences: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each sequence is drawn, ``[C, S]``, a chunk of C resamples at a time."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _DRAWS // num_sequences)
    for begin in range(0, resamples, chunk):
        size = min(chunk, resamples - begin)
        drawn_CS = rng.integers(num_sequences, size=(size, num_sequences))
        drawn_CS += np.arange(size)[:, None] * num_sequences
        counts = np.bincount(drawn_CS.ravel(), minlength=size * num_sequences)
        yield counts.reshape(size, num_sequences).astype(np.float64)


def percentile_interval(found_R: np.ndarray, confidence: float) -> tuple[float, float]:
    """The quantiles (1 − confidence)/2 and (1 + confidence)/2 of a statistic over resamples.

    Raises:
        UserError: confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, such as 0.95, got {confidence}")
    low, high = np.quantile(found_R, ((1 - confidence) / 2, (1 + confidence) / 2)).tolist()
    return low, high


def rates(
    numerators_SG: np.ndarray | sparse.csr_array,
    denominators_SG: np.ndarray | sparse.csr_array,
    *,
    groups: Sequence[Any],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Rate]:
    """Σ_s num / Σ_s den of each group with the percentile interval over resampled sequences.

    Resamples that hold nothing of a group leave its interval alone. A rate of exactly 0 or 1 has an
    interval of width 0: no resample can contain what no sequence did.

    Args:
        numerators_SG, denominators_SG: ``[S, G]`` sums of each sequence, dense or sparse. A
            sequence belongs to a group where its denominator is above 0.
        groups: G labels.

    Raises:
        UserError: shapes differ, confidence outside (0, 1), a negative denominator, or a group
            without any (its denominator sums to 0).
    """
    shape = numerators_SG.shape
    if shape != denominators_SG.shape or shape[1] != len(groups):
        raise UserError(
            "numerators and denominators must both be [S, G] with G = the number of groups, got "
            f"{list(shape)}, {list(denominators_SG.shape)} and {len(groups)} groups"
        )
    numerator_G = np.asarray(numerators_SG.sum(axis=0), dtype=float).ravel()
    denominator_G = np.asarray(denominators_SG.sum(axis=0), dtype=float).ravel()
    if shape[0] and denominators_SG.min() < 0:
        raise UserError("denominators count something and cannot be negative")
    if empty := [group for group, d in zip(groups, denominator_G, strict=True) if d == 0]:
        raise UserError(
            f"nothing was counted in the groups {empty}: a rate of no rows is undefined"
        )
    sequences_G = np.asarray((denominators_SG > 0).sum(axis=0)).ravel()

    stack = sparse.hstack if sparse.issparse(numerators_SG) else np.hstack
    both_SG = stack([numerators_SG, denominators_SG])
    sampled_RG = resampled_sums(both_SG, resamples=resamples, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_RG = sampled_RG[:, : shape[1]] / sampled_RG[:, shape[1] :]
    rows = []
    for g, group in enumerate(groups):
        # A group missing from a resample is 0/0 there; a numerator that is NaN stays NaN.
        found_R = rate_RG[:, g]
        if not math.isnan(numerator_G[g]):
            found_R = found_R[~np.isnan(found_R)]
        low, high = math.nan, math.nan
        if sequences_G[g] > 1:
            low, high = percentile_interval(found_R, confidence)
        rows.append(
            Rate(
                group=group,
                numerator=float(numerator_G[g]),
                denominator=float(denominator_G[g]),
                rate=float(numerator_G[g] / denominator_G[g]),
                low=low,
                high=high,
                sequences=int(sequences_G[g]),
            )
        )
    return rows
