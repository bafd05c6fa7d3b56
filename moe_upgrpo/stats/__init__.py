"""Statistics of figures whose tokens are not independent: pure numpy and scipy, no files."""

from moe_upgrpo.stats.bootstrap import (
    Rate,
    cluster_sums,
    percentile_interval,
    rates,
    resampled_sums,
)
from moe_upgrpo.stats.paired import (
    Comparison,
    compare_paired,
    compare_pairs,
    holm,
    mean_interval,
)
from moe_upgrpo.stats.weights import TAILS, chi_square, effective_sample_size, ratio_tails

__all__ = [
    "TAILS",
    "Comparison",
    "Rate",
    "chi_square",
    "cluster_sums",
    "compare_paired",
    "compare_pairs",
    "effective_sample_size",
    "holm",
    "mean_interval",
    "percentile_interval",
    "rates",
    "ratio_tails",
    "resampled_sums",
]
