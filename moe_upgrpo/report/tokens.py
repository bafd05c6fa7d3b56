"""What the report reads of a run's token log: its newest files, the narrow columns."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import TokenLayout, read_tokens
from moe_upgrpo.store.schema import metadata
from moe_upgrpo.store.token_log import token_files

# About 200 MB for a model of 48 layers.
MAX_ROWS = 2_000_000
_COLUMNS = (
    "step",
    "sequence",
    "position",
    "token_id",
    "reward",
    "advantage",
    "logp_rollout",
    "logp_old",
    "ratio",
    "clipped",
    "layers_mismatched",
    "overlap",
    "prefix_mismatched",
    "margin_min",
    "gradient_weight",
)


@dataclass(frozen=True, kw_only=True)
class TokenLog:
    """Rows of the newest files, or none; ``note`` says what was read and what was not."""

    table: pa.Table | None
    note: str

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.of(self.table.schema)


def read_token_log(run: Path, *, level: str | None = None, max_rows: int = MAX_ROWS) -> TokenLog:
    """Whole files from the last back, until ``max_rows`` are reached.

    ``level`` is that of the run's config: a log of level aggregate has no files.

    A file holds whole sequences of one step, so that none is cut. One that cannot be read, or whose
    model or share of sequences differs from that of the newest, is left out and named in the note.
    """
    files = token_files(run / "tokens")
    if not files:
        if level == "aggregate":
            why = "this run kept its token log at level aggregate: its metrics, and no token rows."
        else:
            why = "this run has no token log."
        return TokenLog(table=None, note=why)
    tables: list[pa.Table] = []
    steps: set[int] = set()
    left_out: list[str] = []
    rows = seen = 0
    for file, step in reversed(files):
        if rows >= max_rows:
            break
        seen += 1
        try:
            held = pq.read_schema(file).names
            table = read_tokens(file, columns=[c for c in _COLUMNS if c in held])
        except (UserError, pa.ArrowException, OSError):
            left_out.append(f"{file.name} (not readable)")
            continue
        if tables and table.schema.metadata != tables[0].schema.metadata:
            left_out.append(f"{file.name} (logged otherwise)")
            continue
        tables.append(table)
        steps.add(step)
        rows += table.num_rows
    missing = f" Left out: {', '.join(left_out)}." if left_out else ""
    if not tables:
        return TokenLog(table=None, note=f"no token file could be read.{missing}")
    span = f"step {min(steps)}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
    older = len(files) - seen
    part = f"; {older} older file{'s' * (older > 1)} not read" if older else ""
    table = pa.concat_tables(reversed(tables), promote_options="default")
    sample = ""
    if (share := metadata(table.schema)["share"]) < 1:
        sample = f" A sample: whole sequences, drawn with a share of {100 * share:g}%."
    return TokenLog(table=table, note=f"{rows:,} response tokens of {span}{part}.{sample}{missing}")
