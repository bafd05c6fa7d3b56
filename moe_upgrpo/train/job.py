"""One rank's view of a training run: the parts of a step, which `train.loop` puts in order."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric
from moe_upgrpo.megatron import backend, groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.cache import load_rollouts, save_rollouts
from moe_upgrpo.store import (
    RunFolder,
    TokenLogWriter,
    read_metrics,
    write_evaluation,
)
from moe_upgrpo.store.checkpoints import Checkpoints, step_of
from moe_upgrpo.tasks import Problem, Task
from moe_upgrpo.train import alarms, analysis, evaluate, heap, record, resume
from moe_upgrpo.train.analysis import OldScores
from moe_upgrpo.train.batch import Batch, Group, collect, shaped_rewards
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.progress import Display
from moe_upgrpo.train.stopping import GivenUp, Stopping
from moe_upgrpo.train.tracking import Tracking

# What a stream of random numbers is for; the step and the rank complete its seed.
_SAMPLING, _SHUFFLING, _EVALUATION, _GLOBAL, _VERDICTS = range(5)


@dataclass(kw_only=True)
class Job:
    """One rank's view of the run."""

    config: TrainConfig
    rank: int
    world_size: int
    task: Task
    actor: MegatronActor
    reference: MegatronActor | None
    behind: MegatronActor | None  # at the weights that sampled the batch, where they are older
    engine: Engine | None  # None where rollouts are loaded
    sampling: SamplingConfig
    run: RunFolder
    tracking: Tracking
    display: Display
    stopping: Stopping
    done: int  # steps
    ahead: InitVar[list[Rollout] | None]  # everyone's rollouts of the next step, sampled ahead

    def __post_init__(self, ahead: list[Rollout] | None):
        self.loss = self.config.policy_loss()
        self._thread = ThreadPoolExecutor(1, "generate")
        self._ahead: Future | None = None
        self.dp_rank, self.dp_size = groups.data_parallel()
        self.copy_rank, self.copy_size = groups.model_parallel()
        if ahead is not None:
            of_copy = _share(ahead, self.dp_rank, self.dp_size)
            self._ahead = Future()
            self._ahead.set_result(_share(of_copy, self.copy_rank, self.copy_size))
        # With overlap, the only step whose batch is sampled with the weights that it trains.
        self._fresh_step = self.done + 1 if ahead is None else None
        self.token_log = TokenLogWriter(
            self.run.tokens,
            rank=self.dp_rank,
            layer_ids=self.actor.layer_ids,
            top_k=self.actor.top_k,
            num_experts=self.actor.num_experts,
            level=self.config.token_log,
            share=self.config.token_log_share,
        )

    @property
    def first_sequence(self) -> int:
        return self.dp_rank * (self.config.prompts // self.dp_size) * self.config.group

    def _seed(self, purpose: int, step: int, which: int, refill: int = 0) -> int:
        """Seed of one rank's, or one problem's, draws in a step."""
        numbers = (self.config.seed, purpose, step, which, *([refill] if refill else []))
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

    def seed_global_generators(self, step: int) -> None:
        """Whatever draws from them gives in a resumed run what it would have given."""
        seed = self._seed(_GLOBAL, step, self.rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _stale(self, step: int) -> bool:
        """Whether the step's batch was sampled ahead, with older weights than it trains."""
        return self.config.overlap and step != self._fresh_step

    def problems(self, step: int, refill: int = 0) -> list[Problem]:
        """This data-parallel rank's share of the step's problems, or of a refill of them."""
        everyone = self.task.training_problems(
            self.config.prompts, seed=self.config.seed, step=step, refill=refill
        )
        return _share(everyone, self.dp_rank, self.dp_size)

    def batch(self, step: int) -> Batch | None:
        """This data-parallel rank's groups of the step, sampled or loaded, and judged.

        None where a signal came meanwhile and generation was given up: `leave_if_asked` is next.
        """
        groups_needed = self.config.prompts // self.dp_size
        if self.engine is None:
            problems, rollouts = self._loaded(step)
            return collect(
                lambda refill: self._judged(problems, rollouts),
                groups=groups_needed,
                max_refills=0,
            )

        def sample(refill: int) -> tuple[list[Group], int]:
            problems = self.problems(step, refill)
            if not problems:
                return [], 0  # every problem has been sampled
            return self._judged(problems, self.generate(problems, step, refill))

        try:
            batch = collect(sample, groups=groups_needed, max_refills=self.config.max_refills)
        except GivenUp:
            return None
        if self.config.save_rollouts and self.copy_rank == 0:
            save_rollouts(self.config.save_rollouts, step, self.dp_rank, batch.rollouts)
        return batch

    def _judged(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout]
    ) -> tuple[list[Group], int]:
        """The rollouts in groups with the verifier's verdicts, and how many took it too long.

        Each rank of a model copy judges a part, so that all have the same verdicts: whether an
        answer takes too long may differ from one call to the next.
        """
        size = self.config.group
        before = self.task.killed
        verdicts = [
            self.task.reward(problem, rollout.response_ids)
            for problem, rollout in _share(
                [(problems[i // size], r) for i, r in enumerate(rollouts)],
                self.copy_rank,
                self.copy_size,
            )
        ]
        correct = np.array(groups.gather_in_model_copy(verdicts), np.float32)
        killed = sum(groups.gather_in_model_copy([self.task.killed - before]))
        if not np.isin(correct, (0, 1)).all():
            i = int(np.flatnonzero(~np.isin(correct, (0, 1)))[0])
            raise UserError(
                f"The verifier gave {correct[i]} to a response to {problems[i // size].prompt!r}: "
                "1 for a right and 0 for a wrong one are needed."
            )
        return [
            Group(rollouts=rollouts[i : i + size], correct_G=correct[i : i + size])
            for i in range(0, len(rollouts), size)
        ], killed

    def rewards(self, batch: Batch, step: int) -> np.ndarray:
        """Rewards of the batch's responses. Which wrong ones pass for right is drawn for each
        problem of the step and each response to it, so that every layout has the same errors."""
        first = self.first_sequence // self.config.group
        draws = [
            np.random.default_rng(self._seed(_VERDICTS, step, first + i)).random(len(g.correct_G))
            for i, g in enumerate(batch.groups)
        ]
        mistaken_B = np.concatenate(draws) < self.config.false_positives
        return shaped_rewards(
            np.where(mistaken_B, 1, batch.correct_B),
            np.array([len(rollout.response_ids) for rollout in batch.rollouts]),
            wrong=self.config.reward_wrong,
            max_length=self.sampling.max_new_tokens,
            overlong_buffer=self.config.overlong_buffer,
            overlong_factor=self.config.overlong_penalty,
        )

    def generate(self, problems: Sequence[Problem], step: int, refill: int = 0) -> list[Rollout]:
        """Responses to `problems`; the ranks of a model copy each sample a part, and share all."""
        mine: list[Rollout | None]
        if self.config.overlap:  # never given up: the next state has these rollouts in it
            mine = self._ahead.result() if self._ahead else self._sample(problems, step, refill)
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

    def _sample(self, problems: Sequence[Problem], step: int, refill: int = 0) -> list[Rollout]:
        """This rank's part of the responses; touches no other rank, so that a thread may do it."""
        mine = _share(problems, self.copy_rank, self.copy_size)
        with backend.suspended():
            return self.engine.generate(
                [problem.prompt_ids for problem in mine],
                self.sampling,
                samples_per_prompt=self.config.group,
                seed=self._seed(_SAMPLING, step, self.rank, refill),
            )

    def generate_ahead(self, step: int) -> None:
        """With overlap, begin to generate a step's batch with the weights that the engine holds."""
        if self.config.overlap and step <= self.config.steps:
            if self.behind is not None:
                self.behind.take_weights(self.actor)
            self._ahead = self._thread.submit(self._sample, self.problems(step), step)

    def _loaded(self, step: int) -> tuple[list[Problem], list[Rollout]]:
        """This rank's share of a step's saved rollouts, and the problems that they answer."""
        everyone = load_rollouts(self.config.load_rollouts, step)
        expected, size = self.config.prompts * self.config.group, self.config.group
        mine = _share(everyone, self.dp_rank, self.dp_size)
        known = {
            problem.prompt_ids.tobytes(): problem
            for refill in range(1 + self.config.max_refills)
            for problem in self.task.training_problems(
                self.config.prompts, seed=self.config.seed, step=step, refill=refill
            )
        }
        answered = [known.get(rollout.prompt_ids.tobytes()) for rollout in mine]
        problems = answered[::size]
        whole = all(problem is problems[i // size] for i, problem in enumerate(answered))
        if len(everyone) != expected or not whole or None in problems:
            raise UserError(
                f"{self.config.load_rollouts}: the {len(everyone)} rollouts of step {step} do not "
                f"answer the {expected} prompts of this run. Use the digits or data, seed, "
                "prompts, group and max_refills of the run that saved them."
            )
        self._check_versions(mine, step)
        return problems, mine

    def _check_versions(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Nothing is trained on that other weights have sampled than those meant."""
        expected = step - 1 - self._stale(step)
        expected -= expected % self.config.engine_every
        for i, rollout in enumerate(rollouts):
            if rollout.weight_version != expected:
                raise UserError(
                    f"Sequence {self.first_sequence + i} of step {step} was sampled with weight "
                    f"version {rollout.weight_version}; {expected} was expected"
                    + (" (the saved run's --overlap differs)" if self.engine is None else "")
                    + "."
                )

    def update_engine(self, step: int) -> None:
        """Give the engine the trainer's weights, once it has finished what it is generating."""
        if self._ahead:
            self._ahead.result()
        if self.engine is not None and step % self.config.engine_every == 0:
            with backend.suspended():
                self.engine.update_weights(self.actor.export_weights(), version=step)

    def samples(self, rollouts: Sequence[Rollout], advantages: np.ndarray) -> list[Sample]:
        return [
            Sample(
                tokens=np.concatenate([r.prompt_ids, r.response_ids]),
                prompt_length=len(r.prompt_ids),
                rollout_log_probs=r.logp_rollout,
                advantage=float(advantage),
            )
            for r, advantage in zip(rollouts, advantages, strict=True)
        ]

    @property
    def old_from_update(self) -> bool:
        """Whether the update starts at the old policy and ends after one optimizer step.

        Its forward is the old policy's then: ratios are exactly 1, and no other forward is needed.
        """
        config = self.config
        return config.replay == "none" and config.minibatches * config.epochs == 1

    def _analyses(self, step: int) -> bool:
        every = self.config.analyse_every
        return every > 0 and (step - 1) % every == 0

    def score_old(
        self, step: int, samples: Sequence[Sample], rollouts: Sequence[Rollout]
    ) -> OldScores | None:
        """The trainer's scores at the old weights: native, and under R3 held to the rollout's
        routes too. None: the step's only optimizer step makes the same forward, see `update`."""
        if self.old_from_update and not self._analyses(step):
            return None
        gates = ("gates",) if self._analyses(step) else ()
        native = self.actor.score(samples, record=(*OLD_RECORDS, *gates))
        if self.config.replay != "R3":
            return OldScores(native=native, held=None)
        held = self.actor.score(_held(samples, rollouts), record=("routes", *gates))
        return OldScores(native=native, held=held)

    def analyse(
        self,
        step: int,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        old: OldScores | None,
    ) -> dict[str, Metric]:
        """Begin to take the gap apart, and the noise floors of both sides, where this step does."""
        if not self._analyses(step):
            return {}
        if not self.actor.layer_ids:
            return analysis.trainer_noise_floor(self.actor, samples)
        begin = time.perf_counter()
        old.analysed = True
        if old.held is None:
            old.held = self.actor.score(_held(samples, rollouts), record=("routes", "gates"))
        if self.config.replay != "R3":
            old.counterpart = [None] * len(samples)
        if self.behind is not None and self._stale(step):
            held = _held(samples, rollouts)
            old.behind = [s.log_probs for s in self.behind.score(held, record=())]
        old.seconds = time.perf_counter() - begin
        floors = analysis.trainer_noise_floor(self.actor, samples)
        if self.engine is None:
            return floors
        mine = _share(samples, self.copy_rank, self.copy_size)
        passes = groups.gather_in_model_copy(analysis.engine_passes(self.engine, mine))
        # The engine that sampled these held other weights than it does now.
        stale = self._stale(step)
        return floors | analysis.engine_noise_floor(
            list(zip(*passes, strict=True)),
            samples,
            None if stale else rollouts,
            num_experts=self.actor.num_experts,
        )

    def update(
        self,
        samples: Sequence[Sample],
        rollouts: Sequence[Rollout],
        old: OldScores | None,
        step: int,
    ) -> dict[str, Any]:
        """All optimizer steps on a batch; what each sequence's last visit saw.

        Without `old`, the one optimizer step's own forward is the old policy's.
        """
        replay = self.config.replay
        if replay == "R2":
            samples = _held(samples, old.native)
        elif replay == "R3":
            samples = _held(samples, rollouts)
        if self.config.old_log_probs == "rollout":
            samples = [replace(s, old_log_probs=s.rollout_log_probs) for s in samples]
        elif not self.old_from_update:
            samples = [
                replace(sample, old_log_probs=scored.log_probs)
                for sample, scored in zip(samples, old.policy(replay), strict=True)
            ]
        record = () if old else OLD_RECORDS
        shuffle = np.random.default_rng(self._seed(_SHUFFLING, step, self.dp_rank))
        updates, last = [], {name: [None] * len(samples) for name in _OF_LAST_VISIT}
        for epoch in range(self.config.epochs):
            for indices in np.split(shuffle.permutation(len(samples)), self.config.minibatches):
                batch = [samples[i] for i in indices]
                if old and old.counterpart is not None and epoch == self.config.epochs - 1:
                    self._score_counterpart(batch, indices, old)
                update = self.actor.update(batch, self.loss, record=record)
                updates.append(update)
                for name, column in _OF_LAST_VISIT.items():
                    for i, values in zip(indices, getattr(update, column), strict=True):
                        last[name][i] = values
        if old is None:
            native = [update.scored[i] for i in np.argsort(indices)]
            old = OldScores(native=native, held=None)
        return {
            "old": old,
            "updates": updates,
            "updates_counted": len(updates) if self.dp_rank == 0 else 0,
            **last,
        }

    def _score_counterpart(
        self, batch: Sequence[Sample], indices: np.ndarray, old: OldScores
    ) -> None:
        """The forward at a mini-batch's weights that its update does not make itself."""
        begin = time.perf_counter()
        if self.config.replay == "R2":
            others = [replace(sample, routes=None) for sample in batch]
        else:
            others = _held(batch, [old.native[i] for i in indices])
        for i, scored in zip(indices, self.actor.score(others, record=()), strict=True):
            old.counterpart[i] = scored.log_probs
        old.seconds += time.perf_counter() - begin

    def log_tokens(self, step: int, step_record: record.StepRecord) -> None:
        if self.copy_rank == 0:
            self.token_log.write(step, step_record.token_rows())

    def log_step(self, step: int, step_record: record.StepRecord, clock) -> None:
        """Sum the step's metrics over the ranks, evaluate where it is due, write a row."""
        begin = clock.total()
        heap.give_back()
        updates = step_record.updates
        sums, loss_metrics = step_record.sums(), step_record.loss_metrics()
        maxima = step_record.maxima()
        metrics = record.finish(
            groups.sum_metrics(sums), groups.sum_metrics(loss_metrics), groups.largest(maxima)
        )
        metrics["tokens/visited"] = metrics["tokens/sampled"] * self.config.epochs
        metrics["grad_norm"] = float(np.mean([update.grad_norm for update in updates]))
        seconds = clock.seconds
        seconds["logging"] += clock.total() - begin
        seconds["total"] = clock.total()
        if step_record.old.analysed:
            seconds["decomposition"] = step_record.old.seconds
        row = {"step": step} | metrics | {f"time/{name}": s for name, s in seconds.items()}
        row["tokens_per_second"] = metrics["tokens/sampled"] / seconds["total"]
        row["alarms"] = alarms.raised(row)
        due = step % self.config.eval_every == 0 or step == self.config.steps
        if due and self.evaluates:
            row |= self._evaluate(step)
        if self.rank == 0:
            self.run.append_metrics(row)
            self.tracking.log(row)
            self.display.step(row)

    def log_evaluation(self, step: int) -> None:
        """A row of its own for the model before the first step."""
        if self.engine is None:
            self.display.say(f"rollouts from {self.config.load_rollouts}: no evaluation")
        elif not self.evaluates:
            self.display.say("no --eval-data: no evaluation")
        if not self.evaluates:
            return
        row = {"step": step} | self._evaluate(step)
        if self.rank == 0:
            self.run.append_metrics(row)
            self.tracking.log(row)
            self.display.say(
                f"warm start: held-out greedy {row['eval/greedy']:.3f}, "
                f"pass@1 {row['eval/pass@1']:.3f}"
            )

    @property
    def evaluates(self) -> bool:
        return self.engine is not None and len(self.task.heldout_problems()) > 0

    def _evaluate(self, step: int) -> dict[str, float]:
        problems = self.task.heldout_problems()[: self.config.eval_problems]
        counts = evaluate.count_correct(
            self.engine,
            problems[self.rank :: self.world_size],
            self.task,
            sampling=self.sampling,
            samples=self.config.eval_samples,
            seed=self._seed(_EVALUATION, step, self.rank),
        )
        shares = groups.gather_everywhere([counts])
        if self.rank == 0:
            write_evaluation(self.run.evaluations, step, evaluate.by_problem(shares, problems))
        return evaluate.finish(shares)

    def save_checkpoint(self, step: int) -> None:
        """Keep the state to resume from, where it is due: the last that a step does."""
        every, last = self.config.save_every, step == self.config.steps
        if every and (last or step % every == 0):
            self._save(step)

    def leave_if_asked(self, done: int, *, in_step: bool = False) -> None:
        """End the run where a signal asked any rank to; the state after step `done` is kept.

        in_step: the next step has begun and is given up, which it is not where it was sampled
        ahead. A collective. Raises Stopped on every rank.
        """
        if done == self.config.steps or (in_step and self.config.overlap):
            return
        asked = groups.largest_everywhere(self.stopping.asked or 0)
        if not asked:
            return
        self.stopping.agree(asked)
        if not done:
            raise self.stopping.error("before its first step was done")
        if not self.config.save_every:
            how = f"after step {done}; --save-every 0 keeps no state"
            raise self.stopping.error(how, state=False)
        whole = Checkpoints(self.run.checkpoints).all()
        if groups.from_rank_0(not whole or step_of(whole[-1]) != done):
            self._save(done)
            # The first rank to leave has the others ended: not before the state has its name.
            groups.from_rank_0(None)
        raise self.stopping.error(f"with its state after step {done} kept")

    def _save(self, step: int) -> None:
        ahead = None
        if self.config.overlap and step < self.config.steps:
            rollouts = groups.gather_in_model_copy(self._ahead.result())
            ahead = rollouts if self.copy_rank == 0 else None
        resume.save(
            self.run,
            step,
            actor=self.actor,
            behind=self.behind,
            ahead=ahead,
            keep=self.config.keep,
        )

    def finish(self) -> Path:
        """Keep the trained weights, write the report, say what came of it."""
        self.actor.save(self.run.checkpoints / f"step-{self.config.steps:06d}")
        if self.rank == 0:
            self.display.summary(read_metrics(self.run.path))
            if not self.config.report:
                return self.run.path
            try:
                from moe_upgrpo.report import write_report

                write_report([self.run.path], self.run.report_path)
                self.display.say(f"report: {self.run.report_path}")
            except UserError as error:  # its libraries are an extra; the run itself is whole
                self.display.say(f"no report: {error}")
        return self.run.path


# What is recorded of the old policy's routing.
OLD_RECORDS = ("routes", "margins")
# Of `StepRecord`, and of `Update`.
_OF_LAST_VISIT = {
    "logp_train": "log_probs",
    "clipped": "clipped",
    "gradient_weight": "gradient_weight",
}


def _held(samples: Sequence[Sample], routed: Sequence[Rollout | Scored]) -> list[Sample]:
    """The samples with the routes of `routed` to replay."""
    return [replace(s, routes=r.routes) for s, r in zip(samples, routed, strict=True)]


def _share(items: Sequence, rank: int, size: int) -> list:
    """The rank's contiguous part of items that divide evenly."""
    each = len(items) // size
    return list(items[rank * each : (rank + 1) * each])
