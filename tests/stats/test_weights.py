"""Effective sample size, χ² and tails, by hand."""

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import TAILS, chi_square, effective_sample_size, ratio_tails


def test_effective_sample_size_by_hand():
    """w = 1, 1, 2: (4)² / (1 + 1 + 4) = 16/6 = 8/3; χ² = 3 / (8/3) − 1 = 1/8."""
    log_w = np.log([1.0, 1.0, 2.0])
    assert effective_sample_size(log_w) == pytest.approx(8 / 3)
    assert chi_square(log_w) == pytest.approx(1 / 8)


def test_limits():
    """Equal weights count in full, one huge weight counts alone, and scale does not matter."""
    assert effective_sample_size(np.zeros(7)) == pytest.approx(7)
    assert chi_square(np.zeros(7)) == pytest.approx(0, abs=1e-12)
    assert effective_sample_size(np.array([2000.0, 0, 0])) == pytest.approx(1)
    assert effective_sample_size(np.log([1.0, 1, 2]) - 5000) == pytest.approx(8 / 3)
    assert effective_sample_size(np.array([0.0, -np.inf])) == pytest.approx(1)


def test_tails_by_hand():
    """Ratios 1, 1.2, 1/1.2, 3, 1/6, 20: both directions count, equality does not."""
    log_w = np.log([1, 1.2, 1 / 1.2, 3, 1 / 6, 20])
    assert ratio_tails(log_w) == {1.1: (5, 6), 1.5: (3, 6), 2: (3, 6), 5: (2, 6), 10: (1, 6)}
    assert ratio_tails(np.log([2.0]), [2.0]) == {2.0: (0, 1)}
    assert TAILS == (1.1, 1.5, 2, 5, 10)


@pytest.mark.parametrize("bad", [[], [[0.0]], [np.nan, 0.0], [np.inf, 0.0], [-np.inf]])
@pytest.mark.parametrize("function", [effective_sample_size, chi_square, ratio_tails])
def test_bad_weights(function, bad):
    with pytest.raises(UserError, match="log-weights must be"):
        function(np.array(bad))


def test_bad_threshold():
    with pytest.raises(UserError, match=r"τ must be too; got \[0.5\]"):
        ratio_tails(np.zeros(2), [0.5, 2])


def test_equal_weights_are_worth_all_tokens_and_no_more():
    """Rounding gives some sizes a little more than N, and χ² a little less than 0."""
    for level in (0.0, 0.1, -3.7, 700.0):
        for size in range(1, 200):
            log_w = np.full(size, level)
            assert size * (1 - 1e-12) <= effective_sample_size(log_w) <= size
            assert 0 <= chi_square(log_w) < 1e-12
