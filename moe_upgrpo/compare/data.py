"""The Parquet file of each run: its metrics by step, and about the run as the file's metadata."""

from __future__ import annotations

import json
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import parse_json
from moe_upgrpo.store.parquet import read_checked, write_checked
from moe_upgrpo.store.text import printable

_ABOUT = b"moe_upgrpo.compare"


@dataclass(frozen=True, kw_only=True)
class About:
    """status: finished, or crashed where the run ended by itself with an error, `message`.
    seconds: wall-clock of the whole run, its start included; None where it is not known."""

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
    """A run as it was kept. Rows are those of metrics.jsonl that are numbers or lists of numbers:
    row 0 the evaluation before the first step, then a row for each step."""

    about: About
    rows: Sequence[dict[str, Any]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it was measured."""
        found = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]


def write(file: Path, run: RunData) -> None:
    names = dict.fromkeys(name for row in run.rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in run.rows]
        if (kind := _kind([value for value in values if value is not None])) is not None:
            columns[name] = pa.array(values, kind)
    about = {_ABOUT: json.dumps(asdict(run.about)).encode()}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    write_checked(pa.table(columns).replace_schema_metadata(about), unfinished)
    unfinished.replace(file)


def _kind(given: list) -> pa.DataType | None:
    """The Arrow type of numbers, or of lists of numbers; None where they are neither."""

    def numeric(values) -> bool:
        return all(isinstance(value, numbers.Real) for value in values)

    if given and numeric(given):
        return pa.int64() if all(isinstance(value, int) for value in given) else pa.float64()
    if given and all(isinstance(value, list) for value in given):
        inner = [x for value in given for x in value]
        return pa.list_(pa.float64()) if inner and numeric(inner) else None
    return None


def read(file: Path) -> RunData:
    """Raises UserError where the file is none of these."""
    try:
        table = read_checked(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {str(error).strip().rstrip('.')}.") from None
    about = (table.schema.metadata or {}).get(_ABOUT)
    if about is None:
        raise UserError(f"{file} is not a run of a comparison.")
    # The log of a run that crashed has a terminal's colours.
    kept = printable(parse_json(about, f"{file}: what it says of its run"))
    return RunData(about=About(**kept), rows=printable(table.to_pylist()))


def read_all(folder: Path, *, tuning: bool = False) -> list[RunData]:
    """The compared runs of a comparison's folder, or those that chose learning rates."""
    files = sorted((folder / "data").glob("*.parquet"))
    runs = [run for run in map(read, files) if run.about.tuning == tuning]
    if not runs and not tuning:
        raise UserError(f"{folder}/data has no finished run.")
    return runs
