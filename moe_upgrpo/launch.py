# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo launch [torchrun's options] -- [train's]`: start ranks, and have the last word.

Torch's elastic agent starts the ranks, as in torchrun, but its report of a failure (some 35 lines
and its own exit status) is suppressed. Options and files are checked before any rank starts. A
signal reaches all ranks, which then keep what they have (`moe_upgrpo.train.stopping`); a second one
ends them at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_upgrpo import ending
from moe_upgrpo.errors import MachineFault, Stopped, UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The agent may wait for a host that is gone; its ranks' ends are known without it.
AGENT_ENDS_S = 20


def launch(agent_words: Sequence[str], train_words: Sequence[str]) -> None:
    """Run `train` with `train_words` on the ranks that `agent_words` (torchrun's options) name.

    Raises UserError, of the kind and with the status of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="moe_upgrpo_") as name:
        folder = Path(name)
        os.environ[ending.LAUNCHER] = name
        asked: list[int] = []
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: asked.append(number))
        failures: list[Any] = []
        agent = threading.Thread(
            target=_agent, args=(agent_words, train_words, failures), daemon=True, name="agent"
        )
        agent.start()
        try:
            _wait(agent, asked)
        finally:
            del os.environ[ending.LAUNCHER]  # for ranks, and this process is not one
            for pid in _ranks():  # started just as a signal came, or abandoned by the agent
                _send(pid, signal.SIGKILL)
        told = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("rank-*.json")]
        if asked:
            raise Stopped(_stopped(asked[0], told, folder), asked[0])
        if failures:
            raise _cause(failures[0], told, folder)


def _agent(agent_words: Sequence[str], train_words: Sequence[str], failures: list) -> None:
    logging.disable(logging.ERROR)  # what the agent says about a failure is said better below
    try:
        from torch.distributed import run
        from torch.distributed.launcher.api import elastic_launch

        arguments = _arguments([*agent_words, "-m", "moe_upgrpo", "train", *train_words])
        try:
            config, command, rest = run.config_from_args(arguments)
        except ValueError as error:
            raise UserError(f"options before --: {error}") from None
        elastic_launch(config=config, entrypoint=command)(*rest)
    except BaseException as error:
        failures.append(error)


def _arguments(words: Sequence[str]) -> Any:
    """Torchrun's options as it parses them; one machine's ranks meet at any free port."""
    from torch.distributed import run

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = run.parse_args(list(words))
    except SystemExit:
        last = (said.getvalue().splitlines() or [""])[-1].partition("error: ")[2]
        raise UserError(f"options before --: {last}; torchrun --help lists them.") from None
    named = arguments.rdzv_endpoint or arguments.master_port or arguments.rdzv_backend != "static"
    if arguments.nnodes in ("1", "1:1") and not named:  # "1:1" where it is not given
        arguments.rdzv_backend, arguments.rdzv_endpoint = "c10d", "localhost:0"
        arguments.rdzv_id = Path(os.environ[ending.LAUNCHER]).name
    arguments.master_port = arguments.master_port or 29500
    return arguments


def _wait(agent: threading.Thread, asked: list[int]) -> None:
    """Wait for the end of the ranks; pass signals on."""
    passed_on, gone_since = 0, None
    while agent.is_alive():
        agent.join(0.1)
        ranks = _ranks()
        if len(asked) > passed_on:
            passed_on = len(asked)
            if not ranks and passed_on == 1:
                return  # nothing has started yet
            ending.leave_signal(signal.Signals(asked[0]).name)
            for pid in ranks:
                # Not the signal itself: an interpreter that is still starting prints a traceback at
                # SIGINT.
                _send(pid, signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
        started = passed_on or list(Path(os.environ[ending.LAUNCHER]).glob("rank-*.json"))
        if ranks or not started:
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > AGENT_ENDS_S:
            return


def _ranks() -> list[int]:
    """The processes that this one has started, in any of its threads."""
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            found += map(int, task.read_text(encoding="utf-8").split())
        except OSError:
            continue  # the thread has ended
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stopped(number: int, told: list[dict], folder: Path) -> str:
    by = signal.Signals(number).name
    stops = [one["message"] for one in told if not one["lost"]]
    return stops[0] if stops else f"stopped by {by}. {ending.how_to_resume(folder)}"


def _cause(failure: BaseException, told: list[dict], folder: Path) -> UserError:
    """The failure to report: a rank's own message, else a rank that ended without one."""
    told = sorted(told, key=lambda one: (one["lost"], one["time"]))
    if told and not told[0]["lost"]:
        return _with_status(told[0]["message"], told[0]["status"])
    for rank, process in sorted(getattr(failure, "failures", {}).items()):
        if process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            why = " (by hand, or by the kernel for lack of memory)" if name == "SIGKILL" else ""
            return MachineFault(
                f"rank {rank} was ended by {name}{why}. {ending.how_to_resume(folder)}"
            )
        if not told:  # it ended before it left a message; what it printed is above
            return _with_status(
                f"rank {rank} ended with status {process.exitcode}, as is said above. "
                f"{ending.how_to_resume(folder)}",
                1,
            )
    if told:
        return _with_status(told[0]["message"], told[0]["status"])
    if isinstance(failure, UserError):
        return failure
    return MachineFault(
        f"the ranks could not be started, or ended without a message: "
        f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}. "
        f"{ending.how_to_resume(folder)}"
    )


def _with_status(message: str, status: int) -> UserError:
    error = UserError(message)
    error.status = status
    return error


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    if "--" not in arguments:
        raise UserError(
            "usage: moe-upgrpo launch [OPTIONS OF TORCHRUN] -- [OPTIONS OF TRAIN]; no -- was given."
        )
    at = list(arguments).index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


def world_size(agent_words: Sequence[str]) -> int | None:
    """The number of ranks that torchrun's options name, if they give it in numbers."""
    sizes = {"nnodes": "1", "nproc-per-node": "1"}
    words = iter(agent_words)
    for word in words:
        name, found, value = word.removeprefix("--").replace("_", "-").partition("=")
        if name in sizes and word.startswith("--"):
            sizes[name] = value if found else next(words, "")
    if not all(value.isdigit() for value in sizes.values()):
        return None
    return int(sizes["nnodes"]) * int(sizes["nproc-per-node"])
