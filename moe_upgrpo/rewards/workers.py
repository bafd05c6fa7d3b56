# SPDX-License-Identifier: Apache-2.0
"""Worker processes of one reward, asked many at a time, with a hard time limit on each answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.rewards.question import Question

START_S = 120.0
TOGETHER = 32  # coroutines of a worker


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a reward: a number, named ones, or (value None) why there is none."""

    value: float | dict[str, float] | None
    why: str = ""
    late: bool = False


class Workers:
    """Up to `count` processes that call the function at `place` (module:function).

    A call that has no answer after `timeout_s` of wall-clock is ended with its process, and it
    alone has no value. Raises UserError where the function cannot be imported or called.
    """

    def __init__(self, place: str, *, timeout_s: float, count: int):
        self.place, self._timeout_s, self._count = place, timeout_s, count
        self._free: list[_Worker] = [_Worker(place, timeout_s)]  # the error comes at the start

    def __call__(self, asked: Sequence[tuple[Question, str, Any, str | None]]) -> list[Outcome]:
        """Judge each (question, response, row, text); outcomes in the same order."""
        left = deque(enumerate(_as_json(*one) for one in asked))
        outcomes: list[Outcome | None] = [None] * len(left)
        each = TOGETHER if self._free[0].waits else 1
        count = min(self._count, -(-len(left) // each))
        lock = threading.Lock()

        def work(_: int) -> None:
            with lock:
                worker = self._free.pop() if self._free else None
            worker = worker or _Worker(self.place, self._timeout_s)
            try:
                while chunk := _taken(left, each):
                    for i, outcome in self._answers(worker, chunk):
                        outcomes[i] = outcome
            finally:
                with lock:
                    self._free.append(worker)

        with ThreadPoolExecutor(max(1, count)) as threads:
            list(threads.map(work, range(count)))
        return outcomes

    def _answers(self, worker: _Worker, chunk: list[tuple[int, str]]) -> list[tuple[int, Outcome]]:
        replies = worker.ask([text for _, text in chunk])
        if replies is not None:
            return [(i, _outcome(r, self)) for (i, _), r in zip(chunk, replies, strict=True)]
        ended = worker.renew()
        if len(chunk) > 1:  # one of them blocks all: which?
            return [found for one in chunk for found in self._answers(worker, [one])]
        late = ended is None
        why = self.too_late() if late else f"{self.place} ended its process ({ended})"
        return [(chunk[0][0], Outcome(None, why, late=late))]

    def too_late(self) -> str:
        return f"{self.place} gave no answer in {self._timeout_s:g} s"

    def close(self) -> None:
        """End the processes."""
        for worker in self._free:
            worker.close()


def _outcome(reply: dict, workers: Workers) -> Outcome:
    if "late" in reply:
        return Outcome(None, workers.too_late(), late=True)
    if "error" in reply:
        return Outcome(None, f"{workers.place}: {reply['error']}")
    return Outcome(reply["value"])


def _taken(left: deque, most: int) -> list:
    taken = []
    with suppress(IndexError):  # another thread had the last
        while len(taken) < most:
            taken.append(left.popleft())
    return taken


def _as_json(question: Question, response: str, row: Any, text: str | None) -> str:
    more = [] if text is None else [text]
    return json.dumps([asdict(question), response, row, *more], default=str)


class _Worker:
    """One process."""

    def __init__(self, place: str, timeout_s: float):
        self._place, self._timeout_s = place, timeout_s
        self._start()

    def _start(self) -> None:
        self._ended_by_us = False
        # Its temporary files are removed with it, even where it is killed.
        self._folder = tempfile.TemporaryDirectory(
            prefix="moe_upgrpo_reward_", ignore_cleanup_errors=True
        )
        paths = dict.fromkeys([os.getcwd(), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_upgrpo.rewards.worker", self._place, str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": self._folder.name},
        )
        with self._killed_after(START_S):
            line = self._process.stdout.readline()
        told = json.loads(line) if line.endswith("\n") else {"error": "its process did not start"}
        if "error" in told:
            self.close()
            raise UserError(f"reward {self._place}: {told['error']}")
        self.waits = told["waits"]

    def ask(self, texts: Sequence[str]) -> list[dict] | None:
        """The process's reply; None where it ended, by the limit or by itself."""
        # A worker of coroutines holds its limit itself, unless one of them blocks.
        limit_s = self._timeout_s + (2 if self.waits else 0)
        with self._killed_after(limit_s):
            try:
                self._process.stdin.write(f"[{','.join(texts)}]\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass
            reply = self._process.stdout.readline()
        return json.loads(reply) if reply.endswith("\n") else None

    def renew(self) -> str | None:
        """Start another process; returns how the old one ended, None where its time was over."""
        by_us = self._ended_by_us
        self._process.kill()
        status = self._process.wait()
        self.close()
        self._start()
        if by_us:
            return None
        return signal.Signals(-status).name if status < 0 else f"status {status}"

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[None]:
        def end() -> None:
            self._ended_by_us = True
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
