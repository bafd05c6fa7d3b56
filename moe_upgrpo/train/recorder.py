# SPDX-License-Identifier: Apache-2.0
"""The record of a run: token rows, metrics and evaluations of its steps, and lines on screen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.heap import Heap
from moe_upgrpo.megatron import groups
from moe_upgrpo.record import finish
from moe_upgrpo.record.alarms import Watch
from moe_upgrpo.rollout.base import Engine, SamplingConfig
from moe_upgrpo.store import RunFolder, read_metrics, write_evaluation
from moe_upgrpo.tasks import Problem, Task
from moe_upgrpo.train import evaluate
from moe_upgrpo.train.apart import Apart
from moe_upgrpo.train.clock import Clock
from moe_upgrpo.train.place import EVALUATION, Place, seed_of
from moe_upgrpo.train.progress import Display
from moe_upgrpo.train.record import TrainedStep
from moe_upgrpo.train.tracking import Tracking
from moe_upgrpo.train.writing import TokenLogThread


@dataclass(kw_only=True)
class Evaluation:
    """Accuracy on held-out problems, which all ranks share. engine: None where there is none."""

    engine: Engine | None
    task: Task
    sampling: SamplingConfig
    place: Place
    run: RunFolder
    seed: int
    samples: int
    most_problems: int

    def why_not(self) -> str | None:
        """Why there is no evaluation; None where there is one."""
        if self.engine is None:
            return "rollouts are loaded: no evaluation"
        return None if self.task.heldout_problems() else "no --eval-data: no evaluation"

    def of(self, step: int) -> dict[str, float]:
        """Metrics of the engine's weights after `step`; writes a file of each problem's counts."""
        problems: list[Problem] = self.task.heldout_problems()[: self.most_problems]
        counts = evaluate.count_correct(
            self.engine,
            problems[self.place.rank :: self.place.size],
            self.task,
            sampling=self.sampling,
            samples=self.samples,
            seed=seed_of(self.seed, EVALUATION, step, self.place.rank),
        )
        shares = groups.gather_everywhere([counts])
        if self.place.rank == 0:
            write_evaluation(self.run.evaluations, step, evaluate.by_problem(shares, problems))
        return evaluate.finish(shares)


@dataclass(kw_only=True)
class Recorder:
    """Writes what the ranks measured; rank 0 shows it."""

    run: RunFolder
    token_log: TokenLogThread
    apart: Apart
    tracking: Tracking
    display: Display
    evaluation: Evaluation
    place: Place
    steps: int
    eval_every: int
    report: bool
    watch: Watch
    heap: Heap = field(default_factory=Heap)

    def log_tokens(self, step: int, trained: TrainedStep) -> None:
        """Hand this data-parallel rank's token rows to the thread that writes them."""
        if self.place.copy_rank == 0:
            record = trained.record
            self.token_log.write(step, record.token_rows(), record.prompts())
        if self.apart.ranks:
            self.token_log.settle()
            self.apart.send()

    def log_step(self, step: int, trained: TrainedStep, clock: Clock) -> dict:
        """Sum the step's metrics over the ranks, evaluate where due, write and return the row."""
        with clock("logging"):
            self.heap.end_step()
            metrics = finish(
                groups.sum_metrics(trained.sums()),
                groups.sum_metrics(trained.loss_metrics()),
                groups.largest(trained.record.maxima()),
            )
        metrics["tokens/visited"] = metrics["tokens/sampled"] * trained.epochs
        metrics["grad_norm"] = float(np.mean([update.grad_norm for update in trained.updates]))
        if flips := sum(update.recompute_flips for update in trained.updates):
            metrics["recompute/router_flips"] = float(flips)
        seconds = clock.seconds | {"total": clock.total()}
        if trained.old.analysed:
            seconds["decomposition"] = trained.old.seconds
        row = {"step": step} | metrics | {f"time/{name}": s for name, s in seconds.items()}
        row |= _over_ranks(clock)
        row["tokens_per_second"] = metrics["tokens/sampled"] / seconds["total"]
        raised = self.watch.add_to(row)
        if self.evaluates(step) and not self.evaluation.why_not():
            row |= self.evaluation.of(step)
        self._append(row)
        if self.place.rank == 0:
            self.display.step(row, raised)
        return row

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after the step."""
        return step % self.eval_every == 0 or step == self.steps

    def log_evaluation(self, step: int) -> None:
        """Write a row of its own for the model before the first step."""
        if why_not := self.evaluation.why_not():
            self.display.say(why_not)
            return
        row = {"step": step} | self.evaluation.of(step)
        self._append(row)
        self.display.say(
            f"warm start: held-out greedy {row['eval/greedy']:.3f}, pass@1 {row['eval/pass@1']:.3f}"
        )

    def _append(self, row: dict) -> None:
        if self.place.rank == 0:
            self.run.append_metrics(row)
            self.tracking.log(row)

    def finish(self) -> None:
        """Write the report and print the summary."""
        self.token_log.settle()
        groups.from_rank_0(None)  # every rank's rows are there for the report
        if self.place.rank:
            return
        self.display.summary(read_metrics(self.run.path))
        if not self.report:
            return
        try:
            from moe_upgrpo.report import write_report

            write_report([self.run.path], self.run.report_path)
            self.display.say(f"report: {self.run.report_path}")
        except UserError as error:  # its libraries are an extra; the run itself is whole
            self.display.say(f"no report: {error}")


def _over_ranks(clock: Clock) -> dict[str, float]:
    """Metrics of the step's time that are sums over all ranks, which all call this.

    A phase whose waiting one rank could not measure has no share.
    """
    phases = list(clock.seconds)
    waited = [clock.waited.get(phase, math.nan) for phase in phases]
    seconds = [clock.seconds[phase] for phase in phases]
    cpu, *sums = groups.summed_everywhere([clock.cpu(), *waited, *seconds])
    shares = [w / s for w, s in zip(sums[: len(phases)], sums[len(phases) :], strict=True)]
    measured = {n: x for n, x in zip(phases, shares, strict=True) if not math.isnan(x)}
    return {"time/cpu": cpu} | {f"time/waiting/{phase}": x for phase, x in measured.items()}
