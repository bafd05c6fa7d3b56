# SPDX-License-Identifier: Apache-2.0
"""Health figures of a replay in Megatron-SWIFT's GRPO trainer: `kit.health`, by generation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_upgrpo.integrations.kit.health import Health


def forward_step(original, trainer: Any, *args) -> Any:
    """Count the forward passes of the update; recomputation for the gradient runs outside."""
    counts = trainer.enable_routing_replay and trainer.unwrapped_models[0].training
    if not counts or trainer.args.use_ray:  # with Ray, its workers have no model in the trainer
        return original(*args)
    if trainer.moe_upgrpo_health is None:
        trainer.moe_upgrpo_health = Health(trainer.unwrapped_models)
    with trainer.moe_upgrpo_health.counting():
        return original(*args)


def train_step(original, trainer: Any, *args) -> tuple:
    """Report the figures with the last update of a generation."""
    metrics, *rest = original(*args)
    if trainer.moe_upgrpo_health and ends_generation(trainer):
        add(trainer, metrics, trainer.moe_upgrpo_health.take())
    return metrics, *rest


def ends_generation(trainer: Any) -> bool:
    """Whether the latest update is the last with the sequences of its generation."""
    return trainer._step % trainer.steps_per_generation == 0


def add(trainer: Any, metrics: Sequence[dict], found: Mapping[str, float]) -> None:
    """Put a step's figures into the metrics of its micro-batches, which ms-swift averages.

    Only the last pipeline stage has any.
    """
    found = {name: torch.tensor(float(x), device=trainer.device) for name, x in found.items()}
    for of_micro_batch in metrics:
        of_micro_batch |= found
