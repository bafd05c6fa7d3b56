# SPDX-License-Identifier: Apache-2.0
"""The limits beyond which an alarm is raised: options of a run, a probe and a stack's log."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moe_upgrpo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AlarmLimits:
    """Where alarms ring; docs/mismatch.md says what each means."""

    mismatch: float = 0.3
    """Share of routers that differ, whatever the noise floor: three times what is published."""
    mismatch_times_floor: float = 10.0
    """The same as a multiple of the last noise floor that was measured ..."""
    mismatch_least: float = 0.05
    """... if it is at least this share."""
    mismatch_stale: float = 0.9
    """The same where an update lies between the engine's weights and the trainer's."""
    layer_times: float = 5.0
    """A layer's share of mismatches, as a multiple of the other layers' median ..."""
    layer_least: float = 0.05
    """... if it is at least this share."""
    zero_rows: float = 0.99
    """Share of a layer's rollout rows that are all expert 0 (top-1)."""
    repeated_rows: float = 0.2
    """Share of tokens whose rollout row repeats another token's, beyond the trainer's own share."""
    log_prob_gap: float = 0.1
    """KL(rollout || trainer) per token, nats."""
    effective_tokens: float = 0.5
    """Effective sample of the importance ratios, as a share of the tokens."""
    steps_without_signal: int = 5
    """Steps in a row with nothing to learn."""
    steps_unchanged: int = 2
    """Steps in a row whose updates change no weight."""
    reward_drop: float = 0.5
    """Fall of the mean reward from its best, as a share of that."""
    entropy_left: float = 0.1
    """Entropy as a share of what it was in the first steps."""
    window: int = 5
    """Steps whose mean stands for reward and entropy."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type == "int" else 0
            if not least <= value < math.inf or (field.type == "int" and value != int(value)):
                raise UserError(
                    f"alarm.{field.name}={value}: "
                    + ("a whole number from 1 on" if least else "a finite number, 0 or more,")
                    + " is needed."
                )
