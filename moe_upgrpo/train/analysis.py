# SPDX-License-Identifier: Apache-2.0
"""Measurements beside training, on some steps: the log-prob gap in its parts, the noise floors.

Neither touches the weights; both cost forwards, on one step in `analyse_every`.

Shapes: N response tokens of this rank, L MoE layers, K experts per token, T response tokens of a
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from moe_upgrpo.losses import Metric
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.record import Sums, count_sums
from moe_upgrpo.rollout.base import Engine, Rollout
from moe_upgrpo.routing import ComparisonKind, RoutingDivergence, compare_routes


@dataclass(kw_only=True)
class OldScores:
    """The trainer on the step's sequences, at the weights that the engine sampled with."""

    native: Sequence[Scored]  # routers free
    held: Sequence[Scored] | None  # with the rollout's routes: under R3, and on analysed steps
    analysed: bool = False
    # Log-probs [T] at the weights of each sequence's last visit that its update does not compute:
    # L(θ, n(θ_old)) without replay, L(θ, native) under R2, nothing under R3.
    counterpart: list[np.ndarray | None] | None = None
    behind: list[np.ndarray] | None = None  # L(θ_engine, e), [T], where the engine's were older
    seconds: float = 0.0  # spent in forwards that only the decomposition needs

    def policy(self, replay: str) -> Sequence[Scored]:
        """The old policy of the loss: under R3 the trainer with the rollout's routes."""
        return self.held if replay == "R3" else self.native

    def forget_hidden(self) -> None:
        """Let go of the hidden states, the largest of what was recorded."""
        for name in ("native", "held"):
            scores = getattr(self, name)
            setattr(self, name, scores and [replace(one, hidden=None) for one in scores])


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """Differences of engine and trainer from themselves: this rank's sums, and the tokens' counts.

    layers: column name of the token log -> [N]: for each response token the number of MoE layers
        that differ between two passes.
    """

    sums: Sums = field(default_factory=dict)
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    def __or__(self, other: NoiseFloor) -> NoiseFloor:
        return NoiseFloor(sums=self.sums | other.sums, layers=self.layers | other.layers)

    @classmethod
    def of(cls, side: str, counts: RoutingDivergence) -> NoiseFloor:
        name = _noise_name(side, counts.kind)
        return cls(
            sums=count_sums(name, counts),
            layers={name.replace("/", "_"): counts.routers_per_token.numpy()},
        )


def compare_responses(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    samples: Sequence[Sample],
    *,
    num_experts: int,
    kind: ComparisonKind,
) -> RoutingDivergence:
    """Compare two sides' whole-sequence routes `[P+T-1, L, K]`, on the tokens that count."""
    sides_NLK = [
        torch.from_numpy(
            np.concatenate(
                [r[s.response_rows][s.counted] for r, s in zip(side, samples, strict=True)]
            )
        )
        for side in (first, second)
    ]
    return compare_routes(*sides_NLK, num_experts=num_experts, kind=kind)


def trainer_noise_floor(actor: MegatronActor, samples: Sequence[Sample]) -> NoiseFloor:
    """Measure how far the trainer differs from itself: identical forwards, another batch shape.

    The same metrics as between engine and trainer, over response tokens, as this rank's sums; for a
    dense model those of log-probs alone. A collective.
    """
    first = actor.score(samples, record=("routes",))
    # In reverse order and in halves: other neighbours, other padding, other sizes of every product.
    # A budget of tokens is counted by the longest sequence. Where it allows only one at a time, so
    # does this pass, without the shorter ones that were beside it.
    size = min(len(samples), actor.limit.rows(max(len(sample.tokens) for sample in samples)))
    other = size // 2 if size > 1 else (2 if actor.limit.tokens is None else 1)
    reshaped = actor.score(samples[::-1], record=("routes",), micro_batch_size=other)[::-1]
    passes = {
        ComparisonKind.REPEAT: actor.score(samples, record=("routes",)),
        ComparisonKind.BATCH_SHAPE: reshaped,
    }
    floor = NoiseFloor()
    for kind, second in passes.items():
        name = _noise_name("trainer", kind)
        if actor.layer_ids:
            routes = [[scored.routes for scored in side] for side in (first, second)]
            counts = compare_responses(*routes, samples, num_experts=actor.num_experts, kind=kind)
            floor |= NoiseFloor.of("trainer", counts)
        a_N, b_N = (
            torch.from_numpy(
                np.concatenate([p.log_probs[s.counted] for p, s in zip(side, samples, strict=True)])
            ).double()
            for side in (first, second)
        )
        of_log_probs = {
            f"{name}/logp_mean_abs": Metric(float((a_N - b_N).abs().sum()), len(a_N)),
            f"{name}/k3": Metric(float(k3(a_N, b_N).sum()), len(a_N)),
        }
        floor |= NoiseFloor(sums=of_log_probs)
    return floor


def engine_noise_floor(
    passes: Sequence[Sequence[np.ndarray]],
    samples: Sequence[Sample],
    rollouts: Sequence[Rollout] | None,
    *,
    num_experts: int,
) -> NoiseFloor:
    """Measure how far the engine differs from itself, by two `engine_passes` and its sampling.

    `rollouts`: sampled with the same weights; None where the engine has others by now.
    """
    pairs = {ComparisonKind.REPEAT: passes}
    if rollouts is not None:
        pairs[ComparisonKind.BATCH_SHAPE] = ([r.routes for r in rollouts], passes[0])
    floor = NoiseFloor()
    for kind, sides in pairs.items():
        counts = compare_responses(*sides, samples, num_experts=num_experts, kind=kind)
        floor |= NoiseFloor.of("engine", counts)
    return floor


def engine_passes(engine: Engine, samples: Sequence[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The engine's routes of each whole sequence, computed twice."""
    sequences = [sample.tokens for sample in samples]
    return list(zip(engine.routes(sequences), engine.routes(sequences), strict=True))


def _noise_name(side: str, kind: ComparisonKind) -> str:
    return f"noise/{side}_{kind.value.replace(' ', '_')}"
