"""Clustering against numbers worked by hand and against numpy's covariance matrix."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing import ComparisonKind, RoutingCounts, compare_routes
from moe_upgrpo.routing.clustering import clustering


def counts_of(mismatch_TL, kind=ComparisonKind.FREE_RUNNING):
    """Top-1 routes of 2 experts that differ where the matrix is 1."""
    rollout = torch.zeros(*np.shape(mismatch_TL), 1, dtype=torch.long)
    train = torch.tensor(np.array(mismatch_TL), dtype=torch.long)[..., None]
    return compare_routes(rollout, train, num_experts=2, kind=kind)


def test_every_combination_once_is_independence():
    """p = (1/2, 1/2): 1 − 1/4 = 3/4 of the tokens; J = 0, 1, 1, 2 has variance 1/2 = 2·(1/4)."""
    c = clustering(counts_of([[0, 0], [0, 1], [1, 0], [1, 1]]))
    assert (c.token_any_rate, c.token_any_rate_independent) == (0.75, 0.75)
    assert (c.variance, c.variance_independent) == (0.5, 0.5)
    assert (c.dispersion, c.pair_covariance_sum, c.tokens) == (1.0, 0.0, 4)


def test_layers_that_flip_together():
    """Same p, one token in two: 1/2 against 3/4; J = 0, 2 has variance 1; the one pair of layers
    has covariance E[XY] − E[X]·E[Y] = 1/2 − 1/4."""
    c = clustering(counts_of([[0, 0], [1, 1]], ComparisonKind.CONDITIONAL))
    assert (c.token_any_rate, c.token_any_rate_independent) == (0.5, 0.75)
    assert (c.variance, c.variance_independent) == (1.0, 0.5)
    assert (c.dispersion, c.pair_covariance_sum) == (2.0, 0.25)
    assert c.kind is ComparisonKind.CONDITIONAL


def test_layers_that_avoid_each_other():
    """J = 1 in every token: all of them against 3/4; variance 0; covariance 0 − 1/4."""
    c = clustering(counts_of([[0, 1], [1, 0]]))
    assert (c.token_any_rate, c.token_any_rate_independent) == (1.0, 0.75)
    assert (c.variance, c.dispersion, c.pair_covariance_sum) == (0.0, 0.0, -0.25)


def test_unequal_rates():
    """p = (1/4, 3/4): 1 − (3/4)·(1/4) = 13/16; Σ p(1 − p) = 3/8. J = 0, 1, 1, 2: variance 1/2."""
    c = clustering(counts_of([[0, 0], [0, 1], [0, 1], [1, 1]]))
    assert (c.token_any_rate, c.token_any_rate_independent) == (0.75, 13 / 16)
    assert (c.variance, c.variance_independent) == (0.5, 0.375)


def test_ten_percent_of_48_layers():
    """One token in ten differs in all layers: 10% against 1 − 0.9^48 = 99.4%, dispersion 48."""
    c = clustering(counts_of([[1] * 48] + [[0] * 48] * 9))
    assert c.token_any_rate == 0.1
    assert c.token_any_rate_independent == pytest.approx(0.99364, abs=1e-5)
    assert c.dispersion == pytest.approx(48)


def test_no_mismatch_is_zeros():
    c = clustering(counts_of([[0, 0, 0]] * 5))
    assert c.token_any_rate == c.token_any_rate_independent == 0.0
    assert c.variance == c.variance_independent == c.pair_covariance_sum == 0.0
    assert math.isnan(c.dispersion)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda L: st.lists(st.lists(st.integers(0, 1), min_size=L, max_size=L), min_size=1)
    )
)
def test_equals_the_covariance_matrix(mismatch):
    c = clustering(counts_of(mismatch))
    covariance = np.atleast_2d(np.cov(np.array(mismatch).T, bias=True))
    assert c.variance == pytest.approx(covariance.sum(), abs=1e-12)
    assert c.variance_independent == pytest.approx(np.trace(covariance), abs=1e-12)
    above_diagonal = np.triu(covariance, 1).sum()
    assert c.pair_covariance_sum == pytest.approx(above_diagonal, abs=1e-12)
    assert c.token_any_rate == np.any(mismatch, axis=1).mean()


def test_counts_of_ranks_are_added_first():
    a, b = counts_of([[0, 0], [0, 1]]), counts_of([[1, 0], [1, 1]])
    assert clustering(a + b) == clustering(counts_of([[0, 0], [0, 1], [1, 0], [1, 1]]))


def test_no_tokens_is_an_error():
    empty = RoutingCounts(
        overlap_histogram=torch.zeros(2, 2, dtype=torch.long),
        token_histogram=torch.zeros(3, dtype=torch.long),
    )
    with pytest.raises(UserError, match="the counts are empty"):
        clustering(empty)
