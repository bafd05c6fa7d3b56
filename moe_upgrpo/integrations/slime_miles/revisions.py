# SPDX-License-Identifier: Apache-2.0
"""Names in a stack, wherever its revision has them, and its own layout of a rank's sequences."""

import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.hooking import replaced


def first_module(*names: str) -> ModuleType:
    """The first of the modules that the installed revision has.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as missing:
            if not f"{name}.".startswith(f"{missing.name}."):  # something that the module needs
                raise
    raise UserError(
        f"{' and '.join(names)}: not in the installed {names[0].split('.')[0]}; install a revision "
        "that docs/slime.md says was run"
    )


def need(module: ModuleType, *names: str) -> None:
    """Raise UserError where the installed revision's module lacks one of the names."""
    if missing := [name for name in names if not hasattr(module, name)]:
        raise UserError(
            f"{module.__name__}: the installed {module.__name__.split('.')[0]} has no "
            f"{', '.join(missing)} there; install a revision that docs/slime.md says was run"
        )


def taken(function: Callable, **arguments: Any) -> dict[str, Any]:
    """The arguments whose names the installed revision's function has."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


class Partition:
    """Sequences of the whole batch that this rank has: the stack forgets which when it takes its
    shard of a rollout apart."""

    def __init__(self):
        self.indices: list[int] = []

    @classmethod
    def from_ray(cls, module: ModuleType, data: ModuleType) -> "Partition":
        """module: its process_rollout_data is called. data: its data.ray is used for fetching."""
        partition, process, get = cls(), module.process_rollout_data, data.ray.get

        def watched(*args):
            seen = Namespace(get=lambda *refs, **kwargs: partition.seen(get(*refs, **kwargs)))
            with replaced(data, ray=seen):
                return process(*args)

        module.process_rollout_data = watched
        return partition

    @classmethod
    def from_shards(cls, module: ModuleType) -> "Partition":
        """module: its process_rollout_data_shard is called."""
        partition, process = cls(), module.process_rollout_data_shard
        module.process_rollout_data_shard = lambda args, shard: process(args, partition.seen(shard))
        return partition

    def seen(self, shard: dict) -> dict:
        self.indices = list(shard["partition"])
        return shard

    def rewards(self, data: dict) -> Sequence[float]:
        """Raw rewards of this rank's sequences: raw_reward holds those of the whole batch."""
        if "raw_reward" in data and len(self.indices) == len(data["tokens"]):
            return [data["raw_reward"][i] for i in self.indices]
        return data["rewards"]
