# SPDX-License-Identifier: Apache-2.0
"""Parquet files in which every flipped bit is noticed.

Each page carries a checksum that Parquet defines and other readers know; a page's header and the
file's footer carry none. The schema's metadata therefore has, under ``moe_upgrpo.checksums``, the
CRC-32 of each column's values and of every other entry of the metadata. Files without these are
read as they are.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_upgrpo.errors import UserError

_GROUP = 1 << 13  # rows whose pages are held until they are written
_KEY = b"moe_upgrpo.checksums"


def write_checked(table: pa.Table, file: Path, **options: Any) -> None:
    """Write a table, compressed, with its checksums. ``options`` are those of `pq.write_table`."""
    metadata = dict(table.schema.metadata or {})
    metadata.pop(_KEY, None)  # that of the file the table was read from
    checksums = {"columns": _columns(table), "metadata": _entries(metadata)}
    with opened(file, "wb") as sink:
        pq.write_table(
            table.replace_schema_metadata(metadata | {_KEY: json.dumps(checksums)}),
            sink,
            compression="zstd",
            row_group_size=_GROUP,
            write_page_checksum=True,
            **options,
        )


def opened(file: Path, mode: str = "rb") -> pa.OSFile:
    """Open a file for pyarrow, by the bytes of its name, which need not be UTF-8."""
    return pa.OSFile(os.fsencode(file), mode)


def read_checked(
    file: Path, choose: Callable[[pa.Schema], Sequence[str] | None] = lambda schema: None
) -> pa.Table:
    """Read a file, and check what is read.

    Args:
        file: from `write_checked`, or any other Parquet file.
        choose: called with the file's schema before any column is read; returns the names of the
            columns to read (None: all), or raises UserError.

    Raises:
        pa.ArrowException: not Parquet, truncated or damaged.
        OSError: it cannot be opened.
    """
    with (
        _damage_named(),
        opened(file) as source,
        pq.ParquetFile(source, page_checksum_verification=True) as parquet,
    ):
        schema = parquet.schema_arrow
        columns = choose(schema)
        table = parquet.read(columns=None if columns is None else list(columns))
        _check(table, schema)
        return table


def column_names(file: Path) -> list[str]:
    """The names of a Parquet file's columns, without reading them. Raises as `read_checked`."""
    with _damage_named(), opened(file) as source:
        return pq.read_schema(source).names


def described(file: Path) -> tuple[pa.Schema, int]:
    """A file's schema and its number of rows; no column is read. Raises as `read_checked`."""
    with _damage_named(), opened(file) as source:
        parquet = pq.ParquetFile(source)
        return parquet.schema_arrow, parquet.metadata.num_rows


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except (UserError, pa.ArrowException, OSError):
        raise
    # Damaged names are not UTF-8, damaged sizes are not sizes.
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise pa.ArrowInvalid(f"damaged: {type(error).__name__}: {error}") from None


def _check(table: pa.Table, schema: pa.Schema) -> None:
    # pyarrow keeps the metadata twice in a file, and reads either copy depending on the call.
    if table.schema.metadata != schema.metadata:
        raise pa.ArrowInvalid("damaged: its metadata says two things")
    metadata = dict(schema.metadata or {})
    written = metadata.pop(_KEY, None)
    if written is None:
        return
    checksums = json.loads(written)
    columns = checksums["columns"]
    if _entries(metadata) != checksums["metadata"] or {*columns} != {*schema.names}:
        raise pa.ArrowInvalid("damaged: its schema is not the one that was written")
    for name, found in _columns(table).items():
        if found != columns[name]:
            raise pa.ArrowInvalid(f"damaged: column {name} holds other values than were written")


def _entries(metadata: dict[bytes, bytes]) -> dict[str, int]:
    return {key.decode(): zlib.crc32(value) for key, value in metadata.items()}


def _columns(table: pa.Table) -> dict[str, int]:
    return {
        field.name: _array(_whole(table[field.name]), zlib.crc32(_kind(field).encode()))
        for field in table.schema
    }


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; `combine_chunks` would copy a single one too."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _kind(field: pa.Field) -> str:
    """The type in words; for lists, with the name that Parquet gives their items."""
    kind = field.type
    if pa.types.is_nested(kind):
        named = kind.value_field.name not in ("item", "element")
        size = kind.list_size if pa.types.is_fixed_size_list(kind) else ""
        words = f"list{size}<{kind.value_field.name if named else ''}{_kind(kind.value_field)}>"
    else:
        words = str(kind)
    return words if field.nullable else f"{words} not null"


def _array(array: pa.Array, start: int) -> int:
    """CRC-32 of an array's values, whatever its buffers' layout, continued from ``start``."""
    found = zlib.crc32(f"{len(array)},{array.null_count}".encode(), start)
    if array.null_count:
        found = _bits(array.is_valid(), found)
        array = array.drop_null()
    kind = array.type
    if pa.types.is_nested(kind):
        lengths = pc.list_value_length(array)
        return _array(array.flatten(), _bytes(lengths.to_numpy(zero_copy_only=False), found))
    if pa.types.is_boolean(kind):
        return _bits(array, found)
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        return _bytes(_raw(array.buffers()[1], array.offset * width, len(array) * width), found)
    if kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        found = _bytes(pc.binary_length(array).to_numpy(zero_copy_only=False), found)
        wide = pa.types.is_large_binary(kind) or pa.types.is_large_string(kind)
        _, offsets, data = array.buffers()
        starts = np.frombuffer(offsets, np.int64 if wide else np.int32)
        first, last = (int(starts[array.offset + i]) for i in (0, len(array)))
        return _bytes(_raw(data, first, last - first), found)
    return _bytes(array.to_numpy(zero_copy_only=False), found)


def _raw(buffer: pa.Buffer | None, start: int, size: int) -> np.ndarray:
    return np.frombuffer(buffer or b"", np.uint8)[start : start + size]


def _bits(flags: pa.Array, start: int) -> int:
    return _bytes(np.packbits(flags.to_numpy(zero_copy_only=False)), start)


def _bytes(values: np.ndarray, start: int) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data.cast("B") if len(values) else b"", start)
