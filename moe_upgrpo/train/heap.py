# SPDX-License-Identifier: Apache-2.0
"""Return of freed memory to the system."""

from __future__ import annotations

import ctypes
from functools import cache


def give_back() -> None:
    """Return free memory of the C library's heap to the system; takes milliseconds, once a step.

    Each step allocates tensors of other sizes, as responses have other lengths, between weights
    that stay: the holes that are left fit the next step badly, and the heap grows by hundreds of kB
    a step though no more of it is in use. glibc returns of its own accord only what lies free at
    the heap's end. Every step and not now and then: the more holes there are, the more of them the
    steps in between would fill. Other C libraries have no such call, and none is made.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
