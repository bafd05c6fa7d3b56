# SPDX-License-Identifier: Apache-2.0
"""The terms of each token's log-prob gap, as the token log has them: N response tokens."""

from __future__ import annotations

import numpy as np
import torch

from moe_upgrpo.routing.decomposition import decompose, decompose_under_replay


def gap_terms(
    replay: str,
    *,
    rollout: np.ndarray,
    native: np.ndarray,
    held: np.ndarray,
    counterpart: np.ndarray | None,
    train: np.ndarray,
    behind: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The terms of log p_train − log p_rollout, [N] float64, by their column names.

    The gap columns add up to train − rollout under every replay; what replay takes out of the loss
    is in the counterfactual columns. Formulas: `routing.decomposition`. Log-probs, [N]: `rollout`
    μ; `native` L(θ_old, native); `held` L(θ_old, e); `counterpart`, at the weights of `train`, is
    what its forward does not compute itself: L(θ, n(θ_old)) without replay, L(θ, native) under R2,
    nothing under R3; `train` that of the update's own forward; `behind` L(θ_engine, e) where the
    engine sampled with older weights than θ_old: the difference is then a term of its own,
    gap_staleness = L(θ_old, e) − L(θ_engine, e).
    """
    if behind is not None:
        terms = gap_terms(
            replay,
            rollout=behind,
            native=native,
            held=held,
            counterpart=counterpart,
            train=train,
        )
        terms["gap_staleness"] = terms["gap_numerics"]
        return terms | {"gap_numerics": behind.astype(np.float64) - rollout}

    def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    if replay == "R3":
        given = tensors(
            rollout=rollout, old_on_rollout_routes=held, current_on_rollout_routes=train
        )
        held_terms = decompose_under_replay(**given)
        return {
            "gap_numerics": held_terms.numerics.numpy(),
            "gap_update": held_terms.update.numpy(),
            "counterfactual_engine_routing": native.astype(np.float64) - held,
        }
    if counterpart is None:
        raise ValueError(f"counterpart: None given under replay {replay!r}; only R3 does without")
    on_old, free = (train, counterpart) if replay == "R2" else (counterpart, train)
    found = decompose(
        **tensors(
            rollout=rollout,
            old_on_rollout_routes=held,
            old_native=native,
            current_on_old_routes=on_old,
            current_native=free,
        )
    )
    shift = "counterfactual_routing_shift" if replay == "R2" else "gap_routing_shift"
    return {
        "gap_numerics": found.numerics.numpy(),
        "gap_engine_routing": found.engine_routing.numpy(),
        "gap_update": found.update.numpy(),
        shift: found.routing_shift.numpy(),
    }
