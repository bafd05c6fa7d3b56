"""A run's token log as the report reads it: its newest files, the narrow columns."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import TokenLayout, read_tokens
from moe_upgrpo.store.parquet import column_names
from moe_upgrpo.store.questions import GROUPINGS, QUANTITIES, rate
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
    "gap_numerics",
    "gap_engine_routing",
    "counterfactual_engine_routing",
)
# Of sequences; the ends of a 95% interval are then the 12th smallest and largest.
RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class TokenLog:
    """Rows of the newest files, or none; ``note`` says what was read and what was not."""

    table: pa.Table | None
    note: str
    _answered: dict[tuple[str, str], list[dict[str, Any]] | str] = field(
        default_factory=dict, repr=False, compare=False
    )

    def ask(self, quantity: str, by: str = "all") -> list[dict[str, Any]] | str:
        """The rows of one of `QUANTITIES` by one of `GROUPINGS`, or why there are none.

        Each is computed once, however many figures and sentences show it.
        """
        if (quantity, by) not in self._answered:
            self._answered[quantity, by] = self._answer(quantity, by)
        return self._answered[quantity, by]

    def _answer(self, quantity: str, by: str) -> list[dict[str, Any]] | str:
        if self.table is None:
            return self.note
        columns = (*QUANTITIES[quantity].columns, GROUPINGS[by][0])
        dense = not self.layout.num_layers
        if dense and (quantity.startswith("mismatch") or by in ("own", "prefix", "layer")):
            return "the model has no MoE layer."
        if missing := [c for c in columns if c not in self.table.column_names]:
            return f"the token log has no column {missing[0]}."
        try:
            rows = rate(self.table, quantity, by=by, resamples=RESAMPLES)
        except UserError as error:
            return f"{error}."
        # An interval of a single sequence is null.
        return [{key: finite(value) for key, value in asdict(row).items()} for row in rows]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.of(self.table.schema)


def read_token_log(
    run: Path,
    *,
    config: dict[str, Any] | None = None,
    rows: Sequence[dict[str, Any]] = (),
    max_rows: int = MAX_ROWS,
) -> TokenLog:
    """Whole files from the last back, until ``max_rows`` are reached.

    ``config`` and ``rows`` are the run's settings and metrics: the note says where the log is not
    of that model, lacks a logged step or, at level full, rows of one.

    A file holds whole sequences of one step, so that none is cut. One that cannot be read, or whose
    model or share of sequences differs from that of the newest, is left out and named in the note.
    """
    config = config or {}
    files = token_files(run / "tokens")
    if not files:
        if config.get("token_log") == "aggregate":
            why = "this run kept its token log at level aggregate: its metrics, and no token rows."
        else:
            why = "this run has no token log."
        return TokenLog(table=None, note=why)
    tables: list[pa.Table] = []
    steps: set[int] = set()
    left_out: list[str] = []
    others: list[str] = []
    num_rows = seen = 0
    for file, step in reversed(files):
        if num_rows >= max_rows:
            break
        seen += 1
        try:
            held = column_names(file)
            table = read_tokens(file, columns=[c for c in _COLUMNS if c in held])
        except (UserError, pa.ArrowException, OSError):
            left_out.append(f"{file.name} (not readable)")
            continue
        if other := _other_model(TokenLayout.of(table.schema), config):
            others.append(other)
            left_out.append(f"{file.name} ({other})")
            continue
        if tables and table.schema.metadata != tables[0].schema.metadata:
            left_out.append(f"{file.name} (logged otherwise)")
            continue
        tables.append(table)
        steps.add(step)
        num_rows += table.num_rows
    missing = f" Left out: {', '.join(left_out)}." if left_out else ""
    if not tables and others:
        return TokenLog(table=None, note=f"the token log is of another model: {others[0]}.")
    if not tables:
        return TokenLog(table=None, note=f"no token file could be read.{missing}")
    older = len(files) - seen
    part = f"; {older} older file{'s' * (older > 1)} not read" if older else ""
    table = pa.concat_tables(reversed(tables), promote_options="default")
    sample = ""
    if (share := metadata(table.schema)["share"]) < 1:
        sample = f" A sample: whole sequences, drawn with a share of {100 * share:g}%."
    gaps = _gaps(table, rows, {step for _, step in files}, cut=older > 0)
    note = f"{num_rows:,} response tokens of {spans(steps)}{part}{gaps}.{sample}{missing}"
    return TokenLog(table=table, note=note)


def _other_model(logged: TokenLayout, config: dict[str, Any]) -> str:
    """Both models, where the routes of a token log are not of the one that the config names."""
    layers, *top = (config.get(key) for key in ("moe_layers", "top_k", "num_experts"))
    ids = list(logged.layer_ids)
    if layers is None or (layers == ids and (not ids or top == [logged.top_k, logged.num_experts])):
        return ""
    return (
        f"its MoE layers are {ids}, top-{logged.top_k} of {logged.num_experts}, those of "
        f"config.json {layers}, top-{top[0]} of {top[1]}"
    )


def _gaps(table: pa.Table, rows: Sequence[dict[str, Any]], found: set[int], *, cut: bool) -> str:
    """Which logged steps have no file, and which, at level full, fewer or more rows than tokens.

    ``cut``: older files were not read, maybe of the first step read too.
    """
    about = metadata(table.schema)
    held = {row["values"]: row["counts"] for row in table["step"].value_counts().to_pylist()}
    first = min(held)
    logged = {row["step"]: row.get("tokens/sampled") for row in rows if row["step"] > 0}
    text = ""
    if missing := {step for step in logged if step not in found and not (cut and step < first)}:
        verb = "are" if len(missing) > 1 else "is"
        # By chance, a sample may hold no sequence of a step.
        how = f"{verb} missing" if about["share"] == 1 else f"{verb} not in it"
        text += f"; {spans(missing)} {how}"
    if logged and (unfinished := held.keys() - logged):
        text += f"; {spans(unfinished)} not finished"
    if about["share"] == 1:
        for step in sorted(held.keys() & logged.keys()):
            if logged[step] and logged[step] != held[step] and not (cut and step == first):
                text += f"; step {step} has {held[step]:,} rows for {logged[step]:,.0f} tokens"
    return text


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_MAX_SPANS = 12


def spans(steps: Collection[int]) -> str:
    """'steps 1, 4 to 7 and 9'; of many spans the first and how many more."""
    found: list[list[int]] = []
    for step in sorted(set(steps)):
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    texts = [f"{a}" if a == b else f"{a} to {b}" for a, b in found]
    if (hidden := len(texts) - _MAX_SPANS) > 0:
        texts = [*texts[:_MAX_SPANS], f"{hidden} more places"]
    last = f" and {texts[-1]}" if len(texts) > 1 else texts[0]
    return f"step{'s' * (len(set(steps)) > 1)} {', '.join(texts[:-1])}{last}"
