"""examples/train_moe.sh in which one rank ends by SIGKILL as it enters a function that is named.

    torchrun --nproc-per-node 2 tests/train/killed.py MODULE:FUNCTION NTH RANK [options of training]

It is killed at the NTH call of its own. A function that is imported by name elsewhere has to be
named where it is used. Forked ranks call `kill_at` before the command (tests/ranks.py).
"""

import functools
import importlib
import os
import signal
import sys
import threading
from pathlib import Path


def kill_at(place: str, nth: int, rank: int, by: int = signal.SIGKILL) -> None:
    """Send this rank a signal as it enters the function for the nth time."""
    if os.environ["RANK"] != str(rank):
        return
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def counted(*args, **keywords):
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), by)
        return original(*args, **keywords)

    setattr(owner, name, counted)


def kill_at_call(nth: int, rank: int, count: str | None = None) -> None:
    """Kill this rank at its nth call of any of the package's functions, or count them all.

    count: a file that gets the number of calls so far, a thousand at a time; nothing is killed.
    """
    if os.environ["RANK"] != str(rank):
        return
    calls = 0

    def seen(frame, event: str, argument: object) -> None:
        nonlocal calls
        if event != "call" or "/moe_upgrpo/" not in frame.f_code.co_filename:
            return
        calls += 1
        if count is None and calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        if count is not None and calls % 1000 == 0:
            Path(count).write_text(str(calls))

    threading.setprofile(seen)  # of the threads that write
    sys.setprofile(seen)


if __name__ == "__main__":
    place, nth, rank, *options = sys.argv[1:]
    sys.argv[1:] = options
    kill_at(place, int(nth), int(rank))
    from moe_upgrpo.cli import main

    main(["train"])
