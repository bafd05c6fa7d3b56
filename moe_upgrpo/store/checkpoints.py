# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that a run is resumed from, each a folder that is whole or absent.

A checkpoint is written into a folder whose name begins with a dot, gets a manifest of its files,
and becomes whole by one rename. This module does not know who writes what into it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import parse_json, publish, sync, write_text

VERSION = 1
_MANIFEST = "manifest.json"
_THREADS = 4  # files that are read, or synced, at once
# Half-written or half-removed: a state, or the export of a step's weights beside it.
_UNFINISHED = re.compile(r"\.state-\d{6,}|\.step-\d{6,}\.part")


@dataclass(frozen=True)
class Checkpoints:
    """The folders ``state-000020`` in a run's ``checkpoints``; one process begins and commits."""

    folder: Path

    def begin(self, step: int) -> Path:
        """An empty folder for the state after ``step``; earlier unfinished ones are removed."""
        self.remove_unfinished()
        part = self.folder / f".{self._of(step).name}"
        part.mkdir(parents=True)
        return part

    def commit(self, part: Path, step: int, files: dict[str, Any], about: dict[str, Any]) -> Path:
        """Make the checkpoint whole: its manifest with ``files`` from `describe`, then its name."""
        manifest = {"version": VERSION, "step": step} | about | {"files": files}
        write_text(part / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for folder in part.rglob("*/"):
            sync(folder)
        publish(part, self._of(step))
        return self._of(step)

    def prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest, each renamed first: what has the name stays whole."""
        for path in self.all()[:-keep]:
            _remove(path.rename(path.with_name(f".{path.name}")))

    def remove_unfinished(self) -> None:
        """Remove what a killed job left of half-written or half-removed checkpoints.

        Nothing else is removed: a user's own hidden folder stays.
        """
        for path in self.folder.glob(".*/"):
            if _UNFINISHED.fullmatch(path.name):
                _remove(path)

    def all(self) -> list[Path]:
        """The whole checkpoints, the oldest first; folders with similar names are left out."""
        found = {step_of(path): path for path in self.folder.glob("state-*/")}
        return [path for step, path in sorted((s, p) for s, p in found.items() if s is not None)]

    def _of(self, step: int) -> Path:
        return self.folder / f"state-{step:06d}"


def _remove(path: Path) -> None:
    """Remove a folder, or the link to it where its owner keeps it elsewhere."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for any other name."""
    digits = path.name.removeprefix("state-")
    if not re.fullmatch(r"[0-9]{6,}", digits) or path.name != f"state-{int(digits):06d}":
        return None
    return int(digits)


def names(part: Path) -> list[str]:
    """The files in a checkpoint's folder except the manifest, relative to the folder."""
    found = (str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
    return sorted(name for name in found if name != _MANIFEST)


def describe(
    part: Path, files: Iterable[str], written: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Name -> size and SHA-256 of files in ``part``, each synced to disk.

    written: more files, described as they were written: those are synced alone. Files are synced
    and read at the same time, to use disk and processor at once.
    """
    files, written = list(files), written or {}
    with ThreadPoolExecutor(_THREADS) as threads:
        synced = [threads.submit(sync, part / name) for name in [*written, *files]]
        described = list(threads.map(lambda name: _described(part / name), files))
        for each in synced:
            each.result()
    return dict(written) | dict(zip(files, described, strict=True))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        UserError: there is none, it is not JSON, it is of a newer version than this one reads, or
            its step is not the one in the folder's name.
    """
    unreadable = UserError(f"{path} has no readable {_MANIFEST}: {_damaged(path)}")
    try:
        manifest = parse_json((path / _MANIFEST).read_bytes(), _MANIFEST)
    except (OSError, UserError):
        raise unreadable from None
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise unreadable
    if (version := manifest["version"]) != VERSION:
        raise UserError(
            f"{path} is a checkpoint of version {version}, written by a newer moe_upgrpo; this one "
            f"reads version {VERSION}. Resume with the moe_upgrpo that wrote it "
            f"({manifest.get('moe_upgrpo')}), or delete the folder to resume from an older "
            "checkpoint."
        )
    step, files = manifest.get("step"), manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("model"), dict):
        raise unreadable
    if not all(_is_ours(name, about) for name, about in files.items()):
        raise unreadable
    if type(step) is not int or step != step_of(path):
        raise UserError(
            f"{path} holds the state after step {step}, as its {_MANIFEST} says: another folder "
            "took its name. Give it the name of its step, or move it elsewhere."
        )
    return manifest


def _is_ours(name: str, about: Any) -> bool:
    """Whether a manifest's entry is a file in the checkpoint's folder, with size and checksum."""
    inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    return inside and isinstance(about, dict) and {*about} == {"bytes", "sha256"}


def faults(path: Path, expected: dict[str, Any]) -> list[str]:
    """Name what is wrong with a checkpoint's files ``expected`` (a part of its manifest's)."""
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: _fault(path / name, expected[name]), expected)
        return [f"{fault}: {_damaged(path)}" for fault in found if fault]


def _fault(file: Path, about: dict[str, Any]) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != about["bytes"]:
        return f"{file} has {file.stat().st_size} bytes, {about['bytes']} were written"
    if _described(file) != about:
        return f"{file} holds other bytes than were written"
    return None


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _damaged(path: Path) -> str:
    return (
        f"the checkpoint is damaged. Delete {path} to resume from the checkpoint before it, or "
        "from the start where there is none."
    )
