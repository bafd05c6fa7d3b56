# SPDX-License-Identifier: Apache-2.0
"""Read the token log, one row per response token, into Arrow and numpy.

Shape suffixes: N rows (response tokens), L MoE layers, K experts per token (top-k), B bytes.
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.parquet import read_checked
from moe_upgrpo.store.schema import COLUMNS, TokenLayout, check_types, file_metadata, metadata

# Only short numbers have leading zeros, so that a step and rank have one name.
_FILE_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})-rank-(\d{4}|[1-9]\d{4,})\.parquet")


def token_files(folder: Path) -> list[tuple[Path, int]]:
    """The token files of a ``tokens`` folder and their steps, in the order of step and rank."""
    found = [(file, _FILE_NAME.fullmatch(file.name)) for file in folder.glob("step-*.parquet")]
    files = [(file, int(match[1]), int(match[2])) for file, match in found if match]
    return [(file, step) for file, step, _ in sorted(files, key=lambda item: item[1:])]


def read_tokens(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    steps: Collection[int] | None = None,
) -> pa.Table:
    """Read a token log into one Arrow table, in the order of step and rank.

    Args:
        path: a run folder, its ``tokens`` folder, or one file.
        columns: names to read; all where None.
        steps: steps to read; all where None. Files of other steps are not opened.

    Returns:
        A table whose schema carries the `TokenLayout`, with nulls where a file lacks an optional
        column that another has; `overlap_array` and `read_routes` turn it into numpy,
        ``.to_pandas()`` and ``polars.from_arrow`` into data frames.

    Raises:
        UserError: no row at all; a file is truncated, not a token log, of an unknown version, with
            a column missing or of another type, of another model or another share of sequences than
            the first (the file is named); a column does not exist in any file.
    """
    path = Path(path)
    folder = path / "tokens" if (path / "tokens").is_dir() else path
    files = (
        [path]
        if path.is_file()
        else [file for file, step in token_files(folder) if steps is None or step in steps]
    )
    if not files:
        of_steps = "" if steps is None else f" of steps {sorted(steps)}"
        raise UserError(
            f"{path} holds no token log{of_steps}: expected tokens/step-*.parquet. A run logged at "
            "level aggregate has none, and one at level sampled none of some steps"
        )

    tables: list[pa.Table] = []
    names: set[str] = set()
    first: dict[str, Any] = {}

    def choose(schema: pa.Schema) -> Sequence[str] | None:
        check_types(schema, TokenLayout.of(schema))
        about = metadata(schema)
        first.update(first or about)
        _check_same_run(about, first, files[0])
        names.update(schema.names)
        return None if columns is None else [c for c in columns if c in schema.names]

    for file in files:
        try:
            tables.append(read_checked(file, choose))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is truncated or not Parquet, or damaged ({error}). Delete it, or read the "
                "other steps with steps=..."
            ) from None
    if unknown := set(columns or ()) - names:
        raise UserError(
            f"{path}: no columns {sorted(unknown)}: it has {[*filter(names.__contains__, COLUMNS)]}"
        )
    table = pa.concat_tables(tables, promote_options="default")
    if table.num_rows == 0:
        raise UserError(f"{path}: the token log has no rows")
    # The order of COLUMNS, or of the caller, whatever columns the first file had.
    order = columns or [*(c for c in COLUMNS if c in names), *sorted(names - set(COLUMNS))]
    layout = TokenLayout.of(tables[0].schema)
    sampling = {"level": first["level"], "share": first["share"]}
    return table.select(list(order)).replace_schema_metadata(file_metadata(layout, sampling))


def _check_same_run(about: dict[str, Any], first: dict[str, Any], first_file: Path) -> None:
    model = ("layer_ids", "top_k", "num_experts")
    if any(about[key] != first[key] for key in model):
        raise UserError(
            f"routes of another model: {_only(about, model)}, but {first_file} has "
            f"{_only(first, model)}"
        )
    if about["share"] != first["share"]:
        raise UserError(
            f"logged with a share of {about['share']} of the sequences, but {first_file} with "
            f"{first['share']}: pooled, steps would weigh unequally. Read them apart with steps=..."
        )


def _only(about: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: about[key] for key in keys}


def overlap_array(table: pa.Table) -> np.ndarray:
    """uint8 ``[N, L]``: the experts shared by both sides in each MoE layer; ``[N, 0]`` if dense."""
    num_layers = TokenLayout.of(table.schema).num_layers
    if num_layers == 0:
        return np.empty((table.num_rows, 0), dtype=np.uint8)
    return table["overlap"].combine_chunks().flatten().to_numpy().reshape(-1, num_layers)


def read_routes(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Both sides' expert sets ``[N, L, K]`` (rollout, trainer), each ascending within K.

    ``table`` is from `read_tokens`, with ``step`` and ``sequence`` beside the two route columns;
    filter it first to unpack few rows. uint8 up to 256 experts, else uint16.

    Raises:
        UserError: no route columns, rows without routes, or bytes that encode no routes (the step,
            the sequence and the layer are named).
    """
    from moe_upgrpo.routing.codec import decode_difference, decode_sets

    layout = TokenLayout.of(table.schema)
    needed = ["step", "sequence", "rollout_experts", "train_experts"]
    if missing := [name for name in needed if name not in table.column_names]:
        raise UserError(
            f"no columns {missing}: routes are read from {needed}. Read them with "
            "read_tokens(path) from a run that logged routes"
        )
    for name in needed[2:]:
        if table[name].null_count:
            without = table.filter(table[name].is_null())["step"].unique().to_pylist()
            raise UserError(
                f"{table[name].null_count} of {table.num_rows} rows have no {name}, in steps "
                f"{without}: read the other steps, or filter those rows away"
            )
    rows_of = table["step"].to_numpy(), table["sequence"].to_numpy()
    packed = table["rollout_experts"].combine_chunks()
    width = packed.type.byte_width
    first, N = packed.offset, len(packed)
    packed_NB = np.frombuffer(packed.buffers()[1], np.uint8)[first * width : (first + N) * width]
    packed_NB = packed_NB.reshape(N, width)
    shape = {
        "num_layers": layout.num_layers,
        "top_k": layout.top_k,
        "num_experts": layout.num_experts,
    }
    rollout_NLK = by_sequence(lambda rows: decode_sets(packed_NB[rows], **shape), *rows_of)

    difference = table["train_experts"].combine_chunks()

    def decode(rows: slice | np.ndarray) -> np.ndarray:
        part = difference if isinstance(rows, slice) else difference.take(pa.array(rows))
        _, offset_buffer, data_buffer = part.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64)[part.offset : part.offset + len(part) + 1]
        data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
        return decode_difference(
            rollout_NLK[rows], data, offsets - offsets[0], num_experts=layout.num_experts
        )

    return rollout_NLK, by_sequence(decode, *rows_of)


def by_sequence(code: Callable[[Any], Any], step_N: np.ndarray, sequence_N: np.ndarray) -> Any:
    """``code(rows)`` for all rows; if it refuses them, for each sequence, to name the bad one."""
    try:
        return code(slice(None))
    except UserError:
        for step, sequence in np.unique(np.stack([step_N, sequence_N]), axis=1).T:
            try:
                code(((step_N == step) & (sequence_N == sequence)).nonzero()[0])
            except UserError as error:
                raise UserError(
                    f"step {step}, sequence {sequence} (its logged tokens from 0): {error}"
                ) from None
        raise
