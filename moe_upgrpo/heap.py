# SPDX-License-Identifier: Apache-2.0
"""Return of freed memory to the system."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

_GROWTH = 1.05


def give_back() -> None:
    """Return free memory of the C library's heap to the system; takes milliseconds.

    Pages that were given back cost who allocates next a fault each: a sixth of a small model's step
    if it is done every step. Other C libraries have no such call, and nothing is done there.
    """
    if trim := _malloc_trim():
        trim(0)


class Heap:
    """Gives free memory back when a process holds more of it than its steps need.

    Responses differ in length, so each step allocates tensors of other sizes, between weights that
    stay. The holes that are left fit the next step badly, and the heap grows by hundreds of kB a
    step though no more of it is in use. glibc itself returns only free memory at the heap's end.
    The memory is kept while the process holds at most `_GROWTH` times what it held at the end of
    the step after the last return: that step's own need, without old holes.
    """

    def __init__(self):
        self._needed: int | None = None

    def end_step(self) -> None:
        """Give free memory back if the process has grown; called at the end of every step."""
        if _malloc_trim() is None:
            return
        held = _resident_bytes()
        if self._needed is None:
            self._needed = held
        elif held > _GROWTH * self._needed:
            give_back()
            self._needed = None


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
