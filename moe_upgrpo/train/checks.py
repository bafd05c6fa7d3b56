"""Everything of a start that can be checked before a rank is: options, folders, files."""

from __future__ import annotations

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import read_raw_config
from moe_upgrpo.megatron import releases
from moe_upgrpo.rollout.cache import check_new
from moe_upgrpo.store import RunFolder, read_config
from moe_upgrpo.train.config import TrainConfig, changes
from moe_upgrpo.train.found import find
from moe_upgrpo.train.tracking import check as check_trackers


def check_start(config: TrainConfig, world_size: int | None) -> None:
    """Raise UserError for what `moe_upgrpo.train.start` would refuse; loads no model.

    world_size: None where only the ranks will know.
    """
    releases.check()
    if world_size is not None:
        config.layout(world_size)
    check_trackers(config.track)
    if config.resume:
        run = RunFolder(config.resume)
        changes(read_config(run.path), config)
        find(run, config.steps, restart=config.restart)
    else:
        if config.output_dir:
            RunFolder(config.output_dir).check_free()
        if config.save_rollouts:
            check_new(config.save_rollouts)
    for name in ("data", "eval_data"):
        for path in getattr(config, name):
            if not path.is_file():
                raise UserError(f"--{name.replace('_', '-')} {path}: there is no such file.")
    if config.model:
        read_raw_config(config.model)
    if config.load_rollouts and not config.load_rollouts.is_dir():
        raise UserError(f"--load-rollouts {config.load_rollouts}: there is no such folder.")
    if config.megatron:
        _check_passed(config, world_size)


def _check_passed(config: TrainConfig, world_size: int | None) -> None:
    # Here: only these options have to wait for Megatron's import.
    from moe_upgrpo.megatron import passthrough
    from moe_upgrpo.megatron.families import read_model_config

    if world_size is None:
        passthrough.read(config.megatron)
        return
    passthrough.check(
        config.megatron,
        read_model_config(config.model) if config.model else config.tiny.hugging_face(),
        config.layout(world_size),
        dtype=config.dtype,
        recompute=config.recompute,
        optimizer=config.optimizer,
    )
