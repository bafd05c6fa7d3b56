"""The paired comparison and Holm's correction, by hand."""

import math

import pytest
import scipy.stats

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import compare_paired, compare_pairs, holm, mean_interval


def test_holm_by_hand():
    """.01·4 = .04; .02·3 = .06; .03·2 = .06; .04·1 = .04, raised to .06 by the step before."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1])
    assert holm([0.05]) == pytest.approx([0.05])


@pytest.mark.parametrize("bad", [[], [1.1], [-0.1, 0.5], [math.nan]])
def test_holm_takes_p_values(bad):
    with pytest.raises(UserError, match=r"p-values in \[0, 1\]"):
        holm(bad)


def test_differences_by_hand():
    """a − base = 1, 2, 3: mean 2, sd 1, t = 2√3 with 2 degrees of freedom.

    With 2 degrees of freedom P(|T| > t) = 1 − t/√(2 + t²) = 1 − √12/√14; the half-width is
    4.302653 (the 97.5% point) / √3. Of the two p-values the smaller is doubled by Holm.
    """
    results = {
        "base": {0: 1.0, 1: 5.0, 2: 9.0},
        "a": {2: 12.0, 0: 2.0, 1: 7.0},
        "b": {0: 1.0, 1: 5.0, 2: 9.0},
    }
    a, b = compare_paired(results, baseline="base")
    p = 1 - math.sqrt(12 / 14)
    assert (a.method, a.seeds, a.difference) == ("a", 3, 2.0)
    assert a.p_value == pytest.approx(p)
    assert a.p_holm == pytest.approx(2 * p)
    assert (a.low, a.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert (b.method, b.difference, b.p_value, b.p_holm) == ("b", 0, 1, 1)


def test_agrees_with_the_two_sample_form_of_scipy():
    x, y = [0.31, 0.42, 0.29, 0.5], [0.3, 0.35, 0.31, 0.41]
    (row,) = compare_paired({"x": dict(enumerate(x)), "y": dict(enumerate(y))}, baseline="y")
    assert row.p_value == row.p_holm == pytest.approx(scipy.stats.ttest_rel(x, y).pvalue)


def test_pairing_beats_the_noise_of_the_seeds():
    """Seeds differ by tens, the methods by about 1: unpaired nothing shows, paired it does."""
    base = {seed: 10.0 * seed for seed in range(5)}
    better = {seed: value + 1 + 0.1 * (seed % 2) for seed, value in base.items()}
    (row,) = compare_paired({"base": base, "better": better}, baseline="base")
    assert row.p_value < 1e-4
    assert scipy.stats.ttest_ind(list(better.values()), list(base.values())).pvalue > 0.5


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": {0: 1.0, 1: 2.0}}, "needs the baseline 'base' and another method"),
        ({"base": {0: 1.0, 1: 2.0}}, "another method"),
        ({"base": {0: 1.0, 1: 2.0}, "a": {0: 1.0, 2: 2.0}}, r"a has seeds \[0, 2\], base has"),
        ({"base": {0: 1.0}, "a": {0: 1.0}}, "at least two seeds"),
        ({"base": {0: 1.0, 1: 2.0}, "a": {0: 1.0, 1: math.nan}}, "a has a figure that is not"),
    ],
)
def test_bad_input(results, message):
    with pytest.raises(UserError, match=message):
        compare_paired(results, baseline="base")


def test_pairs_are_chosen_freely_and_corrected_together():
    """c − b = 1, 2, 3 and b − a = 0: as above p is 1 − √(12/14), doubled by Holm."""
    results = {"a": {0: 1.0, 1: 5.0, 2: 9.0}, "b": {0: 1.0, 1: 5.0, 2: 9.0}}
    results["c"] = {0: 2.0, 1: 7.0, 2: 12.0}
    first, second = compare_pairs(results, [("c", "b"), ("b", "a")])
    assert (first.method, first.other, second.method, second.other) == ("c", "b", "b", "a")
    assert first.p_holm == pytest.approx(2 * (1 - math.sqrt(12 / 14)))
    assert (first.seeds, first.difference, second.p_holm) == (3, 2, 1)
    (alone,) = compare_pairs(results, [("b", "c")])
    assert (alone.difference, alone.p_holm) == (-2, pytest.approx(1 - math.sqrt(12 / 14)))
    assert (alone.low, alone.high) == pytest.approx((-first.high, -first.low))


def test_missing_seeds_only_where_they_are_allowed():
    results = {"a": {0: 1.0, 1: 2.0, 3: 9.0}, "b": {0: 2.0, 1: 5.0, 2: 7.0}}
    with pytest.raises(UserError, match=r"b has seeds \[0, 1, 2\], a has \[0, 1, 3\]"):
        compare_pairs(results, [("b", "a")])
    (row,) = compare_pairs(results, [("b", "a")], common_seeds=True)
    assert (row.seeds, row.difference) == (2, 2)
    with pytest.raises(UserError, match=r"at least two seeds, got \[0\] of b and a"):
        compare_pairs({"a": {0: 1.0}, "b": {0: 2.0, 1: 3.0}}, [("b", "a")], common_seeds=True)


def test_a_constant_difference():
    (row,) = compare_pairs({"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 3.0}}, [("b", "a")])
    assert (row.difference, row.low, row.high, row.p_value) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least one pair"),
        ([("a", "c")], "'c' has no results"),
        ([("a", "a")], "a is compared with itself"),
    ],
)
def test_bad_pairs(pairs, message):
    with pytest.raises(UserError, match=message):
        compare_pairs({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}}, pairs)


def test_interval_of_a_mean_by_hand():
    """1, 2, 3: mean 2, s = 1, t with 2 degrees of freedom 4.302653 (95%) and 2.919986 (90%)."""
    assert mean_interval([1, 2, 3]) == pytest.approx(
        (2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5)
    )
    assert mean_interval([1, 2, 3], 0.9)[2] == pytest.approx(2 + 2.919986 / 3**0.5)
    mean, low, high = mean_interval([5.0])
    assert mean == 5 and math.isnan(low) and math.isnan(high)
    for bad in ([], [math.nan], [math.inf, 1]):
        with pytest.raises(UserError, match="finite figures, at least one"):
            mean_interval(bad)
