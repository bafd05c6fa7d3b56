"""What some steps measure beside training: the log-prob gap taken apart, and the noise floor.

Neither touches the weights; both cost forwards, on one step in `analyse_every`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_upgrpo.losses import Metric
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.routing import ComparisonKind, compare_routes
from moe_upgrpo.routing.decomposition import decompose


@dataclass(kw_only=True)
class Gap:
    """The forwards that take log p_train − log p_rollout apart, sequence by sequence.

    `on_old_routes` is filled during the update, at the weights of each sequence's last visit.
    """

    on_rollout_routes: list[np.ndarray]  # [T], L(θ_old, e)
    native_routes: list[np.ndarray]  # n(θ_old)
    on_old_routes: list[np.ndarray | None]  # [T], L(θ, n(θ_old))

    def terms(
        self, rollouts: Sequence[Rollout], old: Sequence[Scored], logp_train: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The four terms of `routing.decomposition`, [N] float64, by their column names."""

        def flat(parts) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(list(parts)))

        parts = decompose(
            rollout=flat(r.logp_rollout for r in rollouts),
            old_on_rollout_routes=flat(self.on_rollout_routes),
            old_native=flat(s.log_probs for s in old),
            current_on_old_routes=flat(self.on_old_routes),
            current_native=flat(logp_train),
        )
        return {
            f"gap_{name}": getattr(parts, name).numpy()
            for name in ("numerics", "engine_routing", "update", "routing_shift")
        }


def start_gap(
    actor: MegatronActor,
    samples: Sequence[Sample],
    rollouts: Sequence[Rollout],
    old: Sequence[Scored],
) -> Gap:
    """The forward at the old weights on the rollout's routes; a collective."""
    held = [replace(s, routes=r.routes) for s, r in zip(samples, rollouts, strict=True)]
    return Gap(
        on_rollout_routes=[s.log_probs for s in actor.score(held, routes=False)],
        native_routes=[s.routes for s in old],
        on_old_routes=[None] * len(samples),
    )


def noise_floor(actor: MegatronActor, samples: Sequence[Sample]) -> dict[str, Metric]:
    """How far the trainer differs from itself: identical forwards, and another batch shape.

    The same metrics as between engine and trainer, over response tokens, this rank's sums. A
    collective.
    """
    first = actor.score(samples)
    # In reverse order and in halves: other neighbours, other padding, other sizes of every product.
    half = max(1, min(len(samples), actor.micro_batch_size) // 2)
    passes = {
        ComparisonKind.REPEAT: actor.score(samples),
        ComparisonKind.BATCH_SHAPE: actor.score(samples[::-1], micro_batch_size=half)[::-1],
    }
    sums = {}
    for kind, second in passes.items():
        routes_NLK = [
            torch.from_numpy(
                np.concatenate(
                    [p.routes[s.response_rows] for p, s in zip(side, samples, strict=True)]
                )
            )
            for side in (first, second)
        ]
        counts = compare_routes(*routes_NLK, num_experts=actor.hf.num_experts, kind=kind)
        a_N, b_N = (
            torch.from_numpy(np.concatenate([p.log_probs for p in side])).double()
            for side in (first, second)
        )
        name = "noise/" + kind.value.replace(" ", "_")
        tokens = len(a_N)
        sums |= {
            f"{name}/router_rate": Metric(counts.routers_mismatched, counts.routers_compared),
            f"{name}/token_any_rate": Metric(counts.tokens_mismatched, counts.tokens_compared),
            f"{name}/logp_mean_abs": Metric(float((a_N - b_N).abs().sum()), tokens),
            f"{name}/k3": Metric(float(k3(a_N, b_N).sum()), tokens),
        }
    return sums
