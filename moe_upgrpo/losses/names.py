# SPDX-License-Identifier: Apache-2.0
"""A name that nothing has: an error that lists the nearest."""

from __future__ import annotations

from collections.abc import Collection

from moe_upgrpo.errors import UserError, nearest


def check_name(option: str, given: str, known: Collection[str]) -> None:
    """UserError for a name that is not known: the nearest, and all."""
    if given not in known:
        raise UserError(
            f"{option}: {given!r} given; allowed: {', '.join(known)}{nearest(given, known)}"
        )
