# SPDX-License-Identifier: Apache-2.0
"""The rollouts of each step: sampled, sampled ahead or loaded, judged, and kept in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import backend, groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.beside import hand_over
from moe_upgrpo.rollout.cache import load_rollouts, save_rollouts
from moe_upgrpo.rollout.partial import go_on
from moe_upgrpo.rollout.turns import converse, turns_of
from moe_upgrpo.tasks import Problem, Task, judged
from moe_upgrpo.train.ahead import Ahead, Patience
from moe_upgrpo.train.batch import Batch, Group, collect
from moe_upgrpo.train.place import CONTINUING, SAMPLING, Place, seed_of
from moe_upgrpo.train.stopping import GivenUp, Stopping


@dataclass(kw_only=True)
class Rollouts:
    """One rank's part in the rollouts of all steps.

    engine: None where rollouts are loaded, from `load_from`. done: steps before this process.
    staleness: N batches are sampled ahead, each with the weights of N steps before those that it
    trains; those of a run's first steps, which nothing precedes, with those of its start. Batch k
    is of version max(first, k − 1 − N): when anything is finished does not matter. partial: tokens
    of a response between two updates; after them it goes on with the next weights, and is finished
    with those of k − 2. ahead: all ranks' rollouts by step, where they were sampled ahead before
    this process.
    """

    task: Task
    engine: Engine | None
    sampling: SamplingConfig
    place: Place
    stopping: Stopping
    seed: int
    steps: int
    prompts: int
    group: int
    max_refills: int = 0
    staleness: int = 0
    partial: int | None = None
    patience: Patience = field(default_factory=Patience)
    engine_every: int = 1
    save_in: Path | None = None
    load_from: Path | None = None
    done: int = 0
    ahead: InitVar[Mapping[int, Sequence[Rollout]] | None] = None

    def __post_init__(self, ahead: Mapping[int, Sequence[Rollout]] | None):
        if self.partial and turns_of(self.task) > 1:
            raise UserError(
                f"partial_rollouts={self.partial} with a task of {turns_of(self.task)} turns: only "
                "single responses go on after an update. Leave it out."
            )
        self._ahead = Ahead(self.patience)
        self._versions: dict[int, int] = {}  # of the weights that sample a step's batch ahead
        for step, rollouts in (ahead or {}).items():
            self._ahead.restore(step, self.place.of_rank(self.place.of_copy(rollouts)))
            self._versions[step] = rollouts[0].weight_version

    @property
    def first_sequence(self) -> int:
        """Index, over all ranks, of this rank's first sequence of a step."""
        return self.place.dp_rank * (self.prompts // self.place.dp_size) * self.group

    def stale(self, step: int) -> bool:
        """Whether the step's batch was sampled ahead, with older weights than it trains."""
        return self._versions.get(step, step - 1) != step - 1

    def problems(self, step: int, refill: int = 0) -> list[Problem]:
        """This data-parallel rank's share of the step's problems, or of a refill of them."""
        everyone = self.task.training_problems(
            self.prompts, seed=self.seed, step=step, refill=refill
        )
        return self.place.of_copy(everyone)

    def batch(self, step: int) -> Batch | None:
        """This data-parallel rank's groups of the step, sampled or loaded, and judged.

        None where a signal came meanwhile and generation was given up: call `leave_if_asked` next.
        """
        groups_needed = self.prompts // self.place.dp_size
        if self.engine is None:
            problems, rollouts = self._loaded(step)
            return collect(
                lambda refill: self._judged(problems, rollouts),
                groups=groups_needed,
                max_refills=0,
            )

        def sample(refill: int) -> list[Group]:
            problems = self.problems(step, refill)
            if not problems:
                return []  # every problem has been sampled
            return self._judged(problems, self._generated(problems, step, refill))

        try:
            batch = collect(sample, groups=groups_needed, max_refills=self.max_refills)
        except GivenUp:
            return None
        if self.save_in and self.place.copy_rank == 0:
            save_rollouts(self.save_in, step, self.place.dp_rank, batch.rollouts)
        return batch

    def _judged(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[Group]:
        """The rollouts in groups with the verifier's verdicts.

        Each rank of a model copy judges a part and shares it, so that all have the same verdicts:
        whether an answer takes too long may differ from one call to the next.

        Raises UserError where no response could be judged: nothing would be trained on.
        """
        size = self.group
        mine = self.place.of_rank([(problems[i // size], r) for i, r in enumerate(rollouts)])
        verdicts = groups.gather_in_model_copy(
            judged(
                self.task,
                [p for p, _ in mine],
                [r.response_ids for _, r in mine],
                [r.sampled for _, r in mine],
            )
        )
        if all(verdict.failed for verdict in verdicts):
            raise UserError(
                f"the reward failed for all {len(verdicts)} responses of a step; for the first, to "
                f"problem {problems[0].prompt!r:.120}: {verdicts[0].failed}"
            )
        return [
            Group(rollouts=rollouts[i : i + size], verdicts=verdicts[i : i + size])
            for i in range(0, len(rollouts), size)
        ]

    def _generated(self, problems: Sequence[Problem], step: int, refill: int = 0) -> list[Rollout]:
        """Responses to `problems`; the ranks of a model copy each sample a part, and share all."""
        mine: list[Rollout | None]
        if step in self._ahead:
            mine = self._ahead.take(step)
        elif self.staleness:  # never given up: a state has what was sampled ahead in it
            self.settle()  # a resumed run's weights are still on their way
            mine = self._sample(problems, step, refill)
        else:
            try:
                with self.stopping.giving_up():
                    mine = self._sample(problems, step, refill)
            except GivenUp:
                mine = [None]
        rollouts = groups.gather_in_model_copy(mine)
        if any(rollout is None for rollout in rollouts):
            raise GivenUp
        self._check_versions(rollouts, step)
        return rollouts

    def _sample(
        self, problems: Sequence[Problem], step: int, refill: int = 0, most: int | None = None
    ) -> list[Rollout]:
        """This rank's part of the responses; not a collective, so that a thread may call it.

        most: tokens after which a response is cut off; None: its most.
        """
        longest = self.sampling.max_new_tokens
        cut = most is not None and most < longest
        with backend.suspended():
            return converse(
                self.engine,
                self.task,
                self.place.of_rank(problems),
                replace(self.sampling, max_new_tokens=most) if cut else self.sampling,
                samples_per_prompt=self.group,
                seed=seed_of(self.seed, SAMPLING, step, self.place.rank, refill),
            )

    def generate_ahead(self, step: int) -> list[int]:
        """Have the queue filled up while `step` is trained, with the weights from before it.

        No more than `staleness` batches wait or are being sampled. Returns the steps of the new.
        """
        begun = []
        for later in range(step + 1, min(step + self.staleness, self.steps) + 1):
            most = None if later == step + 1 else self.partial  # the next batch is finished
            if later not in self._ahead:
                begun.append(later)
                self._versions[later] = step - 1
                sample = partial(self._sample, self.problems(later), later, most=most)
                self._ahead.sample(later, sample)
            elif self.partial:
                self._ahead.extend(later, partial(self._go_on, step=later, at=step, most=most))
        return begun

    def _go_on(
        self, rollouts: list[Rollout], *, step: int, at: int, most: int | None
    ) -> list[Rollout]:
        """This rank's part of a step's responses, continued while step `at` is trained."""
        seed = seed_of(self.seed, CONTINUING, step, self.place.rank, at)
        with backend.suspended():
            return go_on(self.engine, rollouts, self.sampling, most=most, seed=seed)

    def settle(self) -> None:
        """Wait until the engine has the newest weights and samples nothing."""
        if self.staleness > 1:  # else it has them since the last update
            self._ahead.settle()

    def ahead_of(self, step: int) -> dict[int, list[Rollout]]:
        """This copy's rollouts sampled ahead of the state after `step`, by the steps that train
        them, to be kept with it.

        A collective. One rank of each copy gets them, the others nothing.
        """
        waiting = {
            later: groups.gather_in_model_copy(rollouts)
            for later, rollouts in self._ahead.waiting().items()
        }
        return waiting if self.place.copy_rank == 0 else {}

    def _loaded(self, step: int) -> tuple[list[Problem], list[Rollout]]:
        """This rank's share of a step's saved rollouts, and the problems that they answer."""
        everyone = load_rollouts(self.load_from, step)
        expected, size = self.prompts * self.group, self.group
        mine = self.place.of_copy(everyone)
        known = {
            problem.prompt_ids.tobytes(): problem
            for refill in range(1 + self.max_refills)
            for problem in self.task.training_problems(
                self.prompts, seed=self.seed, step=step, refill=refill
            )
        }
        answered = [known.get(rollout.prompt_ids.tobytes()) for rollout in mine]
        problems = answered[::size]
        whole = all(problem is problems[i // size] for i, problem in enumerate(answered))
        if len(everyone) != expected or not whole or None in problems:
            raise UserError(
                f"{self.load_from}: the {len(everyone)} rollouts of step {step} do not "
                f"answer the {expected} prompts of this run. Use the digits or data, seed, "
                "prompts, group and max_refills of the run that saved them."
            )
        self._check_versions(mine, step)
        return problems, mine

    def _check_versions(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Refuse rollouts that were sampled with other weights than the expected ones."""
        expected = self._versions.get(step, step - 1)
        expected -= expected % self.engine_every
        for i, rollout in enumerate(rollouts):
            versions = expected
            if self.partial and step in self._versions:
                parts = np.arange(len(rollout.response_ids)) // self.partial
                versions = np.minimum(expected + parts, max(expected, step - 2))
            if (rollout.versions_or_all != versions).any():
                raise UserError(
                    f"Sequence {self.first_sequence + i} of step {step} was sampled with weight "
                    f"version {_named(rollout.versions_or_all)}; {_named(versions)} was expected"
                    + (" (the saved run's --staleness differs)" if self.engine is None else "")
                    + "."
                )

    def update_engine(self, actor: MegatronActor, step: int) -> None:
        """Give the engine the trainer's weights, once it has finished what it is generating.

        With up to one batch ahead this waits: the next step needs that batch. With more, a copy of
        the weights waits its turn, and training goes on.
        """
        if self.engine is None or step % self.engine_every:
            return
        if self.staleness < 2:
            self._ahead.waiting()
        with backend.suspended():
            if self.staleness < 2:
                self.engine.update_weights(actor.export_weights(), version=step)
            else:
                put = hand_over(self.engine, actor.export_weights(), version=step)
                self._ahead.put_weights(put)


def _named(versions: int | np.ndarray) -> str:
    """Weight versions in words, each once."""
    return " and ".join(map(str, np.unique(versions)))
