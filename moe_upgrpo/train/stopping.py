# SPDX-License-Identifier: Apache-2.0
"""The end of a run that a signal asks for: by preemption on a cluster, or Ctrl-C.

A step is made of parts in which every rank waits for others. So the ranks agree at two places of a
step whether one of them was asked: before its update (the step is given up, generation too, at
once) and after it. A state is written there, and every rank ends.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moe_upgrpo import ending
from moe_upgrpo.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_S = 1.0  # between checks that the launcher lives


class GivenUp(BaseException):
    """Work given up because of a signal; no Exception, so that nothing handles it as a failure."""


class Stopping:
    """Handler of SIGTERM and SIGINT while it is entered; the main thread enters it.

    asked: the signal that came, or None. `within_s` seconds after it, or at a second signal, the
    process ends wherever it is.
    """

    def __init__(self, within_s: float):
        self.within_s = within_s
        self.asked: signal.Signals | None = None
        self._may_give_up = False
        self._limit: threading.Timer | None = None

    def __enter__(self) -> Stopping:
        # A thread hears signals that come while the main thread waits in a collective: Python's
        # own handlers would have to wait for the main thread.
        self._heard, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._bell_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, daemon=True, name="signals").start()
        self._left = threading.Event()
        threading.Thread(target=self._look, daemon=True, name="launcher").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._bell_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._bell.close()  # ends the thread
        if kind is GivenUp:
            raise self.error("before its first step") from None

    def _hear(self) -> None:
        with self._heard:
            while heard := self._heard.recv(1):
                if heard[0] not in SIGNALS:
                    continue
                if self._limit is not None:
                    ending.fail(self.message("at once"), 128 + self.asked)
                if ending.failed_already():  # the agent ends those that a failed rank left
                    ending.fail("another rank of this machine failed.", 4, lost=True)
                self.ask(heard[0])

    def _look(self) -> None:
        """Stop where the launcher was killed and cannot pass on a signal."""
        while not self._left.wait(LOOK_S):
            if ending.launcher_is_gone():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def ask(self, number: int) -> None:
        """Ask for the end, as a signal of that number does."""
        self._asked_for(number)
        self._limit = threading.Timer(self.within_s, self._late)
        self._limit.daemon = True
        self._limit.start()

    def agree(self, number: int) -> None:
        """Take over the signal that another rank got, for the message and the status."""
        self._asked_for(number)

    def _late(self) -> None:
        within = f"no state was written within --stop-within {self.within_s:g} s"
        ending.fail(self.message(within), 128 + self.asked)

    def _asked_for(self, number: int) -> None:
        self.asked = self.asked or signal.Signals(number)

    def _handle(self, number: int, frame: object) -> None:
        self._asked_for(number)
        if self._may_give_up:
            raise GivenUp

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Raise GivenUp inside as soon as a signal comes. For code that waits for no other rank."""
        self._may_give_up = True
        try:
            if self.asked is not None:
                raise GivenUp
            yield
        finally:
            self._may_give_up = False

    def message(self, how: str, *, state: bool = True) -> str:
        """Say that the run was stopped, how, and how to go on; state: whether it keeps states."""
        by = ending.signal_name(self.asked.name)
        if self.asked == signal.SIGPIPE:
            by += " (the reader of standard output is gone)"
        return f"stopped by {by}, {how}. {ending.how_to_resume(state=state)}"

    def error(self, how: str, *, state: bool = True) -> Stopped:
        """The exception that ends this rank."""
        return Stopped(self.message(how, state=state), self.asked)
