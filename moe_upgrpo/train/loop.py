# SPDX-License-Identifier: Apache-2.0
"""The training loop, on one screen; `moe_upgrpo.train.start` builds the objects that it uses."""

from __future__ import annotations

from pathlib import Path

from moe_upgrpo.megatron import backend
from moe_upgrpo.train.advantages import advantages_of
from moe_upgrpo.train.clock import Clock
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.learner import for_update, samples_of
from moe_upgrpo.train.place import seed_global_generators
from moe_upgrpo.train.record import record_step
from moe_upgrpo.train.start import start


def train(config: TrainConfig) -> Path:
    """Run the RL steps of `config` and return the run folder. Every rank of the job calls it."""
    with start(config) as job:
        sampler, learner, recorder, states = job.rollouts, job.learner, job.recorder, job.states
        run, objective, group = config.run, config.objective, config.batch.group
        if job.done == 0:
            recorder.log_evaluation(step=0)
        for step in range(job.done + 1, run.steps + 1):
            seed_global_generators(run.seed, step, sampler.place.rank)
            clock = Clock(busy_waits=backend.has_cuda())
            with clock("generate"):
                batch = sampler.batch(step)
                states.leave_if_asked(step - 1, in_step=True)
                first = sampler.first_sequence
                rewards = job.rewarding.rewards(batch, step, first_prompt=first // group)
            with clock("old_log_probs"):
                rollouts = batch.rollouts
                samples = samples_of(rollouts)
                old = learner.score_old(step, samples, rollouts)
                reference = learner.score_reference(samples)
                shaped, penalty = learner.penalised(rewards, samples, old, reference)
                advantages = advantages_of(
                    shaped,
                    rollouts,
                    group=group,
                    kind=objective.advantage,
                    terms_B=batch.terms_B,
                    old=old and old.policy(objective.replay),
                )
                samples = for_update(samples, advantages, reference, first, group)
                samples = learner.weighed(samples, old)
            with clock("analysis"):
                if learner.analyses(step):
                    sampler.settle()
                noise = learner.analyse(
                    step,
                    samples,
                    rollouts,
                    old,
                    engine=sampler.engine,
                    stale=sampler.stale(step),
                )
            with clock("update"):
                for later in sampler.generate_ahead(step):
                    learner.keep_behind(later)
                updated = learner.update(samples, rollouts, old, step)
                sampler.update_engine(learner.actor, step)
            with clock("logging"):
                trained = record_step(
                    batch=batch,
                    rewards=rewards,
                    advantages=[sample.advantage for sample in samples],
                    updated=updated,
                    reference=learner.of_start_model(reference),
                    penalty=penalty,
                    noise=noise,
                    first_sequence=first,
                    group=group,
                    replay=objective.replay,
                    weight_version=step - 1,
                    num_experts=learner.actor.num_experts,
                    counts_updates=sampler.place.dp_rank == 0,
                )
                recorder.log_tokens(step, trained)
            if recorder.evaluates(step):
                sampler.settle()
            learner.terms.end_step(recorder.log_step(step, trained, clock))
            states.save_if_due(step)
            states.leave_if_asked(step)
        learner.actor.save(states.run.checkpoints / f"step-{run.steps:06d}")
        recorder.finish()
        return states.run.path
