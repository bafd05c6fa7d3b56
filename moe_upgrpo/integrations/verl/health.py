# SPDX-License-Identifier: Apache-2.0
"""Health figures of a replay in verl's Megatron engine: `kit.health`, in the update's metrics."""

import functools

from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model
from verl.utils.metric import AggregationType, Metric

from moe_upgrpo.integrations.kit.health import Health


def install(module) -> None:
    """Wrap `forward_backward_batch` of the module's MegatronEngine; once."""
    engine_class = module.MegatronEngine
    original = engine_class.forward_backward_batch
    if hasattr(original, "moe_upgrpo_health"):
        return

    @functools.wraps(original)
    def forward_backward_batch(self, data, loss_function, forward_only=False):
        if forward_only or self.is_value_model or not self.enable_routing_replay:
            return original(self, data, loss_function, forward_only)
        watched, health = self.__dict__.get("moe_upgrpo_health", (None, None))
        if watched is not self.module:  # `TrainingWorker.reset` makes another model
            health = Health(unwrap_model(self.module))
            self.moe_upgrpo_health = self.module, health
        with health.counting():
            output = original(self, data, loss_function, forward_only)
        if tu.get_non_tensor_data(data, "update_lr_scheduler", False):  # a step's last mini-batch
            found = health.take()
            if self.is_mp_src_rank_with_outputs():
                output["metrics"] |= {
                    name: Metric(value=value, aggregation=AggregationType.MEAN)
                    for name, value in found.items()
                }
        return output

    forward_backward_batch.moe_upgrpo_health = True
    engine_class.forward_backward_batch = forward_backward_batch
