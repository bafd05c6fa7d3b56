"""Doing a comparison: what is missing is run, as many runs at a time as there are cores.

A folder holds plan.json, learning_rates.json, data/RUN.parquet, runs/RUN and logs/RUN.log. A run
whose Parquet file is there is done. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_upgrpo import kernels
from moe_upgrpo.compare import data
from moe_upgrpo.compare.plan import Comparison, Run, default_parallel
from moe_upgrpo.errors import UserError
from moe_upgrpo.store import RunFolder, read_config, read_environment, rows_so_far
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.store.files import parse_json, write_text
from moe_upgrpo.store.run_folder import git_state
from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.warm_start import warm_start

# A worker that the kernel or the user killed says nothing about the loss.
_KILLED = re.compile(r"exitcode\s*:\s*-\d+|SignalException|interrupted;")


def compare(
    plan: Comparison, folder: Path, *, parallel: int | None, say: Callable[[str], None]
) -> None:
    """Run what is missing of `plan` in `folder`.

    Raises UserError: the folder holds another comparison, another command works in it, or a run
    could not start. A SIGTERM ends it as Ctrl-C does, with KeyboardInterrupt and its runs stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another compare is at work in {folder}: wait for it, or take another --output."
            ) from None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _compare(plan, folder, parallel, say)
        finally:
            signal.signal(signal.SIGTERM, before)


def _compare(
    plan: Comparison, folder: Path, parallel: int | None, say: Callable[[str], None]
) -> None:
    write_plan(plan, folder)
    pool = parallel or default_parallel(plan.nproc)
    tuning = plan.tuning()
    missing = [run for run in tuning if not data_file(folder, run).exists()]
    _prepare(plan, missing or plan.runs({}), pool, say)
    _run_all(plan, folder, tuning, pool, say)
    rates = choose_rates(plan, folder)
    if rates:
        say("learning rates: " + ", ".join(f"{arm} {lr:g}" for arm, lr in rates.items()))
    _prepare(plan, plan.runs({}), pool, say)
    _run_all(plan, folder, plan.runs(rates), pool, say)


def write_plan(plan: Comparison, folder: Path) -> None:
    """plan.json, before anything runs: the plan, when it was written and by which code."""
    file = folder / "plan.json"
    if file.exists():
        written = parse_json(file.read_bytes(), str(file))["plan"]
        now = plan.to_json()
        if changed := [name for name in now if now[name] != written.get(name)]:
            raise UserError(
                f"{folder} holds a comparison whose {', '.join(changed)} differ from the config's: "
                "what was written down before the runs stays. Take another --output."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    written = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "code": git_state()}
    write_text(file, json.dumps(written | {"plan": plan.to_json()}, indent=1) + "\n")


def choose_rates(plan: Comparison, folder: Path) -> dict[str, float]:
    """Each arm's learning rate by `LearningRates`, kept in learning_rates.json with all scores."""
    asked = plan.learning_rates
    if asked is None:
        return {}
    scores: dict[str, dict[float, list[float]]] = {arm: {} for arm in plan.arms}
    kept_runs = {run: data.read(data_file(folder, run)) for run in plan.tuning()}
    if not any(found.series(asked.metric)[0] for found in kept_runs.values()):
        # Every score would be 0, and the first value the choice.
        raise UserError(f"learning_rates.metric={asked.metric!r} is in none of the runs' metrics.")
    for run, found in kept_runs.items():
        found = dict(zip(*found.series(asked.metric), strict=True))
        late = [found.get(s, 0.0) for s in range(asked.steps // 2 + 1, asked.steps + 1)]
        scores[run.arm].setdefault(run.lr, []).append(float(np.mean(late)))
    rates = {
        arm: max(of_arm, key=lambda lr: float(np.mean(of_arm[lr])))
        for arm, of_arm in scores.items()
    }
    kept = {
        arm: {
            "chosen": rates[arm],
            "scores": [{"lr": lr, "by_seed": found} for lr, found in of_arm.items()],
        }
        for arm, of_arm in scores.items()
    }
    write_text(folder / "learning_rates.json", json.dumps(kept, indent=1) + "\n")
    return rates


def data_file(folder: Path, run: Run) -> Path:
    return folder / "data" / f"{run.key}.parquet"


def _prepare(plan: Comparison, runs: Sequence[Run], pool: int, say: Callable[[str], None]) -> None:
    """Make the warm-started models, each once, before several runs ask for the same."""
    configs = {}
    for run in runs:
        config = plan.config(run)
        if config.model is None and not config.data:
            configs[repr((config.warm_start, config.tiny, config.digits))] = config
    if not configs:
        return
    # Fresh processes: torch's threads, kernels and random state are those of a run.
    context = get_context("spawn")
    with ProcessPoolExecutor(pool, mp_context=context, initializer=kernels.pin) as processes:
        for number, made in enumerate(processes.map(_warm_started, configs.values()), 1):
            if made:
                say(f"warm start {number} of {len(configs)}: {made}")


def _warm_started(config: TrainConfig) -> str | None:
    """The folder's name where it had to be made."""
    config.cache_dir.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in config.cache_dir.iterdir()}
    made = warm_start(
        ArithmeticTask(config.digits),
        config.tiny.hugging_face(),
        settings=config.warm_start,
        cache_dir=config.cache_dir,
    )
    return None if made.name in before else made.name


def _run_all(
    plan: Comparison, folder: Path, runs: Sequence[Run], pool: int, say: Callable[[str], None]
) -> None:
    missing = [run for run in runs if not data_file(folder, run).exists()]
    if not missing:
        return
    say(f"{len(missing)} of {len(runs)} runs to do, {pool} at a time")
    begin, done = time.monotonic(), 0
    children: dict[Run, subprocess.Popen] = {}

    def one(run: Run) -> None:
        nonlocal done
        line = _run_one(plan, folder, run, children)
        done += 1
        left = (time.monotonic() - begin) / done * (len(missing) - done) / 60
        say(f"[{done}/{len(missing)}] {run.key}: {line}; about {left:.0f} min left")

    threads = ThreadPoolExecutor(pool)
    try:
        waiting = [threads.submit(one, run) for run in missing]
        finished, _ = wait(waiting, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in list(children.values()):
            child.terminate()
        threads.shutdown(wait=True)


def _run_one(plan: Comparison, folder: Path, run: Run, children: dict) -> str:
    """Run it to its end and keep its data; what to say of it."""
    path, log = folder / "runs" / run.key, folder / "logs" / f"{run.key}.log"
    begin, status, said, resumed = time.monotonic(), 0, "", True
    if not is_trained(folder, run):
        what = train_words(plan, folder, run)
        resumed = "--resume" in what
        with log.open("w", encoding="utf-8") as out:
            command = _command(plan.nproc, what)
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            children[run] = child
            status = child.wait()
            del children[run]
        said = log.read_text(encoding="utf-8", errors="replace")
    seconds = time.monotonic() - begin
    rows = rows_so_far(path)
    if status and (status < 0 or _KILLED.search(said)):
        raise UserError(f"{run.key} was stopped ({log}); the same command goes on from there.")
    if status and not any(row["step"] > 0 for row in rows):
        raise UserError(f"{run.key} ended before its first step; {log} ends with:\n{_tail(said)}")
    crashed = _tail(said) if status else None
    keep(folder, run, rows, crashed=crashed, seconds=None if resumed else seconds)
    shutil.rmtree(RunFolder(path).checkpoints, ignore_errors=True)
    if status:
        return f"CRASHED at step {rows[-1]['step']}, kept as such"
    last = rows[-1]
    measured = last.get(plan.primary.metric)
    result = f"{plan.primary.metric} {measured:.3f}, " if measured is not None else ""
    return f"{'' if run.tuning else result}{seconds:.0f} s"


def is_trained(folder: Path, run: Run) -> bool:
    """Whether its last step is done: it was stopped before its data were kept."""
    path = RunFolder(folder / "runs" / run.key)
    if not path.config_path.is_file():
        return False
    return (path.checkpoints / f"step-{read_config(path.path)['steps']:06d}").is_dir()


def train_words(plan: Comparison, folder: Path, run: Run) -> list[str]:
    """The options of `train` that start a run, or continue it from its newest checkpoint."""
    path, options = folder / "runs" / run.key, folder / "logs" / f"{run.key}.yaml"
    options.parent.mkdir(parents=True, exist_ok=True)
    write_text(options, yaml.safe_dump(plan.options(run)))
    if path.exists() and Checkpoints(RunFolder(path).checkpoints).all():
        return ["--resume", str(path)]
    shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped before a checkpoint
    return ["--config", str(options), "--output-dir", str(path)]


def keep(
    folder: Path,
    run: Run,
    rows: Sequence[dict[str, Any]],
    *,
    crashed: str | None,
    seconds: float | None,
) -> None:
    """Write the data of a run that has ended; with that it is done. `crashed`: by which error."""
    path = folder / "runs" / run.key
    config = read_config(path)
    about = data.About(
        arm=run.arm,
        seed=run.seed,
        tuning=run.tuning,
        lr=config["optimizer"]["lr"],
        steps=config["steps"],
        status="finished" if crashed is None else "crashed",
        message=crashed or "",
        seconds=seconds,
        config=_without_paths(config),
        environment=_without_paths(read_environment(path)),
    )
    data.write(data_file(folder, run), data.RunData(about=about, rows=rows))


def _command(nproc: int, what: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(nproc), "-m", "moe_upgrpo", "train", *what]  # fmt: skip


def _tail(said: str) -> str:
    """The first error message of a log, or its last lines."""
    found = re.search(r"^error: .*", said, re.MULTILINE | re.DOTALL)
    lines = (found.group() if found else said).strip().splitlines()
    return "\n".join(lines[:12] if found else lines[-12:])


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Without the folders of the machine that ran it."""
    return {
        key: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for key, value in values.items()
        if key != "argv"
    }
