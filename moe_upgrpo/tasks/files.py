"""Questions with answers from local files, JSONL or Parquet, one problem a row."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moe_upgrpo.errors import UserError

# Where no field is named, the first of these that a file's first row has. `a.b` is field b of the
# object a: verl's files have the answer in reward_model.ground_truth, slime's in label.
PROMPT_FIELDS = ("prompt", "question", "problem")
ANSWER_FIELDS = ("answer", "reward_model.ground_truth", "ground_truth", "label", "solution")
SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_SHOWN = 5  # unusable rows in one error

Message = tuple[str, str]  # role, content


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A question as text or as the messages of a chat, its answer, and where it was read."""

    prompt: str | tuple[Message, ...]
    answer: str
    where: str


@dataclass(kw_only=True)
class DataFile:
    """The problems of a file, and what was left out of it."""

    rows: list[Row]
    prompt_field: str
    answer_field: str
    repeated: int = 0
    """Rows that say again what another says; each problem is used once."""
    unanswered: list[str] = field(default_factory=list)
    """Where the answer is empty."""
    contradicted: list[str] = field(default_factory=list)
    """Where a question's answer differs from the first one given; the question is left out."""

    def describe(self) -> str:
        """One line for the screen."""
        fields = f"prompt from {self.prompt_field!r}, answer from {self.answer_field!r}"
        parts = [f"{len(self.rows)} problems ({fields})"]
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
    file: Path, *, prompt_field: str | None = None, answer_field: str | None = None
) -> DataFile:
    """The problems of a .jsonl (.ndjson) or .parquet file in its order.

    A prompt is a text or a list of chat messages `{role, content}` of which the last is not the
    assistant's; an answer is a text or a number. Repeated rows, rows without an answer and
    questions with several answers are left out and counted: the published DAPO-Math-17k has each
    problem a hundred times.

    Raises:
        UserError: the file cannot be read, no field holds prompts or answers, rows that are broken
            (file, line or row, and what is missing; the first five), or no problem at all.
    """
    prompts = (prompt_field,) if prompt_field else PROMPT_FIELDS
    answers = (answer_field,) if answer_field else ANSWER_FIELDS
    data, broken = None, []
    by_prompt: dict[str | tuple[Message, ...], Row | None] = {}
    for where, row in _rows(file, prompts, answers):
        try:
            if isinstance(row, UserError):
                raise row
            if data is None:
                data = DataFile(
                    rows=[],
                    prompt_field=_field(row, prompts, "prompt"),
                    answer_field=_field(row, answers, "answer"),
                )
            prompt = _prompt(_value(row, data.prompt_field))
            answer = _answer(_value(row, data.answer_field))
        except UserError as error:
            broken.append(f"{where}: {error}")
            continue
        if not answer:
            data.unanswered.append(where)
        elif prompt not in by_prompt:
            by_prompt[prompt] = Row(prompt=prompt, answer=answer, where=f"{file}, {where}")
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
        raise UserError(f"{file} has no problems{f': {data.describe()}' if data else ''}.")
    data.rows = rows
    return data


def _rows(
    file: Path, prompts: tuple[str, ...], answers: tuple[str, ...]
) -> Iterator[tuple[str, dict | UserError]]:
    """Where each row stands and the row, or what is wrong with it."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: data files end with {', '.join(SUFFIXES)}.")
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file, prompts, answers)
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
            except (ValueError, RecursionError) as error:  # thousands of digits or brackets
                row = UserError(f"not JSON that can be read ({error}).")
            yield f"line {number}", row


def _parquet_rows(
    file: Path, prompts: tuple[str, ...], answers: tuple[str, ...]
) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        known = parquet.schema_arrow.names
        kinds = [
            {c for c in known for name in names if c in (name, name.split(".")[0])}
            for names in (prompts, answers)
        ]
        # Where a kind has no column all are read, for the error to name them.
        columns = sorted(set.union(*kinds)) if all(kinds) else None
        number = 0
        for batch in parquet.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{file} is truncated or not a Parquet file: {error}") from None


def _field(row: dict, names: tuple[str, ...], kind: str) -> str:
    for name in names:
        if _value(row, name) is not None:
            return name
    raise UserError(
        f"no {kind}: a field {' or '.join(map(repr, names))} is needed, it has "
        f"{', '.join(map(repr, row)) or 'none'} (--{kind}-field names another)."
    )


def _value(row: dict, name: str):
    """The value of a field; `a.b` is field b of the object a. None where it is not there."""
    if name in row:
        return row[name]
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _prompt(value) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        messages = [
            (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
            for m in value
        ]
        of_text = all(isinstance(part, str) and part for m in messages for part in m)
        if of_text and messages[-1][0] != "assistant":
            return tuple(messages)
    raise UserError(
        f"the prompt is {_shown(value)}; a text is needed, or a list of chat messages with role "
        "and content, the last one not the assistant's."
    )


def _answer(value) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"the answer is {_shown(value)}; a text or a number is needed.")


def _shown(value) -> str:
    return "missing" if value is None else f"{value!r:.60}"
