# SPDX-License-Identifier: Apache-2.0
"""Differences of two sides' routers beyond their choices: gates, distributions, margins.

Every function gives one value for each (token, layer) and ignores masks: values at padding mean
nothing, and `layer_sums` leaves them out. Expert ids are compared but not checked: `compare_routes`
checks the same routes.

Shape suffixes: T tokens, L MoE layers, K experts per token (top-k), E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses.correction import log_router_shift


def layer_sums(values_TL: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, int]:
    """Numerator and denominator of the mean in each layer: Σ over valid tokens, and their number.

    Both add up over micro-batches, ranks and steps. Values at tokens that are not valid may be
    anything, even NaN.

    Returns:
        float64 ``[L]`` and the number of valid tokens, all T where ``valid_T`` is None.

    Raises:
        UserError: a mask that is not bool ``[T]``; no valid token.
    """
    if valid_T is not None:
        if valid_T.dtype != torch.bool or valid_T.shape != values_TL.shape[:1]:
            raise UserError(
                f"valid must be bool of shape [{len(values_TL)}], one for each token, "
                f"got {valid_T.dtype} of shape {list(valid_T.shape)}"
            )
        values_TL = values_TL[valid_T]
    if not len(values_TL):
        raise UserError("nothing to sum: no valid token")
    return values_TL.sum(dim=0, dtype=torch.float64), len(values_TL)


def gate_overlap(
    rollout_routes: Tensor, rollout_gates: Tensor, train_routes: Tensor, train_gates: Tensor
) -> Tensor:
    """Σ_{e ∈ S ∩ S'} min(g_e, g'_e), ``[T, L]``: in [0, 1] for gates that sum to 1.

    S and g are the rollout's expert set and gates, S' and g' the trainer's. Definition 7 of the
    routing metrics.

    Args:
        rollout_routes, train_routes: integers ``[T, L, K]``; slots may be in any order.
        rollout_gates, train_gates: ``[T, L, K]``, ≥ 0, of the experts in the same slots. Gates are
            the weights on the experts' outputs; with bias-corrected routing these are not the
            scores that experts were chosen by.

    Raises:
        UserError: the four are not of one shape, or gates are not floating point.
    """
    _check_gates(rollout_routes, rollout_gates, train_routes, train_gates)
    overlap_TL = torch.zeros(rollout_routes.shape[:2], device=rollout_gates.device)
    for slot in range(rollout_routes.shape[-1]):
        same_TLK = rollout_routes == train_routes[..., slot, None]
        smaller_TLK = torch.minimum(rollout_gates, train_gates[..., slot, None])
        overlap_TL = overlap_TL + smaller_TLK.where(same_TLK, 0).sum(dim=-1)
    return overlap_TL


def gate_total_variation(
    rollout_routes: Tensor, rollout_gates: Tensor, train_routes: Tensor, train_gates: Tensor
) -> Tensor:
    """½ Σ_e |g_e − g'_e| over all experts, ``[T, L]``, a gate being 0 outside its side's set.

    In [0, 1] for gates that sum to 1, where it equals 1 − `gate_overlap`; exactly 0 where sets and
    gates are the same in the same slots. Args and errors as of `gate_overlap`.
    """
    _check_gates(rollout_routes, rollout_gates, train_routes, train_gates)
    alone_TLK = torch.ones_like(rollout_routes, dtype=torch.bool)
    variation_TL = torch.zeros(rollout_routes.shape[:2], device=rollout_gates.device)
    for slot in range(rollout_routes.shape[-1]):
        same_TLK = rollout_routes == train_routes[..., slot, None]
        alone_TLK &= ~same_TLK
        gate_TL = train_gates[..., slot]
        moved_TL = (rollout_gates - gate_TL[..., None]).abs().where(same_TLK, 0).sum(dim=-1)
        variation_TL = variation_TL + torch.where(same_TLK.any(dim=-1), moved_TL, gate_TL)
    return (variation_TL + rollout_gates.where(alone_TLK, 0).sum(dim=-1)) / 2


def router_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ_e p_e·(log p_e − log q_e), ``[T, L]``, nats, p and q the softmax of the logits.

    For routers that score by softmax, over all E experts, before top-k; both directions take two
    calls. Definition 8 of the routing metrics. A logit of −∞ is a probability of 0.

    Args:
        logits_p, logits_q: floating point ``[T, L, E]``; softmax in float32 at least.

    Raises:
        UserError: the shapes differ, or the logits are not floating point.
    """
    log_p, log_q = _log_softmax(logits_p, logits_q)
    return _expectation(log_p, log_p - log_q)


def router_js(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, ``[T, L]``: symmetric, in [0, log 2] nats.

    Args and errors as of `router_kl`.
    """
    log_p, log_q = _log_softmax(logits_p, logits_q)
    return (_kl_to_mixture(log_p, log_q) + _kl_to_mixture(log_q, log_p)) / 2


def top_k_margin(scores: Tensor, *, top_k: int) -> Tensor:
    """s_(K) − s_(K+1) ≥ 0, ``[T, L]``: how far the last expert chosen is above the first left out.

    0 for a tie, which an engine and a trainer may break in different ways. Definition 10 of the
    routing metrics.

    Args:
        scores: ``[T, L, E]``: the scores that experts are chosen by, in their own units: logits, or
            with bias-corrected routing the biased scores.

    Raises:
        UserError: not 1 ≤ K < E.
    """
    if not 1 <= top_k < scores.shape[-1]:
        raise UserError(
            f"a margin needs 1 ≤ top-k < experts, got top-{top_k} of {scores.shape[-1]}"
        )
    highest = scores.topk(top_k + 1, dim=-1).values
    return highest[..., top_k - 1] - highest[..., top_k]


@dataclass(frozen=True, kw_only=True)
class RouterShift:
    """RSPO's router shift between the old and the current weights; all without gradient.

    - ``by_layer`` ``[T, L]``: d = (1/K) Σ_k |log r_θ(e_k) − log r_θold(e_k)|, nats
    - ``mean`` ``[T]``: Δ = mean of d over layers
    - ``weight`` ``[T]``: γ = max(exp(−Δ), floor)
    """

    by_layer: Tensor
    mean: Tensor
    weight: Tensor


def router_shift(current: Tensor, old: Tensor, *, floor: float) -> RouterShift:
    """Movement of the router on the experts that the old policy activated.

    Definition 9 of the routing metrics, from RSPO (arXiv 2510.23027): taken from a secondary
    source, not from the paper's own text.

    Args:
        current, old: router log-probs ``[T, L, K]`` of the old policy's experts, under the current
            and the old weights.
        floor: γ_min in (0, 1].

    Raises:
        UserError: the shapes differ or are not ``[T, L, K]``; the floor is outside (0, 1].
    """
    if current.dim() != 3 or current.shape != old.shape:
        raise UserError(
            "router log-probs must be two equal shapes [tokens, MoE layers, top-k], got "
            f"{list(current.shape)} and {list(old.shape)}"
        )
    if not 0 < floor <= 1:
        raise UserError(f"floor must be in (0, 1], got {floor}")
    by_layer_TL = (current.detach() - old.detach()).abs().mean(dim=-1)
    weight_T = log_router_shift(current[None], old[None], floor)[0].exp()
    return RouterShift(by_layer=by_layer_TL, mean=by_layer_TL.mean(dim=-1), weight=weight_T)


def _check_gates(
    rollout_routes: Tensor, rollout_gates: Tensor, train_routes: Tensor, train_gates: Tensor
) -> None:
    shapes = [list(x.shape) for x in (rollout_routes, rollout_gates, train_routes, train_gates)]
    if len(shapes[0]) != 3 or any(shape != shapes[0] for shape in shapes):
        raise UserError(
            "routes and gates of both sides must be of one shape [tokens, MoE layers, top-k], got "
            f"rollout {shapes[0]} and {shapes[1]}, training {shapes[2]} and {shapes[3]}"
        )
    for side, gates in (("rollout", rollout_gates), ("training", train_gates)):
        if not gates.is_floating_point():
            raise UserError(f"{side} gates must be floating point, got {gates.dtype}")


def _log_softmax(*both_logits: Tensor) -> list[Tensor]:
    p, q = both_logits
    if p.shape != q.shape or not (p.is_floating_point() and q.is_floating_point()):
        raise UserError(
            "router logits must be floating point in one shape [tokens, MoE layers, experts], got "
            f"{p.dtype} {list(p.shape)} and {q.dtype} {list(q.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    return [logits.to(wide).log_softmax(dim=-1) for logits in both_logits]


def _expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ_e p_e·values_e, where an expert of probability 0 adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * values, 0).sum(dim=-1)


def _kl_to_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖(p + q)/2): log p − log m = −log(1 + (q/p − 1)/2), which is exactly 0 where p = q."""
    # Where q/p is beyond e^80, p·log m is below e^-80·80.
    ratio_less_one = (log_q - log_p).clamp(max=80).expm1()
    return _expectation(log_p, -(ratio_less_one / 2).log1p())
