"""Problems of your own files as two Parquet files that a comparison trains and evaluates on.

    python examples/prepare_data.py --train dapo-math-17k.parquet --heldout aime-2024.jsonl \
        --problems 30 --output-dir data

Writes train.parquet and heldout.parquet, each with `prompt` and `answer`, and says what was left
out: repeated rows, rows without an answer, and training problems that are held-out ones too. Where
all training problems stand in the same words (DAPO's begin with "Solve the following math problem
step by step."), held-out problems without them are put into these words: a model that is trained on
one form of prompt is not to be judged on another. Any file that docs/data.md says can be read.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from moe_upgrpo.errors import UserError
from moe_upgrpo.tasks.files import Row, read_problems


@dataclass(kw_only=True)
class Arguments:
    """Problems of your own files as two Parquet files for training and evaluation."""

    train: tuple[Path, ...]
    """Files of training problems, .jsonl or .parquet."""
    heldout: tuple[Path, ...]
    """Files of held-out problems."""
    problems: int | None = None
    """How many held-out problems there must be: 30 for AIME 2024."""
    prompt_field: str | None = None
    """Name of the field in held-out files, where it is none of the known ones."""
    answer_field: str | None = None
    output_dir: Path = Path("data")


def frame(texts: Sequence[str]) -> tuple[str, str]:
    """The words before and after every problem: whole lines that all texts begin and end with."""
    before, after = beginning(texts), beginning([text[::-1] for text in texts])[::-1]
    before = before[: before.rfind("\n") + 1]
    after = after[after.find("\n") :] if "\n" in after else ""
    whole = any(len(text) <= len(before) + len(after) for text in texts)
    return ("", "") if whole else (before, after)


def beginning(texts: Sequence[str]) -> str:
    """The beginning shared by all: that of the first and the last in alphabetical order."""
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def bare(text: str, before: str, after: str) -> str:
    """The problem without its frame, in single spaces, to see whether two are the same."""
    if text.startswith(before) and text.endswith(after):
        text = text[len(before) : len(text) - len(after)]
    return " ".join(text.split())


def read(files: Sequence[Path], **fields: str | None) -> list[Row]:
    rows: dict[str, Row] = {}
    for file in files:
        found = read_problems(file, **fields)
        print(f"{file}: {found.describe()}")
        for row in found.rows:
            if not isinstance(row.prompt, str) and len(row.prompt) > 1:
                raise UserError(
                    f"{row.where}: a chat of {len(row.prompt)} messages; the file can be trained "
                    "on as it is (--data), but not brought into one form with another."
                )
            rows.setdefault(text_of(row), row)
    return list(rows.values())


def text_of(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[0][1]


def write(file: Path, texts: Sequence[str], rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"prompt": list(texts), "answer": [row.answer for row in rows]})
    pq.write_table(table, file, compression="zstd")
    print(f"{file}: {len(rows)} problems")


def main(arguments: Arguments) -> None:
    train = read(arguments.train)
    heldout = read(
        arguments.heldout,
        prompt_field=arguments.prompt_field,
        answer_field=arguments.answer_field,
    )
    if arguments.problems not in (None, len(heldout)):
        raise UserError(
            f"{len(heldout)} held-out problems; {arguments.problems} were asked for (--problems): "
            "is the file whole, and of one year alone?"
        )
    before, after = frame([text_of(row) for row in train])
    if before or after:
        print(f"all training problems stand between {before!r} and {after!r}")
    texts = []
    for row in heldout:
        text = text_of(row)
        framed = text.startswith(before) and text.endswith(after)
        texts.append(text if framed else before + text.strip() + after)
    unseen = {bare(text, before, after) for text in texts}
    kept = [row for row in train if bare(text_of(row), before, after) not in unseen]
    if len(kept) < len(train):
        print(f"{len(train) - len(kept)} training problems are held-out ones: left out")
    if not kept:
        raise UserError("every training problem is a held-out one: nothing is left to train on.")
    write(arguments.output_dir / "train.parquet", [text_of(row) for row in kept], kept)
    write(arguments.output_dir / "heldout.parquet", texts, heldout)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack signs that problems use
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
