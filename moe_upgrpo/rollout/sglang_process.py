# SPDX-License-Identifier: Apache-2.0
"""A server of SGLang's own environment as a child of this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.rollout import sglang_server
from moe_upgrpo.rollout.engines import Found
from moe_upgrpo.rollout.server_client import ServerClient

LOG_LINES = 12  # of the server, in an error
# Variables of torchrun and this environment: SGLang would take them for its own.
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
                 "PYTHONPATH", "PYTHONHOME")  # fmt: skip
INSTALL = (
    "SGLang has an environment of its own: make .venv-sglang/.installed. To use another, give "
    "python=, or its path in the variable SGLANG_PYTHON."
)


class ServerProcess:
    """An SGLang server as a child process, on a port of its own of this machine's loopback.

    It answers requests with `key` alone.
    """

    def __init__(
        self,
        python: Path,
        options: dict[str, Any],
        *,
        log: Path,
        log_stays: bool,
        key: str,
        start_timeout: float,
    ):
        self.python, self.log, self.start_timeout = python, log, start_timeout
        self.log_stays, self.key = log_stays, key
        self.options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = ServerClient(
            "SGLang", self.url, key=key, key_variable=sglang_server.KEY, late="is late"
        )
        self.process: subprocess.Popen | None = None

    def start(self, model_dir: Path, weight_version: str) -> None:
        """Start it and wait until it is ready; after `start_timeout` s end it: MachineFault."""
        options = {
            "model_path": model_dir,
            "host": "127.0.0.1",
            "port": self.port,
            "weight_version": weight_version,
            "skip_tokenizer_init": True,
        } | self.options
        arguments = [sglang_server.UNTIL_STDIN_CLOSES]
        for name, value in options.items():
            if value is not False and value is not None:
                arguments.append(f"--{name.replace('_', '-')}")
                arguments += [] if value is True else [str(value)]
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [self.python, "-P", sglang_server.__file__, *arguments],
                stdin=subprocess.PIPE,  # closes when this process ends, however it does
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
                | {sglang_server.KEY: self.key},
                start_new_session=True,
            )
        deadline = time.monotonic() + self.start_timeout
        while not self._client.is_alive(5, "/ready"):
            code = self.process.poll()
            if code is not None:
                self.stop()  # what it had started
                raise MachineFault(f"SGLang ended with code {code} at its start.{self.log_end()}")
            if time.monotonic() > deadline:
                self.stop()
                raise MachineFault(
                    f"SGLang was not up after start_timeout={self.start_timeout:g} s."
                    f"{self.log_end()}"
                )
            time.sleep(0.25)

    def stop(self) -> None:
        """End it and all that it started, at once and whatever its state."""
        if self.process is None:
            return
        # The group: its scheduler is a process too, and may outlive it.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process = None

    def log_end(self) -> str:
        """The last exception in the log, else its last lines, and where the log stays."""
        try:
            text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
            text = text.replace(self.key, "***")
        except OSError:
            return ""
        lines = text.splitlines()
        for i in reversed(range(len(lines))):
            if "Traceback (most recent call last)" in lines[i]:
                end = i + 1
                while end < len(lines) and lines[end].startswith(" "):
                    end += 1
                lines = lines[: end + 1]
                break
        where = f"its log {self.log}" if self.log_stays else "its log (log=FILE keeps it)"
        return f" From {where}:\n" + "\n".join(lines[-LOG_LINES:])


def find_python(python: str | Path | None) -> Path:
    """The Python of SGLang's environment."""
    given = python or os.environ.get("SGLANG_PYTHON")
    folders = dict.fromkeys((Path.cwd(), Path(__file__).parents[2]))
    candidates = [Path(given)] if given else [f / ".venv-sglang/bin/python" for f in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.absolute()  # not resolved: a virtual environment is found by its link
    raise UserError(f"There is no {' or '.join(map(str, candidates))}. {INSTALL}")


def look() -> Found:
    """See `EngineRecord.look`; SGLang's own environment is asked."""
    get = (
        "make .venv-sglang/.installed, or set SGLANG_PYTHON to the Python of an environment with it"
    )
    try:
        python = find_python(None)
    except UserError:
        note = "no .venv-sglang here, and no SGLANG_PYTHON"
        return Found(name="sglang", version=None, state="missing", note=note, get=get)
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    try:
        asked = subprocess.run(
            [python, "-c", code],
            capture_output=True,
            timeout=60,
            encoding="utf-8",
            errors="replace",
        )
        note = f"{python} has none" if asked.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        note = f"{python}: {error}"
    if note:
        return Found(name="sglang", version=None, state="wrong", note=note, get=get)
    version = asked.stdout.strip()
    return Found(name="sglang", version=version, state="ok", note=f"in {python}")
