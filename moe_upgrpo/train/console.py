# SPDX-License-Identifier: Apache-2.0
"""A console that survives the end of its reader, such as `| head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import rich.console


class Console(rich.console.Console):
    """rich's, which calls `closed` when nobody reads any more; rich's own ends the process there.

    What is printed after that goes nowhere.
    """

    def __init__(self, closed: Callable[[], None], **options: Any):
        super().__init__(**options)
        self._closed = closed

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._closed()
