# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo patch`: small diffs for the stacks this package works with, applied safely.

It imports none of the stacks, needs neither patch nor git, and changes only files that it knows to
the last bit.
"""

from moe_upgrpo.patching.checkout import Checkout, UnknownRevision, find, recognise
from moe_upgrpo.patching.series import Patch, Series, all_series, load, of_stack

__all__ = [
    "Checkout",
    "Patch",
    "Series",
    "UnknownRevision",
    "all_series",
    "find",
    "load",
    "of_stack",
    "recognise",
]
