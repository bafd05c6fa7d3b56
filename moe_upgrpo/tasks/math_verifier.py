# SPDX-License-Identifier: Apache-2.0
"""Equality of mathematical answers, by math-verify in a process that may be killed."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from moe_upgrpo.errors import UserError
from moe_upgrpo.extras import install

_WORKER = Path(__file__).with_name("math_worker.py")
# Wall-clock limits: ten times the processor time that an answer may take, and the imports.
ANSWER_S, START_S = 30.0, 120.0


class MathVerifier:
    """math-verify (the extra `math`) with hard limits: 3 s of processor time, 4 GiB.

    An answer beyond the limit is wrong and counted in `killed`: `9^{9^{9^9}}` neither hangs a rank
    nor ends the run. A worker that gives no answer in 30 s though it may run no longer than 3 was
    stopped, or its machine has stalled: it is killed and counted, and another one is asked; if that
    is silent too, the answer is wrong. May be called from any thread, by one at a time.

    Raises UserError where math-verify is not installed or its process does not start.
    """

    def __init__(self):
        if find_spec("math_verify") is None:
            raise UserError(
                "answers are checked by math-verify, which is not installed: " + install("math")
            )
        self.killed = 0
        self._worker: subprocess.Popen | None = None

    def right(self, reference: str, response: str) -> bool:
        """Whether the last answer in `response` equals the reference: `46`, `\\frac{1}{2}`, a
        solution that ends with `\\boxed{46}`, or GSM8K's `... #### 46`."""
        return bool(self._ask("right", reference, response))

    def classes(self, responses: list[str]) -> list[int | None]:
        """Number the answer of each response, the same for equal ones; None for no answer.

        An answer joins the first class whose first member it equals: equality of math-verify is
        not transitive (it rounds), and the order of the responses decides where it is not.
        """
        found: list[int | None] = []
        written: dict[str, int] = {}  # answers as sympy writes them
        firsts: list[str] = []
        for response in responses:
            answer = self._ask("answer", response)
            if answer is None:
                found.append(None)
                continue
            if answer not in written:
                same = (i for i, r in enumerate(firsts) if self._ask("same", r, response))
                written[answer] = next(same, len(firsts))
                if written[answer] == len(firsts):
                    firsts.append(response)
            found.append(written[answer])
        return found

    def _ask(self, *request: str):
        for _ in range(2):
            if self._worker is None:
                self._worker = _start()
            reply = _answered(self._worker, json.dumps(request) + "\n")
            if reply is not None:
                return json.loads(reply)
            self._worker.kill()
            status = self._worker.wait()  # what ended it first
            self.close()
            self.killed += 1
            if status != -signal.SIGKILL:  # its own limit ended it; any other would end as well
                break
        return None

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _answered(worker: subprocess.Popen, request: str) -> str | None:
    """The process's reply, one line; None where it ends, or is killed after `ANSWER_S`.

    Killed: a worker that is stopped takes no request that is longer than the pipe either.
    """
    with _killed_after(ANSWER_S, worker):
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; there will be no reply either
        reply = worker.stdout.readline()
    return reply if reply.endswith("\n") else None


@contextmanager
def _killed_after(seconds: float, worker: subprocess.Popen) -> Iterator[None]:
    timer = threading.Timer(seconds, worker.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start() -> subprocess.Popen:
    # -P: the files beside the worker shadow no module of the standard library.
    worker = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    with _killed_after(START_S, worker):
        ready = worker.stdout.readline()
    if ready != "ready\n":
        worker.kill()
        worker.communicate()
        raise UserError(
            f"math-verify's process does not start; `{sys.executable} -P {_WORKER}` says why."
        )
    return worker
