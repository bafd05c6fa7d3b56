"""Options as tyro reads them, with one line for a mistake in the place of its box."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import tyro

from moe_upgrpo.errors import UserError

# The part of a config has a name that nobody types.
_OURS = re.compile(r"^Error parsing (\w+\.)?((TrainConfig|PlanConfig|ProbeConfig|tiny): )?")


def parsed(what: Any, words: list[str], prog: str, *, speaks: bool = True) -> Any:
    """`tyro.cli` of a dataclass or a function. `--help` prints and leaves by SystemExit.

    speaks: whether this process prints the help, one of a job's ranks.

    Raises UserError that says in one line what is wrong and what is allowed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(what, args=words, prog=prog, console_outputs=speaks)
    except UserError as error:  # of a part without a prefix, which tyro lets through
        wrong = str(error).removesuffix(".")
    except SystemExit as end:
        if not end.code:
            raise
        wrong = _condensed(said.getvalue())
    raise UserError(f"{wrong}. All options: {prog} --help")


def _condensed(box: str) -> str:
    parts: list[list[str]] = [[]]
    for drawn in box.splitlines():
        line = drawn.strip("│╭╮╰╯─ ")
        if not line and "──" in drawn:
            parts.append([])
        elif line and not drawn.startswith("╭"):
            parts[-1].append(line)
    texts = [" ".join(part) for part in parts if part]
    texts = [text for text in texts if not text.startswith("For full helptext")]
    said = ". ".join(text.removesuffix(".") for text in texts)
    return _OURS.sub("", said).replace(". Argument helptext: ", "; ")
