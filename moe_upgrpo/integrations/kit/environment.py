"""The variables by which a job of another stack says what it wants: of the log, of a loss."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError

RUN = "MOE_UPGRPO_RUN"  # a new folder for the routing log; unset: none
TOKENS = "MOE_UPGRPO_TOKENS"  # share of the sequences whose token rows are kept; unset: all
SETTINGS = "MOE_UPGRPO_LOSS_SETTINGS"  # JSON, fields of a loss; unset: the preset's


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


def loss_settings(loss: str, *, preset: bool) -> dict[str, Any] | None:
    """The fields that MOE_UPGRPO_LOSS_SETTINGS sets; None for a loss that is no preset of ours.

    loss: as the user named it. Raises UserError: no JSON object, or fields of a loss of the stack.
    """
    given = os.environ.get(SETTINGS) or "{}"
    try:
        settings, reason = json.loads(given), "not an object"
    except json.JSONDecodeError as error:
        settings, reason = None, str(error)
    if not isinstance(settings, dict):
        raise UserError(
            f"{SETTINGS}: {given!r} given ({reason}); allowed: a JSON object of fields of a loss, "
            'such as {"clip_low": 0.1}'
        )
    if settings and not preset:
        raise UserError(
            f"{SETTINGS}: {given} given with {loss}, which is not of moe_upgrpo; take a preset of "
            "it, or unset the variable"
        )
    return settings if preset else None


def refuse(not_covered: Mapping[str, object]) -> None:
    """Raise UserError with the first name whose value is true: what the log does not cover."""
    for name, there in not_covered.items():
        if there:
            raise UserError(f"{RUN}: the routing log does not cover {name}; unset it")
