"""The training loop, on one screen; what it stands on is built in `moe_upgrpo.train.start`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe_upgrpo.losses import group_advantages
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.record import StepRecord
from moe_upgrpo.train.start import start


def train(config: TrainConfig) -> Path:
    """Run the RL steps of `config` and return the run folder. Every rank of the job calls it."""
    with start(config) as job:
        if job.done == 0:
            job.log_evaluation(step=0)
        for step in range(job.done + 1, config.steps + 1):
            job.seed_global_generators(step)
            clock = Clock()
            with clock("generate"):
                batch = job.batch(step)
                job.leave_if_asked(step - 1, in_step=True)
                rollouts, rewards = batch.rollouts, job.rewards(batch, step)
                advantages = group_advantages(
                    torch.from_numpy(rewards), config.group, config.advantage
                ).numpy()
            with clock("old_log_probs"):
                samples = job.samples(rollouts, advantages)
                old = job.score_old(step, samples, rollouts)
                reference = job.reference and job.reference.score(samples, record=())
            with clock("analysis"):
                noise = job.analyse(step, samples, rollouts, old)
            with clock("update"):
                job.generate_ahead(step + 1)
                record = StepRecord(
                    first_sequence=job.first_sequence,
                    group=config.group,
                    replay=config.replay,
                    weight_version=step - 1,
                    rollouts=rollouts,
                    rewards=rewards,
                    advantages=advantages,
                    sampled=batch.sampled,
                    reference=reference,
                    noise=noise,
                    num_experts=job.actor.num_experts,
                    **job.update(samples, rollouts, old, step),
                )
                job.update_engine(step)
            with clock("logging"):
                job.log_tokens(step, record)
            job.log_step(step, record, clock)
            job.save_checkpoint(step)
            job.leave_if_asked(step)
        return job.finish()


class Clock:
    """Seconds spent in each named phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin

    def total(self) -> float:
        return time.perf_counter() - self._started
