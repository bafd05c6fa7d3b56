# SPDX-License-Identifier: Apache-2.0
"""The token log written by a thread of its own, while the next step goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moe_upgrpo.store import TokenLogWriter
from moe_upgrpo.store.token_writer import Column


class TokenLogThread:
    """Hands a rank's token rows to a thread that packs and writes them, one step at a time.

    A failure of it is raised where the next step's rows are handed over, or in `settle`, which
    comes before a checkpoint is begun and at the end of the run: what a checkpoint stands for is on
    disk before it has its name.
    """

    def __init__(self, writer: TokenLogWriter) -> None:
        self.writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token log")
        self._last: Future[None] | None = None

    def write(
        self, step: int, columns: Mapping[str, Column], prompts: dict[int, np.ndarray]
    ) -> None:
        """Have a step's rows and prompts written; waits for those of the step before it.

        Nothing that was handed over may change afterwards. Raises what the writing of the step
        before it raised.
        """
        self.settle()
        self._last = self._thread.submit(self._write, step, columns, prompts)

    def settle(self) -> None:
        """Wait until all that was handed over is on disk. Raises what the writing raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def _write(
        self, step: int, columns: Mapping[str, Column], prompts: dict[int, np.ndarray]
    ) -> None:
        self.writer.write_prompts(step, prompts)
        self.writer.write(step, columns)
