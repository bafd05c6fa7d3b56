"""Whether mathematical answers are equal, by math-verify in a process that may be killed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from moe_upgrpo.errors import UserError

_WORKER = Path(__file__).with_name("math_worker.py")


class MathVerifier:
    """math-verify (the extra `math`) behind a limit that holds: 3 s of processor time, 4 GiB.

    An answer beyond the limit is wrong and counted in `killed`: `9^{9^{9^9}}` neither hangs a rank
    nor ends the run. May be called from any thread, by one at a time.

    Raises UserError where math-verify is not installed or its process does not start.
    """

    def __init__(self):
        if find_spec("math_verify") is None:
            raise UserError(
                "answers are checked by math-verify, which is not installed: "
                "pip install 'moe_upgrpo[math]'."
            )
        self.killed = 0
        self._worker: subprocess.Popen | None = None

    def right(self, reference: str, response: str) -> bool:
        """Whether the last answer in `response` equals the reference: `46`, `\\frac{1}{2}`, a
        solution that ends with `\\boxed{46}`, or GSM8K's `... #### 46`."""
        return bool(self._ask("right", reference, response))

    def classes(self, responses: list[str]) -> list[int | None]:
        """For each response the number of its answer, the same for equal ones; None for no answer.

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
        if self._worker is None:
            self._worker = _start()
        try:
            self._worker.stdin.write(json.dumps(request) + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; there will be no reply either
        reply = self._worker.stdout.readline()
        if reply:
            return json.loads(reply)
        self.close()
        self.killed += 1
        return None

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _start() -> subprocess.Popen:
    # -P: the files beside the worker shadow no module of the standard library.
    worker = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    if worker.stdout.readline() != "ready\n":
        worker.kill()
        worker.communicate()
        raise UserError(
            f"math-verify's process does not start; `{sys.executable} -P {_WORKER}` says why."
        )
    return worker
