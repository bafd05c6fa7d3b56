# SPDX-License-Identifier: Apache-2.0
"""The start of a training run: ranks, model, engine, task and run folder, put together once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from moe_upgrpo import ending, plugins
from moe_upgrpo.errors import LOST_RANK, MachineFault, UserError, machine_fault
from moe_upgrpo.hugging_face.config import is_tied
from moe_upgrpo.hugging_face.export import drop_exports
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.hugging_face.tokenizer import keep_vocabulary, read_tokenizer
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.record import alarms
from moe_upgrpo.rollout.base import Engine, SamplingConfig
from moe_upgrpo.rollout.cache import check_new, drop_after
from moe_upgrpo.rollout.engines import make_engine
from moe_upgrpo.rollout.turns import longest
from moe_upgrpo.store import RunFolder, read_config
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.tasks import ArithmeticTask, MathTask, Task
from moe_upgrpo.tasks.named import make_task
from moe_upgrpo.tasks.rewarded import RewardedTask, reward_by_source
from moe_upgrpo.train import resume
from moe_upgrpo.train.apart import check as check_apart
from moe_upgrpo.train.apart import check_model
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.found import Checkpoint, find
from moe_upgrpo.train.job import Job, make_job
from moe_upgrpo.train.options import changes
from moe_upgrpo.train.parts import RunOptions, StartOptions
from moe_upgrpo.train.progress import Display
from moe_upgrpo.train.stopping import Stopping
from moe_upgrpo.train.tracking import Tracking
from moe_upgrpo.train.tracking import check as check_trackers
from moe_upgrpo.train.warm_start import warm_start


@contextmanager
def start(config: TrainConfig) -> Iterator[Job]:
    """Check everything, build everything, and only then make the run folder."""
    with _ranks(config) as ranks, ExitStack() as begun:
        begun.enter_context(ranks.stopping.giving_up())
        run = _run_folder(config.run, config.objective.loss)
        apart = _check_folder(config, run, ranks.rank)
        found, changed, edited = _found(config, run)
        task, model_dir = _task_and_model(config, ranks)
        # Raises UserError where there are not that many.
        task.training_problems(config.batch.prompts, seed=config.run.seed, step=1)
        most = config.rollouts.max_new_tokens or task.max_response_tokens
        if most is None:
            raise UserError(
                f"task={config.problems.task} does not say how long its answers are "
                "(max_response_tokens): give --max-new-tokens."
            )
        sampling = SamplingConfig(temperature=config.rollouts.temperature, max_new_tokens=most)
        max_tokens = task.max_prompt_tokens + longest(task, sampling.max_new_tokens)
        actor, reference, behind = _actors(config, model_dir, ranks.layout, max_tokens)
        if ranks.rank == 0:
            actor.try_saving(run.path)
        resume.load(found, actor, behind, reference if config.terms.reference_every else None)
        actor.check_length(max_tokens)
        about = _about(config, actor, ranks)
        engine = _engine(config, model_dir, max_tokens, server_log=run.path / "engine.log")
        with (
            closing(task),
            closing(engine) if engine else nullcontext(),
            run.locked() if ranks.rank == 0 else nullcontext(),
            closing(_tracking(config, run, about, found, ranks.rank)) as tracking,
            machine_fault_named(run),
        ):
            ahead = found.rollouts()
            if ranks.rank == 0 and config.run.resume:
                _cut_back(config, run, found, about, changed, ranks.display)
            elif ranks.rank == 0:
                RunFolder.create(run.path, about)
                if config.log.token_log != "aggregate":
                    keep_vocabulary(
                        run.path, model_dir, trust_remote_code=config.start.trust_remote_code
                    )
            groups.from_rank_0(None)  # nobody writes into the folder before it exists
            ending.remember(run.path)
            ranks.display.say(_first_line(about, actor, run))
            if config.run.resume:
                ranks.display.resumed(found.step, changed, edited)
            job = make_job(
                config,
                task=task,
                actor=actor,
                reference=reference,
                behind=behind,
                engine=engine,
                sampling=sampling,
                run=run,
                tracking=tracking,
                display=ranks.display,
                stopping=ranks.stopping,
                done=found.step,
                ahead=ahead,
                apart=apart,
            )
            if found.step:
                job.rollouts.update_engine(actor, found.step)
            begun.close()
            with job.recorder.token_log, job.states.thread or nullcontext():
                yield job


@dataclass(frozen=True)
class _Ranks:
    """The processes of the job, seen from one of them."""

    layout: Layout
    rank: int
    world_size: int
    stopping: Stopping
    display: Display


@contextmanager
def _ranks(config: TrainConfig) -> Iterator[_Ranks]:
    """Inside, the process groups are up, and signals and a closed terminal are handled."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    layout = config.layout(world_size)
    check_trackers(config.log.track)
    stopping = Stopping(config.run.stop_within)
    closed = partial(stopping.ask, signal.SIGPIPE)
    display = Display(config.run.steps, shown=rank == 0, closed=closed)
    with (
        stopping,
        groups.process_groups(
            layout,
            seed=config.run.seed,
            timeout_s=60 * config.run.timeout,
            deterministic=config.trainer.deterministic,
        ),
        display,
    ):
        yield _Ranks(layout, rank, world_size, stopping, display)


def _run_folder(options: RunOptions, loss: str) -> RunFolder:
    # Ranks start at different seconds; the folder has one name.
    started = groups.from_rank_0(f"{datetime.now():%Y%m%d-%H%M%S}")
    return RunFolder(options.resume or options.output_dir or Path("runs") / f"{loss}-{started}")


def _check_folder(config: TrainConfig, run: RunFolder, rank: int) -> list[int]:
    """The ranks that do not see the run's folder, which a new run may use."""
    if rank == 0 and not config.run.resume:
        run.check_free()
        if config.rollouts.save_rollouts:
            check_new(config.rollouts.save_rollouts)
    return check_apart(
        run,
        resumes=bool(config.run.resume),
        states=config.run.save_every > 0,
        rollouts=bool(config.rollouts.save_rollouts),
    )


def _found(config: TrainConfig, run: RunFolder) -> tuple[Checkpoint, dict[str, list], dict]:
    """The checkpoint to go on from, the changed settings, and edits of the run's config.json."""
    if not config.run.resume:
        return Checkpoint(), {}, {}
    changed = changes(read_config(run.path), config)
    edited = run.edits()
    return find(run, config.run.steps, restart=config.run.restart), changed, edited


def _actors(
    config: TrainConfig, model_dir: Path, layout: Layout, max_tokens: int
) -> tuple[MegatronActor, MegatronActor | None, MegatronActor | None]:
    """The policy; the reference, where there is one; the policy as it sampled."""
    trainer, limit = config.trainer, config.micro_batches(max_tokens)
    settings = {
        "dtype": trainer.dtype,
        "temperature": config.rollouts.temperature,
        "micro_batch_size": limit.sequences,
        "micro_batch_tokens": limit.tokens,
        "longest": limit.longest,
        "packing": limit.packed,
        "recompute": trainer.recompute,
        "megatron": trainer.megatron,
    }
    actor = MegatronActor(model_dir, layout, optimizer=trainer.optimizer, **settings)
    reference = MegatronActor(model_dir, layout, **settings) if config.has_reference else None
    needs_behind = config.rollouts.ahead > 0 and config.log.analyse_every > 0
    behind = MegatronActor(model_dir, layout, **settings) if needs_behind else None
    return actor, reference, behind


def _about(config: TrainConfig, actor: MegatronActor, ranks: _Ranks) -> dict[str, Any]:
    """Options and facts of a run, for its config.json."""
    return config.flat() | {
        "model": str(actor.model_dir),
        "layout": str(ranks.layout),
        "world_size": ranks.world_size,
        "moe_layers": actor.layer_ids,
        "num_experts": actor.num_experts,
        "top_k": actor.top_k,
        "parameters": actor.parameter_count(),
        "plugins": plugins.load(),
        "alarms": alarms.texts(config.log.alarm),
        "loss_in_words": config.objective.loss_in_words,
        # The loss that follows from the options.
        "policy_loss": asdict(config.objective.policy_loss()),
    }


def _first_line(about: dict[str, Any], actor: MegatronActor, run: RunFolder) -> str:
    return (
        f"{about['loss_in_words']} on {about['layout']}, {about['world_size']} rank(s), "
        f"{about['parameters'] / 1e6:.2f}M parameters, {routing(actor)}; run: {run.path}"
    )


def _tracking(
    config: TrainConfig, run: RunFolder, about: dict[str, Any], found: Checkpoint, rank: int
) -> Tracking:
    """The trackers that are asked for, on rank 0 alone."""
    trackers = config.log.track if rank == 0 else ()
    return Tracking(trackers, run.path, about, done=found.step if config.run.resume else None)


def _engine(
    config: TrainConfig, model_dir: Path, max_tokens: int, server_log: Path
) -> Engine | None:
    options = config.rollouts
    if options.load_rollouts is not None:
        return None
    return make_engine(
        options.engine,
        model_dir,
        dtype=options.engine_dtype,
        weights=options.engine_weights,
        device=groups.device(),
        max_tokens=max_tokens,
        seed=config.run.seed,
        url=options.engine_url,
        transfer=options.engine_transfer,
        lost=options.engine_lost,
        vllm=options.vllm,
        server_log=server_log,
    )


def _cut_back(
    config: TrainConfig,
    run: RunFolder,
    found: Checkpoint,
    about: dict[str, Any],
    changed: dict[str, list],
    display: Display,
) -> None:
    """Remove from a resumed run everything that it wrote after the checkpoint."""
    if config.rollouts.save_rollouts:
        drop_after(config.rollouts.save_rollouts, found.step)
    step = found.step if found.path else None
    RunFolder.resume(run.path, step=step, config=about, changed=changed)
    # The run may have been killed between a checkpoint and the pruning, or may now keep fewer. The
    # checkpoint has been read by now.
    Checkpoints(run.checkpoints).prune(config.run.keep)
    for path in drop_exports(run.checkpoints, found.step if found.path else -1):
        display.say(f"{path} is removed: its steps are run again")


@contextmanager
def machine_fault_named(run: RunFolder) -> Iterator[None]:
    """Turn any error of a failing machine into a MachineFault that says how to go on."""
    try:
        yield
    except Exception as error:
        what = machine_fault(error)
        if isinstance(error, MachineFault):
            said = str(error)
        elif what in (None, LOST_RANK):  # the process groups name the rank
            raise
        else:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            said = f"rank {ending.rank()}: {what}: {first}."
        raise MachineFault(
            f"{said} What was logged in {run.path} and its last checkpoint are whole: once that is "
            f"mended, --resume {run.path} goes on."
        ) from error


def routing(actor: MegatronActor) -> str:
    """The model's MoE layers in words."""
    if not actor.layer_ids:
        return "dense: no routes to record"
    return f"{len(actor.layer_ids)} MoE layers of {actor.num_experts} experts, top-{actor.top_k}"


def _task_and_model(config: TrainConfig, ranks: _Ranks) -> tuple[Task, Path]:
    """The task and the folder of the model, which uses the task's tokens."""
    start, problems = config.start, config.problems
    if start.model:
        _say_of_model(start, ranks)
    if problems.data:
        return _of_files(config, ranks), start.model
    sums = ArithmeticTask(problems.digits)
    model_dir = start.model or groups.from_rank_0(
        _warm_started(start, sums, ranks) if ranks.rank == 0 else None
    )
    if not start.model:
        check_model(Path(model_dir))
    if problems.task:
        own = make_task(problems.task, Path(model_dir), problems.task_options)
        return _rewarded(own, problems.reward, config), Path(model_dir)
    sums.check_model(Path(model_dir), trust_remote_code=start.trust_remote_code)
    if problems.reward:
        return _rewarded(sums, problems.reward, config), Path(model_dir)
    return sums, Path(model_dir)


def _of_files(config: TrainConfig, ranks: _Ranks) -> Task:
    problems = config.problems
    task = MathTask(
        problems.data,
        problems.eval_data,
        model_dir=config.start.model,
        prompt_field=problems.prompt_field,
        answer_field=problems.answer_field,
        chat_template=problems.chat_template,
        chat_template_kwargs=problems.chat_template_kwargs,
        instruction=problems.instruction,
        max_prompt_tokens=problems.max_prompt_tokens,
        trust_remote_code=config.start.trust_remote_code,
        whole_rows=bool(problems.reward),
        verifier=not problems.reward,
    )
    for note in task.notes:
        ranks.display.say(note)
    if problems.reward:
        return _rewarded(task, problems.reward, config)
    judges = reward_by_source(task)
    if not judges:
        return task
    ranks.display.say(f"rewards by the data's data_source: {judges} (--reward takes another)")
    return _rewarded(task, ("data-source:math",), config)


def _rewarded(task: Task, rewards: Sequence[str], config: TrainConfig) -> Task:
    """The task with other rewards than its own, or with its own behind a time limit."""
    options = config.rewarding
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    cores = len(os.sched_getaffinity(0))
    return RewardedTask(
        task,
        rewards,
        timeout_s=options.reward_timeout,
        workers=options.reward_workers or min(8, max(1, cores // here)),
        ends=options.reward_failures == "end",
    )


def _say_of_model(start: StartOptions, ranks: _Ranks) -> None:
    """Print notes on a given model, or refuse it before the problems are read."""
    hf = read_model_config(start.model)
    with Weights(start.model, tied=is_tied(hf)) as weights:
        if note := weights.note():
            ranks.display.say(note)
    if start.trust_remote_code:
        ranks.display.say(f"--trust-remote-code: code of {start.model} is run for its tokenizer")
        if ranks.rank == 0:  # transformers copies the code into a cache: one rank after the other
            read_tokenizer(start.model, trust_remote_code=True)
        groups.from_rank_0(None)


def _warm_started(start: StartOptions, task: ArithmeticTask, ranks: _Ranks) -> Path:
    model, cache_dir = start.tiny.hugging_face(), start.cache_dir
    ranks.layout.check_model(model)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {cache_dir} cannot be made ({error.strerror}): choose another "
            "--cache-dir."
        ) from None
    return warm_start(
        task, model, settings=start.warm_start, cache_dir=cache_dir, progress=ranks.display.say
    )
