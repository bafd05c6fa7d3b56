"""Numbers in so many bits each, against Python's own integers and strings of bits."""

import numpy as np
import pytest

from moe_upgrpo.routing.bits import as_bytes, blank, pack, padded, read, unpack, write

WIDTHS = [3, 41, 0, 1, 63, 20, 64 - 41, 57, 58, 7]


def numbers(rows: int = 50) -> list[np.ndarray]:
    """The least, the greatest, and any number of each width."""
    rng = np.random.default_rng(0)
    most = [(1 << width) - 1 for width in WIDTHS]
    columns = [rng.integers(0, m, rows, endpoint=True) for m in most]
    for column, m in zip(columns, most, strict=True):
        column[:2] = 0, m
    return columns


def bits_of(row: list[int]) -> str:
    return "".join(f"{n:0{w}b}" for n, w in zip(row, WIDTHS, strict=True) if w)


def test_rows_are_their_numbers_bits_side_by_side():
    columns = numbers()
    packed = pack(columns, WIDTHS)
    assert packed.dtype == np.uint8 and packed.shape == (50, -(-sum(WIDTHS) // 8))
    for row, found in zip(np.stack(columns, 1).tolist(), packed, strict=True):
        expected = bits_of(row)
        expected += "0" * (-len(expected) % 8)
        assert "".join(f"{byte:08b}" for byte in found) == expected
    for found, column in zip(unpack(packed, WIDTHS), columns, strict=True):
        assert found.dtype == np.int64 and found.tolist() == column.tolist()


@pytest.mark.parametrize("width", [0, 1, 5, 8, 31, 56, 57, 58, 63])
def test_a_number_is_read_at_any_bit(width):
    data = np.random.default_rng(width).integers(0, 256, 40, dtype=np.uint8)
    bits = "".join(f"{byte:08b}" for byte in data) + "0" * 64
    at = np.arange(8 * len(data))
    expected = [int(bits[i : i + width] or "0", 2) for i in at]
    assert read(padded(data, 8), at, width).tolist() == expected


def test_numbers_are_written_at_any_bit_beside_others():
    """Numbers of all widths side by side, across the ends of words, in any order."""
    rng = np.random.default_rng(0)
    widths = rng.permutation(np.repeat(WIDTHS, 20))
    values = [int(rng.integers(0, (1 << int(w)) - 1, endpoint=True)) for w in widths]
    expected = "".join(f"{v:0{w}b}" for v, w in zip(values, widths, strict=True) if w)
    at = widths.cumsum() - widths
    size = -(-len(expected) // 8)
    words = blank(size)
    for width in rng.permutation(np.unique(widths)):
        these = rng.permutation((widths == width).nonzero()[0])
        write(words, at[these], np.array(values)[these], int(width))
    found = "".join(f"{byte:08b}" for byte in as_bytes(words, size))
    assert found == expected.ljust(8 * size, "0")
