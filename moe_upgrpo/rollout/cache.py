# SPDX-License-Identifier: Apache-2.0
"""Rollouts kept in files, so that an update can be repeated and debugged without an engine.

One Parquet file for each step and writing rank, one row for each response. Lists and scalars are
Parquet's own; the routes `[P+T-1, L, K]` are the bytes of the array, whose type, L and K are in the
schema's metadata.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.store.files import parse_json, publish
from moe_upgrpo.store.parquet import read_checked, write_checked

_KEY = b"moe_upgrpo.rollouts"
_VERSION = 1
_WITH_RESULTS = 2  # one more column, where not all tokens were sampled: those that were
_WITH_VERSIONS = 3  # another one, where weights changed in a response: each token's
# Only short numbers have leading zeros, so that a step has one name.
_FILE_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})-rank-(\d{4}|[1-9]\d{4,})\.parquet")
_SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "logp_rollout": pa.list_(pa.float32()),
        "routes": pa.large_binary(),
        "weight_version": pa.int32(),
        "finished": pa.bool_(),
    }
)
_SCHEMAS = {
    _VERSION: _SCHEMA,
    _WITH_RESULTS: _SCHEMA.append(pa.field("sampled", pa.list_(pa.bool_()))),
    _WITH_VERSIONS: _SCHEMA.append(pa.field("versions", pa.list_(pa.int32()))),
}


def save_rollouts(folder: str | Path, step: int, rank: int, rollouts: Sequence[Rollout]) -> Path:
    """Write one data-parallel rank's rollouts of a step, whole or not at all.

    Raises:
        UserError: no rollouts, routes of different models, or a step that is there already.
    """
    if not rollouts:
        raise UserError(f"no rollouts of step {step} to save")
    kinds = {(r.routes.dtype.str, *r.routes.shape[1:]) for r in rollouts}
    if len(kinds) > 1:
        raise UserError(f"rollouts of one step have routes of different kinds: {sorted(kinds)}")
    file = Path(folder) / f"step-{step:06d}-rank-{rank:04d}.parquet"
    if file.exists():
        raise UserError(f"{file} exists already: choose another folder for the rollouts")
    ((dtype, layers, top_k),) = kinds
    version = _VERSION if all(r.sampled is None for r in rollouts) else _WITH_RESULTS
    if any(r.versions is not None for r in rollouts):  # never of several turns
        version = _WITH_VERSIONS
    schema = _SCHEMAS[version]
    about = {"version": version, "dtype": dtype, "layers": layers, "top_k": top_k}
    rows = [{name: getattr(r, name) for name in schema.names} for r in rollouts]
    for row in rows:
        row["routes"] = row["routes"].tobytes()
    table = pa.Table.from_pylist(rows, schema.with_metadata({_KEY: json.dumps(about)}))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.tmp")
    write_checked(table, part)
    publish(part, file)
    return file


def check_new(folder: str | Path) -> None:
    """Raise UserError where `folder` holds rollouts already."""
    if any(Path(folder).glob("step-*.parquet")):
        raise UserError(f"{folder} holds rollouts already: choose another folder to save them in")


def drop_after(folder: str | Path, step: int) -> None:
    """Remove the rollouts of later steps, and of a step that was cut short, if any were saved."""
    for file in Path(folder).glob("*"):
        match = _FILE_NAME.fullmatch(file.name.removeprefix(".").removesuffix(".tmp"))
        unfinished = file.name.startswith(".") and file.suffix == ".tmp"
        if match and (unfinished or int(match[1]) > step):
            file.unlink()


def saved_steps(folder: str | Path) -> list[int]:
    """The steps whose rollouts are in `folder`, ascending."""
    found = (_FILE_NAME.fullmatch(file.name) for file in Path(folder).glob("step-*.parquet"))
    return sorted({int(match[1]) for match in found if match})


def load_rollouts(folder: str | Path, step: int) -> list[Rollout]:
    """All ranks' rollouts of a step, in the order of the ranks that wrote them.

    Raises:
        UserError: the step is not there, or a file is not of this kind (the file is named).
    """
    found = [(_FILE_NAME.fullmatch(f.name), f) for f in Path(folder).glob("step-*.parquet")]
    of_step = [(int(match[2]), file) for match, file in found if match and int(match[1]) == step]
    files = [file for _, file in sorted(of_step)]
    if not files:
        raise UserError(
            f"{folder} holds no rollouts of step {step}: step-{step:06d}-rank-*.parquet"
        )
    return [rollout for file in files for rollout in _read(file)]


def _read(file: Path) -> list[Rollout]:
    try:
        table = read_checked(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is truncated or not a Parquet file: {error}") from None
    about = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"), f"{file}: its metadata")
    schema = _SCHEMAS.get(about.get("version"))
    if schema is None or not table.schema.equals(schema):
        known = " or ".join(map(str, _SCHEMAS))
        raise UserError(f"{file} does not hold rollouts of version {known}, as saved by a run")
    dtype, shape = np.dtype(about["dtype"]), (about["layers"], about["top_k"])
    rows = table.to_pylist()
    return [_rollout(row, dtype, shape, f"{file}, row {i}") for i, row in enumerate(rows)]


def _rollout(row: dict, dtype: np.dtype, shape: tuple[int, int], where: str) -> Rollout:
    rows = len(row["prompt_ids"]) + len(row["response_ids"]) - 1
    routes = np.frombuffer(row["routes"], dtype)
    if routes.size != rows * math.prod(shape):
        raise UserError(
            f"{where}: {routes.size} ids of routes; {rows} rows of {shape[0]} MoE layers and "
            f"{shape[1]} experts are needed"
        )
    try:
        return Rollout(
            prompt_ids=np.array(row["prompt_ids"], np.int64),
            response_ids=np.array(row["response_ids"], np.int64),
            logp_rollout=np.array(row["logp_rollout"], np.float32),
            routes=routes.reshape(rows, *shape),
            weight_version=row["weight_version"],
            finished=row["finished"],
            sampled=None if row.get("sampled") is None else np.array(row["sampled"], bool),
            versions=None if row.get("versions") is None else np.array(row["versions"], np.int32),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
