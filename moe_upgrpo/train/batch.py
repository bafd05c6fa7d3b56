# SPDX-License-Identifier: Apache-2.0
"""The batch of one step: groups of responses with the verifier's verdicts, and their rewards.

G responses to a problem are a group. Shapes: B responses of this data-parallel rank, the G of a
problem adjacent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import dynamic_sampling, overlong_penalty
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.tasks import Verdict
from moe_upgrpo.tasks.base import Terms
from moe_upgrpo.train.place import VERDICTS, seed_of


@dataclass(frozen=True, kw_only=True)
class Group:
    """The responses to one problem with their verdicts."""

    rollouts: Sequence[Rollout]
    verdicts: Sequence[Verdict]

    @property
    def rewards_G(self) -> np.ndarray:
        """Rewards, before the penalty for length."""
        return np.array([verdict.reward for verdict in self.verdicts])

    @property
    def correct_G(self) -> np.ndarray:
        """Whether each response is right, 1 or 0."""
        return np.array([verdict.correct for verdict in self.verdicts], np.float32)

    @property
    def mixed(self) -> bool:
        """Whether their rewards differ. Any other group has advantages of 0, unless its rewards
        differ by length."""
        return bool(self.rewards_G.max() > self.rewards_G.min())


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Counts over everything that was sampled for a step, whether it is trained on or not."""

    groups: int
    mixed: int
    kept: int
    responses: int
    correct: int
    killed: int  # responses that took the verifier too long
    failed: int = 0  # responses for which there was no reward
    parts: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # sums of named rewards

    def shares(self) -> dict[str, tuple[float, int]]:
        """Numerators and denominators, by the metric's name."""
        return {f"reward/of/{name}": pair for name, pair in self.parts.items()} | {
            "reward/correct_rate": (self.correct, self.responses),
            "reward/failed_rate": (self.failed, self.responses),
            "verifier/killed_rate": (self.killed, self.responses),
            "groups/mixed_rate": (self.mixed, self.groups),
            "groups/kept": (self.kept, self.groups),
        }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This data-parallel rank's groups of a step."""

    groups: Sequence[Group]
    sampled: Sampled

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def correct_B(self) -> np.ndarray:
        return np.concatenate([group.correct_G for group in self.groups])

    @property
    def earned_B(self) -> np.ndarray:
        return np.concatenate([group.rewards_G for group in self.groups])

    @property
    def terms_B(self) -> list[Terms]:
        """The rewards that add up to each response's reward, where there are several."""
        return [verdict.terms for group in self.groups for verdict in group.verdicts]


def collect(sample: Callable[[int], Sequence[Group]], *, groups: int, max_refills: int) -> Batch:
    """Make a batch of `groups` groups from generation batches: `sample(r)` makes batch r.

    Without refills it is batch 0. With refills it is DAPO's dynamic sampling (arXiv 2503.14476,
    eq. 11): only mixed groups are kept, and batches 1 to `max_refills` are sampled until there
    are enough; the surplus of the last one is dropped.

    Raises UserError if `max_refills` refills do not give enough.
    """
    refill, batches = itertools.count(), []

    def generate() -> list[tuple[Group, np.ndarray]]:
        batches.append(sample(next(refill)))
        return [(group, group.rewards_G) for group in batches[-1]]

    try:
        pairs = dynamic_sampling(generate, groups, 1 + max_refills) if max_refills else generate()
    except UserError:
        if len(batches) <= max_refills:
            raise  # the error is one of a batch itself
        sampled = [group for batch in batches for group in batch]
        mixed = sum(group.mixed for group in sampled)
        last = " All problems were tried." if not batches[-1] else ""
        raise UserError(
            f"max_refills={max_refills}: {len(sampled)} groups were sampled, {mixed} of them have "
            f"right and wrong responses; {groups} are needed.{last} Allow more refills, give "
            "larger groups or fewer prompts, or problems that the model solves now and then."
        ) from None
    sampled = [group for batch in batches for group in batch]
    return Batch(groups=[group for group, _ in pairs], sampled=_counted(sampled, len(pairs)))


def _counted(sampled: Sequence[Group], kept: int) -> Sampled:
    verdicts = [verdict for group in sampled for verdict in group.verdicts]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    of_name = {name: [v.parts[name] for v in verdicts if name in v.parts] for name in names}
    return Sampled(
        groups=len(sampled),
        mixed=sum(group.mixed for group in sampled),
        kept=kept,
        responses=len(verdicts),
        correct=int(sum(verdict.correct for verdict in verdicts)),
        killed=sum(verdict.killed for verdict in verdicts),
        failed=sum(bool(verdict.failed) for verdict in verdicts),
        parts={name: (math.fsum(values), len(values)) for name, values in of_name.items()},
    )


def shaped_rewards(
    earned_B: np.ndarray,
    lengths_B: np.ndarray,
    *,
    wrong: float = 0.0,
    max_length: int,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> np.ndarray:
    """The rewards `[B]` float32: 1 where 1 was earned, `wrong` for 0, in proportion between them;
    with a buffer, plus DAPO's penalty for overlong responses (`overlong_penalty`), right or wrong.
    """
    rewards_B = np.where(earned_B == 1, 1.0, wrong + (1 - wrong) * earned_B)
    if overlong_buffer:
        lengths = torch.from_numpy(lengths_B)
        rewards_B += overlong_penalty(lengths, max_length, overlong_buffer, overlong_factor).numpy()
    return rewards_B.astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewarding:
    """The rewards that responses earn by their verdicts and lengths.

    false_positives: share of the wrong responses that pass as right, drawn at random.
    """

    seed: int
    max_length: int
    wrong: float = 0.0
    false_positives: float = 0.0
    overlong_buffer: int = 0
    overlong_factor: float = 1.0

    def rewards(self, batch: Batch, step: int, *, first_prompt: int) -> np.ndarray:
        """Rewards of the batch's responses, [B] float32.

        The wrong responses that pass as right are drawn for each problem of the step and each
        response to it, so that every layout has the same errors. first_prompt: index of the batch's
        first prompt among those of all ranks.
        """
        draws = [
            np.random.default_rng(seed_of(self.seed, VERDICTS, step, first_prompt + i)).random(
                len(group.correct_G)
            )
            for i, group in enumerate(batch.groups)
        ]
        mistaken_B = np.concatenate(draws) < self.false_positives
        return shaped_rewards(
            np.where(mistaken_B & (batch.correct_B != 1), 1, batch.earned_B),
            np.array([int(rollout.sampled_or_all.sum()) for rollout in batch.rollouts]),
            wrong=self.wrong,
            max_length=self.max_length,
            overlong_buffer=self.overlong_buffer,
            overlong_factor=self.overlong_factor,
        )
