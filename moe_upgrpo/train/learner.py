"""The trainer's side of a step: old log-probs, analyses, and the optimizer steps on a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.record.weights import changed, fingerprint
from moe_upgrpo.rollout.base import Engine, Rollout
from moe_upgrpo.train import analysis
from moe_upgrpo.train.analysis import NoiseFloor, OldScores
from moe_upgrpo.train.place import SHUFFLING, Place, seed_of
from moe_upgrpo.train.record import LastVisit, Updated

OLD_RECORDS = ("routes", "margins")  # what is recorded of the old policy's routing


@dataclass(kw_only=True)
class Learner:
    """Scores and trains this data-parallel rank's samples; its methods are collectives.

    reference: the start model. behind: at the weights that sampled the batch, where they are older.
    """

    actor: MegatronActor
    reference: MegatronActor | None
    behind: MegatronActor | None
    loss: PolicyLossConfig
    place: Place
    seed: int
    minibatches: int
    epochs: int = 1
    replay: str = "none"
    old_log_probs: str = "trainer"
    analyse_every: int = 0

    @property
    def old_from_update(self) -> bool:
        """Whether the update starts at the old policy and ends after one optimizer step.

        Its forward is the old policy's then: ratios are exactly 1, and no other forward is needed.
        """
        return self.replay == "none" and self.minibatches * self.epochs == 1

    def analyses(self, step: int) -> bool:
        """Whether the step takes the gap apart and measures the noise floors."""
        return self.analyse_every > 0 and (step - 1) % self.analyse_every == 0

    def score_old(
        self, step: int, samples: Sequence[Sample], rollouts: Sequence[Rollout]
    ) -> OldScores | None:
        """The trainer's scores at the old weights: native, and under R3 held to the rollout's
        routes too. None: the step's only optimizer step makes the same forward, see `update`."""
        if self.old_from_update and not self.analyses(step):
            return None
        gates = ("gates",) if self.analyses(step) else ()
        native = self.actor.score(samples, record=(*OLD_RECORDS, *gates))
        if self.replay != "R3":
            return OldScores(native=native, held=None)
        held = self.actor.score(_held(samples, rollouts), record=("routes", *gates))
        return OldScores(native=native, held=held)

    def score_reference(self, samples: Sequence[Sample]) -> list[Scored] | None:
        """The start model's scores, where it is kept."""
        return self.reference and self.reference.score(samples, record=())

    def analyse(
        self,
        step: int,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        old: OldScores | None,
        *,
        engine: Engine | None,
        stale: bool,
    ) -> NoiseFloor:
        """Begin to take the gap apart, and the noise floors of both sides, where this step does.

        stale: whether other weights sampled the rollouts than engine and trainer hold now.
        """
        if not self.analyses(step):
            return NoiseFloor()
        if not self.actor.layer_ids:
            return analysis.trainer_noise_floor(self.actor, samples)
        begin = time.perf_counter()
        old.analysed = True
        if old.held is None:
            old.held = self.actor.score(_held(samples, rollouts), record=("routes", "gates"))
        if self.replay != "R3":
            old.counterpart = [None] * len(samples)
        if self.behind is not None and stale:
            held = _held(samples, rollouts)
            old.behind = [s.log_probs for s in self.behind.score(held, record=())]
        old.seconds = time.perf_counter() - begin
        floors = analysis.trainer_noise_floor(self.actor, samples)
        if engine is None:
            return floors
        mine = self.place.of_rank(samples)
        passes = groups.gather_in_model_copy(analysis.engine_passes(engine, mine))
        return floors | analysis.engine_noise_floor(
            list(zip(*passes, strict=True)),
            samples,
            None if stale else rollouts,
            num_experts=self.actor.num_experts,
        )

    def keep_behind(self) -> None:
        """Keep the weights of now beside those that the update makes."""
        if self.behind is not None:
            self.behind.take_weights(self.actor)

    def update(
        self,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        old: OldScores | None,
        step: int,
    ) -> Updated:
        """All optimizer steps on a batch. Without `old`, the one step's own forward is it."""
        if self.replay == "R2":
            samples = _held(samples, old.native)
        elif self.replay == "R3":
            samples = _held(samples, rollouts)
        if self.old_log_probs == "rollout":
            samples = [replace(s, old_log_probs=s.rollout_log_probs) for s in samples]
        elif not self.old_from_update:
            samples = [
                replace(sample, old_log_probs=scored.log_probs)
                for sample, scored in zip(samples, old.policy(self.replay), strict=True)
            ]
        record = () if old else OLD_RECORDS
        shuffle = np.random.default_rng(seed_of(self.seed, SHUFFLING, step, self.place.dp_rank))
        before = fingerprint(self.actor.chunks)
        updates, last = [], {name: [None] * len(samples) for name in _OF_LAST_VISIT}
        for epoch in range(self.epochs):
            for indices in np.split(shuffle.permutation(len(samples)), self.minibatches):
                batch = [samples[i] for i in indices]
                if old and old.counterpart is not None and epoch == self.epochs - 1:
                    self._score_counterpart(batch, indices, old)
                update = self.actor.update(batch, self.loss, record=record)
                updates.append(update)
                for name, column in _OF_LAST_VISIT.items():
                    for i, values in zip(indices, getattr(update, column), strict=True):
                        last[name][i] = values
        if old is None:
            native = [update.scored[i] for i in np.argsort(indices)]
            old = OldScores(native=native, held=None)
        return Updated(
            old=old,
            updates=updates,
            last=LastVisit(**last),
            weights=changed(before, fingerprint(self.actor.chunks)),
        )

    def _score_counterpart(
        self, batch: Sequence[Sample], indices: np.ndarray, old: OldScores
    ) -> None:
        """The forward at a mini-batch's weights that its update does not make itself."""
        begin = time.perf_counter()
        if self.replay == "R2":
            others = [replace(sample, routes=None) for sample in batch]
        else:
            others = _held(batch, [old.native[i] for i in indices])
        for i, scored in zip(indices, self.actor.score(others, record=()), strict=True):
            old.counterpart[i] = scored.log_probs
        old.seconds += time.perf_counter() - begin


# Of `LastVisit`, and of `Update`.
_OF_LAST_VISIT = {
    "logp_train": "log_probs",
    "clipped": "clipped",
    "gradient_weight": "gradient_weight",
}


def _held(samples: Sequence[Sample], routed: Sequence[Rollout | Scored]) -> list[Sample]:
    """The samples with the routes of `routed` to replay."""
    return [replace(s, routes=r.routes) for s, r in zip(samples, routed, strict=True)]


def samples_of(rollouts: Sequence[Rollout], advantages: np.ndarray) -> list[Sample]:
    """The rollouts as the actor takes them, one advantage for each."""
    return [
        Sample(
            tokens=np.concatenate([r.prompt_ids, r.response_ids]),
            prompt_length=len(r.prompt_ids),
            rollout_log_probs=r.logp_rollout,
            advantage=float(advantage),
            sampled=r.sampled,
        )
        for r, advantage in zip(rollouts, advantages, strict=True)
    ]
