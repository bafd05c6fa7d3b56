# SPDX-License-Identifier: Apache-2.0
"""Threads that write while the next step goes on: of the token log and of checkpoints."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack

import numpy as np

from moe_upgrpo import ending
from moe_upgrpo.store import TokenLogWriter
from moe_upgrpo.store.token_writer import Column

# A rank that fails waits so long for what its threads write: torchrun kills after 30 s.
LAST_S = 15.0


class Behind:
    """Does work in a thread of its own, one piece at a time, while training goes on.

    A failure is raised where the next piece is handed over, in `settle` or in `look`. A run that
    fails leaves the `with` block of this, which waits a while for the last piece.

    what: the work, for the message that it failed beside the run. always: whether the end of the
    process by another thread waits for it as well.
    """

    def __init__(self, what: str, *, always: bool) -> None:
        self._what, self._always = what, always
        self._last: Future[None] | None = None
        self._entered = ExitStack()

    def __enter__(self):
        if self._always:
            self._entered.enter_context(ending.doing_before(self._linger))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._entered:
            if kind is None:
                self.settle()
            self._linger()

    def hand_over(self, work: Callable[..., None], *arguments: object) -> None:
        """Begin the work, after the piece before it. Raises any error of that one.

        What it is given may not change afterwards.
        """
        self.settle()
        self._last = Future()
        # A daemon: a process that ends waits for it as long as `_linger` does, no longer.
        given = (self._last, work, arguments)
        threading.Thread(target=_do, args=given, name=self._what, daemon=True).start()

    def settle(self) -> None:
        """Wait until all that was handed over is done. Raises any error of it."""
        if self._last is not None:
            try:
                self._last.result()
            finally:
                self._last = None

    def look(self) -> None:
        """Raise any error of work that is done, without waiting."""
        if self._last is not None and self._last.done():
            self.settle()

    def _linger(self) -> None:
        """Wait a while for what was handed over; report its failure."""
        last = self._last
        if last is None:
            return
        wait([last], timeout=LAST_S)
        failure = last.exception() if last.done() else f"it takes more than {LAST_S:g} s"
        if failure:
            print(
                f"rank {ending.rank()}: the {self._what} were not written: {failure}",
                file=sys.stderr,
                flush=True,
            )


def _do(done: Future[None], work: Callable[..., None], arguments: tuple) -> None:
    try:
        work(*arguments)
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


class TokenLogThread(Behind):
    """Hands a rank's token rows to a thread that packs and writes them, one step at a time.

    `settle` is called before a checkpoint is begun and at the end of the run: the rows up to a
    checkpoint are on disk before it has its name. A run that ends otherwise waits for the rows of
    the last step, because its row of metrics is already written.
    """

    def __init__(self, writer: TokenLogWriter) -> None:
        super().__init__("token rows of the last step", always=True)
        self.writer = writer

    def write(
        self, step: int, columns: Mapping[str, Column], prompts: dict[int, np.ndarray]
    ) -> None:
        """Hand over a step's rows and prompts; waits for those of the step before.

        Raises any error of writing the step before.
        """
        self.hand_over(self._write, step, columns, prompts)

    def _write(
        self, step: int, columns: Mapping[str, Column], prompts: dict[int, np.ndarray]
    ) -> None:
        self.writer.write_prompts(step, prompts)
        self.writer.write(step, columns)
