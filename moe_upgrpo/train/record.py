# SPDX-License-Identifier: Apache-2.0
"""The record of one RL step of this trainer, from its rollouts, scores and updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_upgrpo.losses import Metric, merge_metrics
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.record import SequenceRecord, StepRecord, Sums, gap_terms
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.train.analysis import NoiseFloor, OldScores
from moe_upgrpo.train.batch import Batch, Sampled


@dataclass(kw_only=True)
class LastVisit:
    """Each sequence at its last optimizer visit, [T] each, T its response tokens."""

    logp_train: Sequence[np.ndarray]
    clipped: Sequence[np.ndarray]
    gradient_weight: Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Updated:
    """A step's optimizer steps, the scores at the weights before them, and each last visit."""

    old: OldScores
    updates: list[Update]
    last: LastVisit
    epochs: int = 1  # passes over the samples
    terms: Sums = field(default_factory=dict)  # beside the policy loss
    weights: Metric | None = None  # tensors that changed, out of all


def sequence_records(
    *,
    first_sequence: int,
    group: int,
    replay: str,
    weight_version: int,
    rollouts: Sequence[Rollout],
    rewards: np.ndarray,
    advantages: Sequence[float | np.ndarray],
    old: OldScores,
    reference: Sequence[Scored] | None,
    last: LastVisit,
) -> list[SequenceRecord]:
    """The records of this data-parallel rank's sequences.

    first_sequence: index of the first one over all ranks. group: responses to each prompt.
    weight_version: the trainer's, before the step's first update. advantages: one for a response,
    or one for each of its tokens.
    """
    records = []
    for i, rollout in enumerate(rollouts):
        native, held = old.native[i], old.held and old.held[i]
        policy = old.policy(replay)[i]
        counts = np.flatnonzero(rollout.sampled_or_all)  # N of the T response tokens
        gap = None
        if old.analysed:
            gap = gap_terms(
                replay,
                rollout=rollout.logp_rollout,
                native=native.log_probs,
                held=held.log_probs,
                counterpart=old.counterpart and old.counterpart[i],
                train=last.logp_train[i],
                behind=old.behind and old.behind[i],
            )
            gap = {name: values[counts] for name, values in gap.items()}
        records.append(
            SequenceRecord(
                prompt=(first_sequence + i) // group,
                token_ids=np.concatenate([rollout.prompt_ids, rollout.response_ids]),
                positions=len(rollout.prompt_ids) + counts,
                reward=rewards[i],
                advantage=np.broadcast_to(advantages[i], policy.log_probs.shape)[counts],
                logp_rollout=rollout.logp_rollout[counts],
                logp_old=policy.log_probs[counts],
                logp_train=last.logp_train[i][counts],
                clipped=last.clipped[i][counts],
                gradient_weight=last.gradient_weight[i][counts],
                rollout_routes=rollout.routes,
                train_routes=native.routes,
                own_routes=held and held.own_routes,
                margins=native.margins,
                entropy=policy.entropy[counts],
                logp_reference=reference and reference[i].log_probs[counts],
                gap=gap,
                staleness=weight_version - rollout.weight_version
                if rollout.versions is None
                else weight_version - rollout.versions[counts],
                finished=rollout.finished,
                held_routes=held.routes if old.analysed else None,
                held_gates=held.gates if old.analysed else None,
                native_gates=native.gates if old.analysed else None,
            )
        )
    return records


@dataclass(kw_only=True)
class TrainedStep:
    """One step of this data-parallel rank: its sequences, its updates and other measurements."""

    record: StepRecord
    old: OldScores
    updates: Sequence[Update]
    updates_counted: int  # optimizer steps on the first data-parallel rank, 0 on the others
    noise: NoiseFloor  # empty where this step does not measure it
    epochs: int = 1  # passes over the sequences
    terms: Sums = field(default_factory=dict)  # of the KL and entropy terms
    sampled: Sampled | None = None  # None: nothing was sampled for training
    weights: Metric | None = None  # parameter tensors that the updates changed, out of all

    def loss_metrics(self) -> Sums:
        """The loss library's metrics over all optimizer steps, this rank's share."""
        return merge_metrics([update.metrics for update in self.updates])

    def sums(self) -> Sums:
        """Every other mean of the step, this rank's share."""
        # The ranks' losses add up to the loss: it has global denominators already.
        sums = {"loss/policy": Metric(sum(u.loss for u in self.updates), self.updates_counted)}
        sums |= self.record.sums() | self.terms
        if self.sampled is not None:
            sums |= {name: Metric(*pair) for name, pair in self.sampled.shares().items()}
        if self.weights is not None:
            sums["weights/changed_rate"] = self.weights
        return sums | self.noise.sums


def record_step(
    *,
    batch: Batch,
    updated: Updated,
    noise: NoiseFloor,
    num_experts: int,
    counts_updates: bool,
    first_sequence: int,
    penalty: Sums | None = None,
    **of_sequences,
) -> TrainedStep:
    """The record of a step of training.

    counts_updates: true on the first data-parallel rank: all take the same optimizer steps.
    penalty: sums of the amounts taken off the rewards for the KL divergence, if any.
    of_sequences: see `sequence_records`.
    """
    sequences = sequence_records(
        first_sequence=first_sequence,
        rollouts=batch.rollouts,
        old=updated.old,
        last=updated.last,
        **of_sequences,
    )
    return TrainedStep(
        record=StepRecord(
            sequences=sequences,
            first_sequence=first_sequence,
            num_experts=num_experts,
            noise_layers=noise.layers,
        ),
        old=updated.old,
        updates=updated.updates,
        updates_counted=len(updated.updates) if counts_updates else 0,
        noise=noise,
        epochs=updated.epochs,
        terms=updated.terms | (penalty or {}),
        sampled=batch.sampled,
        weights=updated.weights,
    )


def record_without_update(
    *,
    rollouts: Sequence[Rollout],
    old: OldScores,
    num_experts: int,
    group: int = 1,
    logp_train: Sequence[np.ndarray] | None = None,
    noise: NoiseFloor | None = None,
) -> StepRecord:
    """The record of sequences without rewards or an update.

    logp_train: log-probs at other weights than the old ones, where those are to be compared.
    """
    native = [scored.log_probs for scored in old.native]
    nothing = np.zeros(len(native), np.float32)
    sequences = sequence_records(
        first_sequence=0,
        group=group,
        replay="none",
        weight_version=0,
        rollouts=rollouts,
        rewards=nothing,
        advantages=nothing,
        old=old,
        reference=None,
        last=LastVisit(
            logp_train=native if logp_train is None else logp_train,
            clipped=[np.zeros(len(x), bool) for x in native],
            gradient_weight=[np.zeros(len(x), np.float32) for x in native],
        ),
    )
    return StepRecord(
        sequences=sequences,
        first_sequence=0,
        num_experts=num_experts,
        noise_layers=noise.layers if noise else {},
    )
