# SPDX-License-Identifier: Apache-2.0
"""Ratios of sums over prompts, with intervals by prompt.

The responses to a prompt share its difficulty, and the tokens of a response share every earlier
mismatch, so neither tokens nor sequences are independent: prompts are. A figure is a ratio of sums,
r = Σ_p n_p / Σ_p d_p, and its spread is that of the prompts. Linearised by leaving one out, prompt
p moves it by e_p = g(r) − g(r without p), with g the logit for shares and the logarithm for
magnitudes, where figures are closer to normal and stay within their bounds:

    se² = (P − 1) / P · Σ_p e_p²,    g⁻¹(g(r) ± t_{P−1} se)

(Cochran, Sampling Techniques, 1977, §6.17; Efron and Tibshirani, An Introduction to the Bootstrap,
1993, §11). Half an event is added for the logit; for the logarithm, where one prompt holds all of a
sum, half of the smallest part. benchmarks/studies/coverage.py shows how often such intervals
contain the true value.

Shape suffixes: P prompts, G groups, C columns of sums.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import t as student_t

from moe_upgrpo.errors import UserError

MIN_PROMPTS = 8
"""With fewer there is no interval: the spread of so few says too little about the others."""

UNSEEN_SPREAD = 2.0
"""The standard deviation of prompts' shares, divided by their mean, where the data cannot tell it:
the widest that docs/intervals.md tries."""

Scale = Literal["share", "magnitude", "signed"]
"""A figure between 0 and 1, one above 0, one of either sign."""

_SCALES: dict[Scale, tuple[Callable[..., Any], Callable[..., Any]]] = {  # to it and back
    "share": (logit, expit),
    "magnitude": (np.log, np.exp),
    "signed": (np.asarray, np.asarray),
}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """``numerator / denominator`` of a group, and its interval by prompt.

    ``prompts`` is the number of prompts with rows in the group. ``low`` and ``high`` are NaN with
    fewer than `MIN_PROMPTS`, and where a share is 0 or 1 (or a magnitude 0): no difference was
    seen, so how much prompts differ is unknown.
    """

    group: Any
    numerator: float
    denominator: float
    rate: float
    low: float
    high: float
    prompts: int


def rates(
    numerators_PG: np.ndarray | sparse.csr_array,
    denominators_PG: np.ndarray | sparse.csr_array,
    *,
    groups: Sequence[Any],
    scale: Scale = "share",
    confidence: float = 0.95,
) -> list[Rate]:
    """Σ_p num / Σ_p den of each group with its interval by prompt; see the module.

    Args:
        numerators_PG, denominators_PG: ``[P, G]`` sums of each prompt, dense or sparse. A prompt
            belongs to a group where its denominator is above 0.
        groups: G labels.

    Raises:
        UserError: shapes differ, confidence outside (0, 1), a negative denominator, or a group
            without any (its denominator sums to 0).
    """
    shape = numerators_PG.shape
    if shape != denominators_PG.shape or shape[1] != len(groups):
        raise UserError(
            "numerators and denominators must both be [P, G] with G = the number of groups, got "
            f"{list(shape)}, {list(denominators_PG.shape)} and {len(groups)} groups"
        )
    _check(confidence)
    if shape[0] and denominators_PG.min() < 0:
        raise UserError("denominators count something and cannot be negative")
    num_GP, den_GP = (sparse.csc_array(x) for x in (numerators_PG, denominators_PG))
    rows, empty = [], []
    for g, group in enumerate(groups):
        n_P, d_P = _column(num_GP, g), _column(den_GP, g)
        here_P = d_P > 0
        if not here_P.any():
            empty.append(group)
            continue
        n_P, d_P = n_P[here_P], d_P[here_P]
        rate, low, high = ratio_interval(n_P, d_P, scale=scale, confidence=confidence)
        rows.append(
            Rate(
                group=group,
                numerator=float(n_P.sum()),
                denominator=float(d_P.sum()),
                rate=rate,
                low=low,
                high=high,
                prompts=len(d_P),
            )
        )
    if empty:
        raise UserError(
            f"nothing was counted in the groups {empty}: a rate of no rows is undefined"
        )
    return rows


def _column(matrix: sparse.csc_array, g: int) -> np.ndarray:
    """A column [P], dense."""
    column = np.zeros(matrix.shape[0])
    entries = slice(matrix.indptr[g], matrix.indptr[g + 1])
    np.add.at(column, matrix.indices[entries], matrix.data[entries])
    return column


def ratio_interval(
    numerators_P: np.ndarray,
    denominators_P: np.ndarray,
    *,
    scale: Scale = "share",
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Σ num / Σ den over prompts, and the two ends of its interval; see the module and `Rate`.

    Raises:
        UserError: no prompt, or a denominator that is not above 0.
    """
    n_P, d_P = (np.asarray(x, dtype=np.float64) for x in (numerators_P, denominators_P))
    if n_P.shape != d_P.shape or n_P.ndim != 1 or not len(d_P) or not (d_P > 0).all():
        raise UserError(
            "an interval by prompt takes two sums of each prompt, the second above 0, got shapes "
            f"{list(n_P.shape)} and {list(d_P.shape)}"
        )
    count, total = n_P.sum(), d_P.sum()
    rate = float(count / total)
    if len(d_P) < MIN_PROMPTS or _at_a_bound(rate, scale):
        return rate, math.nan, math.nan
    above, below = (0.5, 1.0) if scale == "share" else (0.0, 0.0)
    if scale == "magnitude" and (count - n_P <= 0).any():
        above = n_P[n_P > 0].min() / 2

    def on_scale(n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return _SCALES[scale][0]((n + above) / (d + below))

    e_P = on_scale(count, total) - on_scale(count - n_P, total - d_P)
    return rate, *_ends(rate, e_P, scale, confidence)


def unseen_bound(denominators_P: np.ndarray, *, confidence: float = 0.95) -> float:
    """The upper end of the interval of a share that was never seen; the lower one is 0.

    Prompts' shares are taken to spread by `UNSEEN_SPREAD` times their mean r, as a gamma
    distribution does. None of d_p is then seen with probability (1 + c² r d_p)^(−1/c²); at the
    bound, the product over all prompts is (1 − confidence) / 2: 3.7 / Σ d_p for many, and more for
    few.

    Raises:
        UserError: no prompt, or a denominator that is not above 0.
    """
    _check(confidence)
    d_P = np.asarray(denominators_P, dtype=np.float64)
    if d_P.ndim != 1 or not len(d_P) or not (d_P > 0).all():
        raise UserError(
            f"a bound by prompt takes one sum of each, above 0, got shape {list(d_P.shape)}"
        )
    c2, enough = UNSEEN_SPREAD**2, -math.log((1 - confidence) / 2)

    def beyond(share: float) -> float:
        return float(np.log1p(c2 * share * d_P).sum() / c2 - enough)

    return 1.0 if beyond(1.0) <= 0 else float(brentq(beyond, 0.0, 1.0, xtol=1e-15))


def jackknifed(
    statistic: Callable[[np.ndarray], np.ndarray],
    sums_PC: np.ndarray,
    *,
    scale: Scale,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """A figure made of sums over prompts that is not a ratio of two of them, and its interval.

    Args:
        statistic: from sums ``[…, C]`` to figures ``[…]``; it is called with the sums of all
            prompts, and with those of all but each one.
    """
    _check(confidence)
    total_C = sums_PC.sum(axis=0)
    figure = float(statistic(total_C))
    if len(sums_PC) < MIN_PROMPTS or _at_a_bound(figure, scale):
        return figure, math.nan, math.nan
    without_P = statistic(total_C - sums_PC)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved_P = _SCALES[scale][0](figure) - _SCALES[scale][0](without_P)
    return figure, *_ends(figure, moved_P, scale, confidence)


def _at_a_bound(figure: float, scale: Scale) -> bool:
    return scale != "signed" and (figure <= 0 or (scale == "share" and figure >= 1))


def _ends(
    figure: float, moved_P: np.ndarray, scale: Scale, confidence: float
) -> tuple[float, float]:
    """The interval of a figure that each prompt moves by ``moved_P`` on its scale; NaN where a
    prompt moves it out of bounds."""
    if not np.isfinite(moved_P).all():
        return math.nan, math.nan
    to_scale, back = _SCALES[scale]
    prompts = len(moved_P)
    error = math.sqrt((prompts - 1) / prompts * float((moved_P**2).sum()))
    reach = student_t.ppf((1 + confidence) / 2, prompts - 1) * error
    return float(back(to_scale(figure) - reach)), float(back(to_scale(figure) + reach))


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, such as 0.95, got {confidence}")
