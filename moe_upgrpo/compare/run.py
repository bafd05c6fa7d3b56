# SPDX-License-Identifier: Apache-2.0
"""Runs of a comparison: the missing ones are started, as many at a time as there are cores.

A folder holds plan.json, learning_rates.json, data/RUN.parquet, runs/RUN and logs/RUN.log, and
not_run.json where machines failed. A run is done once its Parquet file exists. If stopped at any
moment, the same command continues.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import threading
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
from moe_upgrpo.compare.outcome import Outcome, outcome
from moe_upgrpo.compare.plan import Comparison, Run, default_parallel
from moe_upgrpo.errors import MachineFault, Terminated, UserError
from moe_upgrpo.store import RunFolder, read_config, read_environment, rows_so_far
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.store.files import parse_json, write_text
from moe_upgrpo.store.run_folder import git_state
from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.warm_start import warm_start

_LIBC = ctypes.CDLL(None)
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h
TRIES = 3  # of a run that fails because of its machine
PAUSE_S = 30  # before the next try


def compare(
    plan: Comparison, folder: Path, *, parallel: int | None, say: Callable[[str], None]
) -> str | None:
    """Run what `folder` lacks of `plan`; returns a text naming runs that their machines failed.

    These are tried `TRIES` times. Raises UserError: the folder holds another comparison, another
    command works in it, or a run was refused; MachineFault where there is nothing to report on,
    because the learning rates are not known or no run is done. A SIGTERM ends it like Ctrl-C, with
    KeyboardInterrupt (Terminated) and its runs stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another compare is at work in {folder}: wait for it, or take another --output."
            ) from None
        before = signal.signal(signal.SIGTERM, _terminated)
        try:
            return _compare(plan, folder, parallel, say)
        finally:
            signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> None:
    raise Terminated


def _compare(
    plan: Comparison, folder: Path, parallel: int | None, say: Callable[[str], None]
) -> str | None:
    if (together := folder / data.TOGETHER).exists():
        raise UserError(
            f"{together} is a comparison that was run and kept in one file: `moe-upgrpo compare "
            f"--report-only --output {folder}` makes its report; another --output runs it again."
        )
    write_plan(plan, folder)
    pool = parallel or default_parallel(plan.nproc)
    tuning = plan.tuning()
    missing = [run for run in tuning if not data_file(folder, run).exists()]
    _prepare(plan, missing or plan.runs({}), pool, say)
    if left := _not_run(folder, tuning, _run_all(plan, folder, tuning, pool, say)):
        raise MachineFault(f"{left} They choose the learning rates of all others.")
    rates = choose_rates(plan, folder)
    if rates:
        say("learning rates: " + ", ".join(f"{arm} {lr:g}" for arm, lr in rates.items()))
    _prepare(plan, plan.runs({}), pool, say)
    runs = plan.runs(rates)
    left = _not_run(folder, runs, _run_all(plan, folder, runs, pool, say))
    if left and not any(data_file(folder, run).exists() for run in runs):
        raise MachineFault(left)
    return left


def _not_run(folder: Path, runs: Sequence[Run], left: dict[Run, Outcome]) -> str | None:
    """Record, for the report, which runs failed because of their machines, and say so."""
    file = folder / "not_run.json"
    kept = [
        {"arm": run.arm, "seed": run.seed, "tuning": run.tuning, "message": ended.message}
        for run, ended in left.items()
    ]
    if not kept:
        file.unlink(missing_ok=True)
        return None
    write_text(file, json.dumps(kept, indent=1) + "\n")
    run, ended = next(iter(left.items()))
    return (
        f"{len(left)} of {len(runs)} runs not run: machine, {TRIES} tries each: "
        f"{', '.join(sorted(run.key for run in left))}. What they have done stays: the same "
        f"command goes on from there. {run.key}, {folder}/logs/{run.key}.log:\n{ended.message}"
    )


def write_plan(plan: Comparison, folder: Path) -> None:
    """Write plan.json before anything runs: the plan, when it was written and by which code."""
    file = folder / "plan.json"
    if file.exists():
        written = parse_json(file.read_bytes(), str(file))["plan"]
        now = plan.to_json()
        if changed := [name for name in now if now[name] != written.get(name)]:
            raise UserError(
                f"{folder} holds a comparison whose {', '.join(changed)} differ from the config's: "
                "the plan is fixed once a run has started. Take another --output."
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
        # Every score would be 0, and the first value would be chosen.
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
    """Make the warm-started models, each once, before several runs need the same one."""
    configs = {}
    for run in runs:
        config = plan.config(run)
        start, problems = config.start, config.problems
        if start.model is None and not problems.data:
            configs[repr((start.warm_start, start.tiny, problems.digits))] = config
    if not configs:
        return
    # Fresh processes: torch's threads, kernels and random state are then those of a run.
    context = get_context("spawn")
    with ProcessPoolExecutor(pool, mp_context=context, initializer=kernels.pin) as processes:
        for number, made in enumerate(processes.map(_warm_started, configs.values()), 1):
            if made:
                say(f"warm start {number} of {len(configs)}: {made}")


def _warm_started(config: TrainConfig) -> str | None:
    """The folder's name if it had to be made."""
    start = config.start
    start.cache_dir.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in start.cache_dir.iterdir()}
    made = warm_start(
        ArithmeticTask(config.problems.digits),
        start.tiny.hugging_face(),
        settings=start.warm_start,
        cache_dir=start.cache_dir,
    )
    return None if made.name in before else made.name


def _run_all(
    plan: Comparison, folder: Path, runs: Sequence[Run], pool: int, say: Callable[[str], None]
) -> dict[Run, Outcome]:
    """Run what is missing, up to `TRIES` times where the machine failed; returns what remains."""
    left: dict[Run, Outcome] = {}
    for attempt in range(1, TRIES + 1):
        missing = [run for run in runs if not data_file(folder, run).exists()]
        if not missing:
            return {}
        if attempt == 1:
            say(f"{len(missing)} of {len(runs)} runs to do, {pool} at a time")
        else:
            say(
                f"{len(missing)} again, as their machine failed: try {attempt} of {TRIES}, in "
                f"{PAUSE_S} s"
            )
            time.sleep(PAUSE_S)
        left = _run_each(plan, folder, missing, pool, say)
    return left


def _run_each(
    plan: Comparison, folder: Path, missing: Sequence[Run], pool: int, say: Callable[[str], None]
) -> dict[Run, Outcome]:
    """Run each once; returns those that failed because of their machine."""
    begin, done, stopped = time.monotonic(), 0, threading.Event()
    children: dict[Run, subprocess.Popen] = {}
    failed: dict[Run, Outcome] = {}

    def one(run: Run) -> None:
        nonlocal done
        ended, line = _run_one(plan, folder, run, children)
        if stopped.is_set():  # by us
            return
        if ended.of_machine:
            failed[run] = ended
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
        stopped.set()
        threads.shutdown(wait=False, cancel_futures=True)
        for child in list(children.values()):
            child.terminate()
        threads.shutdown(wait=True)
    return failed


def _run_one(plan: Comparison, folder: Path, run: Run, children: dict) -> tuple[Outcome, str]:
    """Run it to its end and keep its data; returns how it ended, and a line about it.

    If its machine failed, nothing of the run is kept, and nothing is removed. Raises UserError
    where the job was refused, or failed by a fault of ours: further runs would do no better.
    """
    path, log = folder / "runs" / run.key, folder / "logs" / f"{run.key}.log"
    begin, ended, resumed = time.monotonic(), Outcome(0, ""), True
    if not is_trained(folder, run):
        what = train_words(plan, folder, run)
        resumed = "--resume" in what
        ended = _start(plan.nproc, what, log, run, children)
    seconds = time.monotonic() - begin
    if ended.of_machine:
        reason = ended.message.partition("\n")[0]
        return ended, f"NOT RUN, its machine failed: {reason}"
    rows = rows_so_far(path)
    if ended.status and not (ended.crashed and rows):
        when = f"at step {rows[-1]['step']}" if rows else "before its first step"
        raise UserError(f"{run.key} ended {when}, which is no result; {log}:\n{ended.message}")
    crashed = ended.message if ended.crashed else None
    keep(folder, run, rows, crashed=crashed, seconds=None if resumed else seconds)
    shutil.rmtree(RunFolder(path).checkpoints, ignore_errors=True)
    if crashed:
        return ended, f"CRASHED at step {rows[-1]['step']}, kept as such"
    last = rows[-1]
    measured = last.get(plan.primary.metric)
    result = f"{plan.primary.metric} {measured:.3f}, " if measured is not None else ""
    return ended, f"{'' if run.tuning else result}{seconds:.0f} s"


def _start(nproc: int, what: Sequence[str], log: Path, run: Run, children: dict) -> Outcome:
    """Run the job of a run to its end; its log covers all tries."""
    with log.open("a", encoding="utf-8") as out:
        before = out.tell()
        child = subprocess.Popen(
            _command(nproc, what),
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        children[run] = child
        status = child.wait()
        del children[run]
    with log.open("rb") as written:
        written.seek(before)
        said = written.read().decode(errors="replace")
    return outcome(status, said)


def _end_with_parent() -> None:
    """Have this process told to stop (SIGTERM) when the thread that started it is gone.

    A comparison that is killed could not tell its jobs: they would train on, unseen, while the same
    command starts them again.
    """
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def is_trained(folder: Path, run: Run) -> bool:
    """Whether its last step is done: it may have been stopped before its data were kept."""
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
    shutil.rmtree(path, ignore_errors=True)  # left by a run stopped before its first checkpoint
    return ["--config", str(options), "--output-dir", str(path)]


def keep(
    folder: Path,
    run: Run,
    rows: Sequence[dict[str, Any]],
    *,
    crashed: str | None,
    seconds: float | None,
) -> None:
    """Write the data of a run that has ended, which makes it done. `crashed`: by which error."""
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
    launch = [sys.executable, "-m", "moe_upgrpo", "launch", "--nproc-per-node", str(nproc)]
    return [*launch, "--", *what]


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Strip the names of the machine's folders."""
    return {
        key: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for key, value in values.items()
        if key != "argv"
    }
