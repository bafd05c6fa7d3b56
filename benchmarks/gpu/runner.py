"""Run checks one after another, each in its own process with its own time limit.

A check that fails, hangs or breaks the GPU's context does not affect the others. The processes are
forked from one that has imported everything and never touched the GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import Check, Outcome
from benchmarks.gpu.sizes import Sizes

LEAST_S = 5  # seconds that must be left for a check to start


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The arguments of a check."""

    sizes: Sizes
    scratch: Path  # shared by the checks of one run
    carried: Path  # the folder of `--carry`; need not exist
    on_card: bool


def run_checks(
    checks: Sequence[Check],
    job: Job,
    *,
    total_s: float,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Name -> its result; `save` gets all results after each check.

    state: "ok", "failed", "out of time", "cannot run" (its modules cannot be imported here) or
    "no time left".
    """
    begin, results = time.monotonic(), {}
    unimportable = {check.module: _import(check.module) for check in checks}
    for check in checks:
        left = total_s - (time.monotonic() - begin)
        if unimportable[check.module]:
            result = {"state": "cannot run", "line": unimportable[check.module], "seconds": 0.0}
        elif left < LEAST_S:
            result = {"state": "no time left", "line": "", "seconds": 0.0}
        else:
            result = _run(check, job, min(check.budget_s, left))
        results[check.name] = result
        say(f"{result['state']:12} {result['seconds']:6.1f} s  {check.name}: {result['line']}")
        for fault in result.get("faults", ()):
            say(f"{'':22} {fault}")
        save(results)
    return results


def _import(module: str) -> str | None:
    """Why the module cannot be imported here; None if it was imported."""
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        return f"{type(error).__name__}: {error}"
    return None


def _run(check: Check, job: Job, budget_s: float) -> dict[str, Any]:
    begin = time.monotonic()
    log = job.scratch / "log"
    found = _in_process("fork", check, job, budget_s, log)
    if found.get("state") == "bad fork":  # something touched the GPU while it was imported
        found = _in_process("spawn", check, job, budget_s, log)
    if found["state"] != "ok":
        found["log"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def _in_process(method: str, check: Check, job: Job, budget_s: float, log: Path) -> dict[str, Any]:
    context = get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    log.write_text("", encoding="utf-8")
    process = context.Process(target=_child, args=(check, job, sender, log))
    process.start()
    sender.close()
    try:
        if receiver.poll(budget_s):
            return receiver.recv()
        return {"state": "out of time", "line": f"more than {budget_s:.0f} s"}
    except EOFError:
        process.join()
        return {"state": "failed", "line": f"ended with status {process.exitcode}"}
    finally:
        process.kill()  # its later output is not waited for
        process.join(20)  # a driver may keep it longer


def _child(check: Check, job: Job, answer: Connection, log: Path) -> None:
    target = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8")
    if check.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        import torch

        if not check.on_cpu and torch.cuda._is_in_bad_fork():
            answer.send({"state": "bad fork"})
            return
        outcome: Outcome = getattr(importlib.import_module(check.module), check.function)(job)
        found = {"state": "failed" if outcome.faults else "ok", **asdict(outcome)}
        if torch.cuda.is_initialized():
            # torch's allocator returns nothing before the end, so this is the maximum.
            found["taken_GB"] = round(torch.cuda.memory_reserved() / 1e9, 3)
        answer.send(json.loads(json.dumps(found)))  # anything that is not JSON fails here
    except BaseException as error:
        traceback.print_exc()
        said = str(error).strip().partition("\n")[0][:300]
        answer.send({"state": "failed", "line": f"{type(error).__name__}: {said}"})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        answer.close()
        os._exit(0)  # so that the parent's exit handlers do not run twice
