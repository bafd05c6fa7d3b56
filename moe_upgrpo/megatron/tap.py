# SPDX-License-Identifier: Apache-2.0
"""Recording and replay of the experts that the trainer's routers use, for whole sequences.

It takes the place of Megatron-Core's own `RouterReplay`, on each router's `router_replay`, and is
called from inside its top-k (moe_utils.py:705), so gates, gradients and dispatch are Megatron's.
Megatron's own class (router_replay.py) is not used because it replays every row, padding included,
keeps its instances in a list by construction order, and tells micro-batches apart by the order in
which they come.

A visit is one micro-batch on one model chunk. Its routers run once in the forward, and under
activation recomputation once more in the backward, after the forwards of other micro-batches: the
gradient of the chunk's output says whose backward it is.

Shapes: B sequences, S tokens, L MoE layers, E experts, K of them per token, N = S·B / tp rows of
this rank under sequence parallelism, s = S / tp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups, releases
from moe_upgrpo.routing.margins import of_best_groups, top_k_margins
from moe_upgrpo.routing.sets import ascending

NO_ROUTE = -1  # in place of an expert id: the router chooses for itself
RECORDS = ("routes", "margins", "gates")
Arrays = dict[str, np.ndarray]
# (token, layer) pairs whose records are exchanged at once, 12 bytes each with top-8: a limit, so
# that no rank holds a second copy of a whole step's records, or of a large micro-batch's.
_TOGETHER = 1 << 17


@dataclass(slots=True)
class _Trace:
    """The record of one router in one visit, and the routes that it has to use; ids are int16."""

    given_NK: torch.Tensor | None  # NO_ROUTE where the router chooses; None: everywhere
    record: Collection[str]
    forwards: int = 0
    recomputations: int = 0
    own_NK: torch.Tensor | None = None  # the router's own top-k, best first
    used_NK: torch.Tensor | None = None
    margins_N: torch.Tensor | None = None
    gates_NK: torch.Tensor | None = None
    intact: torch.Tensor | bool = True  # whether every token went to K experts, those of used_NK
    flips: torch.Tensor | int = 0  # rows whose own top-k was another one when recomputed

    def choose(self, scores_NE, ranked_NE, native_NK, again: bool) -> torch.Tensor:
        """The experts to use, [N, K] int64, best first. ranked: the scores that top-k ranks."""
        own_NK = native_NK.to(torch.int16)
        if again:
            self.recomputations += 1
            if self.used_NK is None:
                return native_NK
            # Held to the experts of the forward, so that the gradient is that of the values seen.
            self.flips = self.flips + (_sets(own_NK) != _sets(self.own_NK)).any(dim=1).sum()
            return self.used_NK.long()
        self.forwards += 1
        self.own_NK = self.used_NK = own_NK
        if "margins" in self.record:
            self.margins_N = top_k_margins(ranked_NE, native_NK.shape[1])
        if self.given_NK is None:
            return native_NK
        if self.given_NK.shape != native_NK.shape:
            raise RuntimeError(
                f"Routes {tuple(self.given_NK.shape)} for a router that routes "
                f"{tuple(native_NK.shape)} (tokens, experts each)."
            )
        chosen_NK = torch.where(self.given_NK[:, :1] == NO_ROUTE, native_NK, self.given_NK.long())
        # In the order of the native top-k, best first: replaying the native set then gives the same
        # gates to the last bit.
        order_NK = scores_NE.gather(1, chosen_NK).argsort(dim=1, descending=True, stable=True)
        chosen_NK = chosen_NK.gather(1, order_NK)
        self.used_NK = chosen_NK.to(torch.int16)
        return chosen_NK

    def routed(self, probs_NE: torch.Tensor, map_NE: torch.Tensor) -> None:
        """Take the router's outputs, after everything that follows its top-k."""
        if self.used_NK is None:
            return
        ids_NK = _sets(self.used_NK).long()
        self.intact = (map_NE.sum(dim=1) == ids_NK.shape[1]).all() & map_NE.gather(1, ids_NK).all()
        if "gates" in self.record:
            self.gates_NK = probs_NE.detach().gather(1, ids_NK).float()

    def seen(self) -> dict[str, torch.Tensor]:
        """The records, [N, ...] each, expert ids in the order of the router's top-k."""
        found = {}
        if "routes" in self.record:
            found["routes"] = self.used_NK
            if self.used_NK is not self.own_NK:
                found["own_routes"] = self.own_NK
        if "margins" in self.record:
            found["margins"] = self.margins_N
        if "gates" in self.record:
            found["gates"] = self.gates_NK
        return found


def _sets(ids_NK: torch.Tensor) -> torch.Tensor:
    return ids_NK.sort(dim=1).values


class Visit:
    """One micro-batch on one model chunk: `with visit:` around the model's forward.

    `backward_of(output)` then says which tensor's gradient begins the visit's backward.
    """

    def __init__(self, tap: RouterTap, traces: dict[int, _Trace], batch: int):
        self.traces, self.batch = traces, batch  # by layer number
        self._tap = tap

    def __enter__(self) -> Visit:
        self._tap.current, self._tap.again = self, False
        return self

    def __exit__(self, *exc) -> None:
        self._tap.current = None

    def backward_of(self, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._begin_backward)

    def _begin_backward(self, grad) -> None:
        self._tap.current, self._tap.again = self, True


class RouterTap:
    """The routers of this rank's model chunks, told apart by their layer numbers.

    A collective over the pipeline stages. Raises UserError where routes cannot be recorded.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self.routers: dict[int, TopKRouter] = {}
        self._by_chunk: list[list[int]] = []  # layer numbers
        self.current: Visit | None = None
        self.again = False  # the current visit is in its backward
        numbers = []
        for chunk in chunks:
            routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
            if not all(hasattr(router, "router_replay") for router in routers):
                raise releases.lacks("TopKRouter.router_replay, by which routes are recorded")
            if any(router.config.moe_router_fusion for router in routers):
                raise UserError(
                    "moe_router_fusion=True: the fused router returns no native top-k to record "
                    "(moe_utils.py:652). Turn the fusion off to record routes."
                )
            self.routers |= {router.layer_number: router for router in routers}
            self._by_chunk.append([router.layer_number for router in routers])
            numbers += self._by_chunk[-1]
        of_config = (router.config.num_moe_experts for router in self.routers.values())
        self.num_experts = max(of_config, default=0)
        numbers = sorted(groups.gather_over_pipeline(numbers))
        for number, routers in Counter(numbers).items():
            if routers > 1:
                raise UserError(
                    f"Two routers carry the layer number {number}: routes could not be told "
                    "apart. Multi-token-prediction layers are not supported."
                )
        self.layer_ids = [number - 1 for number in numbers]  # Megatron counts from 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, every router reports to the current visit; undone on leaving."""
        before = {number: router.router_replay for number, router in self.routers.items()}
        hooks = []
        try:
            for number, router in self.routers.items():
                router.router_replay = _Hook(self, number)
                hooks.append(router.register_forward_hook(self._routed))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for number, replay in before.items():
                self.routers[number].router_replay = replay
            self.current = None

    def visit(
        self,
        chunk: int,
        batch: int,
        routes_BSLK: torch.Tensor | None = None,
        record: Collection[str] = (),
    ) -> Visit:
        """A visit of `batch` sequences, which replays `routes_BSLK` (of all layers) if not None."""
        given = {}
        if routes_BSLK is not None and self.layer_ids:
            shards_sBLK = routes_BSLK.transpose(0, 1).chunk(
                parallel_state.get_tensor_model_parallel_world_size()
            )
            mine_sBLK = shards_sBLK[parallel_state.get_tensor_model_parallel_rank()]
            by_layer_sBK = zip(self.layer_ids, mine_sBLK.unbind(dim=2), strict=True)
            given = {layer + 1: routes_sBK.flatten(0, 1) for layer, routes_sBK in by_layer_sBK}
        numbers = self._by_chunk[chunk]
        return Visit(self, {n: _Trace(given.get(n), record) for n in numbers}, batch)

    def trace(self, number: int) -> _Trace:
        if self.current is None or number not in self.current.traces:
            raise RuntimeError(
                f"The router of layer {number - 1} ran outside the micro-batch that its routes "
                "belong to: they cannot be assigned to tokens."
            )
        return self.current.traces[number]

    def _routed(self, router: TopKRouter, inputs, outputs) -> None:
        if not self.again:
            self.trace(router.layer_number).routed(*outputs)


class _Hook:
    """The object on a router's `router_replay`: the method that Megatron's top-k calls."""

    def __init__(self, tap: RouterTap, number: int):
        self._tap, self._number = tap, number

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, native=None):
        trace = self._tap.trace(self._number)
        # Without gradients Megatron leaves the top-k unsorted (0.18: moe_utils.py:777), and gates
        # that are divided by their sum differ in the last place from those of an update.
        with torch.enable_grad():
            best, native_NK = native(scores, topk, num_groups=num_groups, group_topk=group_topk)
        ranked = scores.detach()
        if group_topk and "margins" in trace.record:
            ranked = of_best_groups(ranked, topk, num_groups, group_topk)
        chosen_NK = trace.choose(scores, ranked, native_NK, self._tap.again)
        if chosen_NK is native_NK:
            return best, native_NK
        return scores.gather(1, chosen_NK), chosen_NK


def wrong_uses(visits: Sequence[Visit], recomputations: int) -> str | None:
    """The error message for a router that ran too often or too rarely, or dropped tokens.

    `recomputations`: how often each has to run again in the backward, 0 or 1.
    """
    for index, visit in enumerate(visits):
        uses = {
            number - 1: (trace.forwards, trace.recomputations)
            for number, trace in visit.traces.items()
            if (trace.forwards, trace.recomputations) != (1, recomputations)
        }
        if uses:
            return (
                f"The routers of layers {sorted(uses)} did not run once forward and "
                f"{recomputations} times in the backward of micro-batch {index}, but "
                f"{uses} (layer: forward, backward): their routes were not used exactly once."
            )
        dropped = [number - 1 for number, trace in visit.traces.items() if not trace.intact]
        if dropped:
            return (
                f"The routers of layers {dropped} did not send each token to exactly the experts "
                "of their top-k: token dropping and capacity limits are not supported."
            )
    return None


def flips(visits: Sequence[Visit]) -> int:
    """(token, layer) pairs of this rank whose router chose other experts when it was recomputed."""
    return sum(int(trace.flips) for visit in visits for trace in visit.traces.values())


@dataclass(frozen=True)
class Run:
    """Micro-batches whose records are joined at once, or one of several parts of one's rows."""

    visits: slice
    part: int = 0
    parts: int = 1

    def rows(self, shard: int) -> slice:
        """This part of the s rows of a shard, for each of its sequences."""
        return slice(shard * self.part // self.parts, shard * (self.part + 1) // self.parts)


def together(tokens: Sequence[int], num_layers: int) -> list[Run]:
    """Runs of micro-batches, by their tokens, whose records are joined at a time.

    The same on every rank of a copy, so that each joins as often. At least one run.
    """
    runs, first, held = [], 0, 0
    for index, more in enumerate(tokens):
        if index > first and (held + more) * num_layers > _TOGETHER:
            runs.append(slice(first, index))
            first, held = index, 0
        held += more
    runs.append(slice(first, len(tokens)))
    found = []
    for run in runs:
        # More than one part only where the run is one micro-batch.
        parts = max(1, -(-sum(tokens[run]) * num_layers // _TOGETHER))
        found += [Run(run, part, parts) for part in range(parts)]
    return found


def hand_over(
    visits: Sequence[Visit], run: Run, num_experts: int
) -> list[tuple[list[int], int, Arrays]]:
    """Take this rank's records of a run from each visit: layer numbers, rows s of the whole visit,
    and name -> [part of s, B, l, ...].

    Ids of experts are in ascending order, in one byte each where they fit. The visits keep no
    records once their last part is taken.
    """
    return [_taken(visit, run, num_experts) for visit in visits[run.visits]]


def _taken(visit: Visit, run: Run, num_experts: int) -> tuple[list[int], int, Arrays]:
    traces = visit.traces
    if run.part + 1 == run.parts:
        visit.traces = {}
    by_layer = [trace.seen() for trace in traces.values()]
    narrow = torch.uint8 if num_experts <= 256 else torch.int16
    arrays, shard = {}, 0
    for name in list(by_layer[0]) if by_layer else ():
        shard = len(by_layer[0][name]) // visit.batch
        rows = run.rows(shard)
        mine = slice(rows.start * visit.batch, rows.stop * visit.batch)
        layers = [found.pop(name)[mine] for found in by_layer]
        if name in ("routes", "own_routes"):
            arrays[name] = ascending(torch.stack([x.to(narrow) for x in layers], 1).cpu().numpy())
        else:
            arrays[name] = torch.stack(layers, 1).cpu().numpy()
        arrays[name] = arrays[name].reshape(-1, visit.batch, *arrays[name].shape[1:])
    return list(traces), shard, arrays


def join(parts: Sequence[tuple[int, list]], run: Run, joined: list[Arrays]) -> None:
    """Write a run's records, from the ranks of a copy, into those of all micro-batches: name ->
    [B, S, L, ...], layers ascending.

    Ids of experts stay in one byte each where they fit.

    parts: for each rank its shard of the rows and what each of its chunks handed over.
    """
    for index, whole in enumerate(joined[run.visits]):
        _write([(shard, *chunk[index]) for shard, chunks in parts for chunk in chunks], run, whole)


def _write(shares: Sequence[tuple[int, list[int], int, Arrays]], run: Run, whole: Arrays) -> None:
    """One micro-batch of all shares: a shard of the rows, its layers and rows, arrays of a part."""
    place = {number: i for i, number in enumerate(sorted({n for _, ls, *_ in shares for n in ls}))}
    shards = 1 + max((shard for shard, *_ in shares), default=0)
    for shard, numbers, s, arrays in shares:
        layers: list[int] | slice = [place[number] for number in numbers]
        if layers == list(range(len(place))):
            layers = slice(None)  # several times as quick
        rows = run.rows(s)
        for name, array_sBl in arrays.items():
            _, B, _, *rest = array_sBl.shape
            if name not in whole:
                whole[name] = np.empty((B, shards * s, len(place), *rest), array_sBl.dtype)
            mine = whole[name][:, shard * s + rows.start : shard * s + rows.stop]
            mine[:, :, layers] = array_sBl.swapaxes(0, 1)
