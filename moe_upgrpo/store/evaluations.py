# SPDX-License-Identifier: Apache-2.0
"""An evaluation, problem by problem, so that runs on the same problems can be compared in pairs."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import publish
from moe_upgrpo.store.parquet import read_checked, write_checked

_FILE_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})\.parquet")
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("problem", pa.int32()),  # its place among the held-out problems
        ("prompt", pa.string()),
        ("greedy", pa.bool_()),  # was the greedy response right
        ("samples", pa.int32()),
        ("correct", pa.int32()),  # how many of the samples were right
        ("majority", pa.float32()),  # was their majority right; between 0 and 1 where answers tie
    ]
)


def evaluation_files(folder: Path) -> list[tuple[Path, int]]:
    """The files of an ``evaluations`` folder and their steps, in the order of the steps."""
    found = [(file, _FILE_NAME.fullmatch(file.name)) for file in folder.glob("step-*.parquet")]
    return sorted(((f, int(match[1])) for f, match in found if match), key=lambda item: item[1])


def write_evaluation(folder: Path, step: int, columns: dict[str, Any]) -> Path:
    """Write one row a problem to ``FOLDER/step-000020.parquet``, whole or not at all.

    `columns` has all of `SCHEMA` but ``step``. Raises UserError if there is no row.
    """
    rows = len(columns["problem"])
    if not rows:
        raise UserError("an evaluation without problems has no rows to write")
    table = pa.table({"step": [step] * rows} | columns, schema=SCHEMA)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.parquet"
    part = folder / f".{path.name}.tmp"
    write_checked(table, part)
    publish(part, path)
    return path


def read_evaluations(path: str | Path, *, steps: Collection[int] | None = None) -> pa.Table:
    """Rows of `SCHEMA` of a run folder's evaluations, in the order of step and problem.

    Args:
        path: a run folder.
        steps: steps to read; all where None.

    Raises:
        UserError: no evaluation of these steps, or a file that cannot be read.
    """
    folder = Path(path) / "evaluations"
    files = [f for f, step in evaluation_files(folder) if steps is None or step in steps]
    if not files:
        of_steps = "" if steps is None else f" of steps {sorted(steps)}"
        raise UserError(f"{path} holds no evaluation{of_steps}: expected {folder}/step-*.parquet")
    tables = []
    for file in files:
        try:
            tables.append(read_checked(file, _columns).cast(SCHEMA))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is truncated or no evaluation: {error}") from None
    return pa.concat_tables(tables)


def _columns(schema: pa.Schema) -> list[str]:
    if missing := set(SCHEMA.names) - set(schema.names):
        raise pa.ArrowInvalid(f"it has no columns {sorted(missing)}")
    return SCHEMA.names
