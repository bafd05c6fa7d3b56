"""The start of a training run: ranks, model, engine, task and run folder, put together once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

from moe_upgrpo import ending
from moe_upgrpo.errors import LOST_RANK, MachineFault, UserError, machine_fault
from moe_upgrpo.hugging_face.config import is_tied
from moe_upgrpo.hugging_face.export import drop_exports
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.hugging_face.tokenizer import read_tokenizer
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.record import alarms
from moe_upgrpo.rollout.base import SamplingConfig
from moe_upgrpo.rollout.cache import check_new, drop_after
from moe_upgrpo.rollout.engines import make_engine
from moe_upgrpo.store import (
    RunFolder,
    read_config,
)
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.tasks import ArithmeticTask, MathTask, Task
from moe_upgrpo.train import resume
from moe_upgrpo.train.config import TrainConfig, changes
from moe_upgrpo.train.found import Checkpoint, find
from moe_upgrpo.train.job import Job, make_job
from moe_upgrpo.train.progress import Display
from moe_upgrpo.train.stopping import Stopping
from moe_upgrpo.train.tracking import Tracking
from moe_upgrpo.train.tracking import check as check_trackers
from moe_upgrpo.train.warm_start import warm_start


@contextmanager
def start(config: TrainConfig) -> Iterator[Job]:
    """Check everything, build everything, and only then make the run folder."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    layout = config.layout(world_size)
    check_trackers(config.track)
    stopping = Stopping(config.stop_within)
    display = Display(config.steps, shown=rank == 0, closed=partial(stopping.ask, signal.SIGPIPE))
    with (
        stopping,
        groups.process_groups(
            layout,
            seed=config.seed,
            timeout_s=60 * config.timeout,
            deterministic=config.deterministic,
        ),
        display,
        ExitStack() as begun,
    ):
        begun.enter_context(stopping.giving_up())
        # Ranks start at different seconds; the folder has one name.
        started = groups.from_rank_0(f"{datetime.now():%Y%m%d-%H%M%S}")
        output_dir = config.resume or config.output_dir
        run = RunFolder(output_dir or Path("runs") / f"{config.loss}-{started}")
        found, changed, edited = Checkpoint(), {}, {}
        if config.resume:
            changed = changes(read_config(run.path), config)
            edited = run.edits()
            found = find(run, config.steps, restart=config.restart)
        elif rank == 0:
            run.check_free()
            if config.save_rollouts:
                check_new(config.save_rollouts)
        task, model_dir = _task_and_model(config, layout, display, rank)
        task.training_problems(config.prompts, seed=config.seed, step=1)  # are there that many?
        settings = {
            "dtype": config.dtype,
            "temperature": config.temperature,
            "micro_batch_size": config.micro_batch,
            "recompute": config.recompute,
            "megatron": config.megatron,
        }
        actor = MegatronActor(model_dir, layout, optimizer=config.optimizer, **settings)
        reference = MegatronActor(model_dir, layout, **settings) if config.reference_kl else None
        needs_behind = config.overlap and config.analyse_every > 0
        behind = MegatronActor(model_dir, layout, **settings) if needs_behind else None
        if rank == 0:
            actor.try_saving(run.path)
        resume.load(found, actor, behind)
        sampling = SamplingConfig(
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens or task.max_response_tokens,
        )
        max_tokens = task.max_prompt_tokens + sampling.max_new_tokens
        actor.check_length(max_tokens)
        about = asdict(config) | {
            "model": str(model_dir),
            "layout": str(layout),
            "world_size": world_size,
            "moe_layers": actor.layer_ids,
            "num_experts": actor.num_experts,
            "top_k": actor.top_k,
            "parameters": actor.parameter_count(),
            "alarms": {name: alarm.means for name, alarm in alarms.ALARMS.items()},
            "policy_loss": asdict(config.policy_loss()),
        }
        engine = None
        if config.load_rollouts is None:
            engine = make_engine(
                config.engine,
                model_dir,
                dtype=config.engine_dtype,
                weights=config.engine_weights,
                device=groups.device(),
                max_tokens=max_tokens,
                seed=config.seed,
                url=config.engine_url,
                vllm=config.vllm,
                server_log=run.path / "engine.log",
            )
        with (
            closing(task),
            closing(engine) if engine else nullcontext(),
            run.locked() if rank == 0 else nullcontext(),
            closing(
                Tracking(
                    config.track if rank == 0 else (),
                    run.path,
                    about,
                    done=found.step if config.resume else None,
                )
            ) as tracking,
            machine_fault_named(run),
        ):
            ahead = found.rollouts()
            if rank == 0 and config.resume:
                if config.save_rollouts:
                    drop_after(config.save_rollouts, found.step)
                step = found.step if found.path else None
                RunFolder.resume(run.path, step=step, config=about, changed=changed)
                # Killed between a checkpoint and its pruning, or asked to keep fewer; what is kept
                # has been read by now.
                Checkpoints(run.checkpoints).prune(config.keep)
                for path in drop_exports(run.checkpoints, found.step if found.path else -1):
                    display.say(f"{path} is removed: its steps are run again")
            elif rank == 0:
                RunFolder.create(run.path, about)
            groups.from_rank_0(None)  # nobody writes into the folder before it is there
            ending.remember(run.path)
            display.say(
                f"{config.loss} on {layout}, {world_size} rank(s), "
                f"{about['parameters'] / 1e6:.2f}M parameters, {routing(actor)}; run: {run.path}"
            )
            if config.resume:
                display.resumed(found.step, changed, edited)
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
                display=display,
                stopping=stopping,
                done=found.step,
                ahead=ahead,
            )
            if found.step:
                job.rollouts.update_engine(actor, found.step)
            begun.close()
            yield job


@contextmanager
def machine_fault_named(run: RunFolder) -> Iterator[None]:
    """Raise MachineFault that says how to go on where the machine failed, in whatever words."""
    try:
        yield
    except Exception as error:
        what = machine_fault(error)
        if isinstance(error, MachineFault):
            said = str(error)
        elif what in (None, LOST_RANK):  # the process groups know which rank
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


def _task_and_model(
    config: TrainConfig, layout: Layout, display: Display, rank: int
) -> tuple[Task, Path]:
    """The task and the folder of the model, which speaks its tokens."""
    if config.model:
        _say_of_model(config, display, rank)
    if config.data:
        task = MathTask(
            config.data,
            config.eval_data,
            model_dir=config.model,
            prompt_field=config.prompt_field,
            answer_field=config.answer_field,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
            instruction=config.instruction,
            max_prompt_tokens=config.max_prompt_tokens,
            trust_remote_code=config.trust_remote_code,
        )
        for note in task.notes:
            display.say(note)
        return task, config.model
    task = ArithmeticTask(config.digits)
    model_dir = config.model or groups.from_rank_0(
        _warm_started(config, task, layout, display) if rank == 0 else None
    )
    task.check_model(Path(model_dir), trust_remote_code=config.trust_remote_code)
    return task, Path(model_dir)


def _say_of_model(config: TrainConfig, display: Display, rank: int) -> None:
    """Say what is to be known of a given model; refuse it before the problems are read."""
    hf = read_model_config(config.model)
    with Weights(config.model, tied=is_tied(hf)) as weights:
        if note := weights.note():
            display.say(note)
    if config.trust_remote_code:
        display.say(f"--trust-remote-code: code of {config.model} is run for its tokenizer")
        if rank == 0:  # transformers copies the code into a cache: one rank after the other
            read_tokenizer(config.model, trust_remote_code=True)
        groups.from_rank_0(None)


def _warm_started(config: TrainConfig, task: ArithmeticTask, layout: Layout, display: Display):
    model = config.tiny.hugging_face()
    layout.check_model(model)
    try:
        config.cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {config.cache_dir} cannot be made ({error.strerror}): choose "
            "another --cache-dir."
        ) from None
    return warm_start(
        task, model, settings=config.warm_start, cache_dir=config.cache_dir, progress=display.say
    )
