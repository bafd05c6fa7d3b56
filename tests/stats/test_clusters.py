"""Intervals by prompt: by hand, against a jackknife written out, and by their coverage."""

import math

import numpy as np
import pytest
from scipy import sparse
from scipy.special import expit, logit
from scipy.stats import t

from benchmarks.studies.coverage import Case, coverage
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import jackknifed, rates, ratio_interval, unseen_bound


def test_a_rate_is_a_ratio_of_sums_and_no_mean_of_means():
    """1 of 2 and 0 of 8: 1/10, where the mean of means is 1/4."""
    (row,) = rates(np.array([[1.0], [0.0]]), np.array([[2.0], [8.0]]), groups=["all"])
    assert (row.numerator, row.denominator, row.rate, row.prompts) == (1, 10, 0.1, 2)
    assert math.isnan(row.low) and math.isnan(row.high)


def test_a_mean_of_equal_prompts_has_students_interval():
    """One token each: the mean of eight numbers, mean ± t_7 s / √8."""
    x = np.array([3.0, -1, 4, 1, -5, 9, 2, 6])
    mean, low, high = ratio_interval(x, np.ones(8), scale="signed")
    reach = t.ppf(0.975, 7) * x.std(ddof=1) / math.sqrt(8)
    assert (mean, low, high) == pytest.approx((x.mean(), x.mean() - reach, x.mean() + reach))


def test_prompts_of_different_sizes_by_hand():
    """A jackknife on the logit scale, written out."""
    n = np.array([1.0, 0, 3, 5, 2, 2, 7, 1])
    d = np.array([10.0, 4, 12, 40, 9, 8, 30, 20])
    whole = logit((21 + 0.5) / (133 + 1))
    without = [logit((21 - a + 0.5) / (133 - b + 1)) for a, b in zip(n, d, strict=True)]
    se = math.sqrt(7 / 8 * sum((whole - one) ** 2 for one in without))
    expected = expit(logit(21 / 133) + t.ppf(0.975, 7) * se * np.array([-1, 1]))
    assert ratio_interval(n, d) == pytest.approx((21 / 133, *expected))
    assert ratio_interval(n, d, confidence=0.5)[1] > expected[0]
    # As a magnitude, such as layers of a token, the same numbers need no bound of 1.
    without = [math.log((21 - a) / (133 - b)) for a, b in zip(n, d, strict=True)]
    se = math.sqrt(7 / 8 * sum((math.log(21 / 133) - one) ** 2 for one in without))
    high = 21 / 133 * math.exp(t.ppf(0.975, 7) * se)
    assert ratio_interval(n, d, scale="magnitude")[2] == pytest.approx(high)


def test_a_figure_of_sums_is_a_ratio_too():
    rng = np.random.default_rng(0)
    sums = np.column_stack([rng.integers(1, 9, 20), rng.integers(10, 30, 20)]).astype(float)
    found = jackknifed(lambda s: s[..., 0] / s[..., 1], sums, scale="magnitude")
    assert found == pytest.approx(ratio_interval(*sums.T, scale="magnitude"))


def test_no_interval_without_enough_to_tell_one():
    few = ratio_interval(np.ones(7), np.full(7, 9.0))
    none, all_of_it = (
        ratio_interval(np.zeros(9), np.ones(9)),
        ratio_interval(np.ones(9), np.ones(9)),
    )
    for rate, low, high in (few, none, all_of_it):
        assert rate in (1 / 9, 0, 1) and math.isnan(low) and math.isnan(high)
    # One prompt holds all events: wide, and inside of its bounds.
    n = np.array([3.0, *[0] * 9])
    _, low, high = ratio_interval(n, np.full(10, 100.0))
    assert 0 < low < 0.0015 and 0.01 < high < 1
    _, low, high = ratio_interval(n / 7, np.full(10, 100.0), scale="magnitude")
    assert 0 < low < high


def test_sparse_agrees_with_dense_and_groups_with_themselves():
    rng = np.random.default_rng(0)
    den = rng.integers(0, 5, (30, 4)).astype(float)
    num = np.floor(den * rng.random((30, 4)))
    dense = rates(num, den, groups=list("abcd"))
    assert dense == rates(sparse.csr_array(num), sparse.csr_array(den), groups=list("abcd"))
    here = den[:, 2] > 0
    alone = ratio_interval(num[here, 2], den[here, 2])
    assert (dense[2].rate, dense[2].low, dense[2].high) == alone
    assert dense[2].prompts == here.sum() < 30


@pytest.mark.parametrize(
    ("prompts", "responses", "rate"), [(8, 2, 0.01), (8, 16, 0.1), (16, 2, 0.001), (32, 8, 0.5)]
)
def test_coverage(prompts, responses, rate):
    """600 data sets: 95% ± 2.9% is what three standard deviations of that many allow.

    `benchmarks/studies/coverage.py` is the long form, docs/intervals.md its table. Taken as
    independent, 16 responses to a prompt cover far less.
    """
    found = coverage(Case(prompts=prompts, responses=responses, rate=rate), sets=600)
    assert 0.921 < found.by_prompt < 0.979
    assert found.by_sequence < (0.65 if responses > 2 else 0.93)


def test_a_nan_stays_in_its_group():
    num = np.ones((9, 2))
    num[::2, 0], num[0, 1] = 0, math.nan
    good, bad = rates(num, np.ones((9, 2)), groups=["good", "bad"])
    assert good.rate == pytest.approx(4 / 9) and good.low < 4 / 9 < good.high
    assert math.isnan(bad.rate) and math.isnan(bad.low)


@pytest.mark.parametrize(
    ("num", "den", "options", "message"),
    [
        (np.ones((2, 1)), np.ones((3, 1)), {}, "numerators and denominators"),
        (np.ones((2, 2)), np.ones((2, 2)), {}, r"got \[2, 2\], \[2, 2\] and 1 groups"),
        (np.ones((2, 1)), np.zeros((2, 1)), {}, r"nothing was counted in the groups \['g'\]"),
        (np.ones((0, 1)), np.ones((0, 1)), {}, "nothing was counted"),
        (np.ones((2, 1)), np.array([[2.0], [-1.0]]), {}, "cannot be negative"),
        (np.ones((2, 1)), np.ones((2, 1)), {"confidence": 95}, "such as 0.95, got 95"),
    ],
)
def test_bad_input(num, den, options, message):
    with pytest.raises(UserError, match=message):
        rates(num, den, groups=["g"], **options)


def test_the_bound_of_what_was_never_seen():
    """(1 + 4 r d)^(−P / 4) = .025 solved for r by hand; many prompts: the rule of 3.7; one prompt
    says next to nothing."""
    for prompts in (8, 20):
        by_hand = (0.025 ** (-4 / prompts) - 1) / (4 * 100)
        assert unseen_bound(np.full(prompts, 100.0)) == pytest.approx(by_hand)
    many = unseen_bound(np.ones(200_000))
    assert many == pytest.approx(-math.log(0.025) / 200_000, rel=1e-3)
    assert unseen_bound(np.array([1000.0])) == 1
    # As much of one prompt more says less than the same of many.
    assert unseen_bound(np.array([930.0, *[10.0] * 7])) > unseen_bound(np.full(8, 125.0))
    for wrong in (np.zeros(3), np.array([])):
        with pytest.raises(UserError, match="a bound by prompt"):
            unseen_bound(wrong)
