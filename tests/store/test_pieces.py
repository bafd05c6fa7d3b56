"""Arrays in pieces are read as the one array that they are."""

import numpy as np
import pytest

from moe_upgrpo.store.pieces import Pieces

WHOLE = np.arange(22).reshape(11, 2)
PIECES = Pieces.of([WHOLE[:4], WHOLE[4:4], WHOLE[4:5], WHOLE[5:]])


@pytest.mark.parametrize("rows", [slice(0, 11), slice(1, 3), slice(3, 5), slice(4, 11)])
def test_cuts(rows):
    assert PIECES.shape == (11, 2)
    assert (PIECES.cut(rows) == WHOLE[rows]).all()


def test_a_cut_of_one_piece_is_a_view():
    assert np.shares_memory(PIECES.cut(slice(6, 9)), WHOLE)


def test_rows_by_number_and_by_mask():
    kept = np.arange(11) % 3 > 0
    assert (PIECES.where(kept).cut(slice(0, 7)) == WHOLE[kept]).all()
    assert (PIECES.at(np.array([3, 4, 8])).cut(slice(0, 3)) == WHOLE[[3, 4, 8]]).all()


def test_one_array_and_pieces_that_do_not_fit():
    assert Pieces.of(WHOLE).shape == (11, 2) and Pieces.of([[1, 2], [3, 4]]).shape == (2, 2)
    assert Pieces.of([WHOLE, WHOLE[:, :1]]).shape == (11, 1)
