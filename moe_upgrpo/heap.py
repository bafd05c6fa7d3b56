# SPDX-License-Identifier: Apache-2.0
"""Return of freed memory to the system."""

from __future__ import annotations

import ctypes
from functools import cache


def give_back() -> None:
    """Return free memory of the C library's heap to the system; takes milliseconds.

    Responses differ in length, so each step allocates tensors of other sizes, between weights that
    stay. The holes that are left fit the next step badly, and the heap grows by hundreds of kB a
    step though no more of it is in use. glibc itself returns only free memory at the heap's end.
    The trainer calls it every step rather than now and then: the more holes there are, the more of
    them the steps in between would fill. Other C libraries have no such call, and nothing is done
    there.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
