# SPDX-License-Identifier: Apache-2.0
"""A forward pass of verl's Megatron engine, with its routers' choices for each sequence.

verl splits a batch into micro-batches, a micro-batch over the ranks of sequence and context
parallelism, and, under dynamic context parallelism, the batch over groups of ranks of its own.
verl's own functions put the routers' choices together again.

Shapes: S tokens of a sequence, N rows of a micro-batch on this rank, L MoE layers, K experts each,
X = K + 1 (`kit.routers`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from verl.models.mcore.util import (
    postprocess_bshd_engine,
    postprocess_thd_engine,
    preprocess_bshd_engine,
    preprocess_thd_engine,
)
from verl.utils import tensordict_utils as tu
from verl.utils.dynamic_cp_scheduler import DCP_GROUP_LEADER
from verl.utils.megatron_utils import unwrap_model

from moe_upgrpo.integrations.kit import routers
from moe_upgrpo.integrations.kit.hooking import replaced

ROW = "moe_upgrpo_row"  # of each sequence in the engine's batch; travels with the micro-batches


class Forward:
    """`forward_backward_batch` of one engine on one rank."""

    def __init__(self, engine, forward_backward: Callable):
        self.engine = engine
        self.plain = functools.partial(forward_backward, engine)
        self.routers = [routers.counted(chunk) for chunk in unwrap_model(engine.module)]
        self.dynamic = engine.engine_config.dynamic_context_parallel
        self.writes = engine.is_mp_src_rank_with_outputs()

    def recorded(
        self, data, loss_function, *, forward_only: bool = True, own: bool = False
    ) -> tuple[Any, routers.Routes | None]:
        """Run the forward pass; on the rank that writes, also return its routers' choices.

        own: what they would choose without replay, instead.
        """
        found: dict[int, routers.Layers] = {}
        engine = self.engine
        forward_step = type(engine).forward_step
        watched = routers.watched_under_replay if own else routers.watched
        of_chunk = dict(zip(unwrap_model(engine.module), self.routers, strict=True))

        def step(batch_iter, model, *args, **kwargs):
            batch = next(batch_iter)
            with watched(of_chunk[unwrap_model(model)]) as watch:
                result = forward_step(engine, iter([batch]), model, *args, **kwargs)
            numbers, table = watch.take()
            if numbers:
                by_sequence = self._by_sequence(table, batch)
                if leads(batch):
                    for row, table_SLX in zip(batch[ROW].tolist(), by_sequence, strict=True):
                        found.setdefault(row, {}).update(routers.by_layer(numbers, table_SLX))
            return result

        with replaced(engine, forward_step=step):
            output = self.plain(data, loss_function, forward_only)
        for part in self.from_all_replicas(found)[1:]:
            for row, layers in part.items():
                found.setdefault(row, {}).update(layers)
        return output, routers.joined(found, writes=self.writes)

    def from_all_replicas(self, value: Any) -> list[Any]:
        """The value from every rank among which dynamic context parallelism deals out a batch.

        The first of them gets the list, its own value first; the others get none. Without dynamic
        context parallelism, this rank's value alone. A collective of these ranks.
        """
        if not self.dynamic:
            return [value]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        first = dist.get_rank(group) == 0
        values = [None] * dist.get_world_size(group) if first else None
        dist.gather_object(value, values, dst=dist.get_process_group_ranks(group)[0], group=group)
        return values if first else []

    def _by_sequence(self, table_NLX: torch.Tensor, batch) -> list[torch.Tensor]:
        """Rows of this rank's shard of a micro-batch -> `[S, L, X]` of each sequence.

        The shards of sequence and context parallelism are joined by verl's own functions, in the
        layouts in which its forward splits a micro-batch (model_forward.py:303 and 409,
        model_forward_fused.py:276).
        """
        config = self.engine.tf_config
        table_NLX = routers.whole_sequence_parallel(table_NLX, config.sequence_parallel)
        input_ids = batch["input_ids"].to(table_NLX.device)
        fp8 = config.fp8 in ("e4m3", "hybrid")
        sizes = self.engine.engine_config
        if sizes.use_remove_padding:
            split = {
                "cp_layout": self.engine._get_context_parallel_layout(
                    unwrap_model(self.engine.module)[0]
                ),
                "local_cp_size": tu.get_non_tensor_data(batch, "local_cp_size", None),
            }
            _, packed, _ = preprocess_thd_engine(
                input_ids,
                pre_process=True,
                use_fp8_padding=fp8,
                pad_to_length_bucket=sizes.pad_to_length_bucket if sizes.pad_to_length else None,
                **split,
            )
            nested = postprocess_thd_engine(
                table_NLX[None], packed, input_ids, len(input_ids), **split
            )
        else:
            _, mask_BS, _ = preprocess_bshd_engine(
                input_ids,
                use_fp8_padding=fp8,
                forced_max_seqlen=tu.get_non_tensor_data(batch, "forced_max_seqlen", None),
            )
            table_BSLX = table_NLX.unflatten(0, mask_BS.T.shape).transpose(0, 1).contiguous()
            nested = postprocess_bshd_engine(table_BSLX, mask_BS)
        return list(nested.unbind())


def leads(batch) -> bool:
    """Whether this rank answers for the sequences of a micro-batch.

    Under dynamic context parallelism several ranks hold the same; else the rank that writes does.
    """
    return tu.get_non_tensor_data(batch, DCP_GROUP_LEADER, True)
