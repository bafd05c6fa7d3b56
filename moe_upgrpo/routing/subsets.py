# SPDX-License-Identifier: Apache-2.0
"""Number the subsets of a set, and find them again by their numbers.

An ascending subset c_1 < … < c_K of 0..E − 1 has the rank Σ_i C(c_i, i) in the combinatorial number
system (Knuth, The Art of Computer Programming 4A, 7.2.1.3, eq. 20). Where C(E, K) ≥ 2^63 it is
split into the fewest runs of near equal length whose ranks do fit, each a subset of 0..E − 1.

Shape suffixes: R rows, K members of a subset. E, in code `universe`, is the size of the set.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import comb

import numpy as np
from numpy import ndarray

# A subset's three (or two) lowest members are looked up together where no more combinations than
# this exist, in a table with 4 bytes for each: 10 bits for a member.
_LOOKED_UP = 1 << 19
_MEMBER_BITS = 10


def id_type(universe: int) -> type:
    """The narrowest type for members."""
    return np.uint8 if universe <= 256 else np.uint16


@cache
def runs(size: int, universe: int) -> list[int]:
    """Lengths of the runs that an ascending set is numbered in: the fewest whose ranks fit."""
    for count in range(1, size + 1):
        lengths = [size // count + (i < size % count) for i in range(count)]
        if all(comb(universe, length) < 1 << 63 for length in lengths):
            return lengths
    raise AssertionError("a run of one always fits")


def _rank_width(size: int, universe: int) -> int:
    return (comb(universe, size) - 1).bit_length()


@cache
def rank_widths(size: int, universe: int) -> list[int]:
    """Bits of the rank of each run of a subset."""
    return [_rank_width(length, universe) for length in runs(size, universe)]


def set_width(size: int, universe: int) -> int:
    return sum(rank_widths(size, universe))


@cache
def _binomials(size: int, universe: int) -> ndarray:
    """int64 ``[size, universe]``: C(c, i) for i = 1..size, no larger than C(universe, size).

    A larger value belongs to no subset of that size.
    """
    most = comb(universe, size)
    table = [[min(comb(c, i), most) for c in range(universe)] for i in range(1, size + 1)]
    return np.array(table, dtype=np.int64)


def ranks(sets: ndarray, universe: int) -> list[ndarray]:
    """Ascending subsets ``[..., K]`` to the ranks of their runs, int64 ``[...]`` each."""
    size = sets.shape[-1]
    lengths = runs(size, universe)
    if lengths == [size] and size % 2 == 0 and sets.dtype == np.uint8:
        pairs = np.ascontiguousarray(sets).view(np.uint16)
        rank = _pairs(0, size, universe).take(pairs[..., 0])
        for i in range(2, size, 2):
            rank += _pairs(i, size, universe).take(pairs[..., i // 2])
        return [rank]
    found, start = [], 0
    for length in lengths:
        binomials = _binomials(length, universe)
        rank = binomials[0].take(sets[..., start])
        for i in range(1, length):
            rank += binomials[i].take(sets[..., start + i])
        found.append(rank)
        start += length
    return found


@cache
def _pairs(i: int, size: int, universe: int) -> ndarray:
    """The share of members i and i + 1 in a rank, by their two bytes: int64 ``[65536]``."""
    first, second = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2).T
    added = np.zeros((2, 256), dtype=np.int64)
    added[:, :universe] = _binomials(size, universe)[i : i + 2]
    return added[0].take(first) + added[1].take(second)


def members(ranks_R: Sequence[ndarray], size: int, universe: int) -> tuple[ndarray, ndarray]:
    """Undo `ranks`: integers ``[size, R]``, and which rows hold no subset (bool ``[R]``)."""
    members_KR: ndarray = np.empty((size, len(ranks_R[0])), dtype=id_type(universe))
    bad_R = np.zeros(len(ranks_R[0]), dtype=bool)
    end = size
    for rank_R, length in zip(reversed(ranks_R), reversed(runs(size, universe)), strict=True):
        bad_R |= rank_R >= comb(universe, length)
        left_R, low = rank_R.copy(), _looked_up(length, universe)
        for i in reversed(range(low, length)):
            member_R = _largest(left_R, i, length, universe)
            left_R -= _binomials(length, universe)[i].take(member_R)
            members_KR[end - length + i] = member_R
        if low == 1:
            members_KR[end - length] = np.minimum(left_R, universe - 1)
        else:
            found_R = _low_members(low, universe).take(left_R, mode="clip")
        for i in range(low if low > 1 else 0):
            members_KR[end - length + i] = found_R >> _MEMBER_BITS * i & (1 << _MEMBER_BITS) - 1
        end -= length
    for lower_R, upper_R in pairwise(members_KR):
        bad_R |= upper_R <= lower_R
    return members_KR, bad_R


def _looked_up(size: int, universe: int) -> int:
    """The number of a subset's lowest members that one look-up in `_low_members` gives."""
    fit = (low for low in (3, 2) if low <= size and comb(universe, low) <= _LOOKED_UP)
    return next(fit, 1)


@cache
def _low_members(size: int, universe: int) -> ndarray:
    """The subsets of a size by their ranks, the lowest member in the lowest bits: uint32."""
    rank_R = np.arange(comb(universe, size))
    found_R = np.zeros(len(rank_R), dtype=np.int64)
    for i in reversed(range(size)):
        member_R = _largest(rank_R, i, size, universe)
        rank_R -= _binomials(size, universe)[i].take(member_R)
        found_R |= member_R << _MEMBER_BITS * i
    return found_R.astype(np.uint32)


def _largest(rank_R: ndarray, i: int, size: int, universe: int) -> ndarray:
    """The largest c with C(c, i + 1) ≤ each rank.

    A rank's leading bits give it to within one: no two neighbouring binomials share them.
    """
    if i == 0:
        return np.minimum(rank_R, universe - 1)
    binomials = _binomials(size, universe)[i]
    guesses = _guesses(i, size, universe)
    if guesses is None:
        return binomials.searchsorted(rank_R, side="right") - 1
    below, from_above = guesses
    lead_R = _leading_bits(rank_R)
    member_R = below.take(lead_R, mode="clip")  # beyond the table: no set's rank
    member_R += rank_R >= from_above.take(lead_R, mode="clip")
    return member_R


@cache
def _guesses(i: int, size: int, universe: int) -> tuple[ndarray, ndarray] | None:
    """For all leading bits: the largest c whose C(c, i + 1) has lower ones, and C(c + 1, i + 1).

    None where two binomials share leading bits, so that one step up may not reach the right c.
    """
    binomials = _binomials(size, universe)[i]
    bits = _leading_bits(binomials)
    first = int((binomials > 0).argmax())  # C(c, i + 1) is 0 for c ≤ i
    if (np.diff(bits[first:]) == 0).any():
        return None
    below = np.maximum(bits.searchsorted(np.arange(bits[-1] + 2), side="left") - 1, first - 1)
    beyond = np.append(binomials, np.iinfo(np.int64).max)
    return below, beyond[below + 1]


def _leading_bits(values_R: ndarray) -> ndarray:
    """The exponent and the first 7 bits behind it of numbers from 0 to 2^63, in the same order."""
    return (values_R.astype(np.float32).view(np.int32) >> 16).astype(np.intp)
