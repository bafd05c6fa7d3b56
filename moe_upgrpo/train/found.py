# SPDX-License-Identifier: Apache-2.0
"""The newest checkpoint of a run, found and checked before a rank is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.rollout.cache import load_rollouts, saved_steps
from moe_upgrpo.store import RunFolder, read_config
from moe_upgrpo.store.checkpoints import Checkpoints, read_manifest

ROLLOUTS = "rollouts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Where a run is continued: after `step`, from `path`; step 0 is the start, without a file."""

    step: int = 0
    path: Path | None = None
    manifest: dict[str, Any] | None = None

    def rollouts(self) -> dict[int, list[Rollout]]:
        """All ranks' rollouts that were sampled ahead, by the steps that train on them."""
        if self.path is None or not (self.path / ROLLOUTS).is_dir():
            return {}
        folder = self.path / ROLLOUTS
        return {step: load_rollouts(folder, step) for step in saved_steps(folder)}


def find(run: RunFolder, steps: int, *, restart: bool = False) -> Checkpoint:
    """The run's newest checkpoint. Every rank reads it.

    restart: without a checkpoint, begin again even though that deletes what was logged.

    Raises UserError where it is not readable, where nothing is left to do up to `steps`, or where
    steps would be lost.
    """
    whole = Checkpoints(run.checkpoints).all()
    found = Checkpoint()
    if whole:
        manifest = read_manifest(whole[-1])
        found = Checkpoint(step=manifest["step"], path=whole[-1], manifest=manifest)
    if whole and restart:
        raise UserError(
            f"--restart begins a run again that has no state left, and {whole[-1]} is one. Leave "
            f"--restart out to go on after step {found.step}, or delete the states first."
        )
    if not whole and not restart:
        _refuse_loss(run)
    finished = found.step == steps and (run.checkpoints / f"step-{steps:06d}").is_dir()
    if found.step > steps or finished:
        raise UserError(
            f"{run.path} has done {found.step} steps and --steps is {steps}: nothing is left to "
            "do. Give more --steps to go on."
        )
    return found


def _refuse_loss(run: RunFolder) -> None:
    """Raise UserError where a run without a state has logged steps, unless it was killed before its
    first state: then the same steps follow again."""
    last = run.last_logged()
    if not last:
        return
    config, memory = read_config(run.path), run.memory()
    every = config.get("save_every")
    steps = config.get("steps", every)
    first = min(every, steps) if every else 0
    # Where training goes on meanwhile, the second state waits for the first.
    ends = min(2 * every, steps) if config.get("async_save") else first
    never_saved = "last_state" in memory and memory["last_state"] is None
    if last < first or (last <= ends and never_saved):
        return
    why = "its states were removed" if every else "--save-every 0 keeps no state"
    raise UserError(
        f"{run.path} has logged {last} steps and has no state to go on from: {why}. To begin again "
        f"from step 1 and delete what was logged, give --restart; to keep it, put "
        f"{run.checkpoints}/state-… back, or start another run with another --output-dir."
    )
