# SPDX-License-Identifier: Apache-2.0
"""Return of freed memory to the system."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

_GROWTH = 1.05


class Heap:
    """Gives the C library's free memory back to the system when it holds more than steps need.

    Responses differ in length, so each step allocates tensors of other sizes, between weights that
    stay. The holes that are left fit the next step badly, and the heap grows by hundreds of kB a
    step though no more of it is in use. glibc itself returns only free memory at the heap's end.

    Pages that were given back cost the next step a fault each, a sixth of a small model's step. So
    they are kept while the process holds at most `_GROWTH` times what it held at the end of the
    step after the last return: that step's own need, without old holes. Other C libraries have no
    such call, and nothing is done there.
    """

    def __init__(self):
        self._needed: int | None = None

    def give_back(self) -> None:
        """Return free memory if the process has grown; called at the end of every step."""
        if (trim := _malloc_trim()) is None:
            return
        held = _resident_bytes()
        if self._needed is None:
            self._needed = held
        elif held > _GROWTH * self._needed:
            trim(0)
            self._needed = None


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
