# SPDX-License-Identifier: Apache-2.0
"""Both sides' records of the same tokens, and the findings from them: plain arrays and records.

Shape suffixes: B sequences, S tokens of a sequence, T response tokens of it, L MoE layers,
K experts per token. Row p − 1 of a sequence's routes produced the log-prob of its token at
position p, so S tokens have S − 1 rows (docs/mismatch.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(kw_only=True)
class Evidence:
    """The rollout engine's and the trainer's records of the same sequences; None: not known."""

    prompt: list[int]
    """``[B]``: the prompt that each sequence answers. Prompts are independent of each other."""
    tokens: list[np.ndarray] | None = None
    """B × ``[S]`` token ids."""
    response: list[slice]
    """The rows, among the S − 1 of a sequence, that belong to response tokens. A source that keeps
    only the rows of response tokens has T in place of S − 1, here and below."""
    rollout_routes: list[np.ndarray] | None = None
    """B × ``[S−1, L, K]`` expert ids."""
    train_routes: list[np.ndarray] | None = None
    """The trainer's; their shape differs from the rollout's only where something is wrong."""
    logp_rollout: list[np.ndarray] | None = None
    """B × ``[T]`` at the response tokens."""
    logp_train: list[np.ndarray] | None = None
    margins: list[np.ndarray] | None = None
    """B × ``[S−1, L]``: the trainer's score of the last chosen expert less the first not chosen."""
    num_experts: int
    layer_ids: list[int]
    """The MoE layers' numbers in the model."""
    temperature: float | None = None
    left_out: list[np.ndarray] | None = None
    """B × ``[S−1, L]`` bool: routers left out of the comparison, their cause being known."""
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Further columns of a token log, each B × ``[T]``; NaN where a row has none."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause, and how much of the difference it explains."""

    cause: str
    """A key of `causes.CAUSES`."""
    kind: Literal["fault", "numerics"]
    share: float | None
    """Part of the differing routers, or of the gap, that the test explained: 0 to 1."""
    low: float | None = None
    high: float | None = None
    """The ends of the share's 95% interval by prompt; None where there is none."""
    measure: Literal["routers", "gap"]
    shown_by: str
    """One clause: what was done and what resulted."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A cause that can be named, and what to do about it."""

    name: str
    says: str
    """Says what differs, to be used in a sentence after "because"."""
    remedy: str
    command: str | None = None
    """An option, a patch, a replay mode or a correction, as it is typed."""
