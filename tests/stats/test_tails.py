"""Quantiles from counts, the bins of position, and the Pareto index against scipy's own fit."""

import math

import numpy as np
import pytest
from scipy.stats import genpareto

from moe_upgrpo.stats import (
    log_counts,
    pareto_k_of_counts,
    position_bins,
    quantiles,
)
from moe_upgrpo.stats.tails import generalised_pareto_k


def test_bins_of_position():
    found = position_bins(np.array([0, 15, 16, 31, 32, 16383, 16384, 32767, 32768, 10**6]))
    assert found.tolist() == [0, 0, 1, 1, 2, 10, 11, 11, 12, 12]


def test_quantiles_from_counts_are_those_of_the_tokens():
    """To a bin's width, 10^(1/20) = 12%; of 20,000 tokens two are beyond 99.99%."""
    logs = np.random.default_rng(0).standard_t(3, 20_000) * 1e-3
    above, below = log_counts(logs)
    assert above.sum() == (logs > 0).sum() and below.sum() == (logs <= 0).sum()
    found = quantiles(above + below)
    assert list(found) == ["p50", "p90", "p99", "p99_9", "p99_99"]
    for name, q in zip(found, (0.5, 0.9, 0.99, 0.999, 0.9999), strict=True):
        expected = np.quantile(np.abs(logs), q, method="inverted_cdf")
        assert found[name] == pytest.approx(expected, rel=0.13), name
    half = quantiles(sum(log_counts(logs[:100])))
    assert list(half) == ["p50", "p90", "p99"]
    assert quantiles(sum(log_counts(np.zeros(10))))["p50"] < 1e-7
    assert quantiles(sum(log_counts(np.array([math.inf] * 4))))["p50"] > 1000
    assert quantiles(sum(log_counts(np.array([math.nan])))) == {}


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.7, 1.2])
def test_the_index_of_a_pareto_tail_is_found(k):
    """Against the true one, and scipy's maximum likelihood once the prior, ten values of .5, is
    taken out."""
    x = np.sort(genpareto.rvs(k, size=3000, random_state=1))
    found = generalised_pareto_k(x)
    assert found == pytest.approx((3000 * k + 5) / 3010, abs=0.08)
    theirs, _, _ = genpareto.fit(x, floc=0)
    assert (found * 3010 - 5) / 3000 == pytest.approx(theirs, abs=0.01)


def test_ratios_and_their_counts_give_the_same_index():
    """The largest M = 3√N of N ratios; their scale does not matter, and that below 1 does not."""
    rng = np.random.default_rng(2)
    logs = rng.standard_normal(50_000) * 0.7
    found = pareto_k_of_counts(*log_counts(logs))
    assert found == pytest.approx(_of_the_largest(logs, 3 * math.sqrt(50_000)), abs=0.03)
    heavy = rng.standard_t(3, 20_000) * 0.5
    found = pareto_k_of_counts(*log_counts(heavy))
    assert found == pytest.approx(_of_the_largest(heavy, 3 * math.sqrt(20_000)), abs=0.05)
    # 30 tokens, most of them below 1: the tail reaches over it.
    few = np.concatenate([[0.5, 0.2], -np.linspace(0.01, 0.5, 28)])
    assert pareto_k_of_counts(*log_counts(few)) == pytest.approx(_of_the_largest(few, 6), abs=0.1)


def _of_the_largest(logs, tail):
    """The index from the ratios themselves."""
    largest = np.sort(np.exp(logs))[::-1][: math.ceil(tail) + 1]
    return generalised_pareto_k((largest[:-1] - largest[-1])[::-1])


@pytest.mark.parametrize("logs", [np.zeros(500), np.arange(9.0), [math.nan] * 500, []])
def test_no_tail_no_index(logs):
    assert math.isnan(pareto_k_of_counts(*log_counts(np.array(logs))))


def test_ratios_that_are_infinite_are_the_largest():
    logs = np.random.default_rng(3).standard_normal(2000)
    logs[:20] = math.inf
    assert pareto_k_of_counts(*log_counts(logs)) > 1
