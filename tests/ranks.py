"""Run a function, or our command, on several processes over gloo, as torchrun would.

A fork server imports torch, transformers and Megatron once; each job then forks fresh processes in
a fraction of a second, without the seconds of imports of a new interpreter. Every test has process
groups of its own. torchrun itself, and interpreters of their own, are left to the tests
that are about them, most in tests/train/test_launch.py.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])
# What a rank says whose fault another's end was.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class RankFailed(AssertionError):
    """A rank raised: the message is its traceback."""


def host_store():
    """The store in which the ranks of a job find each other, and which has to live as long as they.

    Hosted by who starts them, as by torchrun: a port that is chosen first and bound later, by rank
    0, may be another's by then, and the ranks wait in the store of another job.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank_main(environment: dict[str, str], stack: str, answer, function: Callable, args: tuple):
    os.environ |= environment
    with open(stack, "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            # Pickled here, by value: else tensors go as handles on a process that is gone.
            answer.send((pickle.dumps(function(*args)), None))
        except BaseException:
            answer.send((None, traceback.format_exc()))


def run_ranks(
    world_size: int,
    function: Callable,
    *args: Any,
    timeout_s: float = 120,
    context: multiprocessing.context.BaseContext = _context,
) -> list[Any]:
    """`[function(*args) on rank r for r in range(world_size)]`; raises RankFailed if any rank does.

    `function` and its results must be picklable (torch tensors travel as copies). A rank that ends
    without a word fails at once; where some are still at work after `timeout_s`, the message has
    the Python stacks of their threads.
    """
    store = host_store()
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, str(rank)) for rank in range(world_size)]
        processes, waiting = [], {}
        outputs: dict[int, Any] = {}
        failures: dict[int, str] = {}
        try:
            for rank in range(world_size):
                stacks[rank].touch()
                # A pipe for each: that it closes says that its rank is gone, also in mid-message.
                receiver, sender = context.Pipe(duplex=False)
                # The fork server's environment is that of its own start.
                variables = dict(os.environ) | _environment(rank, world_size, store.port)
                told = (variables, str(stacks[rank]), sender)
                process = context.Process(
                    target=_rank_main, args=(*told, function, args), daemon=True
                )
                process.start()
                sender.close()
                processes.append(process)
                waiting[receiver] = rank
            deadline = time.monotonic() + timeout_s
            while waiting and (left := deadline - time.monotonic()) > 0:
                for receiver in connection.wait(list(waiting), left):
                    rank = waiting.pop(receiver)
                    value, error = _answer(receiver, processes[rank])
                    if error is None:
                        outputs[rank] = pickle.loads(value)
                        continue
                    failures[rank] = error
                    # The others may wait for ever, or report the lost connection.
                    deadline = min(deadline, time.monotonic() + 2)
            if failures:
                rank = min(failures, key=lambda r: any(word in failures[r] for word in _LOST))
                raise RankFailed(f"rank {rank} of {world_size}:\n{failures[rank]}")
            if waiting:
                _write_stacks(processes[rank] for rank in waiting.values())
                found = "".join(f"rank {r}:\n{stacks[r].read_text()}" for r in waiting.values())
                raise RankFailed(f"{len(waiting)} rank(s) gave no result in {timeout_s} s\n{found}")
            return [outputs[r] for r in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def exit_status(function: Callable[..., None], *args: Any, timeout_s: float = 120) -> int:
    """Exit status of a fresh process that calls `function`; negative where a signal ended it."""
    process = _context.Process(target=function, args=args)
    process.start()
    try:
        process.join(timeout_s)
        if process.is_alive():
            raise RankFailed(f"the process gave no result in {timeout_s} s")
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _answer(receiver, process: BaseProcess) -> tuple[bytes | None, str | None]:
    try:
        return receiver.recv()
    except (EOFError, OSError):
        process.join()
        return None, f"ended with exit status {process.exitcode} and without a word"


def _write_stacks(processes: Iterable[BaseProcess]) -> None:
    """Have processes write the Python stacks of their threads where they registered to."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)


def _command_main(
    words: Sequence[str],
    environment: dict[str, str],
    cwd: str,
    folder: str,
    first: Callable[[], None] | None,
):
    os.environ.clear()  # the fork server's is that of its own start
    os.environ |= environment
    os.chdir(cwd)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        target = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(target, stream.fileno())
        os.close(target)
        stream.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR1)
    from moe_upgrpo.cli import main

    if first is not None:
        first()
    sys.argv = ["moe-upgrpo", *words]
    main()


def run_command(
    *words: object,
    ranks: int = 0,
    cwd: Path | None = None,
    timeout_s: float = 120,
    first: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess:
    """`moe-upgrpo WORDS` in a process, or as each of the `ranks` of a job; what all of them print.

    As torchrun does, it ends the other ranks by SIGTERM once one has failed; the exit status is
    that of the first to fail. `first` is called in each process before the command. Raises
    subprocess.TimeoutExpired with what was printed, and the Python stacks at that moment.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = host_store() if ranks else None

        def start(rank: int):
            more = {}
            if ranks:
                # torchrun's layout of folders: by it the ranks agree which of them prints an error.
                report = {"TORCHELASTIC_ERROR_FILE": f"{folder}/attempt_0/{rank}/error.json"}
                more = _environment(rank, ranks, store.port) | report
            arguments = ([*map(str, words)], dict(os.environ) | more, str(cwd or Path.cwd()))
            process = _context.Process(target=_command_main, args=(*arguments, folder, first))
            process.start()
            return process

        def printed(name: str) -> str:
            file = Path(folder, name)
            return file.read_text() if file.exists() else ""

        processes = []
        deadline, status = time.monotonic() + timeout_s, 0
        try:
            processes += map(start, range(ranks or 1))
            running = list(processes)
            while running:
                left = deadline - time.monotonic()
                connection.wait([process.sentinel for process in running], timeout=max(left, 0))
                ended = [process for process in running if not process.is_alive()]
                running = [process for process in running if process not in ended]
                # Of several at once a signal comes first: the others may have failed by it.
                failed = sorted(process.exitcode for process in ended if process.exitcode)
                status = status or next(iter(failed), 0)
                if running and left <= 0:
                    _write_stacks(running)
                    args = (words, timeout_s, printed("stdout"), printed("stderr"))
                    error = subprocess.TimeoutExpired(*args)
                    error.add_note(printed("stderr"))
                    raise error
                if status:
                    for process in running:
                        process.terminate()
        finally:
            for process in processes:
                process.kill()
                process.join()
        return subprocess.CompletedProcess(words, status, printed("stdout"), printed("stderr"))
