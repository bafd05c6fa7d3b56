"""Sorting networks sort, by the zero-one principle; the rest against numpy's plain forms."""

from bisect import bisect_right
from itertools import product
from math import comb

import numpy as np
import pytest

from moe_upgrpo.routing import subsets
from moe_upgrpo.routing.sets import (
    are_ascending,
    ascending,
    comparators,
    not_in,
    repeated,
    unequal,
    zeros,
)


@pytest.mark.parametrize("size", range(2, 11))
def test_a_network_sorts_all_zeros_and_ones_and_with_them_everything(size):
    """Knuth, The Art of Computer Programming 3, 5.3.4, theorem Z."""
    rows = np.array(list(product((0, 1), repeat=size)))
    for i, j in comparators(size):
        assert 0 <= i < j < size
        rows[:, i], rows[:, j] = rows[:, [i, j]].min(axis=1), rows[:, [i, j]].max(axis=1)
    assert (rows[:, 1:] >= rows[:, :-1]).all()


def test_networks_of_known_length():
    assert [len(comparators(size)) for size in (2, 4, 8, 16)] == [1, 5, 19, 63]


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 22, 32, 33])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_ascending_is_numpys_sort_and_leaves_its_argument_alone(top_k, kind):
    ids = np.random.default_rng(top_k).integers(0, 128, (700, 24, top_k)).astype(kind)
    before = ids.copy()
    found = ascending(ids)
    assert found.dtype == kind and found.flags.c_contiguous
    assert (found == np.sort(ids, axis=-1)).all() and (ids == before).all()
    assert (ascending(ids[::2, ::-1]) == np.sort(ids[::2, ::-1], axis=-1)).all()
    assert ascending(ids[:0]).shape == (0, 24, top_k)


def test_comparisons_of_rows():
    a = np.array([[0, 3, 5], [1, 2, 7], [4, 5, 6], [2, 2, 9]])
    b = np.array([[0, 3, 5], [2, 7, 8], [0, 1, 2], [2, 2, 9]])
    assert unequal(a, b).tolist() == [False, True, True, False]
    assert repeated(a).tolist() == [False, False, False, True]
    assert not_in(a[:3], b[:3]).tolist() == [[False] * 3, [True, False, False], [True] * 3]
    assert not_in(b[:3], a[:3]).tolist() == [[False] * 3, [False, False, True], [True] * 3]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8, 10, 16])
def test_rows_in_words_of_many_bytes_are_those_of_their_ids(top_k, kind):
    """One id in each place differs; and rows of zeros, which differ from all others."""
    a = np.tile(np.arange(1, top_k + 1, dtype=kind), (4, top_k + 1, 1))
    b = a.copy()
    for place in range(top_k):
        b[1, place, place] += 1
    a[3], b[3] = 0, 0
    assert (unequal(a, b) == (a != b).any(axis=-1)).all() and unequal(a, b).sum() == top_k
    assert (unequal(a[:, ::2], b[:, ::2]) == (a[:, ::2] != b[:, ::2]).any(axis=-1)).all()
    assert zeros(a).tolist() == [[False] * (top_k + 1)] * 3 + [[True] * (top_k + 1)]
    for stride in (1, 2):
        half = a[:, ::stride]
        assert (zeros(half) == (half == 0).all(axis=-1)).all()


def test_whether_all_rows_ascend():
    good = np.array([[1, 2, 9], [0, 3, 4], [0, 8, 9]], dtype=np.uint8)
    assert are_ascending(good) and are_ascending(good[:0]) and are_ascending(good[:, :1].copy())
    for row, place, value in ((0, 1, 1), (1, 1, 0), (2, 2, 8), (2, 0, 8)):
        bad = good.copy()
        bad[row, place] = value  # an id twice, or one that is smaller than that before it
        assert not are_ascending(bad)
    assert not are_ascending(good[:, ::-1])


@pytest.mark.parametrize(("top_k", "experts"), [(8, 128), (22, 384), (10, 512), (7, 8), (8, 1024)])
def test_the_largest_binomial_by_its_leading_bits_is_that_of_a_search(top_k, experts):
    """At each binomial, one below and one above it, where a guess could be one off, and between."""
    guessed = 0
    for size in set(subsets.runs(top_k, experts)):
        for i in range(size):
            binomials = [comb(c, i + 1) for c in range(experts)]
            most = comb(experts, size)
            near = [b + d for b in binomials for d in (-1, 0, 1)]
            between = np.random.default_rng(i).integers(0, min(binomials[-1], most), 50).tolist()
            ranks = [rank for rank in [*near, *between] if 0 <= rank < most]
            expected = [bisect_right(binomials, rank) - 1 for rank in ranks]
            found = subsets._largest(np.array(ranks, dtype=np.int64), i, size, experts)
            assert found.tolist() == expected
            guessed += i > 0 and subsets._guesses(i, size, experts) is not None
    assert guessed or top_k in (7, 8)
