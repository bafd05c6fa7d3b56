# SPDX-License-Identifier: Apache-2.0
"""The routers of a stack's Megatron model: which ones count, and their choices in a forward pass.

The record of a forward pass travels as one integer table per micro-batch, so that a stack's own
layout functions (sequence and context parallelism, packing) can carry it: for each token and layer
the K experts, followed by the bits of the float32 margin.

Shapes: N rows of a micro-batch on this rank, S tokens of a sequence, R rows of one, L MoE layers,
K experts each, X = K + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.environment import RUN
from moe_upgrpo.routing.margins import of_best_groups, top_k_margins

Layers = dict[int, np.ndarray]  # layer number → [R, X] of one sequence


def counted(chunk: torch.nn.Module) -> list[TopKRouter]:
    """The routers of a model chunk that belong to its decoder.

    Those of multi-token prediction, which carry another layer's number, and those of a draft model
    are left out: the rollout engine has no rows for them.
    """
    return [
        module
        for name, module in chunk.named_modules()
        if isinstance(module, TopKRouter)
        and not (getattr(module, "is_mtp_layer", False) or getattr(module, "is_mtp", False))
        and not {"mtp", "draft_model"} & set(name.split("."))
    ]


def check_replayed(routers: Sequence[TopKRouter]) -> None:
    """Raise UserError where the stack's replay does not reach a router: it would change nothing."""
    without = sorted(r.layer_number for r in routers if getattr(r, "router_replay", None) is None)
    if without:
        raise UserError(
            f"{RUN}: the routers of layers {without} have no router_replay: the replay that is "
            "configured would not be applied to them. Was the model built before the stack "
            "switched replay on, or by another Megatron-Core? Turn replay off, or mend that"
        )


class Watch:
    """The choices of the watched routers since the last `take`, by layer number."""

    def __init__(self, routers: Sequence[TopKRouter]):
        self.numbers = sorted(router.layer_number for router in routers)
        self.current: dict[int, Tensor] = {}  # [N, X]

    def saw(self, number: int, ids_NK: Tensor, margins_N: Tensor | None = None) -> None:
        """Keep a router's choice."""
        if margins_N is None:
            margins_N = torch.full(ids_NK.shape[:1], torch.nan, device=ids_NK.device)
        bits_N1 = margins_N.float().contiguous().view(torch.int32)[:, None]
        self.current[number] = torch.cat([ids_NK.int(), bits_N1], dim=1)

    def take(self) -> tuple[list[int], Tensor | None]:
        """Layer numbers and their table [N, L, X]; empty and None for a chunk without MoE layers.

        Raises UserError where a router of the chunk did not run.
        """
        found, self.current = self.current, {}
        if found.keys() != set(self.numbers):
            raise UserError(
                f"{RUN}: the recorded forward ran the routers of layers {sorted(found)} only, not "
                f"all of {self.numbers}: do the others run in a CUDA graph? Turn it off, or unset "
                "the variable"
            )
        if not self.numbers:
            return [], None
        return self.numbers, torch.stack([found[number] for number in self.numbers], dim=1)


@contextmanager
def watched(routers: Sequence[TopKRouter]) -> Iterator[Watch]:
    """Record, inside this context, what each of `routers` chooses, with its margin."""
    watch, undo = Watch(routers), []
    try:
        for router in routers:
            undo += _watch_choice(router, watch)
        yield watch
    finally:
        for function in undo:
            function()


@contextmanager
def watched_under_replay(routers: Sequence[TopKRouter]) -> Iterator[Watch]:
    """Record, inside this context, what each router would choose without the replay that holds it.

    Through Megatron-Core's RouterReplay, whose `get_replay_topk` is given the default and drops it.
    """
    watch, undo = Watch(routers), []
    try:
        for router in routers:
            undo.append(_watch_default(router, watch))
        yield watch
    finally:
        for function in undo:
            function()


@contextmanager
def at_work(routers: Sequence[TopKRouter]) -> Iterator[list[TopKRouter]]:
    """Inside this context, the list holds the running router if it is one of these."""
    running: list[TopKRouter] = []
    hooks = []
    for router in routers:
        hooks.append(router.register_forward_pre_hook(lambda m, *_: running.append(m)))
        hooks.append(router.register_forward_hook(lambda *_: running.clear()))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def _watch_choice(router: TopKRouter, watch: Watch) -> list:
    margins: list[Tensor | None] = []
    routing = router.routing

    @functools.wraps(routing)
    def seen(logits: Tensor, *args, **kwargs):
        margins[:] = [_margins(router, logits.detach())]
        return routing(logits, *args, **kwargs)

    def chosen(_, inputs, outputs):
        map_NE = outputs[1]
        ids_NK = map_NE.int().topk(router.topk, dim=1).indices
        # A token that was not sent to K experts lacks K ids to compare.
        whole_N1 = map_NE.sum(dim=1, keepdim=True) == router.topk
        watch.saw(router.layer_number, torch.where(whole_N1, ids_NK, -1), *margins)
        margins.clear()

    router.routing = seen
    return [router.register_forward_hook(chosen).remove, lambda: delattr(router, "routing")]


def _watch_default(router: TopKRouter, watch: Watch):
    replay, get = router.router_replay, router.router_replay.get_replay_topk

    @functools.wraps(get)
    def watching(scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        limits = dict(num_groups=num_groups, group_topk=group_topk)
        _, ids_NK = default_compute_topk(scores, topk, **limits)
        watch.saw(router.layer_number, ids_NK)
        return get(scores, topk, **limits, default_compute_topk=default_compute_topk)

    replay.get_replay_topk = watching
    return lambda: delattr(replay, "get_replay_topk")


def _margins(router: TopKRouter, logits: Tensor) -> Tensor | None:
    """Margins [N] of the scores over which Megatron-Core takes the top-k; None for other scores."""
    config, scores_NE = router.config, logits.reshape(-1, logits.shape[-1])
    match config.moe_router_score_function:
        case "softmax" if config.moe_router_pre_softmax:
            scores_NE = torch.softmax(scores_NE, dim=-1, dtype=torch.float32).type_as(scores_NE)
        case "softmax":
            pass
        case "sigmoid":
            scores_NE = torch.sigmoid(scores_NE.float()).type_as(scores_NE)
            if getattr(router, "expert_bias", None) is not None:
                scores_NE = scores_NE + router.expert_bias
        case _:
            return None
    if config.moe_router_group_topk:
        groups = config.moe_router_num_groups, config.moe_router_group_topk
        scores_NE = of_best_groups(scores_NE, router.topk, *groups)
    return top_k_margins(scores_NE, router.topk)


def whole_sequence_parallel(table_NLX: Tensor, sequence_parallel: bool) -> Tensor:
    """The rows of all tensor-parallel ranks, where they split the sequence."""
    if not sequence_parallel:
        return table_NLX
    return gather_from_sequence_parallel_region(
        table_NLX.contiguous(), tensor_parallel_output_grad=False
    )


def whole_context_parallel(table: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
    """`[B, T, L, X]` from all context-parallel ranks, by a stack's function that joins `[B, T]`."""
    columns = [join(column[..., 0]) for column in table.flatten(2).split(1, dim=2)]
    return torch.stack(columns, dim=2).unflatten(2, table.shape[2:])


def by_sequence(
    table: Tensor, rows: Sequence[int], lengths: Sequence[int] | None
) -> dict[int, Tensor]:
    """Row of a batch → its `[T, L, X]`, from a table `[B, T, L, X]` or packed `[1, ΣT, L, X]`.

    lengths: of the packed sequences in order; the table may hold more (padding).
    """
    if lengths is None:
        return dict(zip(rows, table, strict=True))
    return dict(zip(rows, table[0].split([*lengths])[: len(rows)], strict=True))


def by_layer(numbers: Sequence[int], table_RLX: Tensor) -> Layers:
    """Split a sequence's part of a micro-batch by layer."""
    layers = table_RLX.int().cpu().numpy().swapaxes(0, 1)
    return dict(zip(numbers, layers, strict=True))


@dataclass(frozen=True)
class Routes:
    """Whole sequences of this data-parallel rank, over all layers.

    routes: for each row of the batch [R, L, K] int16; margins [R, L] float32, NaN where no margin
    is known.
    """

    layer_ids: list[int]
    routes: dict[int, np.ndarray]
    margins: dict[int, np.ndarray]

    @classmethod
    def of(cls, by_row: Mapping[int, Layers]) -> Routes:
        """Raises UserError if there is no row, or no router."""
        numbers = sorted(next(iter(by_row.values()), {}))
        if not numbers:
            raise UserError(
                f"{RUN}: no router ran in the forward of the old log-probs; does the model have "
                "MoE layers? Unset the variable if it has none"
            )
        routes, margins = {}, {}
        for row, layers in by_row.items():
            table_RLX = np.stack([layers[number] for number in numbers], axis=1)
            routes[row] = table_RLX[..., :-1].astype(np.int16)
            margins[row] = np.ascontiguousarray(table_RLX[..., -1]).view(np.float32)
        return cls([number - 1 for number in numbers], routes, margins)


def first_of_stage() -> bool:
    """Whether this rank is the first of its pipeline stage; that rank joins the stage's shards."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def joined(mine: Mapping[int, Layers], *, writes: bool) -> Routes | None:
    """The layers of all pipeline stages, on the ranks that write; None on the others.

    mine: row of the batch → layers of this stage. A collective of the first ranks of all stages.
    """
    if not first_of_stage():
        return None
    group = parallel_state.get_pipeline_model_parallel_group()
    last = dist.get_process_group_ranks(group)[-1]
    stages = [None] * dist.get_world_size(group) if dist.get_rank() == last else None
    dist.gather_object(dict(mine), stages, dst=last, group=group)
    if not writes:
        return None
    by_row: dict[int, Layers] = {}
    for stage in stages:
        for row, layers in stage.items():
            by_row.setdefault(row, {}).update(layers)
    return Routes.of(by_row)


def moe_layers(
    name: str, routes_RLK: np.ndarray, *, layer_ids: Sequence[int], num_layers: int
) -> np.ndarray:
    """Take only the MoE layers from an engine that also fills rows for dense layers.

    Raises UserError that names the field: rows with another number of layers.
    """
    layers = routes_RLK.shape[1]
    if layers == len(layer_ids):
        return routes_RLK
    if layers == num_layers:
        return routes_RLK[:, list(layer_ids)]
    raise UserError(
        f"{name}: {layers} layers given; the model has {len(layer_ids)} MoE layers of {num_layers}"
    )
