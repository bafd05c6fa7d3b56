"""Which experts the trainer's routers use, for every token of whole sequences: recorded, replayed.

It stands where Megatron-Core's own `RouterReplay` stands, on each router's `router_replay`, and is
called from inside its top-k (moe_utils.py:705), so gates, gradients and dispatch are Megatron's.
Megatron's own class (router_replay.py) is not used because it replays every row, padding included,
keeps its instances in a list by construction order, and tells micro-batches apart by the order in
which they come.

A visit is one micro-batch on one model chunk. Its routers run once in the forward, and under
activation recomputation once more in the backward, when other micro-batches have been forward in
between: the gradient of the chunk's output says whose backward it is.

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

NO_ROUTE = -1  # in place of an expert id: the router chooses for itself
RECORDS = ("routes", "margins", "gates")


@dataclass(slots=True)
class _Trace:
    """The record of one router in one visit, and the routes that it is held to; ids are int16."""

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
        """The experts to use, [N, K] int64, best first. ranked: what the top-k was taken over."""
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
        # In the order of the native top-k, best first: a set that is the native one then gives the
        # same gates to the last bit.
        order_NK = scores_NE.gather(1, chosen_NK).argsort(dim=1, descending=True, stable=True)
        chosen_NK = chosen_NK.gather(1, order_NK)
        self.used_NK = chosen_NK.to(torch.int16)
        return chosen_NK

    def routed(self, probs_NE: torch.Tensor, map_NE: torch.Tensor) -> None:
        """The router's outputs, after whatever came behind its top-k."""
        if self.used_NK is None:
            return
        ids_NK = _sets(self.used_NK).long()
        self.intact = (map_NE.sum(dim=1) == ids_NK.shape[1]).all() & map_NE.gather(1, ids_NK).all()
        if "gates" in self.record:
            self.gates_NK = probs_NE.detach().gather(1, ids_NK).float()

    def arrays(self, batch: int) -> dict[str, np.ndarray]:
        """[s, B, ...] of what was recorded, expert ids ascending in each row."""
        found = {}
        if "routes" in self.record:
            found["routes"] = _sets(self.used_NK)
            if self.used_NK is not self.own_NK:
                found["own_routes"] = _sets(self.own_NK)
        if "margins" in self.record:
            found["margins"] = self.margins_N
        if "gates" in self.record:
            found["gates"] = self.gates_NK
        return {
            name: tensor.cpu().reshape(-1, batch, *tensor.shape[1:]).numpy()
            for name, tensor in found.items()
        }


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
        """Inside, every router reports to the current visit; after it, all is as it was."""
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
        """A visit of `batch` sequences, held to `routes_BSLK` (of all layers) where given."""
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
    """The message where a router did not run as often as it should have, or dropped tokens.

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


def local_arrays(visits: Sequence[Visit]) -> list[dict[int, dict[str, np.ndarray]]]:
    """Give what this rank recorded: for each visit, layer number -> name -> [s, B, ...]."""
    return [{n: t.arrays(visit.batch) for n, t in visit.traces.items()} for visit in visits]


def join(parts: Sequence[tuple[int, list]], visits: int) -> list[dict[str, np.ndarray]]:
    """Name -> [B, S, L, ...] for each micro-batch, layers ascending, from the ranks of a copy.

    parts: for each rank its tensor-parallel rank and the `local_arrays` of each of its chunks.
    """
    joined = []
    for index in range(visits):
        shards: dict[str, dict[int, dict[int, np.ndarray]]] = {}  # name, layer number, tp rank
        for tp_rank, chunks in parts:
            for chunk in chunks:
                for number, arrays in chunk[index].items():
                    for name, array in arrays.items():
                        by_rank = shards.setdefault(name, {}).setdefault(number, {})
                        by_rank[tp_rank] = array
        joined.append({name: _whole(by_layer) for name, by_layer in shards.items()})
    return joined


def _whole(by_layer: dict[int, dict[int, np.ndarray]]) -> np.ndarray:
    layers = [
        np.concatenate([by_rank[tp_rank] for tp_rank in sorted(by_rank)])
        for _, by_rank in sorted(by_layer.items())
    ]
    return np.stack(layers, axis=2).swapaxes(0, 1)
