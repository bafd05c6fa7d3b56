# SPDX-License-Identifier: Apache-2.0
"""Metrics for TensorBoard and Weights & Biases, beside metrics.jsonl, written by rank 0."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from moe_upgrpo.errors import UserError
from moe_upgrpo.extras import install
from moe_upgrpo.store.files import parse_json, write_text

Tracker = Literal["none", "tensorboard", "wandb"]
PROJECT = "moe_upgrpo"


class _Writer(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[Tracker]) -> None:
    """Raise UserError for trackers that do not go together or are not installed."""
    if "none" in names and len(set(names)) > 1:
        raise UserError(f"track={' '.join(names)}: none cannot be combined with others.")
    missing = [n for n in names if n != "none" and importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f"track={' '.join(names)}: {' and '.join(missing)} is not installed. "
            f"{install('tracking')} brings both, or leave --track out."
        )


class Tracking:
    """Logs every number of a metrics row, under its name; those of a list as name/0, name/1, …

    tensorboard: events in RUN/tensorboard. wandb: project `moe_upgrpo` (WANDB_PROJECT), the run
    named as its folder, its files in RUN/wandb; WANDB_MODE=offline needs no network. For a resumed
    run the first `done` steps are kept; later ones are shown again. `done` is None for a new run.
    """

    def __init__(
        self,
        names: Sequence[Tracker],
        run_path: Path,
        config: Mapping[str, Any] | None = None,
        *,
        done: int | None = None,
    ):
        config = json.loads(json.dumps(config or {}, default=str))
        make = {"tensorboard": _TensorBoard, "wandb": _WandB}
        self._writers: list[_Writer] = [
            make[name](run_path, config, done) for name in dict.fromkeys(names) if name != "none"
        ]

    def log(self, row: Mapping[str, Any]) -> None:
        values = dict(numbers({name: v for name, v in row.items() if name != "step"}))
        for writer in self._writers:
            writer.log(row["step"], values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of the finite numbers in a row, also of those inside lists and dicts."""
    for name, value in row.items():
        if hasattr(value, "tolist"):  # numpy and torch
            value = value.tolist()
        if isinstance(value, Mapping):
            yield from numbers({f"{name}/{key}": part for key, part in value.items()})
        elif isinstance(value, list | tuple):
            yield from numbers({f"{name}/{i}": part for i, part in enumerate(value)})
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            yield name, float(value)


class _TensorBoard:
    def __init__(self, run_path: Path, config: dict[str, Any], done: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard leaves out what earlier files have of the steps from purge_step on.
        first = done and done + 1  # without a checkpoint a run begins again, at step 0
        self._writer = SummaryWriter(str(run_path / "tensorboard"), purge_step=first)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run keeps what it logged

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_path: Path, config: dict[str, Any], done: int | None):
        import wandb

        path = run_path.resolve()
        known = path / "wandb" / "run.json"  # a resumed run is the same run
        identity = parse_json(known.read_bytes(), str(known))["id"] if known.is_file() else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=path.name,
                id=identity,
                resume="allow" if identity else None,
                dir=str(path),
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"track=wandb: Weights & Biases does not start: {error}. Log in (wandb login), or "
                "set WANDB_MODE=offline and send the run later (wandb sync)."
            ) from error
        known.parent.mkdir(exist_ok=True)
        write_text(known, json.dumps({"id": self._run.id}) + "\n")
        # wandb's own step only grows, and a resumed run may repeat some.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()
