"""The token log: one row per response token, in Parquet, a file for each step and writing rank.

Shape suffixes: N rows (response tokens), L MoE layers, K experts per token (top-k), B bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_upgrpo.errors import UserError

SCHEMA_VERSION = 2
# Version 1 has the columns that are not optional, and no level: its files are full.
READABLE_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Column:
    """``type`` is Arrow's; L and B in it depend on the model. An optional one may hold nulls."""

    type: str
    meaning: str
    optional: bool = False


# Every column of the current version, in the order of the file.
COLUMNS: dict[str, Column] = {
    "step": Column("int32", "training step, from 1"),
    "sequence": Column("int64", "index of the sequence within the step, counted over all ranks"),
    "prompt": Column("int32", "index of the prompt (the group) within the step"),
    "position": Column("int32", "position p in prompt + response; its route row is p − 1"),
    "token_id": Column("int32", "the sampled token"),
    "reward": Column("float", "reward of the sequence"),
    "advantage": Column("float", "advantage of the token"),
    "logp_rollout": Column("float", "the engine's log-prob, at the sampling temperature"),
    "logp_old": Column("float", "the trainer's log-prob at the weights the engine held"),
    "logp_train": Column("float", "the trainer's log-prob at the token's last optimizer visit"),
    "ratio": Column("float", "exp(logp_train − logp_old), of that visit"),
    "clipped": Column("bool", "the loss's own rule took the gradient away at that visit"),
    "layers_mismatched": Column("int16", "MoE layers with overlap < K, free-running, old weights"),
    "overlap": Column(
        "fixed_size_list<uint8>[L]", "|S ∩ S′| of each MoE layer; no such column if dense"
    ),
    "rollout_experts": Column(
        "fixed_size_binary[B]",
        "S of every MoE layer at route row p − 1, packed; `read_routes` unpacks",
        optional=True,
    ),
    "train_experts": Column(
        "large_binary",
        "S′ of every MoE layer, native routes at the old weights, as a difference from S; empty "
        "where all layers agree",
        optional=True,
    ),
    "prefix_mismatched": Column(
        "int32",
        "(route row, MoE layer) pairs with S ≠ S′ in rows 0..p − 2, the prompt's included",
        optional=True,
    ),
    "margin_min": Column(
        "float",
        "smallest top-k margin s_(K) − s_(K+1) over the MoE layers, the trainer's, old weights",
        optional=True,
    ),
    "gap_numerics": Column("float", "L(θ_old, e) − μ of the decomposition", optional=True),
    "gap_engine_routing": Column("float", "L(θ_old, native) − L(θ_old, e)", optional=True),
    "gap_update": Column("float", "L(θ, n(θ_old)) − L(θ_old, native)", optional=True),
    "gap_routing_shift": Column("float", "L(θ, native) − L(θ, n(θ_old))", optional=True),
    "gradient_weight": Column(
        "float",
        "|A| · c · w at the last visit: c the loss's coefficient of ∇log π, w its aggregation's "
        "weight of the token",
        optional=True,
    ),
    "entropy": Column(
        "float", "−Σ_v π(v) log π(v) in nats, the trainer's, old weights", optional=True
    ),
}
# Given to the writer in place of the packed columns.
_ROUTES = {"rollout_routes": "rollout_experts", "train_routes": "train_experts"}
# Floats of a token's own and packed sets hardly repeat: a dictionary would only add its indices.
# A float's bytes, split into four streams, shrink under zstd.
_SPLIT = {name for name, column in COLUMNS.items() if column.type == "float"}
_SPLIT -= {"reward", "advantage"}
_DISTINCT = _SPLIT | set(_ROUTES.values())
LEVELS = {
    "full": "every sequence",
    "sampled": "whole sequences, chosen by a hash of (step, sequence); the metadata has the share",
    "aggregate": "no token rows: metrics.jsonl alone",
}

_FILE_NAME = re.compile(r"step-(\d{6,})-rank-(\d{4,})\.parquet")
_METADATA_KEY = b"moe_upgrpo.token_log"


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The model whose routes a token log holds; kept in each file's schema metadata."""

    layer_ids: tuple[int, ...]
    top_k: int
    num_experts: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_ids", tuple(int(i) for i in self.layer_ids))
        if len(set(self.layer_ids)) != len(self.layer_ids):
            raise UserError(f"layer_ids must differ from each other, got {list(self.layer_ids)}")
        if self.layer_ids and not 1 <= self.top_k <= min(self.num_experts, 255):
            raise UserError(
                f"top_k must be in 1..min(num_experts, 255), got top_k={self.top_k} and "
                f"num_experts={self.num_experts}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @classmethod
    def of(cls, schema: pa.Schema) -> "TokenLayout":
        """The layout that a file or a table from `read_tokens` carries.

        Raises:
            UserError: not a token log, or of a schema version that this package does not know.
        """
        about = _about(schema)
        return cls(
            layer_ids=tuple(about["layer_ids"]),
            top_k=about["top_k"],
            num_experts=about["num_experts"],
        )


def _about(schema: pa.Schema) -> dict[str, Any]:
    """The metadata ``moe_upgrpo.token_log``, as of the current version."""
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise UserError("not a token log: its schema lacks the moe_upgrpo.token_log metadata")
    about = json.loads(raw)
    if about.get("schema_version") not in READABLE_VERSIONS:
        raise UserError(
            f"schema version {about.get('schema_version')} is unknown: this package reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}. Read it with the moe_upgrpo that wrote it"
        )
    return {"level": "full", "share": 1.0} | about | {"schema_version": SCHEMA_VERSION}


class TokenLogWriter:
    """Writes one rank's rows of a step to ``FOLDER/step-000012-rank-0000.parquet``.

    ``folder`` is the run's ``tokens`` folder. For a dense model pass ``layer_ids=()``; top_k and
    num_experts then mean nothing. ``level`` is one of `LEVELS`; "sampled" needs ``share``, the
    share of sequences to keep, between 0 and 1. The choice is the same on every rank and in a
    resumed run, and a larger share keeps what a smaller one did.

    Raises:
        UserError: a layout that cannot be, an unknown level, or a share that does not go with it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int,
        layer_ids: Sequence[int],
        top_k: int,
        num_experts: int,
        level: str = "full",
        share: float = 1.0,
    ) -> None:
        if level not in LEVELS:
            raise UserError(f"token log level {level!r} is unknown: choose {', '.join(LEVELS)}")
        if (level == "sampled") != (share != 1) or not 0 < share <= 1:
            raise UserError(
                "share goes with level sampled and lies between 0 and 1, both excluded; got "
                f"level={level!r}, share={share}"
            )
        self.folder = Path(folder)
        self.rank = rank
        self.layout = TokenLayout(layer_ids=tuple(layer_ids), top_k=top_k, num_experts=num_experts)
        self.level = level
        self.share = share
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, columns: dict[str, np.ndarray]) -> Path | None:
        """Write one step's rows, all or nothing: under a temporary name, then renamed.

        Args:
            step: every row's step. The column ``step`` itself may be left out.
            columns: names of `COLUMNS`, each ``[N]``, and ``overlap`` ``[N, L]`` of integers in
                0..K (left out, or ``[N, 0]``, for a dense model). Floats are stored as float32.
                Optional columns may be left out; masked entries of a masked array become nulls. In
                place of the packed expert sets come the raw ones: ``rollout_routes`` and, only
                beside it, ``train_routes``, integers ``[N, L, K]``, row p − 1 of each token.

        Returns:
            The file, or None where the level keeps none of these rows.

        Raises:
            UserError: a column is missing, unknown, or of another length or kind; no rows; routes
                that cannot be (the sequence and the layer are named); overlap contradicts
                layers_mismatched or the routes; the file exists already.
        """
        arrays = {name: np.asanyarray(values) for name, values in columns.items()}
        num_rows = self._check_names_and_lengths(step, arrays)
        arrays.setdefault("step", np.full(num_rows, step, dtype=np.int32))
        if (arrays["step"] != step).any():
            raise UserError(f"column step holds other steps than the {step} being written")
        arrays.setdefault("overlap", np.empty((num_rows, 0), dtype=np.uint8))
        self._check_overlap(arrays["overlap"], arrays["layers_mismatched"])
        if self.level == "aggregate":
            return None
        if self.level == "sampled":
            kept_N = _kept(step, arrays["sequence"], self.share)
            if not kept_N.any():
                return None
            arrays = {name: array[kept_N] for name, array in arrays.items()}
        table = self._table(step, arrays)

        file = self.folder / f"step-{step:06d}-rank-{self.rank:04d}.parquet"
        if file.exists():
            raise UserError(
                f"{file} exists already: step {step} was logged before. To run it again, start "
                "from RunFolder.resume, which first drops what was logged after the checkpoint"
            )
        part = file.with_name(f".{file.name}.tmp")
        pq.write_table(
            table,
            part,
            compression="zstd",
            use_dictionary=[name for name in table.column_names if name not in _DISTINCT],
            use_byte_stream_split=[name for name in table.column_names if name in _SPLIT],
        )
        os.replace(part, file)
        return file

    def _table(self, step: int, arrays: dict[str, np.ndarray]) -> pa.Table:
        packed = self._pack(step, arrays) if "rollout_routes" in arrays else {}
        data, fields = [], []
        for name, column in COLUMNS.items():
            if name in packed:
                array = packed[name]
            elif name not in arrays or (name == "overlap" and not self.layout.num_layers):
                continue
            elif name == "overlap":
                kind = pa.list_(
                    pa.field("item", pa.uint8(), nullable=False), self.layout.num_layers
                )
                flat = pa.array(arrays[name].astype(np.uint8).reshape(-1))
                array = pa.FixedSizeListArray.from_arrays(flat, type=kind)
            else:
                array = _to_arrow(name, arrays[name])
            data.append(array)
            fields.append(pa.field(name, array.type, nullable=column.optional))
        sampling = {"level": self.level, "share": self.share}
        return pa.Table.from_arrays(
            data, schema=pa.schema(fields, _metadata(self.layout, sampling))
        )

    def _pack(self, step: int, arrays: dict[str, np.ndarray]) -> dict[str, pa.Array]:
        """Raw routes as the columns that keep them, after a check against ``overlap``."""
        # Here: the routing package brings torch, which a reader of the log does without.
        import torch

        from moe_upgrpo.routing import compare_routes
        from moe_upgrpo.routing.codec import encode_difference, encode_sets

        E, sequence_N = self.layout.num_experts, arrays["sequence"]
        rollout_NLK, train_NLK = arrays["rollout_routes"], arrays.get("train_routes")
        rows_of = arrays["step"], sequence_N
        packed_NB = _by_sequence(
            lambda rows: encode_sets(rollout_NLK[rows], num_experts=E),
            *rows_of,
        )
        columns = {"rollout_experts": _fixed_binary(packed_NB)}
        if train_NLK is not None:
            data, offsets = _by_sequence(
                lambda rows: encode_difference(rollout_NLK[rows], train_NLK[rows], num_experts=E),
                *rows_of,
            )
            overlap_NL = compare_routes(
                torch.from_numpy(np.ascontiguousarray(rollout_NLK)),
                torch.from_numpy(np.ascontiguousarray(train_NLK)),
                num_experts=E,
            ).overlap.numpy()
            wrong_NL = overlap_NL != arrays["overlap"]
            if wrong_NL.any():
                row, layer = np.argwhere(wrong_NL)[0]
                raise UserError(
                    f"step {step}, sequence {sequence_N[row]}, position "
                    f"{arrays['position'][row]}, MoE layer {layer}: overlap is "
                    f"{arrays['overlap'][row, layer]}, but the routes share "
                    f"{overlap_NL[row, layer]}: rows joined wrongly, or routes of another forward"
                )
            buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)]
            columns["train_experts"] = pa.Array.from_buffers(
                pa.large_binary(), len(packed_NB), buffers
            )
        return columns

    def _check_names_and_lengths(self, step: int, arrays: dict[str, np.ndarray]) -> int:
        required = {name for name, column in COLUMNS.items() if not column.optional} - {"step"}
        known = {*COLUMNS, *_ROUTES} - set(_ROUTES.values())
        if not self.layout.num_layers:
            required.remove("overlap")
            known -= set(_ROUTES)
        missing, unknown = required - set(arrays), set(arrays) - known
        if missing or unknown:
            raise UserError(
                f"token log of step {step}: missing columns {sorted(missing)}, unknown columns "
                f"{sorted(unknown)}; needed {sorted(required)}, allowed {sorted(known - required)}"
            )
        if "train_routes" in arrays and "rollout_routes" not in arrays:
            raise UserError(
                "train_routes are kept as a difference from rollout_routes: give both, or neither"
            )
        lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"token log of step {step}: columns of different lengths {lengths}")
        routes_shape = (lengths["position"], self.layout.num_layers, self.layout.top_k)
        for name, array in arrays.items():
            expected = routes_shape if name in _ROUTES else routes_shape[:1]
            if name != "overlap" and array.shape != expected:
                raise UserError(
                    f"token log of step {step}: {name} must have shape {list(expected)}, got "
                    f"{list(array.shape)}"
                )
            if np.ma.is_masked(array) and not (name in COLUMNS and COLUMNS[name].optional):
                raise UserError(f"token log of step {step}: column {name} cannot hold nulls")
        num_rows = lengths["position"]
        if num_rows == 0:
            raise UserError(f"token log of step {step}: no rows, so nothing was sampled or matched")
        return num_rows

    def _check_overlap(self, overlap_NL: np.ndarray, layers_mismatched_N: np.ndarray) -> None:
        K, L = self.layout.top_k, self.layout.num_layers
        if overlap_NL.shape != (len(layers_mismatched_N), L) or overlap_NL.dtype.kind not in "iu":
            raise UserError(
                f"overlap must hold integers of shape [{len(layers_mismatched_N)}, {L}], one for "
                f"each row and MoE layer, got {overlap_NL.dtype} of shape {list(overlap_NL.shape)}"
            )
        if L and (overlap_NL.min() < 0 or overlap_NL.max() > K):
            raise UserError(
                f"overlap counts shared experts and must be in 0..{K} (top-k), got "
                f"{overlap_NL.min()}..{overlap_NL.max()}"
            )
        differs_N = (overlap_NL < K).sum(axis=1) != layers_mismatched_N
        if differs_N.any():
            row = int(differs_N.argmax())
            raise UserError(
                f"row {row}: layers_mismatched is {layers_mismatched_N[row]}, but overlap is below "
                f"{K} in {(overlap_NL[row] < K).sum()} layers"
            )


def _to_arrow(name: str, values_N: np.ndarray) -> pa.Array:
    kind = pa.type_for_alias(COLUMNS[name].type)
    expected = "iu" if pa.types.is_integer(kind) else "f" if pa.types.is_floating(kind) else "b"
    if values_N.dtype.kind not in expected:
        raise UserError(f"column {name} must hold {kind}, got {values_N.dtype}")
    mask_N = np.ma.getmaskarray(values_N) if np.ma.is_masked(values_N) else None
    try:
        return pa.array(np.asarray(values_N), mask=mask_N).cast(kind)
    except pa.ArrowInvalid as error:
        raise UserError(f"column {name} does not fit {kind}: {error}") from None


def _fixed_binary(packed_NB: np.ndarray) -> pa.Array:
    N, B = packed_NB.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(packed_NB))]
    return pa.Array.from_buffers(pa.binary(B), N, buffers)


def _metadata(layout: TokenLayout, sampling: dict[str, Any]) -> dict[bytes, str]:
    about = {"schema_version": SCHEMA_VERSION} | sampling
    return {_METADATA_KEY: json.dumps(about | {"num_layers": layout.num_layers} | asdict(layout))}


def _kept(step: int, sequence_N: np.ndarray, share: float) -> np.ndarray:
    """Rows whose sequence a share keeps: hash(step, sequence) below share · 2^64. bool ``[N]``."""
    sequences, row_N = np.unique(sequence_N, return_inverse=True)
    keys = (f"{step}:{sequence}".encode() for sequence in sequences.tolist())
    hashes = (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) for key in keys)
    return np.array([value < share * 2**64 for value in hashes])[row_N]


def _by_sequence(code: Callable[[Any], Any], step_N: np.ndarray, sequence_N: np.ndarray) -> Any:
    """``code(rows)`` of all rows; where it refuses them, of each sequence, to name the bad one."""
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
        column that another has; `overlap_array` and `read_routes` give numpy, ``.to_pandas()``
        and ``polars.from_arrow`` the rest.

    Raises:
        UserError: no row at all; a file is truncated, no token log, of an unknown version, with a
            column missing or of another type, of another model or another share of sequences than
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
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                schema = parquet.schema_arrow
                layout = TokenLayout.of(schema)
                _check_types(schema, layout)
                about = _about(schema)
                first = first or about
                _check_same_run(about, first, files[0])
                names |= set(schema.names)
                wanted = None if columns is None else [c for c in columns if c in schema.names]
                tables.append(parquet.read(columns=wanted))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is truncated or not Parquet ({error}). Delete it, or read the other steps "
                "with steps=..."
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
    sampling = {"level": first["level"], "share": first["share"]}
    return table.select(list(order)).replace_schema_metadata(_metadata(layout, sampling))


def _check_types(schema: pa.Schema, layout: TokenLayout) -> None:
    for name, column in COLUMNS.items():
        if name not in schema.names:
            if column.optional or (name == "overlap" and not layout.num_layers):
                continue
            raise UserError(f"it lacks the column {name}, {column.type}")
        kind = schema.field(name).type
        if name == "overlap":
            fits = (
                pa.types.is_fixed_size_list(kind)
                and (kind.list_size, kind.value_type) == (layout.num_layers, pa.uint8())
            )  # fmt: skip
        elif name == "rollout_experts":
            fits = pa.types.is_fixed_size_binary(kind)
        else:
            fits = kind == pa.type_for_alias(column.type)
        if not fits:
            raise UserError(f"its column {name} is {kind}, expected {column.type}")


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
        UserError: no route columns, rows without routes, or bytes that no routes are written as
            (the step, the sequence and the layer are named).
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
    rollout_NLK = _by_sequence(lambda rows: decode_sets(packed_NB[rows], **shape), *rows_of)

    difference = table["train_experts"].combine_chunks()

    def decode(rows: slice | np.ndarray) -> np.ndarray:
        part = difference if isinstance(rows, slice) else difference.take(pa.array(rows))
        _, offset_buffer, data_buffer = part.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64)[part.offset : part.offset + len(part) + 1]
        data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
        return decode_difference(
            rollout_NLK[rows], data, offsets - offsets[0], num_experts=layout.num_experts
        )

    return rollout_NLK, _by_sequence(decode, *rows_of)
