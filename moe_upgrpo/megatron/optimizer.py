# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's optimizer and its learning rate, from the settings of a run."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    Adam,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_model_config

from moe_upgrpo.megatron.backend import has_cuda
from moe_upgrpo.megatron.settings import OptimizerSettings

TORCH = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


class ReleasedWithItsActor(DistributedDataParallel):
    """DistributedDataParallel whose gradient hooks do not keep it alive.

    Each hook refers to its wrapper, the wrapper to the weights' gradient nodes, and these to their
    hooks, in C++, where Python's collector cannot see the cycle. Every actor of a process would
    leave its weights and process groups (gloo: some fifty threads) in memory until the end.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter):
        return DistributedDataParallel._make_backward_post_hook(weakref.proxy(self), param)


def optimizer_config(
    config: TransformerConfig,
    settings: OptimizerSettings,
    passed: Mapping[str, Any] | None = None,
) -> OptimizerConfig:
    """Megatron's config of the optimizer of a model with `config`; `passed`: the user's values."""
    own = dict(
        optimizer=settings.algorithm,
        lr=settings.lr,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        sgd_momentum=0.0,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=settings.splits_state,
    )
    passed = dict(passed or {})
    if passed.get("optimizer_cpu_offload"):
        # With bf16 weights the offloading optimizer keeps the fp32 copies; without this Megatron
        # would keep others on the GPU. With fp32 weights this would make it look for gradients in
        # the wrong place (hybrid_optimizer.py:89), and train only the offloaded weights.
        own["use_precision_aware_optimizer"] = config.bf16
    return OptimizerConfig(**(own | passed))


def ddp_config(
    settings: OptimizerSettings, passed: Mapping[str, Any] | None = None
) -> DistributedDataParallelConfig:
    """Megatron's config of how gradients and weights travel; `passed`: the user's values."""
    own = dict(use_distributed_optimizer=settings.splits_state, grad_reduce_in_fp32=True)
    return DistributedDataParallelConfig(**(own | dict(passed or {})))


def make_optimizer(
    chunks: Sequence[torch.nn.Module],
    settings: OptimizerSettings,
    passed: Mapping[str, Any] | None = None,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Make an optimizer for model chunks wrapped in DistributedDataParallel."""
    # Every DP rank read the same files, so no broadcast of parameters is needed.
    optimizer = get_megatron_optimizer(
        optimizer_config(get_model_config(chunks[0]), settings, passed), list(chunks)
    )
    _step_in_one_call(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(1, settings.warmup_steps + 1),
        lr_decay_style="constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def one_call() -> str:
    """The option by which torch's optimizers take one call for all weights on this machine.

    fused needs no temporaries, where foreach needs two as large as the weights; on a CPU fused
    takes one weight after the other.
    """
    return "fused" if has_cuda() else "foreach"


def _step_in_one_call(optimizer: MegatronOptimizer) -> None:
    """Make torch's optimizers take all weights in one call. On a GPU they do so by default, and
    Megatron leaves it so (optimizer/__init__.py:363); other optimizers have no such option."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(getattr(part, "optimizer", None)) in TORCH:
            for group in part.optimizer.param_groups:
                group[one_call()] = True


def code_path() -> str:
    """The class of Adam in use, and its option; without a GPU torch's class (`backend.apply`)."""
    used = Adam if has_cuda() else torch.optim.AdamW
    name = f"{used.__module__}.{used.__name__}"
    return f"{name}, {one_call()}" if used in TORCH else name
