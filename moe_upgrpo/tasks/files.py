# SPDX-License-Identifier: Apache-2.0
"""Questions with answers from local files, JSONL or Parquet, one problem a row."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError

# Where no field is named, the first of these with a value, row by row. `a.b` is field b of the
# object a: verl's files have the answer in reward_model.ground_truth, slime's in label.
PROMPT_FIELDS = ("prompt", "question", "problem")
ANSWER_FIELDS = ("answer", "reward_model.ground_truth", "ground_truth", "label", "solution")
SUFFIXES = (".jsonl", ".ndjson", ".parquet")
# The fields by which verl's data sets choose a reward; of any row they are kept.
REWARD_FIELDS = ("data_source", "reward_model")
_SHOWN = 5  # unusable rows in one error
# What JavaScript, JSON writers and Python's str() make of a number that is not there. Not among
# them: `infinity` and `\infty`, the answers of many a limit, which math-verify reads as ∞.
_NOT_A_NUMBER = re.compile(r"[+-]?((?i:nan|inf)|Infinity)")

_NEEDED = {
    "prompt": "a text is needed, or a list of chat messages with role and content, the last one "
    "not the assistant's.",
    "answer": "a text or a number is needed.",
}

Message = tuple[str, str]  # role, content


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A question as text or as the messages of a chat, its answer, where it was read, and the
    other fields that are kept."""

    prompt: str | tuple[Message, ...]
    answer: str
    where: str
    data: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(kw_only=True)
class DataFile:
    """The problems of a file, and what was left out of it."""

    rows: list[Row] = field(default_factory=list)
    prompt_fields: list[str] = field(default_factory=list)
    answer_fields: list[str] = field(default_factory=list)
    repeated: int = 0
    """Rows that say again what another says; each problem is used once."""
    unanswered: list[str] = field(default_factory=list)
    """Where the answer is empty, null or no finite number."""
    contradicted: list[str] = field(default_factory=list)
    """Where a question's answer differs from the first one given; the question is left out."""

    def describe(self) -> str:
        """One line for the screen."""
        prompts, answers = (
            " and ".join(map(repr, names)) or "no field"
            for names in (self.prompt_fields, self.answer_fields)
        )
        parts = [f"{len(self.rows)} problems (prompt from {prompts}, answer from {answers})"]
        if self.repeated:
            parts.append(f"{self.repeated} repeated rows used once")
        for what, rows in (
            ("rows without an answer left out", self.unanswered),
            ("rows with another answer to the same question, which is left out", self.contradicted),
        ):
            if rows:
                parts.append(f"{len(rows)} {what} (the first: {rows[0]})")
        return "; ".join(parts)


def read_problems(
    file: Path,
    *,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    whole_rows: bool = False,
) -> DataFile:
    """The problems of a .jsonl (.ndjson) or .parquet file in its order.

    A prompt is a text or a list of chat messages `{role, content}` of which the last is not the
    assistant's and only a system message may be empty; an answer is a text or a number. Repeated
    rows, rows without an answer (empty, null, NaN, infinite) and questions with several answers are
    left out and counted: the published DAPO-Math-17k has each problem a hundred times. Of each row
    `data_source` and `reward_model` are kept beside, or all of it (`whole_rows`).

    Raises:
        UserError: the file cannot be read, no field holds prompts or answers, rows that are broken
            (file, line or row, and what is missing; the first five), or no problem at all.
    """
    prompts = (prompt_field,) if prompt_field else PROMPT_FIELDS
    answers = (answer_field,) if answer_field else ANSWER_FIELDS
    data, broken = DataFile(), []
    by_prompt: dict[str | tuple[Message, ...], Row | None] = {}
    for where, row in _rows(file, prompts, answers, whole_rows):
        try:
            if isinstance(row, UserError):
                raise row
            prompt = _prompt(_value(row, prompts, "prompt", data.prompt_fields))
            answer = _answer(_value(row, answers, "answer", data.answer_fields))
        except UserError as error:
            broken.append(f"{where}: {error}")
            continue
        if not answer:
            data.unanswered.append(where)
        elif prompt not in by_prompt:
            by_prompt[prompt] = Row(
                prompt=prompt, answer=answer, where=f"{file}, {where}", data=_kept(row, whole_rows)
            )
        elif by_prompt[prompt] and by_prompt[prompt].answer == answer:
            data.repeated += 1
        else:
            by_prompt[prompt] = None
            data.contradicted.append(where)
    if broken:
        more = f" … and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise UserError(
            f"{file}: {len(broken)} row(s) cannot be used. {' '.join(broken[:_SHOWN])}{more}"
        )
    rows = [row for row in by_prompt.values() if row]
    if not rows:
        read = data.prompt_fields or data.unanswered
        raise UserError(f"{file} has no problems{f': {data.describe()}' if read else ''}.")
    data.rows = rows
    return data


def _kept(row: dict, whole: bool) -> dict:
    return row if whole else {name: row[name] for name in REWARD_FIELDS if name in row}


def _rows(
    file: Path, prompts: tuple[str, ...], answers: tuple[str, ...], whole: bool
) -> Iterator[tuple[str, dict | UserError]]:
    """(place, row) of each row, or (place, error) for a broken one."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: data files end with {', '.join(SUFFIXES)}.")
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file, prompts, answers, whole)
        else:
            yield from _json_rows(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}.") from None


def _json_rows(file: Path) -> Iterator[tuple[str, dict | UserError]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
                if not isinstance(row, dict):
                    row = UserError("an object {...} is needed.")
            except UnicodeDecodeError as error:
                row = UserError(f"not UTF-8 ({error.reason}).")
            except json.JSONDecodeError as error:
                row = UserError(f"not JSON ({error.msg}, character {error.pos + 1}).")
            except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
                row = UserError(f"no JSON that can be read ({error}).")
            yield f"line {number}", row


def _parquet_rows(
    file: Path, prompts: tuple[str, ...], answers: tuple[str, ...], whole: bool
) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moe_upgrpo.store.parquet import opened

    try:
        parquet = pq.ParquetFile(opened(file), page_checksum_verification=True)
        known = parquet.schema_arrow.names
        kinds = [
            {c for c in known for name in names if c in (name, name.split(".")[0])}
            for names in (prompts, answers)
        ]
        # Where a kind has no column all are read, for the error to name them.
        columns = sorted(set.union(*kinds, {*REWARD_FIELDS} & {*known})) if all(kinds) else None
        columns = None if whole else columns
        number = 0
        for batch in parquet.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{file} is truncated or not a Parquet file: {error}") from None


def _value(row: dict, names: tuple[str, ...], kind: str, seen: list[str]):
    """The row's value of that kind, of the first field that has one; None where all are null.

    seen: the fields that rows so far had theirs in; a new one is added.
    """
    there = False
    for name in names:
        has_field, value = _look_up(row, name)
        there |= has_field
        if value is None or _is_no_number(value):
            continue
        if name not in seen:
            seen.append(name)
        return value
    if there:
        return None
    if seen:
        raise UserError(f"the {kind} is missing; {_NEEDED[kind]}")
    raise UserError(
        f"no {kind}: a field {' or '.join(map(repr, names))} is needed, it has "
        f"{', '.join(map(repr, row)) or 'none'} (--{kind}-field names another)."
    )


def _look_up(row: dict, name: str) -> tuple[bool, object]:
    """Whether the row has the field, and its value; `a.b` is field b of the object a."""
    if name in row:
        return True, row[name]
    first, *parts = name.split(".")
    if not parts or first not in row:
        return False, None
    value = row[first]
    for part in parts:
        if isinstance(value, dict) and part not in value:
            return False, None
        value = value[part] if isinstance(value, dict) else None
    return True, value


def _is_no_number(value) -> bool:
    """NaN or infinite, as a number or as its text."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, str) and bool(_NOT_A_NUMBER.fullmatch(value.strip()))


def _prompt(value) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        messages = [
            (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
            for m in value
        ]
        silent, (*before, last) = ("system", ""), messages
        before = [silent if m in (silent, ("system", None)) else m for m in before]
        spoken = [*(m for m in before if m is not silent), last]
        of_text = all(isinstance(part, str) and part for m in spoken for part in m)
        if of_text and last[0] != "assistant":
            return (*before, last)
    raise UserError(f"the prompt is {_shown(value)}; {_NEEDED['prompt']}")


def _answer(value) -> str:
    """The text of an answer; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"the answer is {_shown(value)}; {_NEEDED['answer']}")


def _shown(value) -> str:
    return "missing" if value is None else f"{value!r:.60}"
