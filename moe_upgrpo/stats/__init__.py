"""Statistics of figures whose tokens are not independent: pure numpy and scipy, no files."""

from moe_upgrpo.stats.clusters import (
    MIN_PROMPTS,
    Rate,
    Scale,
    cluster_sums,
    jackknifed,
    rates,
    ratio_interval,
)
from moe_upgrpo.stats.paired import (
    Comparison,
    compare_paired,
    compare_pairs,
    holm,
    mean_interval,
)
from moe_upgrpo.stats.sign_flips import sign_flip_test
from moe_upgrpo.stats.weights import TAILS, chi_square, effective_sample_size, ratio_tails

__all__ = [
    "MIN_PROMPTS",
    "TAILS",
    "Comparison",
    "Rate",
    "Scale",
    "chi_square",
    "cluster_sums",
    "compare_paired",
    "compare_pairs",
    "effective_sample_size",
    "holm",
    "jackknifed",
    "mean_interval",
    "rates",
    "ratio_interval",
    "ratio_tails",
    "sign_flip_test",
]
