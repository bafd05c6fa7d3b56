"""A name that nothing has: an error that lists the nearest."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from moe_upgrpo.errors import UserError


def check_name(option: str, given: str, known: Collection[str]) -> None:
    """UserError for a name that is not known: the nearest, and all."""
    if given not in known:
        near = get_close_matches(given, known, n=3, cutoff=0.5)
        nearest = f" (nearest: {', '.join(near)})" if near else ""
        raise UserError(f"{option}: {given!r} given; allowed: {', '.join(known)}{nearest}")
