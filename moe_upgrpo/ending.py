# SPDX-License-Identifier: Apache-2.0
"""End a process with one message, the last thing on the screen, and a status by kind.

A rank started by our launcher (`moe_upgrpo.launch`) leaves its message in the launcher's folder,
which prints one once every rank is gone. Under plain torchrun the first rank of a machine to fail
prints it, and torchrun repeats it as the root cause in its own report. Otherwise it is just
printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

LAUNCHER = "MOE_UPGRPO_LAUNCHER"  # the launcher's folder
_PARENT = os.getppid()  # of a rank: the launcher
_FAILED, _RUN, _SIGNAL = "moe_upgrpo_failed", "run", "signal"
_run: Path | None = None
_before: list[Callable[[], None]] = []


def rank() -> int:
    """The number of this process among those of its job."""
    return int(os.environ.get("RANK", 0))


def launcher_is_gone() -> bool:
    """Whether this rank's launcher was killed before it."""
    return LAUNCHER in os.environ and os.getppid() != _PARENT


def remember(run: Path) -> None:
    """Remember this process's run, for a last message that names it."""
    global _run
    _run = run
    if (folder := os.environ.get(LAUNCHER)) and rank() == 0:
        Path(folder, _RUN).write_text(str(run), encoding="utf-8")


def how_to_resume(folder: Path | None = None, *, state: bool = True) -> str:
    """Say what to do next with this process's run, or with that of a launcher's folder.

    state: whether the run keeps states; without one it can only begin again.
    """
    run = _run
    if folder is not None and (folder / _RUN).exists():
        run = Path((folder / _RUN).read_text(encoding="utf-8"))
    if run is None:
        return "No run folder was made yet: start again."
    if state:
        return f"What was logged in {run} is complete; to go on: --resume {run}"
    return (
        f"What was logged in {run} is complete; to delete it and begin again: --resume {run} "
        "--restart"
    )


@contextlib.contextmanager
def doing_before(do: Callable[[], None]) -> Iterator[None]:
    """Inside this context, `fail` calls `do` first, in any thread. `do` must return in seconds."""
    _before.append(do)
    try:
        yield
    finally:
        _before.remove(do)


def leave_signal(name: str) -> None:
    """Tell the ranks which signal their launcher got; they get SIGTERM, whatever it was."""
    Path(os.environ[LAUNCHER], _SIGNAL).write_text(name, encoding="utf-8")


def signal_name(received: str) -> str:
    """Name the signal that somebody sent, from the one that this process received."""
    if (folder := os.environ.get(LAUNCHER)) and Path(folder, _SIGNAL).exists():
        return Path(folder, _SIGNAL).read_text(encoding="utf-8")
    return received


def failed_already() -> bool:
    """Whether a rank of this machine has ended with a message."""
    mark = _mark()
    return mark is not None and mark.exists()


def fail(message: str, status: int = 2, *, details: str = "", lost: bool = False) -> NoReturn:
    """End this process at once, from any thread.

    details: printed above the message, such as a traceback. lost: whether another rank's end is the
    cause; that rank's message then says more.
    """
    launcher, error_file = os.environ.get(LAUNCHER), os.environ.get("TORCHELASTIC_ERROR_FILE")
    first = _leave_mark()
    if details and first:
        print(details.rstrip(), file=sys.stderr, flush=True)
    try:
        _write(message, status, lost, launcher, error_file)
        printed_by_launcher = bool(launcher) and not launcher_is_gone()
    except OSError:  # on a full disk, only what is printed here remains
        printed_by_launcher = False
    if first and not printed_by_launcher:
        print(f"error: {message}", file=sys.stderr, flush=True)
    for do in list(_before):  # after the message, which another rank or the launcher waits for
        with contextlib.suppress(Exception):
            do()
    # Without the interpreter's shutdown, where process groups would wait for the other ranks.
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stdout.flush()
    os._exit(status)


def _write(
    message: str, status: int, lost: bool, launcher: str | None, error_file: str | None
) -> None:
    """Leave the message where the launcher, or torchrun, looks for it."""
    if launcher:
        told = {"message": message, "status": status, "lost": lost, "time": time.time()}
        part = Path(launcher, f".rank-{rank()}")
        part.write_text(json.dumps(told | {"rank": rank()}), encoding="utf-8")
        part.rename(part.with_name(f"rank-{rank()}.json"))
    elif error_file:
        about = {"py_callstack": message, "timestamp": str(int(time.time())), "status": status}
        told = {"message": {"message": message, "extraInfo": about}}
        Path(error_file).parent.mkdir(parents=True, exist_ok=True)
        Path(error_file).write_text(json.dumps(told), encoding="utf-8")


def _mark() -> Path | None:
    """The file by which the ranks of a machine agree who was the first to fail.

    torchrun gives each attempt a folder of its own.
    """
    if launcher := os.environ.get(LAUNCHER):
        return Path(launcher, _FAILED)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return Path(error_file).parent.parent / _FAILED
    return None


def _leave_mark() -> bool:
    """Claim to be the first rank that failed; return whether this rank was."""
    mark = _mark()
    if mark is None:
        return True
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # a full disk: better said twice than never
    return True
