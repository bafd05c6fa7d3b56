"""Margins: each test by hand, what becomes of a claim's differences, and its long-run error."""

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats.margins import Difference, judge, together


def of(value, error=0.1, df=9):
    return Difference(value=value, error=error, df=df)


def test_one_sided_tests_are_students():
    x = np.array([0.2, 0.5, -0.1, 0.4, 0.3, 0.1])
    found = Difference(value=x.mean(), error=x.std(ddof=1) / np.sqrt(6), df=5)
    for bound in (-0.3, 0, 0.2):
        expected = ttest_1samp(x, bound, alternative="greater").pvalue
        assert found.p_above(bound) == pytest.approx(expected)
        assert found.p_below(bound) == pytest.approx(1 - expected)
    assert found.p_within(0.6) == pytest.approx(found.p_below(0.6))
    high = x.mean() + t.ppf(0.975, 5) * x.std(ddof=1) / np.sqrt(6)
    assert Difference.of_interval(x.mean(), high, 5).error == pytest.approx(found.error)
    assert of(0.1, error=0).p_above(0) == 0 and of(0.1, error=0).p_below(0) == 1


@pytest.mark.parametrize(
    ("claimed", "value", "found"),
    [
        ("more", 0.9, "holds"),
        ("more", -0.9, "fails"),
        ("more", 0.05, "equal"),
        ("not less", 0.9, "holds"),
        ("not less", -0.1, "equal"),
        ("not less", -0.9, "fails"),
        ("not less", -0.4, "open"),
        ("not more", -0.9, "holds"),
        ("not more", 0.9, "fails"),
    ],
)
def test_one_difference(claimed, value, found):
    assert judge([of(value)], claimed, 0.4) == [found]


def test_several_differences_of_a_claim_are_corrected():
    """One-sided p = .02 by itself; among five it is .1."""
    value = 0.1 * t.isf(0.02, 9)
    assert judge([of(0.1 * t.isf(0.03, 9))], "more", 0.01) == ["open"]  # two-sided, .06
    assert judge([of(value)], "more", 0.01) == ["holds"]
    assert judge([of(value), *[of(0)] * 4], "more", 0.01)[0] == "open"


@pytest.mark.parametrize(
    ("found", "claimed", "verdict"),
    [
        (["holds", "holds", "open"], "more", "holds"),
        (["holds", "open"], "more", "open"),
        (["fails", "fails", "open"], "more", "fails"),
        (["fails", "open"], "more", "open"),
        (["holds", "holds", "fails"], "more", "open"),
        (["fails", "fails", "holds"], "more", "open"),
        (["equal", "equal", "open"], "more", "equal"),
        (["equal", "equal", "holds"], "more", "open"),
        (["equal", "holds", "open"], "not less", "holds"),
        (["equal", "equal", "holds"], "not more", "equal"),
        (["fails", "fails", "equal"], "not less", "open"),
    ],
)
def test_holding_and_failing_have_one_rule(found, claimed, verdict):
    assert together(found, claimed) == verdict


def test_no_verdict_is_wrong_more_often_than_it_may_be():
    """Ten seeds, three contrasts; nothing differs, or all by the margin: of 600 claims at most 5%
    of each kind are wrong somewhere, and 7.7% is three standard deviations above that."""
    rng = np.random.default_rng(0)
    for true, wrong in ((0.0, {"holds", "fails"}), (0.5, {"equal"})):
        said = 0
        for _ in range(600):
            x = rng.normal(true, 1, (3, 10))
            errors = x.std(axis=1, ddof=1) / np.sqrt(10)
            differences = [of(m, e) for m, e in zip(x.mean(axis=1), errors, strict=True)]
            said += bool(wrong & set(judge(differences, "more", 0.5)))
        assert said / 600 < 0.077


@pytest.mark.parametrize(("differences", "margin"), [([], 1), ([of(1)], 0)])
def test_bad_input(differences, margin):
    with pytest.raises(UserError, match="differences and a margin above 0"):
        judge(differences, "more", margin)
