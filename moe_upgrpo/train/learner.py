# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of a step: old log-probs, analyses, and the optimizer steps on a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_upgrpo.losses import PolicyLossConfig, ratio_deviation
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.record import Sums
from moe_upgrpo.record.weights import changed, fingerprint
from moe_upgrpo.rollout.base import Engine, Rollout
from moe_upgrpo.train import analysis
from moe_upgrpo.train.advantages import with_nthr, with_token_weights
from moe_upgrpo.train.analysis import NoiseFloor, OldScores
from moe_upgrpo.train.place import DRAWS, SHUFFLING, Place, seed_of
from moe_upgrpo.train.record import LastVisit, Updated
from moe_upgrpo.train.terms import Terms, term_sums

OLD_RECORDS = ("routes", "margins")  # what is recorded of the old policy's routing


@dataclass(kw_only=True)
class Learner:
    """Scores and trains this data-parallel rank's samples; its methods are collectives.

    reference: the reference of the KL divergence. behind: an actor with the weights that sampled
    the batch, where they are older. gradient_at: "old" takes the gradient of every optimizer step
    of a batch at the weights before the first. stop_ratio: no epoch follows one whose tokens' mean
    |ratio − 1| is above it. group: responses to a prompt, adjacent samples. head_records: what the
    advantages need of the old policy's head. nthr_beta, nthr_eta: of NTHR's mask; None: none.
    """

    actor: MegatronActor
    reference: MegatronActor | None
    behind: MegatronActor | None
    loss: PolicyLossConfig
    terms: Terms
    place: Place
    seed: int
    minibatches: int
    group: int = 1
    epochs: int = 1
    replay: str = "none"
    old_log_probs: str = "trainer"
    analyse_every: int = 0
    gradient_at: str = "current"
    stop_ratio: float | None = None
    head_records: Sequence[str] = ()
    nthr_beta: float | None = None
    nthr_eta: float | None = None

    @property
    def old_from_update(self) -> bool:
        """Whether the update starts at the old policy and ends after one optimizer step.

        Then its forward is the old policy's: ratios are exactly 1, and no other forward is needed.
        """
        return self.replay == "none" and self.minibatches * self.epochs == 1

    def analyses(self, step: int) -> bool:
        """Whether the step takes the gap apart and measures the noise floors."""
        return self.analyse_every > 0 and (step - 1) % self.analyse_every == 0

    def score_old(
        self, step: int, samples: Sequence[Sample], rollouts: Sequence[Rollout]
    ) -> OldScores | None:
        """The trainer's scores at the old weights: native, and under R3 with the rollout's routes
        too. None: the step's only optimizer step makes the same forward, see `update`."""
        weighs = "token_weights" in self.loss.arguments
        needed = weighs or self.terms.needs_old or self.analyses(step) or self.head_records
        if self.old_from_update and not needed:
            return None
        gates = ("gates",) if self.analyses(step) else ()
        of_head = () if self.replay == "R3" else self.head_records
        native = self.actor.score(samples, record=(*OLD_RECORDS, *gates, *of_head))
        if self.replay != "R3":
            return OldScores(native=native, held=None)
        record = ("routes", *gates, *self.head_records)
        held = self.actor.score(_held(samples, rollouts), record=record)
        return OldScores(native=native, held=held)

    def score_reference(self, samples: Sequence[Sample]) -> list[Scored] | None:
        """The reference's scores, where there is one."""
        return self.reference and self.reference.score(samples, record=())

    def penalised(
        self,
        rewards_B: np.ndarray,
        samples: Sequence[Sample],
        old: OldScores | None,
        reference: Sequence[Scored] | None,
    ) -> tuple[np.ndarray, Sums]:
        """The rewards from which advantages are made, and the sums of the KL term's penalty."""
        policy = old and old.policy(self.replay)
        return self.terms.penalised(rewards_B, samples, policy, reference)

    def weighed(self, samples: Sequence[Sample], old: OldScores | None) -> Sequence[Sample]:
        """The samples with NTHR's mask on their advantages, where it is asked for, and with token
        weights, where the loss is defined with them."""
        if self.nthr_beta is not None:
            samples = with_nthr(
                samples,
                old.policy(self.replay),
                self.actor,
                group=self.group,
                beta=self.nthr_beta,
                eta=self.nthr_eta,
            )
            old.forget_hidden()
        if "token_weights" not in self.loss.arguments:
            return samples
        return with_token_weights(samples, old.policy(self.replay), group=self.group)

    def of_start_model(self, reference: Sequence[Scored] | None) -> Sequence[Scored] | None:
        """The reference's scores where it is still the start model."""
        return None if self.terms.reference_every else reference

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
        """On an analysed step, begin to take the gap apart and measure both sides' noise floors.

        stale: whether other weights sampled the rollouts than engine and trainer now have.
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

    def keep_behind(self, step: int) -> None:
        """Keep a copy of the current weights, which sample `step`'s batch, if that is analysed."""
        if self.behind is not None and self.analyses(step):
            self.behind.take_weights(self.actor)

    def update(
        self,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        old: OldScores | None,
        step: int,
    ) -> Updated:
        """Take all optimizer steps on a batch. Without `old`, the only step's forward takes its
        place."""
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
        terms = self.terms.of_loss()
        at = self.actor.weights_now() if self.gradient_at == "old" else None
        shuffle = np.random.default_rng(seed_of(self.seed, SHUFFLING, step, self.place.dp_rank))
        before = fingerprint(self.actor.chunks)
        draws = seed_of(self.seed, DRAWS, step, 0)  # one for all ranks: each token has its number
        updates, last = [], {name: [None] * len(samples) for name in _OF_LAST_VISIT}
        for epoch in range(1, self.epochs + 1):
            for indices in self._mini_batches(shuffle, len(samples)):
                batch = [samples[i] for i in indices]
                # For the last visit, which may be in any epoch where epochs may be left out.
                may_be_last = epoch == self.epochs or self.stop_ratio is not None
                if old and old.counterpart is not None and may_be_last:
                    self._score_counterpart(batch, indices, old)
                update = self.actor.update(
                    batch, self.loss, terms=terms, record=record, at=at, seed=draws + len(updates)
                )
                updates.append(update)
                for name, column in _OF_LAST_VISIT.items():
                    for i, values in zip(indices, getattr(update, column), strict=True):
                        last[name][i] = values
            if self._stops(samples, last["logp_train"]):
                break
        self.terms.refresh(self.actor, step)
        if old is None:
            native = [update.scored[i] for i in np.argsort(indices)]
            old = OldScores(native=native, held=None)
        return Updated(
            old=old,
            updates=updates,
            epochs=epoch,
            last=LastVisit(**last),
            terms=term_sums(
                terms,
                updates,
                counted=self.place.dp_rank == 0,
                controlled=self.terms.control is not None,
            ),
            weights=changed(before, fingerprint(self.actor.chunks)),
        )

    def _mini_batches(self, shuffle: np.random.Generator, samples: int) -> list[np.ndarray]:
        """Samples of each mini-batch, at random; whole groups where the loss compares them."""
        size = self.group if "groups" in self.loss.arguments else 1
        order_P1 = shuffle.permutation(samples // size)[:, None]
        return np.split((order_P1 * size + np.arange(size)).ravel(), self.minibatches)

    def _stops(self, samples: Sequence[Sample], visited: Sequence[np.ndarray]) -> bool:
        """Whether the policy is too far from the old one for another epoch (arXiv 2202.00079).

        visited: log-probs of the ending epoch. As `losses.stops_early`, over all ranks' tokens.
        """
        if self.stop_ratio is None:
            return False
        pairs = zip(samples, visited, strict=True)
        now, old = zip(
            *((now[s.counted], s.old_log_probs[s.counted]) for s, now in pairs), strict=True
        )
        now, old = (torch.from_numpy(np.concatenate(x))[None] for x in (now, old))
        share = ratio_deviation(now, old, torch.ones_like(now))
        numerator, denominator = groups.sum_metrics({"off": share})["off"]
        return numerator / denominator > self.stop_ratio

    def _score_counterpart(
        self, batch: Sequence[Sample], indices: np.ndarray, old: OldScores
    ) -> None:
        """Run the forward at a mini-batch's weights that its update does not make itself."""
        begin = time.perf_counter()
        if self.replay == "R2":
            others = [replace(sample, routes=None) for sample in batch]
        else:
            others = _held(batch, [old.native[i] for i in indices])
        for i, scored in zip(indices, self.actor.score(others, record=()), strict=True):
            old.counterpart[i] = scored.log_probs
        old.seconds += time.perf_counter() - begin


# Field of `LastVisit` -> field of `Update`.
_OF_LAST_VISIT = {
    "logp_train": "log_probs",
    "clipped": "clipped",
    "gradient_weight": "gradient_weight",
}


def _held(samples: Sequence[Sample], routed: Sequence[Rollout | Scored]) -> list[Sample]:
    """The samples with the routes of `routed` to replay."""
    return [replace(s, routes=r.routes) for s, r in zip(samples, routed, strict=True)]


def samples_of(rollouts: Sequence[Rollout]) -> list[Sample]:
    """The rollouts as the actor scores them."""
    return [
        Sample(
            tokens=np.concatenate([r.prompt_ids, r.response_ids]),
            prompt_length=len(r.prompt_ids),
            rollout_log_probs=r.logp_rollout,
            sampled=r.sampled,
        )
        for r in rollouts
    ]


def for_update(
    samples: Sequence[Sample],
    advantages: Sequence[float | np.ndarray],
    reference: Sequence[Scored] | None,
    first_sequence: int,
    group: int = 1,
) -> list[Sample]:
    """The samples as the actor learns from them, with advantages and the reference's scores.

    advantages: one for each, or one for each of its tokens.

    first_sequence: index of the first sample over all ranks. group: responses to a prompt.
    """
    scores = [one.log_probs for one in reference] if reference else [None] * len(samples)
    return [
        replace(
            sample,
            advantage=advantage if np.ndim(advantage) else float(advantage),
            reference_log_probs=log_probs,
            number=number,
            group=number // group,
        )
        for number, (sample, advantage, log_probs) in enumerate(
            zip(samples, advantages, scores, strict=True), first_sequence
        )
    ]
