# SPDX-License-Identifier: Apache-2.0
"""An array that lies in memory in pieces, one after the other: N rows in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Arrays ``[n, …]`` that together are one ``[N, …]``, without a second copy in memory."""

    parts: Sequence[np.ndarray]

    @staticmethod
    def of(values: np.ndarray | list[np.ndarray]) -> Pieces:
        """One array, or a list of several."""
        if isinstance(values, list) and values and isinstance(values[0], np.ndarray):
            return Pieces(values)
        return Pieces([np.asanyarray(values)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole, or that of the first part whose rows have another shape."""
        first = self.parts[0].shape
        for part in self.parts:
            if part.shape[1:] != first[1:] or not first:
                return part.shape
        return sum(map(len, self.parts)), *first[1:]

    def cut(self, rows: slice) -> np.ndarray:
        """Rows from a start to a stop: a view where one part has them all."""
        found = []
        for part, end in zip(self.parts, accumulate(map(len, self.parts)), strict=True):
            begin = end - len(part)
            if begin < rows.stop and end > rows.start:
                found.append(part[max(rows.start - begin, 0) : rows.stop - begin])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def at(self, rows: slice | np.ndarray) -> Pieces:
        """All rows (``slice(None)``), or the rows with these ascending numbers."""
        if isinstance(rows, slice):
            return self
        first = int(rows[0])
        return Pieces([self.cut(slice(first, int(rows[-1]) + 1))[rows - first]])

    def where(self, kept_N: np.ndarray) -> Pieces:
        """The rows at which a mask is true."""
        ends = np.cumsum([len(part) for part in self.parts])[:-1]
        marks = np.split(kept_N, ends)
        return Pieces([part[mark] for part, mark in zip(self.parts, marks, strict=True)])
