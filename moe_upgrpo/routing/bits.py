# SPDX-License-Identifier: Apache-2.0
"""Pack numbers side by side in as many bits as each needs, most significant bit first.

Numbers are kept in columns: each operation is on one column of all rows, in words of 64 bits.

Shape suffixes: R rows, n rows that are each filled up to whole bytes, B bytes of such a row, M
bytes in all, W bits of a number.
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

# A wider number may begin in one window of 8 bytes and end in the next.
_WINDOW = 57


def pack(columns: Sequence[ndarray], widths: Sequence[int]) -> ndarray:
    """Write the columns' numbers row by row: uint8 ``[n, B]``, B = ⌈Σ widths / 8⌉.

    columns: int64 ``[n]`` each, from 0 to 2^width − 1; widths from 0 to 63.
    """
    total = sum(widths)
    words = np.zeros((-(-total // 64), len(columns[0])), dtype=np.uint64)
    end = 0
    for column_n, width in zip(columns, widths, strict=True):
        end += width
        if not width:
            continue
        number_n = column_n.view(np.uint64)
        last, room = (end - 1) // 64, -end % 64  # room: bits behind the number in its last word
        words[last] |= number_n << np.uint64(room)
        if (end - width) // 64 < last:
            words[last - 1] |= number_n >> np.uint64(64 - room)
    rows = np.ascontiguousarray(words.T).astype(">u8").view(np.uint8)
    return rows[:, : -(-total // 8)]


def unpack(packed_nB: ndarray, widths: Sequence[int]) -> list[ndarray]:
    """Undo `pack`: int64 ``[n]`` for each width."""
    n, B = packed_nB.shape
    whole = np.zeros((n, -(-B // 8) * 8), dtype=np.uint8)
    whole[:, :B] = packed_nB
    words = np.ascontiguousarray(whole.view(">u8").T).astype(np.uint64)
    columns, end = [], 0
    for width in widths:
        end += width
        if not width:
            columns.append(np.zeros(n, dtype=np.int64))
            continue
        last, room = (end - 1) // 64, -end % 64
        number_n = words[last] >> np.uint64(room)
        if (end - width) // 64 < last:
            number_n |= words[last - 1] << np.uint64(64 - room)
        number_n &= np.uint64((1 << width) - 1)
        columns.append(number_n.view(np.int64))
    return columns


def padded(data: ndarray, more: int) -> ndarray:
    """The bytes as `read` takes them, with ``more`` zero bytes and a window appended."""
    return np.concatenate([data, np.zeros(more + 8, dtype=np.uint8)])


def read(padded_M: ndarray, at_R: ndarray, width: int) -> ndarray:
    """Numbers of one width, 0 to 63, that begin at any bit: int64 ``[R]``.

    padded_M: from `padded`, with enough bytes for the numbers that reach behind the data's end.
    """
    if width > _WINDOW:
        high_R = read(padded_M, at_R, width - 32)
        return high_R << 32 | read(padded_M, at_R + (width - 32), 32)
    if not width:
        return np.zeros(len(at_R), dtype=np.int64)
    windows = np.ndarray((len(padded_M) - 7,), ">u8", padded_M, strides=(1,))
    window_R = windows[at_R >> 3].astype(np.uint64)
    window_R <<= (at_R & 7).astype(np.uint64)
    window_R >>= np.uint64(64 - width)
    return window_R.view(np.int64)


def blank(size: int) -> ndarray:
    """So many bytes of zero bits, as `write` takes them: words of 64 bits."""
    return np.zeros(-(-size // 8), dtype=np.uint64)


def write(blank_words: ndarray, at_R: ndarray, number_R: ndarray, width: int) -> None:
    """Write numbers of one width, 0 to 63, that begin at any bits, where none is written yet.

    blank_words: from `blank`. number_R: int64, from 0 to 2^width − 1.
    """
    if not width:
        return
    number_R = number_R.view(np.uint64)
    end_R = at_R + width
    last_R, room_R = (end_R - 1) >> 6, (-end_R & 63).astype(np.uint64)
    # Added, since numpy does so for scattered words in a tenth of the time of an or.
    np.add.at(blank_words, last_R, number_R << room_R)
    across_R = (at_R >> 6 < last_R).nonzero()[0]
    high_R = number_R[across_R] >> (np.uint64(64) - room_R[across_R])
    np.add.at(blank_words, last_R[across_R] - 1, high_R)


def as_bytes(written_words: ndarray, size: int) -> ndarray:
    """The bits of `write` as bytes: uint8 ``[size]``."""
    return written_words.astype(">u8").view(np.uint8)[:size]
