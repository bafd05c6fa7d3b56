"""The token log: one row per response token, in Parquet, a file for each step and writing rank.

Shape suffixes: N rows (response tokens), L MoE layers, K experts per token (top-k).
"""

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_upgrpo.errors import UserError

SCHEMA_VERSION = 1

# name: (Arrow type, meaning). `overlap`, whose width depends on the model, comes after these.
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "step": (pa.int32(), "training step, from 1"),
    "sequence": (pa.int64(), "index of the sequence within the step, counted over all ranks"),
    "prompt": (pa.int32(), "index of the prompt (the group) within the step"),
    "position": (pa.int32(), "position p in prompt + response; its route row is p − 1"),
    "token_id": (pa.int32(), "the sampled token"),
    "reward": (pa.float32(), "reward of the sequence"),
    "advantage": (pa.float32(), "advantage of the token"),
    "logp_rollout": (pa.float32(), "the engine's log-prob, at the sampling temperature"),
    "logp_old": (pa.float32(), "the trainer's log-prob at the weights the engine held"),
    "logp_train": (pa.float32(), "the trainer's log-prob at the token's last optimizer visit"),
    "ratio": (pa.float32(), "exp(logp_train − logp_old), of that visit"),
    "clipped": (pa.bool_(), "the loss's own rule took the gradient away at that visit"),
    "layers_mismatched": (pa.int16(), "MoE layers with overlap < K, free-running, old weights"),
}

_FILE_NAME = re.compile(r"step-(\d{6,})-rank-(\d{4,})\.parquet")


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

    def schema(self) -> pa.Schema:
        """Columns, none of which holds nulls, and metadata ``moe_upgrpo.token_log`` (JSON).

        ``overlap`` is fixed_size_list<uint8>[L]: |S ∩ S'| for each MoE layer. A dense model (L = 0)
        has no such column: Arrow has no list of size 0.
        """
        fields = [pa.field(name, kind, nullable=False) for name, (kind, _) in COLUMNS.items()]
        if self.num_layers:
            overlap = pa.list_(pa.field("item", pa.uint8(), nullable=False), self.num_layers)
            fields.append(pa.field("overlap", overlap, nullable=False))
        about = {"schema_version": SCHEMA_VERSION, "num_layers": self.num_layers} | asdict(self)
        return pa.schema(fields, metadata={_METADATA_KEY: json.dumps(about)})

    @classmethod
    def of(cls, schema: pa.Schema) -> "TokenLayout":
        """The layout that a file or a table from `read_tokens` carries.

        Raises:
            UserError: not a token log, or of a schema version that this package does not know.
        """
        raw = (schema.metadata or {}).get(_METADATA_KEY)
        if raw is None:
            raise UserError("not a token log: its schema lacks the moe_upgrpo.token_log metadata")
        about = json.loads(raw)
        if about["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"schema version {about['schema_version']} is unknown: this package reads version "
                f"{SCHEMA_VERSION}. Read it with the moe_upgrpo that wrote it"
            )
        return cls(
            layer_ids=tuple(about["layer_ids"]),
            top_k=about["top_k"],
            num_experts=about["num_experts"],
        )


_METADATA_KEY = b"moe_upgrpo.token_log"


class TokenLogWriter:
    """Writes one rank's rows of a step to ``FOLDER/step-000012-rank-0000.parquet``.

    ``folder`` is the run's ``tokens`` folder. For a dense model pass ``layer_ids=()``; top_k and
    num_experts then mean nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int,
        layer_ids: Sequence[int],
        top_k: int,
        num_experts: int,
    ) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.layout = TokenLayout(layer_ids=tuple(layer_ids), top_k=top_k, num_experts=num_experts)
        self._schema = self.layout.schema()
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, columns: dict[str, np.ndarray]) -> Path:
        """Write one step's rows, all or nothing: under a temporary name, then renamed.

        Args:
            step: every row's step. The column ``step`` itself may be left out.
            columns: the names of `COLUMNS`, each ``[N]``, and ``overlap`` ``[N, L]`` of integers
                in 0..K (left out, or ``[N, 0]``, for a dense model). Floats are stored as float32.

        Raises:
            UserError: a column is missing, unknown, or of another length or kind; no rows;
                overlap and layers_mismatched contradict each other; the file exists already.
        """
        arrays = {name: np.asarray(values) for name, values in columns.items()}
        num_rows = self._check_names_and_lengths(step, arrays)
        arrays.setdefault("step", np.full(num_rows, step, dtype=np.int32))
        if (arrays["step"] != step).any():
            raise UserError(f"column step holds other steps than the {step} being written")
        overlap_NL = arrays.pop("overlap", np.empty((num_rows, 0), dtype=np.uint8))
        self._check_overlap(overlap_NL, arrays["layers_mismatched"])

        data = [_to_arrow(name, arrays[name]) for name in COLUMNS]
        if self.layout.num_layers:
            flat = pa.array(overlap_NL.astype(np.uint8).reshape(-1))
            overlap_type = self._schema.field("overlap").type
            data.append(pa.FixedSizeListArray.from_arrays(flat, type=overlap_type))
        table = pa.Table.from_arrays(data, schema=self._schema)

        file = self.folder / f"step-{step:06d}-rank-{self.rank:04d}.parquet"
        if file.exists():
            raise UserError(
                f"{file} exists already: step {step} was logged before. To run it again, start "
                "from RunFolder.resume, which first drops what was logged after the checkpoint"
            )
        part = file.with_name(f".{file.name}.tmp")
        pq.write_table(table, part, compression="zstd")
        os.replace(part, file)
        return file

    def _check_names_and_lengths(self, step: int, arrays: dict[str, np.ndarray]) -> int:
        required = set(COLUMNS) - {"step"}
        if self.layout.num_layers:
            required.add("overlap")
        missing, unknown = required - set(arrays), set(arrays) - {*COLUMNS, "overlap"}
        if missing or unknown:
            raise UserError(
                f"token log of step {step}: missing columns {sorted(missing)}, unknown columns "
                f"{sorted(unknown)}; expected {sorted(required)}"
            )
        lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"token log of step {step}: columns of different lengths {lengths}")
        flat = {name: array.shape for name, array in arrays.items() if name != "overlap"}
        if wrong := {name: shape for name, shape in flat.items() if len(shape) != 1}:
            raise UserError(f"token log of step {step}: columns must have shape [N], got {wrong}")
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
    kind = COLUMNS[name][0]
    expected = "iu" if pa.types.is_integer(kind) else "f" if pa.types.is_floating(kind) else "b"
    if values_N.dtype.kind not in expected:
        raise UserError(f"column {name} must hold {kind}, got {values_N.dtype}")
    try:
        return pa.array(values_N).cast(kind)
    except pa.ArrowInvalid as error:
        raise UserError(f"column {name} does not fit {kind}: {error}") from None


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
        A table whose schema carries the `TokenLayout`; ``overlap_array`` gives its overlaps as
        numpy, ``.to_pandas()`` and ``polars.from_arrow`` the rest.

    Raises:
        UserError: no row at all; a file is truncated, no token log, of an unknown version, or of
            another model than the first (the file is named); a column does not exist.
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
        raise UserError(f"{path} holds no token log{of_steps}: expected tokens/step-*.parquet")

    tables: list[pa.Table] = []
    first: TokenLayout | None = None
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                schema = parquet.schema_arrow
                layout = TokenLayout.of(schema)
                first = first or layout
                if layout != first:
                    raise UserError(
                        f"routes of another model: {layout}, but {files[0]} has {first}"
                    )
                if unknown := set(columns or ()) - set(schema.names):
                    raise UserError(f"no columns {sorted(unknown)}: it has {schema.names}")
                tables.append(parquet.read(columns=None if columns is None else list(columns)))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is truncated or not Parquet ({error}). Delete it, or read the other steps "
                "with steps=..."
            ) from None
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        raise UserError(f"{path}: the token log has no rows")
    return table


def overlap_array(table: pa.Table) -> np.ndarray:
    """uint8 ``[N, L]``: the experts shared by both sides in each MoE layer; ``[N, 0]`` if dense."""
    num_layers = TokenLayout.of(table.schema).num_layers
    if num_layers == 0:
        return np.empty((table.num_rows, 0), dtype=np.uint8)
    return table["overlap"].combine_chunks().flatten().to_numpy().reshape(-1, num_layers)
