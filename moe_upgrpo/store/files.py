"""Files that are whole or not there, also after a power cut: written aside, synced, renamed."""

import os
import uuid
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, path: Path) -> None:
    """Give a finished file, or a folder whose files are synced, its name; on disk on return."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def write_text(file: Path, text: str) -> None:
    """Of several processes that write the same file at once, on any machine, one wins."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    part.write_text(text, encoding="utf-8")
    publish(part, file)
