# SPDX-License-Identifier: Apache-2.0
"""A console that survives the end of its reader, such as `| head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import rich.console


class Console(rich.console.Console):
    """rich's console, but it calls `closed` when its reader is gone; rich would end the process.

    Anything printed after that is dropped.
    """

    def __init__(self, closed: Callable[[], None], **options: Any):
        super().__init__(**options)
        self._closed = closed

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._closed()
