"""Memory that the process freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache

EVERY = 10  # steps: what a step frees and does not use again is some hundred kB


def give_back(step: int) -> None:
    """Every `EVERY` steps, return to the system what lies free in the C library's heap.

    Each step allocates tensors of other sizes, as responses have other lengths, between weights
    that stay: the holes that are left fit the next step badly, and the heap grows by hundreds of kB
    a step though no more of it is in use (`benchmarks/growth.py`). glibc returns of its own accord
    only what lies free at the heap's end. Other C libraries have no such call, and none is made.
    """
    if step % EVERY == 0 and (trim := _malloc_trim()):
        trim(0)


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
