# SPDX-License-Identifier: Apache-2.0
"""Seconds of a step by phase, and how many of them a rank only waited."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Clock:
    """Seconds since it was made, and those spent in each named phase.

    waited: seconds of each phase in which the calling thread neither ran nor was ready to run: it
    waited for other ranks, an engine or a disk. Empty where the system does not say, and on CUDA
    (`busy_waits`), where a thread that waits for its GPU looks busy to the system. In a process
    with several threads, waiting for its own other threads counts too.
    """

    def __init__(self, *, busy_waits: bool = False):
        self.seconds: dict[str, float] = defaultdict(float)
        self.waited: dict[str, float] = defaultdict(float)
        self._measures_waiting = not busy_waits and _occupied() is not None
        self._started, self._started_cpu = time.perf_counter(), time.process_time()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds inside to `phase`, however the inside ends."""
        begin, occupied = time.perf_counter(), _occupied()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.seconds[phase] += seconds
            if self._measures_waiting:
                self.waited[phase] += max(seconds - (_occupied() - occupied), 0.0)

    def total(self) -> float:
        return time.perf_counter() - self._started

    def cpu(self) -> float:
        """Seconds of CPU time, of all threads of the process, since it was made."""
        return time.process_time() - self._started_cpu


def _occupied() -> float | None:
    """Seconds that the calling thread ran or stood in the queue for a core; None: unknown.

    Linux gives both in nanoseconds in its schedstat. Time in the queue is not time spent waiting
    for another rank: on shared cores it is the machine's load.
    """
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text(
            encoding="ascii"
        )
    except OSError:
        return None
    ran, queued, _ = map(int, text.split())
    return (ran + queued) / 1e9
