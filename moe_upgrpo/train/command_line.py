# SPDX-License-Identifier: Apache-2.0
"""Options read by tyro, with a one-line message for a mistake instead of tyro's box."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from typing import Any

import tyro

from moe_upgrpo.errors import UserError

# Configs and parts of them have names that nobody types, and some messages begin with the part.
_OURS = re.compile(r"^Error parsing (?:\w+\.)*(?:\w+Config: |(\w+): (?=\1\.))?")
_UNKNOWN = "Unrecognized options: "


def parsed(what: Any, words: list[str], prog: str, *, speaks: bool = True) -> Any:
    """`tyro.cli` of a dataclass or a function. `--help` prints and leaves by SystemExit.

    speaks: whether this process prints the help, one of a job's ranks.

    Raises UserError that says in one line what is wrong and what is allowed.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(what, args=words, prog=prog, console_outputs=speaks)
    except UserError as error:  # raised by a part without a prefix, and let through by tyro
        wrong = str(error).removesuffix(".")
    except SystemExit as end:
        if not end.code:
            raise
        wrong = _condensed(said.getvalue())
        if wrong.startswith(_UNKNOWN):
            wrong = wrong.partition(". Perhaps you meant")[0] + _near(wrong, what, prog)
    raise UserError(f"{wrong}. All options: {prog} --help")


def _near(wrong: str, what: Any, prog: str) -> str:
    """The options whose names are nearest to the first unknown one.

    tyro's own list has every option of a group with its help, and none for a part's name.
    """
    given = wrong.removeprefix(_UNKNOWN).split(", ")[0].partition("=")[0]
    if not given.startswith("--"):
        return ""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        tyro.cli(what, args=["--help"], prog=prog)
    names = list(dict.fromkeys(re.findall(r"--[a-z][\w.-]*", shown.getvalue())))
    group, _, last = given.replace("_", "-").rpartition(".")
    of_group = [name for name in names if name.startswith((f"{given}.", f"{group or given}."))]
    same = [name for name in names if name.lstrip("-").rpartition(".")[2] == last.lstrip("-")]
    near = get_close_matches(given, of_group, n=3) or of_group
    near = near or same or get_close_matches(given, names, n=3, cutoff=0.75)
    return f". Near it: {', '.join(near)}" if near else ""


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
