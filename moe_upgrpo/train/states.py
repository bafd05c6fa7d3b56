# SPDX-License-Identifier: Apache-2.0
"""Saving of a run's state, when it is due and when a signal ends the run."""

from __future__ import annotations

from dataclasses import dataclass

from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.store import RunFolder
from moe_upgrpo.store.checkpoints import Checkpoints, step_of
from moe_upgrpo.train import resume
from moe_upgrpo.train.rollouts import Rollouts
from moe_upgrpo.train.stopping import Stopping
from moe_upgrpo.train.writing import TokenLogThread


@dataclass(kw_only=True)
class States:
    """The states of one run; its methods are collectives."""

    run: RunFolder
    actor: MegatronActor
    behind: MegatronActor | None
    reference: MegatronActor | None  # where it does not keep the start model's weights
    rollouts: Rollouts
    token_log: TokenLogThread
    thread: resume.StateThread | None  # None: training waits while a state is written
    stopping: Stopping
    steps: int
    every: int
    keep: int

    def save_if_due(self, step: int) -> None:
        """Keep the state to resume from, where it is due: a step's last action.

        Raises any error of a state that was written meanwhile.
        """
        if self.thread:
            self.thread.look()
        if self.every and (step == self.steps or step % self.every == 0):
            self._save(step, waits=step == self.steps)

    def leave_if_asked(self, done: int, *, in_step: bool = False) -> None:
        """End the run where a signal asked any rank to; the state after step `done` is kept.

        in_step: the next step has begun. It is given up, unless it was sampled ahead. Raises
        Stopped on every rank.
        """
        if done == self.steps or (in_step and self.rollouts.staleness):
            return
        asked = groups.largest_everywhere(self.stopping.asked or 0)
        if not asked:
            return
        self.stopping.agree(asked)
        if not done:
            raise self.stopping.error("before its first step was done")
        if not self.every:
            how = f"after step {done}; --save-every 0 keeps no state"
            raise self.stopping.error(how, state=False)
        if self.thread:
            self.thread.settle()
        whole = Checkpoints(self.run.checkpoints).all()
        if groups.from_rank_0(not whole or step_of(whole[-1]) != done):
            self._save(done, waits=True)
            # When the first rank leaves, the others are ended: not before the state has its name.
            groups.from_rank_0(None)
        raise self.stopping.error(f"with its state after step {done} kept")

    def _save(self, step: int, *, waits: bool) -> None:
        self.token_log.settle()
        resume.save(
            self.run,
            step,
            actor=self.actor,
            behind=self.behind,
            reference=self.reference,
            ahead=self.rollouts.ahead_of(step),
            keep=self.keep,
            thread=self.thread,
        )
        if self.thread and waits:
            self.thread.settle()
