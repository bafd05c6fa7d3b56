"""The cost of recording: a training step with routes and token log against the same step without.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/micro/recording.py --model CHECKPOINT

CHECKPOINT is a warm start (`runs/cache/warm-start-*` after `make train`). Each pair runs one full
step of the default settings, in turn with and without: routes and margins tapped in the old
log-probs' forward, both sides compared over whole sequences, the token log written. Printed: the
median over pairs of the ratio of their times, with the quartiles.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import tyro

from moe_upgrpo import kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.losses import group_advantages
from moe_upgrpo.train.analysis import NoiseFloor, OldScores
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.job import Job
from moe_upgrpo.train.learner import for_update, samples_of
from moe_upgrpo.train.record import record_step
from moe_upgrpo.train.start import start


def step(job: Job, config: TrainConfig, number: int, *, recording: bool) -> float:
    """Seconds of one RL step from rollouts to new engine weights."""
    begin = time.perf_counter()
    learner, first = job.learner, job.rollouts.first_sequence
    batch = job.rollouts.batch(number)
    rewards = job.rewarding.rewards(batch, number, first_prompt=first // config.batch.group)
    advantages = group_advantages(torch.from_numpy(rewards), config.batch.group).numpy()
    samples = for_update(samples_of(batch.rollouts), advantages, None, first)
    wanted = ("routes", "margins") if recording else ()
    old = OldScores(native=learner.actor.score(samples, record=wanted), held=None)
    reference = learner.score_reference(samples)
    updated = learner.update(samples, batch.rollouts, old, number)
    job.rollouts.update_engine(learner.actor, number)
    if recording:
        trained = record_step(
            batch=batch,
            rewards=rewards,
            advantages=advantages,
            updated=updated,
            reference=reference,
            noise=NoiseFloor(),
            first_sequence=first,
            group=config.batch.group,
            replay=config.objective.replay,
            weight_version=number - 1,
            num_experts=learner.actor.num_experts,
            counts_updates=True,
        )
        trained.sums()
        job.recorder.log_tokens(number, trained)
    return time.perf_counter() - begin


def main(model: Path, pairs: int = 20) -> None:
    silence_upstream()
    kernels.pin()
    folder = Path(tempfile.gettempdir()) / "moe_upgrpo-recording"
    config = TrainConfig.of(model=model, steps=2 * pairs, output_dir=folder)
    ratios = []
    with start(config) as job:
        for pair in range(pairs + 2):
            order = (True, False) if pair % 2 else (False, True)
            seconds = {
                on: step(job, config, 2 * pair + 1 + i, recording=on) for i, on in enumerate(order)
            }
            if pair >= 2:  # the first steps warm up
                ratios.append(seconds[True] / seconds[False])
        if job.rollouts.place.rank == 0:
            low, median, high = statistics.quantiles(ratios, n=4)
            print(
                f"a step with recording / without: median {median:.3f} of {pairs} pairs "
                f"(quartiles {low:.3f} to {high:.3f})"
            )
            shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
