# SPDX-License-Identifier: Apache-2.0
"""Health figures of a replay in NeMo-RL's Megatron workers: `kit.health`, in the step's metrics."""

import functools

import torch.distributed as dist
from megatron.core import parallel_state

from moe_upgrpo.integrations.kit import routers
from moe_upgrpo.integrations.kit.health import Health


def reported(worker_class: type) -> type:
    """Return the class, whose `train` now reports the figures where it replays.

    The log is put around it, so that the log's own forward passes are not counted.
    """
    train = worker_class.train

    @functools.wraps(train)
    def counted(self, data, loss_fn, eval_mode=False, *args, **kwargs):
        if eval_mode or not getattr(self, "_router_replay_enabled", False):
            return train(self, data, loss_fn, eval_mode, *args, **kwargs)
        health = self.__dict__.get("moe_upgrpo_health")
        if health is None:
            model = self.model if isinstance(self.model, list) else [self.model]
            health = self.moe_upgrpo_health = Health(model)
        with health.counting():
            output = train(self, data, loss_fn, eval_mode, *args, **kwargs)
        found = health.take()
        # The driver adds up the values it gets from each replica.
        replica = dist.get_rank(parallel_state.get_data_parallel_group())
        if replica == 0 and routers.first_of_stage():
            for name, value in found.items():
                output["all_mb_metrics"][name] = [value]
        return output

    worker_class.train = counted
    return worker_class
