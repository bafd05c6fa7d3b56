# SPDX-License-Identifier: Apache-2.0
"""Decompose the gap log p_train − log p_rollout by its sources, token by token.

Let L(w, routes) be the trainer's log-prob of the sampled token with weights w, its routers free
("native") or held to given expert sets with the gates computed natively on them; log μ the engine's
log-prob; e the routes the engine recorded; θ_old the weights the engine held; θ the current ones;
n(θ_old) the trainer's own routes at θ_old. The terms telescope:

| term           | formula                           | the extra likelihood of the token, given by |
|----------------|-----------------------------------|---------------------------------------------|
| numerics       | L(θ_old, e) − log μ               | the trainer's arithmetic, experts the same  |
| engine_routing | L(θ_old, native) − L(θ_old, e)    | the experts the trainer chose instead       |
| update         | L(θ, n(θ_old)) − L(θ_old, native) | the new weights, experts as before          |
| routing_shift  | L(θ, native) − L(θ, n(θ_old))     | the experts that the new weights choose     |

The order is a choice, since routing and weights do not commute: routing at the old weights first,
then the update at the trainer's old routes, then the routing at the new weights. The other order
takes the update at the engine's routes, L(θ, e) − L(θ_old, e): the `update` of
`decompose_under_replay`, with L(θ, native) − L(θ, e) left over as all of the routing at once.

All forwards need the same batch layout, eval mode and sampling temperature; otherwise the trainer's
own numerics show up in every term. θ_old must be the weights the engine sampled with: if the engine
had older ones, "numerics" includes the updates between as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_upgrpo.errors import NumericalFailure, UserError


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Terms of L(θ, native) − log μ, in nats, float64, one for each token."""

    numerics: Tensor
    engine_routing: Tensor
    update: Tensor
    routing_shift: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the terms: the gap itself, up to the rounding of float64."""
        return self.numerics + self.engine_routing + self.update + self.routing_shift


@dataclass(frozen=True, kw_only=True)
class ReplayDecomposition:
    """Terms of L(θ, e) − log μ, in nats, float64, one for each token."""

    numerics: Tensor
    update: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the terms: the gap itself, up to the rounding of float64."""
        return self.numerics + self.update


def decompose(
    *,
    rollout: Tensor,
    old_on_rollout_routes: Tensor,
    old_native: Tensor,
    current_on_old_routes: Tensor,
    current_native: Tensor,
) -> Decomposition:
    """L(θ, native) − log μ in the four terms of the table above.

    Without replay, ``current_native`` is the training forward, and two more forwards are needed.
    Under R2 (old routes replayed in the update) ``current_on_old_routes`` is the training forward:
    the loss's own gap is ``total − routing_shift``, and ``routing_shift`` is a counterfactual.

    Args:
        rollout: log μ, the engine's log-probs.
        old_on_rollout_routes: L(θ_old, e).
        old_native: L(θ_old, native), the old log-probs.
        current_on_old_routes: L(θ, n(θ_old)).
        current_native: L(θ, native).

    All log-probs are of the same response tokens, in one shape; padding is left out.

    Raises:
        UserError: no tokens, unequal shapes or devices, or a log-prob that is not finite.
    """
    mu, old_e, old, current_old, current = _checked(
        rollout=rollout,
        old_on_rollout_routes=old_on_rollout_routes,
        old_native=old_native,
        current_on_old_routes=current_on_old_routes,
        current_native=current_native,
    )
    return Decomposition(
        numerics=old_e - mu,
        engine_routing=old - old_e,
        update=current_old - old,
        routing_shift=current - current_old,
    )


def decompose_under_replay(
    *, rollout: Tensor, old_on_rollout_routes: Tensor, current_on_rollout_routes: Tensor
) -> ReplayDecomposition:
    """L(θ, e) − log μ, the gap of a loss under R3 (rollout routes replayed in both forwards).

    [L(θ, e) − L(θ_old, e)] + [L(θ_old, e) − log μ] = update + numerics: routing has no share in
    it, and forwards on native routes are counterfactuals. R3: arXiv 2510.11370.

    Args and errors as in `decompose`; ``current_on_rollout_routes`` is L(θ, e).
    """
    mu, old_e, current_e = _checked(
        rollout=rollout,
        old_on_rollout_routes=old_on_rollout_routes,
        current_on_rollout_routes=current_on_rollout_routes,
    )
    return ReplayDecomposition(numerics=old_e - mu, update=current_e - old_e)


def _checked(**log_probs: Tensor) -> list[Tensor]:
    shape, device = log_probs["rollout"].shape, log_probs["rollout"].device
    if not log_probs["rollout"].numel():
        raise UserError("nothing to decompose: no tokens. Pass log-probs of response tokens")
    for name, values in log_probs.items():
        if values.shape != shape or values.device != device or not values.is_floating_point():
            raise UserError(
                f"{name} must hold one log-prob for each of rollout's, shape {list(shape)} on "
                f"{device}, got {values.dtype} {list(values.shape)} on {values.device}"
            )
        if not bool(values.isfinite().all()):
            where = (~values.isfinite()).nonzero()[0].tolist()
            raise NumericalFailure(
                f"{name} at {where} is {values[tuple(where)].item()}: log-probs must be finite. "
                "Leave padding out"
            )
    return [values.detach().to(torch.float64) for values in log_probs.values()]
