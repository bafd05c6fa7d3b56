"""Run a function on several processes over gloo, as torchrun would, and get every rank's result.

A fork server imports torch and Megatron once; each job then forks fresh ranks in a fraction of a
second, so that every test has process groups of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class RankFailed(AssertionError):
    """A rank raised: the message is its traceback."""


def _rank_main(rank: int, world_size: int, port: int, results, function: Callable, args: tuple):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        # Pickled here, by value: the queue would pass tensors as handles on a process that is gone.
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(world_size: int, function: Callable, *args: Any, timeout_s: float = 120) -> list[Any]:
    """`[function(*args) on rank r for r in range(world_size)]`; raises RankFailed if any rank does.

    `function` and its results must be picklable (torch tensors travel as copies).
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
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
