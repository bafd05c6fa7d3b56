# SPDX-License-Identifier: Apache-2.0
"""A sequence as the rollout and the trainer saw it, at its last optimizer visit.

Shapes: S tokens, N of them response tokens that count, L MoE layers, K experts each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_upgrpo.routing.sets import ascending, repeated


@dataclass(kw_only=True)
class SequenceRecord:
    """One sequence as its source knows it; an unknown field is None, and has no column.

    Arrays of tokens are [N], in the order of `positions`; routes and the arrays that go with them
    are [S − 1, L, K] or [S − 1, L], row p − 1 for the token at p, with L = 0 for a dense model.

    prompt: index of its prompt within the step, counted over all ranks.
    positions: of the response tokens that count, in prompt + response, ascending.
    logp_old: None where no forward was made at the old weights. Routes and margins are then those
        of the first forward of the update.
    known: [S − 1], the rows whose routes are known on both sides; None: all. Other rows are
        ignored, and a token's number of mismatches before it is null if such a row came before it.
    train_routes: native routes at the old weights. own_routes: those that the routers would have
        chosen while the trainer was held to the rollout's routes, at the same weights.
    margins: the trainer's top-k margins, native, at the old weights.
    staleness: RL steps between what sampled and the old weights, of the sequence or [N].
    gap: the terms of logp_train − logp_rollout by their columns (`gap_terms`).
    held_routes, held_gates, native_gates: the gates of the held forward, for the experts of
        held_routes in their order, and of the native one, for those of train_routes.
    """

    prompt: int
    token_ids: np.ndarray  # [S]
    positions: np.ndarray
    reward: float
    advantage: np.ndarray
    logp_rollout: np.ndarray
    logp_old: np.ndarray | None
    logp_train: np.ndarray
    clipped: np.ndarray
    gradient_weight: np.ndarray
    rollout_routes: np.ndarray
    train_routes: np.ndarray
    known: np.ndarray | None = None
    own_routes: np.ndarray | None = None
    margins: np.ndarray | None = None
    entropy: np.ndarray | None = None
    logp_reference: np.ndarray | None = None
    gap: dict[str, np.ndarray] | None = None
    staleness: int | np.ndarray | None = None
    finished: bool | None = None
    held_routes: np.ndarray | None = None
    held_gates: np.ndarray | None = None
    native_gates: np.ndarray | None = None


def known_rows(*routes: np.ndarray, num_experts: int) -> np.ndarray:
    """Rows [S − 1] in which each of `routes` [S − 1, L, K] names K different experts everywhere.

    This leaves out padding, tokens that an engine took from a cache, and rows never computed.
    """
    known = np.ones(len(routes[0]), bool)
    for ids_SLK in routes:
        sets_SLK = ascending(ids_SLK)
        inside = (sets_SLK[..., 0] >= 0) & (sets_SLK[..., -1] < num_experts)
        known &= (inside & ~repeated(sets_SLK)).all(axis=1)
    return known
