# SPDX-License-Identifier: Apache-2.0
"""Answer a question part by part: a token log need not fit into memory.

A log is read twice. The first time (`Question.look`) values are counted, for bins with about
equally many tokens and the most frequent token ids; the second time (`Question.add`) the sums of
each prompt and group are kept, which take little memory. A part is a table of whole prompts or
sequences, such as a file.

Shape suffixes: N rows (tokens) of a part, P prompts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import Rate, Scale, position_bins, rates
from moe_upgrpo.store.schema import COLUMNS, TokenLayout

BINNED = ("position", "margin", "prefix")
_SIGNS = ("positive", "negative", "zero")
_MERGED_FROM = 4_000_000  # counted values; 64 MB
# Bits of a float's 32 that are dropped where values are counted: bins end within 0.03% of a value.
_COARSE = 11


@dataclass
class Part:
    """A table, and what several questions need from it, computed once."""

    table: pa.Table
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def nullable(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(name for name in set(names) if self.table[name].null_count))

    def rows(self, names: tuple[str, ...]) -> pa.Table:
        """The rows without a null in any of these columns, names from `nullable`."""

        def make() -> pa.Table:
            if not names:
                return self.table
            known = pc.is_valid(self.table[names[0]])
            for name in names[1:]:
                known = pc.and_(known, pc.is_valid(self.table[name]))
            return self.table.filter(known)

        return self.once(("rows", names), make)

    def array(self, names: tuple[str, ...], column: str) -> np.ndarray:
        """A column of `rows`; floats as float64."""

        def make() -> np.ndarray:
            values = self.rows(names)[column].to_numpy()
            return values.astype(np.float64) if values.dtype.kind == "f" else values

        return self.once(("array", names, column), make)

    def prompts(self, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the prompts of `rows`, the same in every part ``[P]``, and each row's ``[N]``."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            step_N, prompt_N = (self.array(names, c).astype(np.int64) for c in ("step", "prompt"))
            return np.unique((step_N << 32) + prompt_N, return_inverse=True)

        return self.once(("prompts", names), make)


class Counted:
    """Count how often each value was seen, in little memory: floats are counted coarsely."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, values_N: np.ndarray) -> None:
        if values_N.dtype.kind == "f":
            bits = values_N.astype(np.float32).view(np.int32)
            values_N = (bits >> _COARSE << _COARSE).view(np.float32)
        self._parts.append(np.unique(values_N, return_counts=True))
        self._waiting += len(self._parts[-1][0])
        if self._waiting > _MERGED_FROM:
            self.merged()

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Values, ascending, and their counts."""
        if len(self._parts) > 1:
            values, at = np.unique(np.concatenate([v for v, _ in self._parts]), return_inverse=True)
            counts = np.concatenate([c for _, c in self._parts])
            totals = np.bincount(at, weights=counts, minlength=len(values))
            self._parts = [(values, totals.astype(np.int64))]
        self._waiting = 0
        return self._parts[0] if self._parts else (np.empty(0), np.empty(0, np.int64))

    def ends(self, groups: int) -> np.ndarray:
        """The quantiles 1/groups, 2/groups, …: `np.quantile` of all values that were added."""
        values, counts = self.merged()
        if not len(values):
            return np.empty(0)
        upto = counts.cumsum()
        place = np.arange(1, groups) / groups * (upto[-1] - 1)
        below = np.floor(place).astype(np.int64)
        low, high = (
            values[np.searchsorted(upto, k, side="right")].astype(np.float64)
            for k in (below, np.minimum(below + 1, upto[-1] - 1))
        )
        return low + (high - low) * (place - below)

    def most_frequent(self, groups: int) -> np.ndarray:
        values, counts = self.merged()
        return values[np.argsort(-counts, kind="stable")[:groups]]


class Question:
    """One quantity by one grouping; see `moe_upgrpo.store.questions.rate`."""

    def __init__(
        self,
        quantity: str,
        asked: Any,
        *,
        by: str,
        column: str,
        per_router: bool,
        layout: TokenLayout,
        groups: int,
        confidence: float,
        counted: dict[Hashable, Any] | None = None,
    ) -> None:
        """asked: the `Quantity`. column: the grouping's. counted: shared by all questions that are
        answered together and have the same groups."""
        self.quantity, self.asked, self.by, self.column = quantity, asked, by, column
        self.layout, self.groups, self.confidence = layout, groups, confidence
        # A layer's own rate is over tokens.
        self.weight = layout.num_layers if per_router and by != "layer" else 1
        self.columns = tuple(dict.fromkeys(("step", "prompt", *asked.columns, column)))
        optional = tuple(c for c in asked.columns if COLUMNS[c].optional)
        # The columns that say which tokens count.
        self.looked_at = (column, *(asked.columns if asked.counts else optional))
        counted = {} if counted is None else counted
        # Questions about the same tokens have the same bins.
        self.key = (by, optional, asked.counts)
        self._counted = counted.setdefault(self.key, Counted())
        self._sums: list[tuple[np.ndarray, ...]] = []
        self._steps: dict[int, int] = counted.setdefault(("steps", *self.key), {})
        self._extent: dict[int, tuple[Any, Any]] = {}
        self.scale: Scale = asked.scale

    @property
    def looks(self) -> bool:
        return self.by in (*BINNED, "token")

    def _kept(self, part: Part) -> tuple[tuple[str, ...], dict[str, np.ndarray], np.ndarray | None]:
        names = part.nullable(self.columns)
        columns = {c: part.array(names, c) for c in (*self.asked.columns, self.column)}
        return names, columns, self.asked.counts(columns) if self.asked.counts else None

    def look(self, part: Part) -> None:
        """Count the values that make the groups; one of the questions that share them does so."""
        names = part.nullable(self.looked_at)
        values_N = part.array(names, self.column)
        if self.asked.counts:
            columns = {name: part.array(names, name) for name in self.asked.columns}
            values_N = values_N[self.asked.counts(columns)]
        if len(values_N):
            self._counted.add(values_N)

    def add(self, part: Part) -> None:
        """Add the part's sums for each prompt and group."""
        if self.by == "layer":
            self._add_layers(part)
            return
        names, columns, keep_N = self._kept(part)
        group_N = part.once(("group", self.key, names), lambda: self._grouped(columns[self.column]))
        keep_N = group_N >= 0 if keep_N is None else keep_N & (group_N >= 0)
        if not keep_N.any():
            return
        keys_P, prompt_N = part.prompts(names)
        width = int(group_N.max()) + 1
        numerator_N = np.asarray(self.asked.numerator(columns), dtype=np.float64)
        if keep_N.all():
            at_N = prompt_N * width + group_N
        else:
            at_N = prompt_N[keep_N] * width + group_N[keep_N]
            numerator_N = numerator_N[keep_N]
        size = len(keys_P) * width
        tokens = np.bincount(at_N, minlength=size)
        found = np.flatnonzero(tokens)
        sums = np.bincount(at_N, weights=numerator_N, minlength=size)[found]
        self._sums.append((keys_P[found // width], found % width, sums, tokens[found]))
        if self.by in (*BINNED, "own", "context"):
            values_N = columns[self.column]
            values_N, group_N = values_N[keep_N], group_N[keep_N]
            for group in np.unique(group_N).tolist():
                inside = values_N[group_N == group]
                low, high = self._extent.get(group, (inside[0], inside[0]))
                extent = min(low, inside.min()), max(high, inside.max())
                self._extent[group] = tuple(np.asarray(x).item() for x in extent)

    def _add_layers(self, part: Part) -> None:
        names = part.nullable(self.columns)
        keys_P, differs_PL, tokens_P = mismatches_by_layer(part, names, self.layout)
        P, L = differs_PL.shape
        group = np.tile(np.arange(L), P)
        tokens = np.repeat(tokens_P, L)
        self._sums.append((np.repeat(keys_P, L), group, differs_PL.ravel(), tokens))

    @cached_property
    def _fixed(self) -> np.ndarray:
        """The groups from the counted values: ends of bins, or token ids."""
        if self.by == "own":  # 0, 1, 2, 3–4, 5–8, ...: each bin ends at a power of two
            return np.concatenate([[0], 2.0 ** np.arange(32)])
        if self.by == "token":
            return self._counted.most_frequent(self.groups)
        return self._counted.ends(self.groups)

    def _grouped(self, values_N: np.ndarray) -> np.ndarray:
        """Each row's group, -1 where it is in none."""
        if self.by == "all":
            return np.zeros(len(values_N), dtype=np.int64)
        if self.by == "sign":
            return np.select([values_N > 0, values_N < 0], [0, 1], 2)
        if self.by == "context":
            return position_bins(values_N)
        if self.by == "step":
            found, at_N = np.unique(values_N, return_inverse=True)
            return np.array([self._steps.setdefault(s, len(self._steps)) for s in found])[at_N]
        if self.by == "token" and not len(self._fixed):
            return np.full(len(values_N), -1)
        if self.by == "token":
            order = np.argsort(self._fixed)
            ascending = self._fixed[order]
            at_N = np.minimum(np.searchsorted(ascending, values_N), len(ascending) - 1)
            return np.where(ascending[at_N] == values_N, order[at_N], -1)
        return np.searchsorted(self._fixed, values_N)

    def rows(self) -> list[Rate]:
        """The answer, from all parts. Raises UserError where no token was counted."""
        if not self._sums:
            raise UserError(f"no token to count for {self.quantity}: {self.asked.meaning}")
        keys, group, sums, tokens = (np.concatenate(x) for x in zip(*self._sums, strict=True))
        found_G, at = np.unique(group, return_inverse=True)
        labels = self._labels(found_G)
        order = sorted(range(len(labels)), key=labels.__getitem__) if self.by == "step" else None
        prompts, prompt = np.unique(keys, return_inverse=True)
        shape = (len(prompts), len(found_G))
        pair = [
            sparse.coo_array((x, (prompt, at)), shape=shape).tocsc()
            for x in (sums, tokens * float(self.weight))
        ]
        if order:
            pair, labels = [x[:, order] for x in pair], [labels[i] for i in order]
        return rates(*pair, groups=labels, scale=self.scale, confidence=self.confidence)

    def _labels(self, found_G: np.ndarray) -> list[Any]:
        if self.by == "all":
            return ["all"]
        if self.by == "sign":
            return [_SIGNS[g] for g in found_G]
        if self.by == "layer":
            return [self.layout.layer_ids[g] for g in found_G]
        if self.by == "step":
            steps = [int(step) for step in self._steps]
            return [steps[g] for g in found_G]
        if self.by == "token":
            return self._fixed[found_G].tolist()
        return [self._extent[g] for g in found_G.tolist()]


def mismatches_by_layer(
    part: Part, names: tuple[str, ...], layout: TokenLayout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys of the prompts ``[P]``, their mismatched tokens ``[P, L]`` and their tokens ``[P]``."""
    from moe_upgrpo.store.token_log import overlap_array

    def make() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys_P, prompt_N = part.prompts(names)
        differs_NL = overlap_array(part.rows(names)) < layout.top_k
        count = len(keys_P)
        by_layer = [np.bincount(prompt_N, d_N, minlength=count) for d_N in differs_NL.T]
        return keys_P, np.stack(by_layer, axis=1), np.bincount(prompt_N, minlength=count)

    return part.once(("layers", names), make)


def answer(
    questions: Iterable[Any], parts: Callable[[Collection[str]], Iterable[pa.Table]]
) -> None:
    """Pass the parts to every question, twice where a question looks first.

    questions: `Question`s, or other objects that `add` a part. parts: called with the names of
        columns, yields tables that have them.
    """
    questions = list(questions)
    # One of the questions that share their groups looks.
    looking = {q.key: q for q in questions if isinstance(q, Question) and q.looks}
    if looking:
        for table in parts({c for q in looking.values() for c in q.looked_at}):
            part = Part(table)
            for question in looking.values():
                question.look(part)
    for table in parts({column for question in questions for column in question.columns}):
        part = Part(table)
        for question in questions:
            question.add(part)
