# SPDX-License-Identifier: Apache-2.0
"""Signs of life of every rank, so that a silent one can be named.

A transport says at best that a connection closed, and after minutes that something timed out. Here
each rank writes a growing number into the store in which the job's ranks found each other. A rank
that sees another's number stand still for the time limit, or cannot reach the store, ends the job
and names the silent one.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from moe_upgrpo.errors import LOST_RANK, UserError, machine_fault

_ENDED = "ended"
_READS_ALL = 64  # with more ranks each reads only the next one's, so as not to flood the store


class Heartbeat:
    """This rank's signs of life, and a watch over those of the others.

    limit_s: silence after which `on_silence` is called, from a thread, with the name of the silent.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        limit_s: float,
        on_silence: Callable[[str], None],
        interval_s: float = 1.0,
    ):
        self.rank, self.world_size = rank, world_size
        self.limit_s, self.interval_s = limit_s, min(interval_s, limit_s / 8)
        self._on_silence = on_silence
        self._over = threading.Event()
        self._read_all = world_size <= _READS_ALL
        self._reached = time.monotonic()  # the store, the last time
        # rank -> what it wrote last, and since when that has not changed
        self._seen: dict[int, tuple[str, float]] = {}

    def start(self) -> None:
        for target in (self._beat, self._watch):
            threading.Thread(target=target, daemon=True, name="heartbeat").start()

    def stop(self) -> None:
        """Announce that this rank ends as it should."""
        self._over.set()

    def silent(self, for_s: float) -> list[str]:
        """The ranks without a sign of life for so long, in words."""
        now = time.monotonic()
        return [
            f"rank {rank} (host {said.split()[1]}, process {said.split()[2]})"
            for rank, (said, since) in sorted(self._seen.items())
            if said != _ENDED and now - since > for_s
        ]

    def explain(self, error: BaseException) -> str | None:
        """Name the lost rank behind `error`; None where no rank was lost."""
        if isinstance(error, UserError) or machine_fault(error) != LOST_RANK:
            return None
        first = str(error).strip().partition("\n")[0][:200]
        self._read_all = True
        time.sleep(4 * self.interval_s)  # long enough to see whose signs stop
        if names := self.silent(for_s=3 * self.interval_s):
            return f"rank {self.rank} lost {', '.join(names)}, which ended or was cut off"
        if "time" in first.lower():
            return (
                f"rank {self.rank} waited longer than --timeout for another rank ({first}); every "
                "rank shows signs of life, so one is slow or stuck: give a longer --timeout"
            )
        return f"rank {self.rank} lost the connection to another rank ({first})"

    def _beat(self) -> None:
        beats, me = 0, f"{socket.gethostname()} {os.getpid()}"
        others = [r % self.world_size for r in range(self.rank + 1, self.rank + self.world_size)]
        while True:
            try:
                store = dist.PrefixStore("moe_upgrpo/signs", _connect(self.limit_s))
                while not self._over.wait(self.interval_s):
                    beats += 1
                    store.set(str(self.rank), f"{beats} {me}")
                    for other in others if self._read_all else others[:1]:
                        self._see(other, store)
                    self._reached = time.monotonic()
                store.set(str(self.rank), _ENDED)
                return
            except (RuntimeError, OSError):
                if self._over.wait(self.interval_s):
                    return  # the store is gone with the job

    def _see(self, other: int, store: dist.Store) -> None:
        if not store.check([str(other)]):
            return  # not there yet: its imports may take a while
        said = store.get(str(other)).decode()
        if self._seen.get(other, ("",))[0] != said:
            self._seen[other] = (said, time.monotonic())

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.interval_s):
            now = time.monotonic()
            if now - last > min(5 * self.interval_s + 5, self.limit_s / 2):
                # This process itself was stopped, so what it saw of the others is out of date.
                self._reached = now
                self._seen = {rank: (said, now) for rank, (said, _) in self._seen.items()}
            last = now
            if now - self._reached > self.limit_s:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                self._on_silence(
                    f"rank {self.rank} (host {socket.gethostname()}) has not reached the job's "
                    f"store at {where} for {self.limit_s:.0f} s: that host is down or stopped, or "
                    "the network to it is cut"
                )
            elif names := self.silent(for_s=self.limit_s):
                self._on_silence(
                    f"{', '.join(names)} gave no sign of life for {self.limit_s:.0f} s: stopped, "
                    "its host down, or the network to it cut"
                )


def _connect(limit_s: float) -> dist.Store:
    """Open a separate connection, because another thread may wait in torch.distributed's."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=max(limit_s, 1)),
    )
