# SPDX-License-Identifier: Apache-2.0
"""A run as the report sees it: its config, environment and metrics, read from the store."""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.report.tokens import TokenLog, read_token_log
from moe_upgrpo.store import read_config, read_environment, read_metrics
from moe_upgrpo.store.run_folder import has_plain_metrics
from moe_upgrpo.store.text import printable

# Means of this many steps represent the beginning and the end of a run: one step is noisy.
END_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder. ``rows`` are its metrics, a dict for each step."""

    label: str
    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    tokens: TokenLog
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Make a value from the rows once: figures, texts and tables ask for the same."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged and finite (otherwise it is null)."""
        return self.once(("series", name), lambda: self._series(name))

    def _series(self, name: str) -> tuple[list[int], list[float]]:
        at, values = self._numbers().get(name, ([], []))
        return [self.rows[i]["step"] for i in at], [float(value) for value in values]

    def _numbers(self) -> dict[str, tuple[list[int], list[float]]]:
        """Columns by metric: the indices of the rows that have a number for it, and the numbers."""
        return self.once("numbers", self._made_numbers)

    def _made_numbers(self) -> dict[str, tuple[list[int], list[float]]]:
        found: dict[str, tuple[list[int], list[float]]] = {}
        for i, row in enumerate(self.rows):
            for name, value in row.items():
                if isinstance(value, float | int):
                    if (column := found.get(name)) is None:
                        column = found[name] = ([], [])
                    column[0].append(i)
                    column[1].append(value)
        return found

    @property
    def stale_steps(self) -> list[int]:
        """Steps whose samples come from older weights than the trainer's: generation overlaps."""
        series = self.series("staleness/mean")
        return self.once(
            "stale", lambda: [step for step, value in zip(*series, strict=True) if value]
        )

    def ends(self, name: str) -> tuple[float, float, int] | None:
        """Means of the first and of the last ``n`` values, and n; None without data."""
        _, values = self.series(name)
        if not values:
            return None
        n = max(1, min(END_STEPS, len(values) // 2))
        return float(np.mean(values[:n])), float(np.mean(values[-n:])), n

    @property
    def is_dense(self) -> bool:
        return self.config.get("moe_layers") == []

    @property
    def loss(self) -> str:
        """The preset's name; empty where the config has none."""
        return str(self.config.get("loss", ""))

    @property
    def is_probe(self) -> bool:
        """`moe-upgrpo probe` compares engine and trainer and trains nothing."""
        return self.loss.startswith("none")

    @property
    def replay(self) -> str:
        return self.config.get("replay") or "none"

    def pooled(self, name: str, *, steps: Sequence[int] | None = None) -> float | None:
        """Mean over the run, or over ``steps``, each step weighted by how much it compared."""
        return self.once(
            ("pooled", name, None if steps is None else tuple(steps)),
            lambda: self._pooled(name, steps),
        )

    def _pooled(self, name: str, steps: Sequence[int] | None) -> float | None:
        rows = _of([self.rows[i] for i in self._numbers().get(name, ([], []))[0]], steps)
        if not rows:
            return None
        return float(np.average([row[name] for row in rows], weights=_weights(rows)))

    def summed(self, name: str, *, steps: Sequence[int] | None = None) -> np.ndarray | None:
        """A list of counts summed over the run, or over ``steps`` ``[M]``; None if never logged.

        Raises:
            UserError: lists of different lengths.
        """
        rows = [row for row in _of(self.rows, steps) if row.get(name)]
        return self._matrix(name, rows).sum(axis=0).astype(np.int64) if rows else None

    def pass_at_k(self) -> list[str]:
        """The eval/pass@K keys that occur, sorted by K."""
        names = self.once(
            "pass@",
            lambda: {name for row in self.rows for name in row if name.startswith("eval/pass@")},
        )
        return sorted(names, key=lambda name: int(name.removeprefix("eval/pass@")))

    def by_layer(self, name: str) -> tuple[list[int], np.ndarray] | None:
        """Steps and the rates ``[steps, L]`` of a metric by layer; None if there are none."""
        return self.once(("by_layer", name), lambda: self._by_layer(name))

    def _by_layer(self, name: str) -> tuple[list[int], np.ndarray] | None:
        rows = [row for row in self.rows if row.get(name)]
        return ([row["step"] for row in rows], self._matrix(name, rows)) if rows else None

    def pooled_by_layer(self, name: str) -> np.ndarray | None:
        """Rate of each layer over the run ``[L]``, steps weighted by their tokens."""
        return self.once(("pooled_by_layer", name), lambda: self._pooled_by_layer(name))

    def _pooled_by_layer(self, name: str) -> np.ndarray | None:
        found = self.by_layer(name)
        if found is None:
            return None
        rows = [row for row in self.rows if row.get(name)]
        known = ~np.isnan(found[1])
        weights = np.ones(len(rows)) if (w := _weights(rows)) is None else np.array(w, float)
        total = (known * weights[:, None]).sum(axis=0)
        return (np.nan_to_num(found[1]) * weights[:, None]).sum(axis=0) / np.maximum(total, 1e-300)

    def _matrix(self, name: str, rows: list[dict[str, Any]]) -> np.ndarray:
        widths = {len(row[name]) for row in rows}
        if len(widths) > 1:
            raise UserError(f"{self.path}: {name} has {sorted(widths)} entries in turn")
        return np.array([row[name] for row in rows], dtype=float)  # null: NaN

    def layer_ids(self, num_layers: int) -> list[int]:
        """The MoE layers' numbers in the model; 0..L-1 where the config does not tell."""
        ids = self.config.get("moe_layers")
        known = isinstance(ids, list) and len(ids) == num_layers
        return ids if known else list(range(num_layers))


def _of(rows: list[dict[str, Any]], steps: Sequence[int] | None) -> list[dict[str, Any]]:
    """The rows of some steps; None: all."""
    wanted = None if steps is None else set(steps)
    return rows if wanted is None else [row for row in rows if row["step"] in wanted]


def _weights(rows: list[dict[str, Any]]) -> list[float] | None:
    """The (token, layer) pairs that each row compared; a dense model's tokens; otherwise None."""
    for name in ("mismatch/router_denominator", "tokens/sampled"):
        weights = [row.get(name) or 0 for row in rows]
        if all(weights):
            return weights
    return None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch off the garbage collector, which would double the time for millions of objects."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run folders; each is labelled with its name, or with its path where names collide.

    Raises:
        UserError: no folder given, one given twice, no run folder, or one without any metrics.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UserError("no run folder given: name at least one")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"a run folder is given twice: {', '.join(map(str, paths))}")
    names = [path.resolve().name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        # A run from a stranger may hold anything: a page must show it and execute nothing.
        config = printable(read_config(path))
        with _no_collection():
            rows = read_metrics(path)
        if not has_plain_metrics(path):  # usually plain: this saves minutes on a long run
            rows = printable(rows)
        runs.append(
            Run(
                label=printable(name if names.count(name) == 1 else str(path)),
                path=path,
                config=config,
                environment=printable(read_environment(path)),
                rows=rows,
                tokens=read_token_log(path, config=config, rows=rows),
            )
        )
    return runs
