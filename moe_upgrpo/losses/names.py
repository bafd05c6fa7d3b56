# SPDX-License-Identifier: Apache-2.0
"""The error for an unknown name, which lists the nearest known ones."""

from __future__ import annotations

from collections.abc import Collection

from moe_upgrpo.errors import UserError, nearest


def check_name(option: str, given: str, known: Collection[str]) -> None:
    """Raise UserError for an unknown name; it lists the nearest names, and all."""
    if given not in known:
        raise UserError(
            f"{option}: {given!r} given; allowed: {', '.join(known)}{nearest(given, known)}"
        )
