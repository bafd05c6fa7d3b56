# SPDX-License-Identifier: Apache-2.0
"""A temporary folder for weights; those of processes that were killed do not pile up."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from moe_upgrpo.hugging_face.export import by_umask


class WeightsFolder:
    """A new folder in `parent` (None: the system's temporary one); `name` is its path.

    In a `parent` that was named for it, a server of another user may read it, where the umask lets
    others read; in the system's temporary folder nobody else may.

    It is removed by `cleanup`, with this object or with the interpreter. One whose process was
    killed is removed when the next one with this prefix is made in `parent`: the system frees a
    process's lock however it ends. A file system without locks for folders (NFS) keeps it.
    """

    def __init__(self, prefix: str, parent: str | Path | None = None):
        shared = parent is not None
        parent = Path(parent or tempfile.gettempdir()).absolute()
        _remove_abandoned(parent, prefix)
        # Under its name only once it is locked, else another would take it for abandoned.
        unlocked = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        lock = os.open(unlocked, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if shared:
            by_umask(unlocked)
        self.name = str(unlocked.rename(parent / unlocked.name[1:]))
        self.cleanup = weakref.finalize(self, _remove, self.name, lock)


def _remove(name: str, lock: int) -> None:
    shutil.rmtree(name, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # not ours, no folder, or locked: in use
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
