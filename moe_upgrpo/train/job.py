# SPDX-License-Identifier: Apache-2.0
"""One rank's objects for a training run, which `train.loop` calls in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.record.alarms import Watch
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.turns import turns_of
from moe_upgrpo.store import RunFolder, TokenLogWriter, read_metrics
from moe_upgrpo.tasks import Task
from moe_upgrpo.train.ahead import Patience
from moe_upgrpo.train.apart import Apart
from moe_upgrpo.train.batch import Rewarding
from moe_upgrpo.train.config import TrainConfig, starve_after
from moe_upgrpo.train.learner import Learner
from moe_upgrpo.train.place import Place
from moe_upgrpo.train.progress import Display
from moe_upgrpo.train.recorder import Evaluation, Recorder
from moe_upgrpo.train.resume import StateThread
from moe_upgrpo.train.rollouts import Rollouts
from moe_upgrpo.train.states import States
from moe_upgrpo.train.stopping import Stopping
from moe_upgrpo.train.terms import ENTROPY, Terms
from moe_upgrpo.train.tracking import Tracking
from moe_upgrpo.train.writing import TokenLogThread


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The objects that sample, reward, train, log and keep the state."""

    rollouts: Rollouts
    rewarding: Rewarding
    learner: Learner
    recorder: Recorder
    states: States
    done: int  # steps, before this process


def make_job(
    config: TrainConfig,
    *,
    task: Task,
    actor: MegatronActor,
    reference: MegatronActor | None,
    behind: MegatronActor | None,
    engine: Engine | None,
    sampling: SamplingConfig,
    run: RunFolder,
    tracking: Tracking,
    display: Display,
    stopping: Stopping,
    done: int,
    ahead: Mapping[int, Sequence[Rollout]],
    apart: Sequence[int] = (),
) -> Job:
    """Give each object the few settings that it needs. apart: ranks without the run's folder."""
    place = Place.here()
    writers = groups.gather_everywhere([place.rank] if place.copy_rank == 0 else [])
    rows = Apart(run, [rank for rank in apart if rank in writers])
    rollouts = Rollouts(
        task=task,
        engine=engine,
        sampling=sampling,
        place=place,
        stopping=stopping,
        seed=config.run.seed,
        steps=config.run.steps,
        prompts=config.batch.prompts,
        group=config.batch.group,
        max_refills=config.batch.max_refills,
        staleness=config.rollouts.ahead,
        partial=config.rollouts.partial_rollouts,
        patience=Patience(
            seconds=starve_after(config), then=config.rollouts.starved, say=display.say
        ),
        engine_every=config.rollouts.engine_every,
        save_in=config.rollouts.save_rollouts,
        load_from=config.rollouts.load_rollouts,
        done=done,
        ahead=ahead,
    )
    watch = Watch(config.log.alarm, replay=config.objective.replay)
    if done and place.rank == 0:
        watch.catch_up(read_metrics(run.path))
    token_log = TokenLogThread(
        TokenLogWriter(
            rows.folder,
            rank=place.dp_rank,
            layer_ids=actor.layer_ids,
            top_k=actor.top_k,
            num_experts=actor.num_experts,
            level=config.log.token_log,
            share=config.log.token_log_share,
        )
    )
    return Job(
        rollouts=rollouts,
        rewarding=Rewarding(
            seed=config.run.seed,
            max_length=sampling.max_new_tokens * turns_of(task),
            wrong=config.rewarding.reward_wrong,
            false_positives=config.rewarding.false_positives,
            overlong_buffer=config.rewarding.overlong_buffer,
            overlong_factor=config.rewarding.overlong_penalty,
        ),
        learner=Learner(
            actor=actor,
            reference=reference,
            behind=behind,
            loss=config.objective.policy_loss(),
            terms=_terms(config, reference, run, done),
            place=place,
            seed=config.run.seed,
            minibatches=config.batch.minibatches,
            group=config.batch.group,
            epochs=config.batch.epochs,
            replay=config.objective.replay,
            old_log_probs=config.objective.old_log_probs,
            analyse_every=config.log.analyse_every,
            gradient_at=config.terms.gradient_at,
            stop_ratio=config.stop_ratio,
            head_records=config.objective.head_records,
            nthr_beta=config.objective.nthr_beta,
            nthr_eta=config.objective.nthr_eta,
        ),
        recorder=Recorder(
            run=run,
            watch=watch,
            token_log=token_log,
            apart=rows,
            tracking=tracking,
            display=display,
            evaluation=Evaluation(
                engine=engine,
                task=task,
                sampling=sampling,
                place=place,
                run=run,
                seed=config.run.seed,
                samples=config.evaluation.eval_samples,
                most_problems=config.evaluation.eval_problems,
            ),
            place=place,
            steps=config.run.steps,
            eval_every=config.evaluation.eval_every,
            report=config.log.report,
        ),
        states=States(
            run=run,
            actor=actor,
            behind=behind,
            reference=reference if config.terms.reference_every else None,
            rollouts=rollouts,
            token_log=token_log,
            thread=StateThread(60 * config.run.timeout) if config.run.async_save else None,
            stopping=stopping,
            steps=config.run.steps,
            every=config.run.save_every,
            keep=config.run.keep,
        ),
        done=done,
    )


def _terms(
    config: TrainConfig, reference: MegatronActor | None, run: RunFolder, done: int
) -> Terms:
    """The KL and entropy terms; in a resumed run, as they were after its last step."""
    options = config.terms
    terms = Terms(
        reference=reference if options.kl_coef else None,
        reference_every=options.reference_every,
        kl_coef=options.kl_coef,
        kl_in=options.kl_in,
        kl_estimator=options.kl_estimator,
        entropy_coef=options.entropy_coef,
        control=options.control(),
    )
    if done and terms.control is not None:
        rows = [row for row in read_metrics(run.path) if row["step"]] if groups.rank() == 0 else []
        for row in groups.from_rank_0([{ENTROPY: row.get(ENTROPY)} for row in rows]):
            terms.end_step(row)
    return terms
