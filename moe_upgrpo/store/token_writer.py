# SPDX-License-Identifier: Apache-2.0
"""Write the token log: one row per response token, a Parquet file for each step and rank.

Shape suffixes: N rows (response tokens), L MoE layers, K experts per token (top-k), B bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import publish
from moe_upgrpo.store.parquet import write_checked
from moe_upgrpo.store.pieces import Pieces
from moe_upgrpo.store.schema import COLUMNS, LEVELS, TokenLayout, file_metadata
from moe_upgrpo.store.texts import write_prompts
from moe_upgrpo.store.token_log import by_sequence

Column = np.ndarray | list[np.ndarray]
# Passed to the writer in place of the packed columns.
_ROUTES = {"rollout_routes": "rollout_experts", "train_routes": "train_experts"}
# A token's own floats and packed sets hardly repeat: a dictionary would only add its indices.
# A float's bytes, split into four streams, shrink under zstd.
_SPLIT = {name for name, column in COLUMNS.items() if column.type == "float"}
_SPLIT -= {"reward", "advantage"}
# (token, layer) pairs that are packed at once.
_PACKED = 1 << 17
# Tokens that are checked at once.
_CHECKED = 1 << 13
_DISTINCT = _SPLIT | set(_ROUTES.values())


class _Packed(NamedTuple):
    """The routes as `routing.codec` writes them; data and offsets: None where one side is given.

    wrong: the first row and layer whose given overlap is not that of the routes, and theirs.
    """

    rollout_NB: np.ndarray
    data: np.ndarray | None = None
    offsets: np.ndarray | None = None
    wrong: tuple[int, int, int] | None = None


class TokenLogWriter:
    """Writes one rank's rows of a step to ``FOLDER/step-000012-rank-0000.parquet``.

    ``folder`` is the run's ``tokens`` folder. For a dense model, pass ``layer_ids=()``; top_k and
    num_experts are then ignored. ``level`` is one of `LEVELS`; "sampled" needs ``share``, the share
    of sequences to keep, between 0 and 1. The choice is the same on every rank and in a resumed
    run, and a larger share keeps what a smaller one did.

    Raises:
        UserError: an impossible layout, an unknown level, or a share that does not go with it.
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

    def write(self, step: int, columns: Mapping[str, Column]) -> Path | None:
        """Write one step's rows, all or nothing: under a temporary name, then renamed.

        Args:
            step: every row's step. The column ``step`` itself may be left out.
            columns: names of `COLUMNS`, each ``[N]``, and ``overlap`` ``[N, L]`` of integers in
                0..K (left out, or ``[N, 0]``, for a dense model). Floats are stored as float32.
                Optional columns may be left out; masked entries of a masked array become nulls, in
                those and in the nullable ones. Instead of the packed expert sets, pass the raw
                ones: ``rollout_routes`` and, only beside it, ``train_routes``, integers ``[N, L,
                K]``, row p − 1 of each token. They may be lists of arrays, one after the other: no
                second copy of them is made.

        Returns:
            The file, or None where the level keeps none of these rows.

        Raises:
            UserError: a column is missing, unknown, or of another length or kind; no rows;
                impossible routes (the sequence and the layer are named); overlap contradicts
                layers_mismatched or the routes; the file exists already.
        """
        routes = {name: Pieces.of(columns[name]) for name in _ROUTES if name in columns}
        arrays = {name: np.asanyarray(x) for name, x in columns.items() if name not in routes}
        num_rows = self._check_names_and_lengths(step, {**arrays, **routes})
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
            routes = {name: pieces.where(kept_N) for name, pieces in routes.items()}
        table = self._table(step, arrays, routes)

        file = self.folder / f"step-{step:06d}-rank-{self.rank:04d}.parquet"
        if file.exists():
            raise UserError(
                f"{file} exists already: step {step} was logged before. To run it again, start "
                "from RunFolder.resume, which first drops what was logged after the checkpoint"
            )
        part = file.with_name(f".{file.name}.tmp")
        write_checked(
            table,
            part,
            use_dictionary=[name for name in table.column_names if name not in _DISTINCT],
            use_byte_stream_split=[name for name in table.column_names if name in _SPLIT],
        )
        publish(part, file)
        return file

    def write_prompts(self, step: int, prompts: dict[int, np.ndarray]) -> Path | None:
        """Keep the token ids of the prompts for which this rank logs rows.

        prompts: the token ids of each, by its index within the step.
        """
        if self.level == "aggregate" or not prompts:
            return None
        return write_prompts(self.folder, step, self.rank, prompts)

    def _table(
        self, step: int, arrays: dict[str, np.ndarray], routes: dict[str, Pieces]
    ) -> pa.Table:
        packed = self._pack(step, arrays, routes) if routes else {}
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
                flat = pa.array(arrays[name].astype(np.uint8, copy=False).reshape(-1))
                array = pa.FixedSizeListArray.from_arrays(flat, type=kind)
            else:
                array = _to_arrow(name, arrays[name])
            data.append(array)
            nullable = column.optional or (column.nullable and array.null_count > 0)
            fields.append(pa.field(name, array.type, nullable=nullable))
        sampling = {"level": self.level, "share": self.share}
        return pa.Table.from_arrays(
            data, schema=pa.schema(fields, file_metadata(self.layout, sampling))
        )

    def _pack(
        self, step: int, arrays: dict[str, np.ndarray], routes: dict[str, Pieces]
    ) -> dict[str, pa.Array]:
        """Raw routes as the columns that keep them, after a check against ``overlap``."""
        sequence_N = arrays["sequence"]
        packed = by_sequence(
            lambda rows: self._packed(
                {name: side.at(rows) for name, side in routes.items()}, arrays["overlap"][rows]
            ),
            arrays["step"],
            sequence_N,
        )
        columns = {"rollout_experts": _fixed_binary(packed.rollout_NB)}
        if packed.wrong is not None:
            row, layer, shared = packed.wrong
            raise UserError(
                f"step {step}, sequence {sequence_N[row]}, position {arrays['position'][row]}, MoE "
                f"layer {layer}: overlap is {arrays['overlap'][row, layer]}, but the routes share "
                f"{shared}: rows joined wrongly, or routes of another forward"
            )
        if packed.offsets is not None:
            buffers = [None, pa.py_buffer(packed.offsets), pa.py_buffer(packed.data)]
            columns["train_experts"] = pa.Array.from_buffers(
                pa.large_binary(), len(sequence_N), buffers
            )
        return columns

    def _packed(self, routes: dict[str, Pieces], overlap_NL: np.ndarray) -> _Packed:
        """The routes as they are stored, packed a run of tokens at a time."""
        # Imported here: the routing package needs torch, which a reader of the log does without.
        from moe_upgrpo.routing.codec import encode_sets, encode_sides, set_bytes

        E, rollout = self.layout.num_experts, routes["rollout_routes"]
        N, L, K = rollout.shape
        rollout_NB = np.empty((N, set_bytes(L, K, E)), dtype=np.uint8)
        offsets, data = np.zeros(N + 1, dtype=np.int64), bytearray()
        wrong = None
        step = max(1, _PACKED // L)
        for rows in (slice(start, min(start + step, N)) for start in range(0, N, step)):
            rollout_nLK = rollout.cut(rows)
            if "train_routes" not in routes:
                rollout_NB[rows] = encode_sets(rollout_nLK, num_experts=E)
                continue
            train_nLK = routes["train_routes"].cut(rows)
            sides = encode_sides(rollout_nLK, train_nLK, num_experts=E, first_token=rows.start)
            rollout_NB[rows] = sides.sets_NB
            offsets[rows.start + 1 : rows.stop + 1] = len(data) + sides.offsets[1:]
            data += sides.data.data
            wrong_nL = sides.overlap_NL != overlap_NL[rows]
            if wrong is None and wrong_nL.any():
                row, layer = map(int, np.argwhere(wrong_nL)[0])
                wrong = rows.start + row, layer, int(sides.overlap_NL[row, layer])
        if "train_routes" not in routes:
            return _Packed(rollout_NB)
        return _Packed(rollout_NB, np.frombuffer(data, np.uint8), offsets, wrong)

    def _check_names_and_lengths(self, step: int, arrays: Mapping[str, np.ndarray | Pieces]) -> int:
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
        lengths = {name: array.shape[0] if array.shape else 0 for name, array in arrays.items()}
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
            column = COLUMNS.get(name)
            if np.ma.is_masked(array) and not (column and (column.optional or column.nullable)):
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
        blocks = (overlap_NL[i : i + _CHECKED] for i in range(0, len(overlap_NL), _CHECKED))
        below_N = np.concatenate([(block_nL < K).sum(axis=1) for block_nL in blocks])
        differs_N = below_N != layers_mismatched_N
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


def _kept(step: int, sequence_N: np.ndarray, share: float) -> np.ndarray:
    """Rows whose sequence is kept: hash(step, sequence) below share · 2^64. bool ``[N]``."""
    sequences, row_N = np.unique(sequence_N, return_inverse=True)
    keys = (f"{step}:{sequence}".encode() for sequence in sequences.tolist())
    hashes = (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) for key in keys)
    return np.array([value < share * 2**64 for value in hashes])[row_N]
