# SPDX-License-Identifier: Apache-2.0
"""The Parquet file of each run: its metrics by step, with facts about the run as file metadata.

A comparison kept for long has one file for all its runs, `runs.parquet`, a fortieth of the size:
there a column says which run each row belongs to.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import parse_json, publish
from moe_upgrpo.store.parquet import read_checked, write_checked
from moe_upgrpo.store.text import printable

_ABOUT = b"moe_upgrpo.compare"
_RUN = "about"
TOGETHER = "runs.parquet"


@dataclass(frozen=True, kw_only=True)
class About:
    """status: finished, or crashed where the run ended by itself with an error, `message`.
    seconds: wall-clock time of the whole run, including its start; None where it is not known."""

    arm: str
    seed: int
    tuning: bool
    lr: float
    steps: int
    status: str
    message: str
    seconds: float | None
    config: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run's kept data. Rows are those entries of metrics.jsonl that are numbers or number lists:
    row 0 is the evaluation before the first step, then there is a row for each step."""

    about: About
    rows: Sequence[dict[str, Any]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it was measured."""
        found = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]


def write(file: Path, run: RunData) -> None:
    about = {_ABOUT: json.dumps(asdict(run.about)).encode()}
    _publish(pa.table(_columns(run.rows)).replace_schema_metadata(about), file)


def write_together(file: Path, runs: Sequence[RunData]) -> None:
    """Write all runs to one file, as small as possible."""
    rows = [run.rows or [{}] for run in runs]  # one that crashed at its start has none
    columns = _columns([row for of_run in rows for row in of_run])
    floats = [name for name, column in columns.items() if pa.types.is_floating(column.type)]
    abouts = [json.dumps(asdict(run.about)) for run in runs]
    columns[_RUN] = pa.array(np.repeat(abouts, [len(of_run) for of_run in rows]), pa.string())
    _publish(
        pa.table(columns),
        file,
        compression_level=19,
        use_byte_stream_split=floats,
        use_dictionary=[name for name in columns if name not in floats],
    )


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, pa.Array]:
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if (kind := _kind([value for value in values if value is not None])) is not None:
            columns[name] = pa.array(values, kind)
    return columns


def _publish(table: pa.Table, file: Path, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    write_checked(table, unfinished, **options)
    publish(unfinished, file)


def _kind(given: list) -> pa.DataType | None:
    """The Arrow type of numbers, or of lists of numbers; None where the values are neither."""

    def numeric(values) -> bool:
        return all(isinstance(value, numbers.Real) for value in values)

    if given and numeric(given):
        return pa.int64() if all(isinstance(value, int) for value in given) else pa.float64()
    if given and all(isinstance(value, list) for value in given):
        inner = [x for value in given for x in value]
        return pa.list_(pa.float64()) if inner and numeric(inner) else None
    return None


def read(file: Path) -> RunData:
    """Read a run's file. Raises UserError where the file is not one."""
    table = _read(file)
    about = (table.schema.metadata or {}).get(_ABOUT)
    if about is None:
        raise UserError(f"{file} is not a run of a comparison.")
    return RunData(about=_about(about, file), rows=printable(table.to_pylist()))


def read_together(file: Path) -> list[RunData]:
    """Read all runs from a file of `write_together`. Raises UserError where it is not one."""
    table = _read(file)
    if _RUN not in table.column_names:
        raise UserError(f"{file} holds no runs of a comparison: it has no column {_RUN!r}.")
    abouts = table[_RUN].to_pylist()
    rows: Iterable[dict[str, Any]] = table.drop_columns([_RUN]).to_pylist()
    found = []
    for about, of_run in groupby(zip(abouts, rows, strict=True), key=lambda pair: pair[0]):
        kept = [row for _, row in of_run if row.get("step") is not None]
        found.append(RunData(about=_about((about or "").encode(), file), rows=printable(kept)))
    return found


def _read(file: Path) -> pa.Table:
    try:
        return read_checked(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {str(error).strip().rstrip('.')}.") from None


def _about(written: bytes, file: Path) -> About:
    # The log of a run that crashed contains a terminal's colour codes.
    return About(**printable(parse_json(written, f"{file}: what it says of its run")))


def read_all(folder: Path, *, tuning: bool = False) -> list[RunData]:
    """The compared runs of a comparison's folder, or those that chose learning rates."""
    together = folder / TOGETHER
    runs = read_together(together) if together.exists() else []
    runs += map(read, sorted((folder / "data").glob("*.parquet")))
    runs = [run for run in runs if run.about.tuning == tuning]
    if not runs and not tuning:
        raise UserError(f"{folder} has no finished run, neither in data/ nor in {TOGETHER}.")
    return runs
