# SPDX-License-Identifier: Apache-2.0
"""Statistics of figures whose tokens are not independent: pure numpy and scipy, no files."""

from moe_upgrpo.stats.clusters import (
    MIN_PROMPTS,
    Rate,
    Scale,
    jackknifed,
    rates,
    ratio_interval,
    unseen_bound,
)
from moe_upgrpo.stats.paired import (
    Comparison,
    compare_paired,
    compare_pairs,
    holm,
    mean_interval,
)
from moe_upgrpo.stats.sign_flips import sign_flip_test
from moe_upgrpo.stats.tails import (
    BINS,
    POSITION_EDGES,
    QUANTILES,
    log_counts,
    pareto_k_of_counts,
    position_bins,
    quantiles,
)
from moe_upgrpo.stats.weights import TAILS, chi_square, effective_sample_size, ratio_tails

__all__ = [
    "BINS",
    "MIN_PROMPTS",
    "POSITION_EDGES",
    "QUANTILES",
    "TAILS",
    "Comparison",
    "Rate",
    "Scale",
    "chi_square",
    "compare_paired",
    "compare_pairs",
    "effective_sample_size",
    "holm",
    "jackknifed",
    "log_counts",
    "mean_interval",
    "pareto_k_of_counts",
    "position_bins",
    "quantiles",
    "rates",
    "ratio_interval",
    "ratio_tails",
    "sign_flip_test",
    "unseen_bound",
]
