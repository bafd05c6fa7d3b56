# SPDX-License-Identifier: Apache-2.0
"""The token log's own thread, which writes while the next step goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import numpy as np

from moe_upgrpo import ending
from moe_upgrpo.store import TokenLogWriter
from moe_upgrpo.store.token_writer import Column

# A rank that fails waits so long for the rows of its last step: torchrun kills after 30 s.
LAST_S = 15.0


class TokenLogThread:
    """Hands a rank's token rows to a thread that packs and writes them, one step at a time.

    Its failure is raised where the next step's rows are handed over, or in `settle`, which is
    called before a checkpoint is begun and at the end of the run: the rows up to a checkpoint are
    on disk before it has its name. A run that ends otherwise leaves the `with` block of this, which
    waits for the rows of the last step, because its row of metrics is already written.
    """

    def __init__(self, writer: TokenLogWriter) -> None:
        self.writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token log")
        self._last: Future[None] | None = None
        self._entered = ExitStack()

    def __enter__(self) -> TokenLogThread:
        self._entered.enter_context(ending.doing_before(self._linger))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._entered:
            if kind is None:
                self.settle()
            self._linger()
        self._thread.shutdown(wait=False)

    def write(
        self, step: int, columns: Mapping[str, Column], prompts: dict[int, np.ndarray]
    ) -> None:
        """Hand over a step's rows and prompts; waits for those of the step before.

        Nothing that was handed over may change afterwards. Raises any error of writing the step
        before.
        """
        self.settle()
        self._last = self._thread.submit(self._write, step, columns, prompts)

    def settle(self) -> None:
        """Wait until all that was handed over is on disk. Raises any error of the writing."""
        if self._last is not None:
            try:
                self._last.result()
            finally:
                self._last = None

    def _linger(self) -> None:
        """Wait a while for the rows that were handed over; report a failure to write them."""
        last = self._last
        if last is None:
            return
        wait([last], timeout=LAST_S)
        failure = last.exception() if last.done() else f"it takes more than {LAST_S:g} s"
        if failure:
            print(
                f"rank {ending.rank()}: the token rows of the last step were not written: "
                f"{failure}",
                file=sys.stderr,
                flush=True,
            )

    def _write(
        self, step: int, columns: Mapping[str, Column], prompts: dict[int, np.ndarray]
    ) -> None:
        self.writer.write_prompts(step, prompts)
        self.writer.write(step, columns)
