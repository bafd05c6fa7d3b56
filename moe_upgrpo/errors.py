"""The exceptions that have a message for the user, and with which status a process then ends."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and how to fix it.

    A command prints it as its last lines, without a traceback, and every rank ends with `status`.
    """

    status = 2


class NumericalFailure(UserError):
    """A run whose numbers are no numbers any more: a failure of the loss or its settings."""

    status = 3


class MachineFault(UserError):
    """A fault of the machine (disk, memory, files, a lost rank or host): try again once mended."""

    status = 4


class Stopped(UserError):
    """Somebody asked for the end, by a signal; what was done until then is kept."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number

    def __reduce__(self):
        return Stopped, (str(self), self.status - 128)


INTERRUPTED = 128 + signal.SIGINT
