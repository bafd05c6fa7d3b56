# SPDX-License-Identifier: Apache-2.0
"""Records of both sides of the same tokens, and what was found in them: plain arrays and records.

Shape suffixes: B sequences, S tokens of a sequence, T response tokens of it, L MoE layers,
K experts per token. Row p − 1 of a sequence's routes produced the log-prob of its token at
position p, so that S tokens have S − 1 rows (docs/mismatch.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(kw_only=True)
class Evidence:
    """Records of rollout engine and trainer of the same sequences; None: not known."""

    prompt: list[int]
    """``[B]``: the prompt that a sequence answers. Prompts are what is independent."""
    tokens: list[np.ndarray] | None = None
    """B × ``[S]`` token ids."""
    response: list[slice]
    """The rows, of the S − 1 of a sequence, that belong to response tokens. A source that keeps the
    rows of response tokens alone has T in place of S − 1, here and below."""
    rollout_routes: list[np.ndarray] | None = None
    """B × ``[S−1, L, K]`` expert ids."""
    train_routes: list[np.ndarray] | None = None
    """The trainer's; its shape differs from the rollout's only where something is wrong."""
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
    """B × ``[S−1, L]`` bool: routers that are not compared, because a cause was found for them."""
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Further columns of a token log, each B × ``[T]``; NaN where a row has none."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause, and how much of the difference it explains."""

    cause: str
    """A key of `causes.CAUSES`."""
    kind: Literal["fault", "numerics"]
    share: float | None
    """Part of the routers that differ, or of the gap, that the test explained: 0 to 1."""
    low: float | None = None
    high: float | None = None
    """The ends of the share's 95% interval by prompt; None where there is none."""
    measure: Literal["routers", "gap"]
    shown_by: str
    """One clause: what was done and what it gave."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A cause that can be named, and what to do about it."""

    name: str
    says: str
    """Says what differs, to stand in a sentence after "because"."""
    remedy: str
    command: str | None = None
    """An option, a patch, a replay mode or a correction, as it is typed."""
