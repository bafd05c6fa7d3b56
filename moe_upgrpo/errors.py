# SPDX-License-Identifier: Apache-2.0
"""Errors by their kind, each with the exit status of the command that it ends.

0 is success; 2 wrong use or refused input, 3 the numbers of the run failed, 4 the machine did: its
disk, memory or files, a lost rank or host, a server that does not run. 1 is a fault of ours.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names nearest to the given one."""
    near = get_close_matches(str(given), list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and how to fix it.

    A command prints it as its last lines, without a traceback, and every rank ends with `status`.
    """

    status = 2
    lost = False
    """Whether another rank's end is the cause, whose own message says more."""


class NumericalFailure(UserError):
    """A loss, log-prob or gradient of a run that is not finite."""

    status = 3


class MachineFault(UserError):
    """The machine's fault: the same command may succeed on another day or machine."""

    status = 4


class PeerLost(MachineFault):
    """Another rank ended, was stopped or was cut off."""

    lost = True


class Stopped(UserError):
    """Somebody asked for the end, by a signal; what was done until then is kept."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number

    def __reduce__(self):
        return Stopped, (str(self), self.status - 128)


INTERRUPTED = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


_DISK = "no space is left on the disk"
_FILES = "too many files are open (ulimit -n allows no more)"
_MEMORY = "out of memory"
_STORAGE = "the storage failed"
_PROCESSES = "no more processes or threads can be started"
_KILLED = "a process of ours was killed"
LOST_RANK = "lost another rank or host"
_BY_NUMBER = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EFBIG: _DISK,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EIO: _STORAGE,
    errno.ESTALE: _STORAGE,
}
# Libraries in C++ and Rust give the system's words but not its error number.
_BY_WORDS = (
    {os.strerror(number): what for number, what in _BY_NUMBER.items()}
    | dict.fromkeys(("StorageFull", "PytorchStreamWriter failed writing"), _DISK)
    | dict.fromkeys(
        ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
         "_STATUS_ALLOC_FAILED"), _MEMORY)
    | {"can't start new thread": _PROCESSES, "uncorrectable ECC": "the GPU failed"}
)  # fmt: skip
# Errors of gloo, NCCL and torch's store, whatever else they say. A failed check of sizes ("enforce
# fail") is not a lost rank: the ranks are there and disagree.
_TRANSPORT = re.compile(
    r"gloo[/ ]|nccl|ProcessGroup|c10d|TCPStore|Connection (closed|reset) by peer|Broken pipe", re.I
)
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def status_of(error: BaseException) -> int:
    """The exit status of a command that `error` ends."""
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, UserError) and error.status != UserError.status:
        return error.status
    if machine_fault(error):
        return MachineFault.status
    return UserError.status if isinstance(error, UserError) else 1


def machine_fault(error: BaseException) -> str | None:
    """Describe the machine's fault behind `error`; None where the machine is not to blame.

    A UserError counts where an error of the system caused it: a file that cannot be read because
    too many are open is not a wrong file.
    """
    if isinstance(error, UserError):
        # Only by error number: a damaged file may ask for any amount of memory.
        causes = (one for one in _causes(error) if isinstance(one, OSError))
        return next((_BY_NUMBER[one.errno] for one in causes if one.errno in _BY_NUMBER), None)
    for one in (error, *_causes(error)):
        if not isinstance(one, UserError) and (what := _told(one)):
            return what
    return None


def as_user_error(error: Exception) -> UserError:
    """Turn `error` into one of its kind that can be sent to other ranks."""
    if isinstance(error, UserError) and error.status == status_of(error):
        return error
    kind = MachineFault if status_of(error) == MachineFault.status else UserError
    return kind(str(error) if isinstance(error, UserError) else repr(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors behind `error`, including those that `from None` hides from a traceback."""
    seen = {id(error)}
    while error := error.__cause__ or error.__context__:
        if id(error) in seen:
            return
        seen.add(id(error))
        yield error


def _told(error: BaseException) -> str | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:  # torch's
        return _MEMORY
    if "BrokenExecutor" in names:  # of concurrent.futures: its workers died without a message
        return _KILLED
    if isinstance(error, BlockingIOError):  # from a fork; a busy lock is reported where it is taken
        return _PROCESSES
    if isinstance(error, OSError) and _is_of_network(error):
        return LOST_RANK
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_NUMBER.get(error.errno)
    said = str(error)
    if found := next((what for words, what in _BY_WORDS.items() if words in said), None):
        return found
    return (
        LOST_RANK if isinstance(error, RuntimeError) and _is_of_ranks(error, names, said) else None
    )


def _is_of_network(error: OSError) -> bool:
    lost = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
    if isinstance(error, BrokenPipeError):  # of `| head`
        return False
    return isinstance(error, ConnectionError | TimeoutError) or error.errno in lost


def _is_of_ranks(error: RuntimeError, names: set[str], said: str) -> bool:
    if "enforce fail" in said:
        return False
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"} or _TRANSPORT.search(
        said
    ):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith(_COLLECTIVES)
