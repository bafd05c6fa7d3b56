# SPDX-License-Identifier: Apache-2.0
"""Distance of two policies on sampled tokens: effective sample size, χ², tails of the ratio.

Shape suffix: N tokens. log w = log p_train − log p_rollout of each.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

from moe_upgrpo.errors import UserError

# The thresholds τ of F(τ) that are reported.
TAILS = (1.1, 1.5, 2.0, 5.0, 10.0)


def effective_sample_size(log_weights_N: np.ndarray) -> float:
    """(Σw)² / Σw², in tokens, between 1 and N; from logarithms, so that no w overflows.

    Kish, Survey Sampling (1965); Kong, Liu and Wong (1994) for importance weights. Divide by N for
    the share.

    Raises:
        UserError: no tokens, or a log-weight that is NaN or +inf.
    """
    log_w_N = _checked(log_weights_N)
    size = np.exp(2 * logsumexp(log_w_N) - logsumexp(2 * log_w_N))
    return float(np.clip(size, 1, len(log_w_N)))  # rounding may leave the bounds


def chi_square(log_weights_N: np.ndarray) -> float:
    """χ²(train ‖ rollout) by self-normalised weights: N Σw² / (Σw)² − 1 = N / ESS − 1 ≥ 0.

    Raises:
        UserError: as `effective_sample_size`.
    """
    return len(_checked(log_weights_N)) / effective_sample_size(log_weights_N) - 1


def ratio_tails(
    log_weights_N: np.ndarray, taus: Sequence[float] = TAILS
) -> dict[float, tuple[int, int]]:
    """F(τ) as (numerator, denominator): tokens with max(p/q, q/p) > τ, of N.

    Raises:
        UserError: no tokens, a log-weight that is NaN or +inf, or a τ below 1 (max(p/q, q/p) ≥ 1).
    """
    log_w_N = _checked(log_weights_N)
    if wrong := [tau for tau in taus if not tau >= 1]:
        raise UserError(f"max(p/q, q/p) is at least 1, so τ must be too; got {wrong}")
    return {tau: (int((np.abs(log_w_N) > np.log(tau)).sum()), len(log_w_N)) for tau in taus}


def _checked(log_weights_N: np.ndarray) -> np.ndarray:
    log_w_N = np.asarray(log_weights_N, dtype=np.float64)
    if log_w_N.ndim != 1 or len(log_w_N) == 0:
        raise UserError(
            f"log-weights must be [N] with at least one token, got {list(log_w_N.shape)}"
        )
    if not (log_w_N < np.inf).all() or not (log_w_N > -np.inf).any():
        raise UserError("log-weights must be below +inf, not NaN, and not all -inf")
    return log_w_N
