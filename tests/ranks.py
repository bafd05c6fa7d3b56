"""Run a function, or our command, on several processes over gloo, as torchrun would.

A fork server imports torch, transformers and Megatron once; each job then forks fresh processes in
a fraction of a second, without the seconds of imports of a new interpreter. Every test has process
groups of its own. torchrun itself, and interpreters of their own, are left to the tests
that are about them: the whole run of tests/train/test_launch.py and those that kill a rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class RankFailed(AssertionError):
    """A rank raised: the message is its traceback."""


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, results, function: Callable, args: tuple):
    os.environ |= _environment(rank, world_size, port)
    try:
        # Pickled here, by value: the queue would pass tensors as handles on a process that is gone.
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(world_size: int, function: Callable, *args: Any, timeout_s: float = 120) -> list[Any]:
    """`[function(*args) on rank r for r in range(world_size)]`; raises RankFailed if any rank does.

    `function` and its results must be picklable (torch tensors travel as copies).
    """
    port = free_port()
    results = _context.Queue()
    ranks = [
        _context.Process(
            target=_rank_main, args=(r, world_size, port, results, function, args), daemon=True
        )
        for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        outputs: dict[int, Any] = {}
        failures: dict[int, str] = {}
        for _ in ranks:
            # After a failure the others may wait for ever, or report the lost connection.
            try:
                rank, value, error = results.get(timeout=2 if failures else timeout_s)
            except queue.Empty:
                break
            if error is None:
                outputs[rank] = pickle.loads(value)
            else:
                failures[rank] = error
        if failures:
            rank = min(failures, key=lambda r: "Connection closed by peer" in failures[r])
            raise RankFailed(f"rank {rank} of {world_size}:\n{failures[rank]}")
        if len(outputs) < world_size:
            raise RankFailed(f"{world_size - len(outputs)} rank(s) gave no result in {timeout_s} s")
        return [outputs[r] for r in range(world_size)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _command_main(words: Sequence[str], environment: dict[str, str], cwd: str, folder: str):
    os.environ.clear()  # the fork server's is that of its own start
    os.environ |= environment
    os.chdir(cwd)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        target = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(target, stream.fileno())
        os.close(target)
        stream.reconfigure(line_buffering=True)
    from moe_upgrpo.cli import main

    sys.argv = ["moe-upgrpo", *words]
    main()


def run_command(
    *words: object, ranks: int = 0, cwd: Path | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess:
    """`moe-upgrpo WORDS` in a process, or as each of the `ranks` of a job; what all of them print.

    As torchrun does, it ends the other ranks by SIGTERM once one has failed; the exit status is
    that of the first to fail. Raises subprocess.TimeoutExpired with what was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()

        def start(rank: int):
            # torchrun's layout of folders: by it the ranks agree which of them prints an error.
            report = {"TORCHELASTIC_ERROR_FILE": f"{folder}/attempt_0/{rank}/error.json"}
            more = _environment(rank, ranks, port) | report if ranks else {}
            arguments = ([*map(str, words)], dict(os.environ) | more, str(cwd or Path.cwd()))
            process = _context.Process(target=_command_main, args=(*arguments, folder))
            process.start()
            return process

        def printed(name: str) -> str:
            file = Path(folder, name)
            return file.read_text() if file.exists() else ""

        processes = [start(rank) for rank in range(ranks or 1)]
        deadline, status = time.monotonic() + timeout_s, 0
        try:
            running = list(processes)
            while running:
                left = deadline - time.monotonic()
                connection.wait([process.sentinel for process in running], timeout=max(left, 0))
                for process in [process for process in running if not process.is_alive()]:
                    running.remove(process)
                    status = status or process.exitcode
                if left <= 0:
                    args = (words, timeout_s, printed("stdout"), printed("stderr"))
                    raise subprocess.TimeoutExpired(*args)
                if status:
                    for process in running:
                        process.terminate()
        finally:
            for process in processes:
                process.kill()
                process.join()
        return subprocess.CompletedProcess(words, status, printed("stdout"), printed("stderr"))
