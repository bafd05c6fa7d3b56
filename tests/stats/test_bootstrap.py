"""The bootstrap by sequence: by hand, against scipy's, and by its coverage on clustered data."""

import math

import numpy as np
import pytest
import scipy.stats
from scipy import sparse

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import cluster_sums, rates, resampled_sums


def test_sums_of_sequences_and_groups():
    """Rows (sequence, group, value): (0,0,1) (0,0,2) (0,1,5) (1,1,7)."""
    sums = cluster_sums([1, 2, 5, 7], np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), (2, 2))
    np.testing.assert_array_equal(sums.toarray(), [[3, 5], [0, 7]])


def test_a_rate_is_a_ratio_of_sums_and_no_mean_of_means():
    """Sequence 0: 1 of 2; sequence 1: 0 of 8. Pooled 1/10, where the mean of means is 1/4.

    Two sequences have three multisets: (0,0) 1/4 of the time → 2/4, (0,1) half → 1/10,
    (1,1) 1/4 → 0/16. So the 95% interval is [0, 1/2], and the 40% one, whose ends lie at 30% and
    70%, is [1/10, 1/10].
    """
    counts = np.array([[1.0], [0.0]]), np.array([[2.0], [8.0]])
    (row,) = rates(*counts, groups=["all"])
    assert (row.numerator, row.denominator, row.rate) == (1, 10, 0.1)
    assert (row.group, row.sequences) == ("all", 2)
    assert (row.low, row.high) == (0, 0.5)
    (row,) = rates(*counts, groups=["all"], confidence=0.4)
    assert (row.low, row.high) == (0.1, 0.1)


def test_resamples_of_two_sequences_come_as_often_as_they_must():
    """Sums of two draws from {1, 10}: 2, 11 and 20 in 1/4, 1/2 and 1/4 of 4000 resamples.

    Five standard deviations of a share are 5·√(.25·.75/4000) = .034 and 5·√(.25/4000) = .040.
    """
    sums = resampled_sums(np.array([[1.0], [10.0]]), resamples=4000, seed=3).ravel()
    values, counts = np.unique(sums, return_counts=True)
    assert values.tolist() == [2, 11, 20]
    assert np.abs(counts / 4000 - [0.25, 0.5, 0.25]).max() < 0.04


def test_one_sequence_has_no_interval():
    groups = np.array([0, 1, 1])
    shape = (3, 2)
    den = cluster_sums(np.ones(3), np.arange(3), groups, shape)
    num = cluster_sums(np.array([1, 0, 1]), np.arange(3), groups, shape)
    alone, two = rates(num, den, groups=["alone", "two"])
    assert alone.rate == 1 and math.isnan(alone.low) and math.isnan(alone.high)
    assert alone.sequences == 1
    assert (two.rate, two.low, two.high, two.sequences) == (0.5, 0, 1, 2)


def test_sparse_and_chunked_agree_with_dense(monkeypatch):
    rng = np.random.default_rng(0)
    den = rng.integers(0, 5, (30, 4)).astype(float)
    num = den * rng.random((30, 4))
    dense = rates(num, den, groups=list("abcd"), resamples=50, seed=1)
    monkeypatch.setattr("moe_upgrpo.stats.bootstrap._DRAWS", 100)
    packed = rates(
        sparse.csr_array(num), sparse.csr_array(den), groups=list("abcd"), resamples=50, seed=1
    )
    for a, b in zip(dense, packed, strict=True):
        np.testing.assert_allclose((a.rate, a.low, a.high), (b.rate, b.low, b.high), rtol=1e-12)
    other = rates(num, den, groups=list("abcd"), resamples=50, seed=2)
    assert [r.low for r in other] != [r.low for r in dense]


def test_agrees_with_scipy():
    """scipy.stats.bootstrap of the same paired ratio; the ends agree within Monte Carlo error."""
    rng = np.random.default_rng(5)
    den = rng.integers(5, 60, 50).astype(float)
    num = rng.binomial(den.astype(int), rng.beta(2, 6, 50)).astype(float)
    (ours,) = rates(num[:, None], den[:, None], groups=["all"], resamples=8000)
    theirs = scipy.stats.bootstrap(
        (num, den),
        lambda n, d, axis: n.sum(axis) / d.sum(axis),
        paired=True,
        n_resamples=8000,
        method="percentile",
        rng=np.random.default_rng(6),
    )
    width = ours.high - ours.low
    assert abs(ours.low - theirs.confidence_interval.low) < 0.06 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.06 * width
    assert width > 3 * theirs.standard_error


def clustered(rng, sequences=60, mean=0.2, concentration=4):
    """Each sequence has a rate of its own ~ Beta(mean·c, (1−mean)·c) and 10..100 tokens.

    Length and rate are independent, so Σ events / Σ tokens estimates ``mean``.
    """
    length = rng.integers(10, 101, sequences)
    events = rng.binomial(
        length, rng.beta(mean * concentration, (1 - mean) * concentration, sequences)
    )
    return events.astype(float), length.astype(float)


def test_coverage_by_sequence_holds_and_by_token_does_not():
    """200 data sets with a true rate of 0.2: how many 95% intervals contain it.

    By sequence: at least 88% (percentile intervals of 60 sequences cover a little under 95%, and
    200 sets leave ±3%). By token: an intra-sequence correlation of 1/(4+1) with some 68 tokens
    (weighted) makes the true variance 1 + 67/5 = 14 times that of independent tokens, so the
    interval is 3.8 times too narrow: P(|Z| < 1.96/3.8) = 39%.
    """
    rng = np.random.default_rng(11)
    by_sequence, by_token, narrower = [], [], []
    for _ in range(200):
        num, den = clustered(rng)
        (honest,) = rates(num[:, None], den[:, None], groups=[""], resamples=300)
        tokens, events = int(den.sum()), int(num.sum())
        # Every token a sequence of its own: a resample has Binomial(N, events/N) events.
        share = rng.binomial(tokens, events / tokens, 300) / tokens
        low, high = np.quantile(share, (0.025, 0.975))
        by_sequence.append(honest.low <= 0.2 <= honest.high)
        by_token.append(low <= 0.2 <= high)
        narrower.append((honest.high - honest.low) / (high - low))
    assert np.mean(by_sequence) >= 0.88
    assert 0.25 < np.mean(by_token) < 0.55
    assert 3 < np.median(narrower) < 4.6


def test_by_token_is_what_the_function_gives_where_each_token_is_its_own_sequence():
    """The Binomial stand-in of the test above, against the function itself."""
    events = np.repeat([1.0, 0.0], [300, 700])[:, None]
    (row,) = rates(events, np.ones_like(events), groups=[""], resamples=2000)
    sd = math.sqrt(0.3 * 0.7 / 1000)
    assert row.low == pytest.approx(0.3 - 1.96 * sd, abs=0.2 * sd)
    assert row.high == pytest.approx(0.3 + 1.96 * sd, abs=0.2 * sd)


def test_a_nan_stays_in_its_group():
    num = np.array([[1.0, math.nan], [0.0, 1.0]])
    good, bad = rates(num, np.ones((2, 2)), groups=["good", "bad"])
    assert good.rate == 0.5 and good.high == 1
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
        (np.ones((2, 1)), np.ones((2, 1)), {"resamples": 0}, "got 2 sequences and resamples=0"),
    ],
)
def test_bad_input(num, den, options, message):
    with pytest.raises(UserError, match=message):
        rates(num, den, groups=["g"], **options)
