"""The variables by which a job of another stack says what it wants of the routing log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from moe_upgrpo.errors import UserError

RUN = "MOE_UPGRPO_RUN"  # a new folder for the routing log; unset: none
TOKENS = "MOE_UPGRPO_TOKENS"  # share of the sequences whose token rows are kept; unset: all


def run_folder() -> Path | None:
    """The folder that MOE_UPGRPO_RUN names; None: no routing log."""
    path = os.environ.get(RUN)
    return Path(path) if path else None


def token_share() -> float:
    """The share that MOE_UPGRPO_TOKENS names. Raises UserError where it is none."""
    given = os.environ.get(TOKENS, "1")
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{TOKENS}: {given!r} given; allowed: a share of the sequences, 0 < x <= 1")
    return share


def refuse(not_covered: Mapping[str, object]) -> None:
    """Raise UserError with the first name whose value is true: what the log does not cover."""
    for name, there in not_covered.items():
        if there:
            raise UserError(f"{RUN}: the routing log does not cover {name}; unset it")
