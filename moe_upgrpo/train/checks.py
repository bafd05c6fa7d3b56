# SPDX-License-Identifier: Apache-2.0
"""Checks of a start that need no rank: options, folders, files."""

from __future__ import annotations

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import read_raw_config
from moe_upgrpo.megatron import releases
from moe_upgrpo.rollout.cache import check_new
from moe_upgrpo.store import RunFolder, read_config
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.found import find
from moe_upgrpo.train.options import changes
from moe_upgrpo.train.tracking import check as check_trackers


def check_start(config: TrainConfig, world_size: int | None) -> None:
    """Raise UserError for what `moe_upgrpo.train.start` would refuse; loads no model.

    world_size: None where only the ranks will know.
    """
    releases.check()
    if world_size is not None:
        config.layout(world_size)
    check_trackers(config.log.track)
    run, rollouts = config.run, config.rollouts
    if run.resume:
        changes(read_config(run.resume), config)
        find(RunFolder(run.resume), run.steps, restart=run.restart)
    else:
        if run.output_dir:
            RunFolder(run.output_dir).check_free()
        if rollouts.save_rollouts:
            check_new(rollouts.save_rollouts)
    given = {"--data": config.problems.data, "--eval-data": config.problems.eval_data}
    for option, files in given.items():
        for path in files:
            if not path.is_file():
                raise UserError(f"{option} {path}: there is no such file.")
    if config.start.model:
        read_raw_config(config.start.model)
    if rollouts.load_rollouts and not rollouts.load_rollouts.is_dir():
        raise UserError(f"--load-rollouts {rollouts.load_rollouts}: there is no such folder.")
    if config.trainer.megatron:
        _check_passed(config, world_size)


def _check_passed(config: TrainConfig, world_size: int | None) -> None:
    # Here: only these options have to wait for Megatron's import.
    from moe_upgrpo.megatron import passthrough
    from moe_upgrpo.megatron.families import read_model_config

    start, trainer = config.start, config.trainer
    if world_size is None:
        passthrough.read(trainer.megatron)
        return
    passthrough.check(
        trainer.megatron,
        read_model_config(start.model) if start.model else start.tiny.hugging_face(),
        config.layout(world_size),
        dtype=trainer.dtype,
        recompute=trainer.recompute,
        optimizer=trainer.optimizer,
    )
