# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: saving the state of a job after a step, and going on from it.

Random numbers need no keeping: every stream is seeded by the run's seed, its purpose, the step and
the rank. Nor does the engine: it gets the weights again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from moe_upgrpo import __version__
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.checkpoint import load_state, ready_state
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.rollout.cache import save_rollouts
from moe_upgrpo.store import RunFolder
from moe_upgrpo.store.checkpoints import Checkpoints, describe, faults, names
from moe_upgrpo.train.found import ROLLOUTS, Checkpoint
from moe_upgrpo.train.writing import Behind

# Fields of a Hugging Face config about its writer and its loading, not about the model.
_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache")


def load(
    found: Checkpoint,
    actor: MegatronActor,
    behind: MegatronActor | None,
    reference: MegatronActor | None = None,
) -> None:
    """Put a checkpoint's state into the actors, once it is known to be whole and of this model.

    A collective. Raises UserError on every rank for damaged files or another model.
    """
    if found.path is None:
        return
    mine, theirs = _model(actor), found.manifest["model"]
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            raise UserError(
                f"{found.path} is a checkpoint of another model: its {name} is {theirs[name]}, "
                f"that of {actor.model_dir} is {mine[name]}. Resume with the model of the run."
            )
    files = found.manifest["files"]
    if wrong := groups.gather_everywhere(faults(found.path, _part(files))):
        raise UserError(wrong[0])
    load_state(found.path, actor, behind, reference)


def save(
    run: RunFolder,
    step: int,
    *,
    actor: MegatronActor,
    behind: MegatronActor | None,
    reference: MegatronActor | None,
    ahead: Mapping[int, Sequence[Rollout]],
    keep: int,
    thread: StateThread | None = None,
) -> None:
    """Keep the state after `step`, then prune. A collective.

    reference: passed where it does not stay the start model. ahead: this data-parallel rank's
    rollouts of later steps, by their steps, on one rank of each model copy. thread: writes it while
    training goes on, from a copy in the host's memory; this waits for the state before it.
    """
    if thread:
        thread.settle()  # its folder is in the way, and its copy in memory
    own = thread.own if thread else None
    checkpoints = Checkpoints(run.checkpoints)
    first = groups.rank() == 0
    part = groups.from_rank_0(checkpoints.begin(step) if first else None)
    write = ready_state(part, actor, behind, reference, own=own)
    for later, rollouts in ahead.items():
        save_rollouts(part / ROLLOUTS, later, groups.data_parallel()[0], rollouts)
    about = {
        "model": _model(actor),
        "layout": str(actor.layout),
        "moe_upgrpo": __version__,
        "megatron-core": version("megatron-core"),
    }

    def complete() -> None:
        written = write()
        known = set(groups.gather_everywhere(list(written), own))  # every rank's files are there
        others = _part(dict.fromkeys(name for name in names(part) if name not in known))
        described = list(describe(part, others, written).items())
        everyones = groups.gather_everywhere(described, own)
        if first:
            checkpoints.commit(part, step, dict(everyones), about)
            run.remember_state(step)
            checkpoints.prune(keep)

    if thread:
        thread.hand_over(complete)
    else:
        complete()


class StateThread(Behind):
    """The thread that writes checkpoints while training goes on; making it is a collective.

    The ranks' threads wait for each other in a group of their own, and a checkpoint gets its name
    from rank 0's once all are done: as without a thread.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__("files of the last checkpoint", always=False)
        self.own = groups.own_group(timeout_s)


def _part(files: dict[str, Any]) -> dict[str, Any]:
    """The files that this rank reads."""
    mine = sorted(files)[groups.rank() :: groups.world_size()]
    return {name: files[name] for name in mine}


def _model(actor: MegatronActor) -> dict[str, Any]:
    config = json.loads(actor.hf.to_json_string(use_diff=False))
    return {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
