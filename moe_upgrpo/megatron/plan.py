# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that the ranks of a job would hold, built without memory in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from moe_upgrpo.megatron import backend
from moe_upgrpo.megatron import model as model_module
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import Stage


@contextmanager
def _as_rank(rank: int, world_size: int, layout: Layout) -> Iterator[None]:
    """Let this process act as one rank: groups without peers, tensors without memory.

    Always as on a machine without CUDA and Transformer Engine. The shapes are the same everywhere,
    and a GPU's generators and streams are not wanted.
    """
    meta = torch.device("meta")
    with (
        mock.patch.object(backend, "has_cuda", lambda: False),
        mock.patch.object(model_module, "has_cuda", lambda: False),
        backend.apply(),
        mock.patch.object(torch.cuda, "current_device", lambda: meta),
        mock.patch.object(model_module, "device", lambda: meta),
        meta,
    ):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.expert_tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                create_gloo_process_groups=False,
            )
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def rank_share(
    hf: PretrainedConfig, layout: Layout, world_size: int, rank: int, dtype: str = "bfloat16"
) -> Stage:
    """Parameters on `rank` of `world_size`, counted in the model that it would build."""
    layout.check_world(world_size)
    with _as_rank(rank, world_size, layout):
        chunks = model_module.build_model(hf, layout, getattr(torch, dtype))
        index = parallel_state.get_pipeline_model_parallel_rank()
        counts = {True: 0, False: 0}
        layers = []
        for chunk in chunks:
            layers += chunk.decoder.layers
            for parameter in chunk.parameters():
                # Megatron-Core's mark of expert weights (tensor_parallel/layers.py:886); with ep=1
                # they are reduced like all others.
                counts[getattr(parameter, "allreduce", True)] += parameter.numel()
    return Stage(
        index=index,
        shared=counts[True],
        expert=counts[False],
        layers=len(layers),
        moe_layers=sum(hasattr(layer.mlp, "router") for layer in layers),
        first=index == 0,
        last=index == layout.pp - 1,
    )


def stages(
    hf: PretrainedConfig, layout: Layout, world_size: int, dtype: str = "bfloat16"
) -> list[Stage]:
    """Parameters that a rank of each pipeline stage holds: the first rank of each is built.

    The others of a stage hold tensors of the same shapes, because everything is split evenly or
    refused (`Layout.check_model`).
    """
    of_stage = world_size // layout.pp
    return [
        rank_share(hf, layout, world_size, stage * of_stage, dtype) for stage in range(layout.pp)
    ]
