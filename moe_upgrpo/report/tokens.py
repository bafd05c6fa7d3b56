# SPDX-License-Identifier: Apache-2.0
"""A run's token log as the report reads it: file by file, only the narrow columns."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import Rate
from moe_upgrpo.store import COLUMNS, TokenLayout, read_tokens
from moe_upgrpo.store.parquet import column_names, described
from moe_upgrpo.store.questions import GROUPINGS, QUANTITIES, AboveFloors, Clustered, ask
from moe_upgrpo.store.schema import check_types, metadata
from moe_upgrpo.store.streamed import Question, answer
from moe_upgrpo.store.token_log import token_files

# Files are read one by one, so any number of rows fits; but opening this many takes seconds.
MAX_FILES = 1500
_COLUMNS = (
    "step",
    "prompt",
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
    "noise_trainer_repeat",
    "noise_trainer_batch_shape",
    "noise_engine_repeat",
    "noise_engine_batch_shape",
    "gap_numerics",
    "gap_engine_routing",
    "counterfactual_engine_routing",
    "entropy",
)


@dataclass(frozen=True, kw_only=True)
class TokenLog:
    """The rows of a run's token files, read one by one and never all at once.

    ``layout`` is None where there are no files; ``note`` says what is read and what is not.
    """

    note: str
    layout: TokenLayout | None = None
    steps: tuple[int, ...] = ()
    num_rows: int = 0
    column_names: tuple[str, ...] = ()
    files: tuple[tuple[Path, int], ...] = ()
    _answered: dict[tuple[str, str], list[dict[str, Any]] | str] = field(
        default_factory=dict, repr=False, compare=False
    )
    _summed: list[tuple[Clustered, AboveFloors]] = field(
        default_factory=list, repr=False, compare=False
    )

    def parts(
        self, columns: Collection[str], steps: Collection[int] | None = None
    ) -> Iterator[pa.Table]:
        """A table from each file; a column that a file lacks is null."""
        wanted = [c for c in COLUMNS if c in columns and c in self.column_names]
        for file, step in self.files:
            if steps is not None and step not in steps:
                continue
            try:
                held = set(column_names(file))
                table = read_tokens(file, columns=[c for c in wanted if c in held])
            except (UserError, pa.ArrowException, OSError):
                continue  # damaged in a part that was not checked before
            for name in wanted:
                if name not in held:
                    kind = pa.type_for_alias(COLUMNS[name].type)
                    table = table.append_column(name, pa.nulls(table.num_rows, kind))
            yield table

    def ask(self, quantity: str, by: str = "all") -> list[dict[str, Any]] | str:
        """The rows of one of `QUANTITIES` by one of `GROUPINGS`, or why there are none.

        Each is computed once, however many figures and sentences show it; see `answer_all`.
        """
        if (quantity, by) not in self._answered:
            self.answer_all([(quantity, by)])
        return self._answered[quantity, by]

    def answer_all(self, asked: Iterable[tuple[str, str]], *, summed: bool = False) -> None:
        """Answer many questions in one reading of the files, or two for bins.

        summed: also the sums behind `clustered` and `above_floor`.
        """
        questions, counted = {}, {}
        for quantity, by in dict.fromkeys(asked):
            if (quantity, by) in self._answered:
                continue
            found = self._question(quantity, by, counted)
            if isinstance(found, str):
                self._answered[quantity, by] = found
            else:
                questions[quantity, by] = found
        sums = ()
        if summed and self.layout and self.layout.num_layers:
            floors = [name for name in self.column_names if name.startswith("noise_")]
            sums = Clustered(), AboveFloors(floors)
        if everyone := [*questions.values(), *sums]:
            answer(everyone, self.parts)
        if sums:
            self._summed.append(sums)
        for key, question in questions.items():
            try:
                self._answered[key] = [as_entry(row) for row in question.rows()]
            except UserError as error:
                self._answered[key] = f"{error}."

    def _question(self, quantity: str, by: str, counted: dict) -> Question | str:
        if self.layout is None:
            return self.note
        columns = (*QUANTITIES[quantity].columns, GROUPINGS[by][0])
        dense = not self.layout.num_layers
        if dense and (quantity.startswith("mismatch") or by in ("own", "prefix", "layer")):
            return "the model has no MoE layer."
        if missing := [c for c in columns if c not in self.column_names]:
            return f"the token log has no column {missing[0]}."
        return ask(quantity, by=by, layout=self.layout, counted=counted)

    def clustered(self) -> Clustered:
        """The sums that tell how clustered mismatches are, for a model with MoE layers."""
        return self._sums()[0]

    def above_floor(self, column: str, steps: Collection[int]) -> np.ndarray | None:
        """Mismatched routers minus those of a noise floor, by prompt ``[P]``; None without rows."""
        if column not in self.column_names:
            return None
        return self._sums()[1].of(column, steps)

    def _sums(self) -> tuple[Clustered, AboveFloors]:
        if not self._summed:
            self.answer_all([], summed=True)
        return self._summed[0]


def read_token_log(
    run: Path,
    *,
    config: dict[str, Any] | None = None,
    rows: Sequence[dict[str, Any]] = (),
    max_files: int = MAX_FILES,
) -> TokenLog:
    """Find the readable token files; only their metadata is read here.

    ``config`` and ``rows`` are the run's settings and metrics: the note says where the log is of
    another model, lacks a logged step or, at level full, lacks rows of one.

    A file holds whole sequences of one step. A file that cannot be read, or whose model or share of
    sequences differs from the newest file's, is left out and named in the note. If there are more
    than ``max_files``, whole steps are read at even distances, including the newest.
    """
    config = config or {}
    files = token_files(run / "tokens")
    if not files:
        if config.get("token_log") == "aggregate":
            why = "this run kept its token log at level aggregate: its metrics, and no token rows."
        else:
            why = "this run has no token log."
        return TokenLog(note=why)
    all_steps = sorted({step for _, step in files})
    every = -(-len(files) // max_files)
    taken = set(all_steps[::-1][::every])
    kept: list[tuple[Path, int]] = []
    held: dict[int, int] = {}
    names: set[str] = set()
    first = None
    left_out: list[str] = []
    others: list[str] = []
    for file, step in reversed(files):
        if step not in taken:
            continue
        try:
            schema, num_rows = described(file)
            layout = TokenLayout.of(schema)
            check_types(schema, layout)
        except UserError as error:
            left_out.append(f"{file.name} ({_why(error)})")
            continue
        except (pa.ArrowException, OSError):
            left_out.append(f"{file.name} (not readable)")
            continue
        if other := _other_model(layout, config):
            others.append(other)
            left_out.append(f"{file.name} ({other})")
            continue
        about = metadata(schema)
        if first is not None and about != first:
            left_out.append(f"{file.name} (logged otherwise)")
            continue
        first = about
        kept.append((file, step))
        held[step] = held.get(step, 0) + num_rows
        names.update(schema.names)
    missing = f" Left out: {', '.join(_few(left_out))}." if left_out else ""
    if not kept and others:
        return TokenLog(note=f"the token log is of another model: {others[0]}.")
    if not kept:
        return TokenLog(note=f"no token file could be read.{missing}")
    part = ""
    if every > 1:
        part = f"; of {len(all_steps):,} steps with rows {len(taken):,} at even distances are read"
    sample = ""
    if first["share"] < 1:
        sample = f" A sample: whole sequences, drawn with a share of {100 * first['share']:g}%."
    gaps = _gaps(held, first["share"], rows, set(all_steps))
    total = sum(held.values())
    note = f"{total:,} response tokens of {spans(held)}{part}{gaps}.{sample}{missing}"
    return TokenLog(
        note=note,
        layout=_layout(first),
        steps=tuple(sorted(held)),
        num_rows=total,
        column_names=tuple(c for c in _COLUMNS if c in names),
        files=tuple(reversed(kept)),
    )


def _layout(about: dict[str, Any]) -> TokenLayout:
    return TokenLayout(**{key: about[key] for key in ("layer_ids", "top_k", "num_experts")})


def _why(error: UserError) -> str:
    """Say why a file cannot be read: damaged, or of a newer schema (its version is named)."""
    text = str(error)
    return text.split(":")[0] if text.startswith("schema version") else "not readable"


def _few(texts: list[str]) -> list[str]:
    return (
        texts
        if len(texts) <= _MAX_SPANS
        else [*texts[:_MAX_SPANS], f"{len(texts) - _MAX_SPANS} more"]
    )


def _other_model(logged: TokenLayout, config: dict[str, Any]) -> str:
    """Name both models if a token log's routes are not those of the model in the config."""
    layers, *top = (config.get(key) for key in ("moe_layers", "top_k", "num_experts"))
    ids = list(logged.layer_ids)
    if layers is None or (layers == ids and (not ids or top == [logged.top_k, logged.num_experts])):
        return ""
    return (
        f"its MoE layers are {ids}, top-{logged.top_k} of {logged.num_experts}, those of "
        f"config.json {layers}, top-{top[0]} of {top[1]}"
    )


def _gaps(
    held: dict[int, int], share: float, rows: Sequence[dict[str, Any]], found: set[int]
) -> str:
    """Logged steps without a file and, at level full, those with more or fewer rows than tokens."""
    logged = {row["step"]: row.get("tokens/sampled") for row in rows if row["step"] > 0}
    text = ""
    if missing := {step for step in logged if step not in found}:
        verb = "are" if len(missing) > 1 else "is"
        # A sample may, by chance, hold no sequence of a step.
        how = f"{verb} missing" if share == 1 else f"{verb} not in it"
        text += f"; {spans(missing)} {how}"
    if logged and (unfinished := held.keys() - logged):
        text += f"; {spans(unfinished)} not finished"
    if share == 1:
        wrong = [
            f"step {step} has {held[step]:,} rows for {logged[step]:,.0f} tokens"
            for step in sorted(held.keys() & logged.keys())
            if logged[step] and logged[step] != held[step]
        ]
        text += "".join(f"; {one}" for one in _few(wrong))
    return text


def finite(value: Any) -> Any:
    """Replace NaN and infinities by null, for JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_entry(row: Rate) -> dict[str, Any]:
    """A row of an answer; interval ends that are not known are null."""
    return {name: finite(value) for name, value in asdict(row).items()}


_MAX_SPANS = 12


def spans(steps: Collection[int]) -> str:
    """'steps 1, 4 to 7 and 9'; for many spans, the first ones and the number of the others."""
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
