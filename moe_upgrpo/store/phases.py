# SPDX-License-Identifier: Apache-2.0
"""The phases of a step, and their times in the rows of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PHASES = {
    "generate": "generation",
    "old_log_probs": "old log-probs",
    "analysis": "analysis",
    "update": "update",
    "logging": "logging",
}
"""In order, with the names that a reader sees; `time/PHASE` is each phase's seconds."""


def waiting_share(rows: Iterable[Mapping[str, Any]], phase: str) -> float | None:
    """The share of a phase's time that the ranks waited, 0 to 1, over all steps of a run.

    Each step's share is weighted by its phase's seconds; None where none was measured.
    """
    measured = [row for row in rows if f"time/waiting/{phase}" in row]
    seconds = sum(row[f"time/{phase}"] for row in measured)
    if not seconds:
        return None
    waited = sum(row[f"time/waiting/{phase}"] * row[f"time/{phase}"] for row in measured)
    return float(waited / seconds)
