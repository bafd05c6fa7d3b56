# SPDX-License-Identifier: Apache-2.0
"""The queue of batches that are sampled ahead of the steps that train on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

from moe_upgrpo.errors import MachineFault
from moe_upgrpo.megatron import groups
from moe_upgrpo.rollout.base import Rollout

Starved = Literal["wait", "end"]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a step waits for its batch before that is said, and what follows.

    say: shows a line; silent on all ranks but the first.
    """

    seconds: float = 300.0
    then: Starved = "wait"
    say: Callable[[str], None] = print


class Ahead:
    """One rank's queue. A thread samples the batches and puts weights into the engine, in the order
    in which it was asked: so which weights sample a batch is decided when it is asked for, and does
    not depend on how fast anything is.
    """

    def __init__(self, patience: Patience):
        self.patience = patience
        self._thread = ThreadPoolExecutor(1, "generate")
        self._batches: dict[int, Future] = {}
        self._failed: BaseException | None = None
        self._said = False

    def __contains__(self, step: int) -> bool:
        return step in self._batches

    def restore(self, step: int, rollouts: list[Rollout]) -> None:
        """Put a batch in that is sampled already."""
        self._batches[step] = Future()
        self._batches[step].set_result(rollouts)

    def sample(self, step: int, sample: Callable[[], list[Rollout]]) -> None:
        """Have a step's batch sampled, after all that was asked for before."""
        self._batches[step] = self._thread.submit(self._run, sample)

    def extend(self, step: int, more: Callable[[list[Rollout]], list[Rollout]]) -> None:
        """Have a batch of the queue continued, after all that was asked for before."""
        before = self._batches[step]
        self._batches[step] = self._thread.submit(self._run, lambda: more(before.result()))

    def put_weights(self, put: Callable[[], None]) -> None:
        """Have weights put into the engine, after all that was asked for before."""
        self._thread.submit(self._run, put)

    def _run(self, work: Callable):
        # After weights that did not arrive, the next batch would be of others than asked for.
        if self._failed is not None:
            raise self._failed
        try:
            return work()
        except BaseException as error:
            self._failed = error
            raise

    def take(self, step: int) -> list[Rollout]:
        """A step's batch, out of the queue. A collective of all ranks.

        Where any rank has waited for longer than `patience.seconds`, rank 0 says so once in a run;
        they then wait on, or all raise MachineFault.
        """
        batch = self._batches.pop(step)
        while late := self._late(batch):
            self._starve(step, late)
        return batch.result()

    def _late(self, batch: Future) -> int:
        """The number of ranks whose batch is not there after a while."""
        wait([batch], self.patience.seconds)
        return int(groups.summed_everywhere([float(not batch.done())])[0])

    def _starve(self, step: int, late: int) -> None:
        seconds = f"{self.patience.seconds:g} s"
        said = f"step {step} has waited {seconds} for its batch, which {late} rank(s) still sample"
        if self.patience.then == "end":
            raise MachineFault(
                f"{said}: the engine stands still, or is slower than --starve-after allows. Ended, "
                "as --starved end says, without training on anything else."
            )
        if not self._said:
            self._said = True
            self.patience.say(
                f"{said}. Training waits on and takes no other batch; said once in a run. "
                "--starved end ends such a run."
            )

    def settle(self) -> None:
        """Wait until all that was asked for is done: the engine then has the newest weights."""
        self._thread.submit(self._run, lambda: None).result()

    def waiting(self) -> dict[int, Sequence[Rollout]]:
        """The batches of the queue by their steps, once all are sampled."""
        return {step: batch.result() for step, batch in sorted(self._batches.items())}
