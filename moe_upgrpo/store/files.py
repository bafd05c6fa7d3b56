# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, even after a power cut: written aside, synced, renamed.

Also reads JSON that anybody may have written or damaged.
"""

import json
import os
import uuid
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError

# Digits of a number in JSON that numpy, torch and a float can take. Python's own limit is 4,300.
_DIGITS = 20


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, path: Path) -> None:
    """Give a finished file, or a folder whose files are synced, its name, on disk on return."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def write_text(file: Path, text: str) -> None:
    """Write a file whole; of several processes writing it at once, on any machine, one wins."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    part.write_text(text, encoding="utf-8")
    publish(part, file)


def new_folder(kind: str) -> Path:
    """The folder runs/KIND-DATE-TIME, under a name that is still free; it is not created."""
    started = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    names = (started + f"-{n}" * (n > 1) for n in count(1))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def parse_json(written: bytes, where: str) -> Any:
    """Read JSON. Raises UserError, one line that begins with `where`, for anything else."""
    try:
        return json.loads(written.decode("utf-8"), parse_int=_integer)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{where} is not JSON ({reason}): {shown(written)}")


def shown(written: bytes) -> str:
    """The beginning of a file's content, in a form that a message can show."""
    return repr(written[:80].decode("utf-8", errors="backslashreplace"))[:120]


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
