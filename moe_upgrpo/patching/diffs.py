# SPDX-License-Identifier: Apache-2.0
"""Apply unified diffs without fuzz: every line is where the diff says, or nothing is applied."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_upgrpo.errors import UserError

HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
NO_NEWLINE = b"\\ No newline at end of file"


@dataclass(frozen=True, slots=True)
class Hunk:
    """Lines with their ends; those of `old` are at index `start`, counted from 0."""

    start: int
    old: list[bytes]
    new: list[bytes]


def parse(diff: bytes, name: str) -> dict[str, list[Hunk]]:
    """The hunks of each file, by its path without the leading a/ or b/.

    Text before the first file is the diff's message. A file that the diff creates has one hunk
    without old lines. Raises UserError for anything else.
    """
    files: dict[str, list[Hunk]] = {}
    lines = _lines(diff)
    index, hunks = 0, None
    while index < len(lines):
        line = lines[index]
        index += 1
        if line.startswith(b"--- ") and lines[index].startswith(b"+++ "):
            path = lines[index].split()[1].decode()
            index += 1
            if not path.startswith("b/") or not is_inside(path[2:]):
                raise UserError(f"{name}: {path!r} is not a path below b/.")
            hunks = files.setdefault(path[2:], [])
        elif (match := HUNK.match(line)) and hunks is not None:
            start, counts = int(match[1]), [int(match[2] or 1), int(match[4] or 1)]
            sides: list[list[bytes]] = [[], []]
            last = sides  # those that got the last line
            while index < len(lines) and (
                [len(side) for side in sides] != counts or lines[index].startswith(NO_NEWLINE)
            ):
                sign, text = lines[index][:1], lines[index][1:]
                index += 1
                if sign == b"\\":
                    for side in last:
                        side[-1] = side[-1].removesuffix(b"\n")
                    continue
                last = {b" ": sides, b"-": sides[:1], b"+": sides[1:]}.get(sign)
                if last is None:
                    raise UserError(f"{name}: line {index} is not of a unified diff.")
                for side in last:
                    side.append(text)
            if [len(side) for side in sides] != counts:
                raise UserError(f"{name}: the hunk {line.decode().strip()!r} is not complete.")
            hunks.append(Hunk(start - (counts[0] > 0), *sides))
    if not any(files.values()):
        raise UserError(f"{name}: no change found in it.")
    return files


def is_inside(path: str) -> bool:
    """Whether a path leads to a file below the folder that it is joined to, whatever that contains.

    Links in the folder are not considered: `Checkout` looks for those.
    """
    return path.isprintable() and all(part not in ("", ".", "..") for part in path.split("/"))


def _lines(content: bytes) -> list[bytes]:
    """Lines with their ends. Not splitlines: a carriage return belongs to its line."""
    return [line for line in re.split(rb"(?<=\n)", content) if line]


def apply(content: bytes, hunks: list[Hunk]) -> bytes:
    """The content with the hunks' old lines replaced by their new ones. Raises ValueError where it
    has other lines there."""
    lines, shift = _lines(content), 0
    for hunk in hunks:
        start = hunk.start + shift
        end = start + len(hunk.old)
        if lines[start:end] != hunk.old:
            raise ValueError(f"lines {hunk.start + 1} and those after it are others")
        lines[start:end] = hunk.new
        shift += len(hunk.new) - len(hunk.old)
    return b"".join(lines)


def reversed_hunks(hunks: list[Hunk]) -> list[Hunk]:
    """The hunks that undo `hunks`."""
    found, shift = [], 0
    for hunk in hunks:
        found.append(Hunk(hunk.start + shift, hunk.new, hunk.old))
        shift += len(hunk.new) - len(hunk.old)
    return found
