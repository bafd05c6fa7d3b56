# SPDX-License-Identifier: Apache-2.0
"""The variables by which a job of another stack sets what it wants of the log and the loss."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS
from moe_upgrpo.record.limits import AlarmLimits

RUN = "MOE_UPGRPO_RUN"  # a new folder for the routing log; unset: none
ALARMS = "MOE_UPGRPO_ALARMS"  # limits of alarms, as mismatch=0.2,reward_drop=0.3
TOKENS = "MOE_UPGRPO_TOKENS"  # share of the sequences whose token rows are kept; unset: all
SETTINGS = "MOE_UPGRPO_LOSS_SETTINGS"  # JSON, fields of a loss; unset: the preset's


def run_folder() -> Path | None:
    """The folder named by MOE_UPGRPO_RUN; None: no routing log."""
    path = os.environ.get(RUN)
    return Path(path) if path else None


def token_share() -> float:
    """The share set by MOE_UPGRPO_TOKENS. Raises UserError if it is not a share."""
    given = os.environ.get(TOKENS, "1")
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{TOKENS}: {given!r} given; allowed: a share of the sequences, 0 < x <= 1")
    return share


def loss_settings() -> Any:
    """The fields of a loss that MOE_UPGRPO_LOSS_SETTINGS sets, for `presets.resolve`; unset: none.

    Raises UserError: not JSON.
    """
    given = os.environ.get(SETTINGS) or "{}"
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{SETTINGS}: {given!r} given ({error}); allowed: a JSON object of "
            f"{', '.join(vars(PRESETS['grpo']))}"
        ) from error


def alarm_limits() -> AlarmLimits:
    """The limits set by MOE_UPGRPO_ALARMS. Raises UserError for anything else."""
    given = os.environ.get(ALARMS, "")
    kinds = {field.name: int if field.type == "int" else float for field in fields(AlarmLimits)}
    limits = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, _, number = part.partition("=")
        try:
            limits[name.strip()] = kinds[name.strip()](number)
        except (KeyError, ValueError):
            raise UserError(
                f"{ALARMS}: {part!r} given; allowed: NAME=NUMBER, comma between them, NAME of "
                f"{', '.join(kinds)}"
            ) from None
    try:
        return AlarmLimits(**limits)
    except UserError as error:
        raise UserError(f"{ALARMS}: {error}") from None


def refuse(not_covered: Mapping[str, object]) -> None:
    """Raise UserError with the first name whose value is true, which the log does not cover."""
    for name, there in not_covered.items():
        if there:
            raise UserError(f"{RUN}: the routing log does not cover {name}; unset it")
