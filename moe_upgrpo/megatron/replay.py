"""Routers held to given expert sets: R2 and R3 replay, and the forwards of the decomposition.

It stands where Megatron-Core's own `RouterReplay` stands, on each router's `router_replay`, and is
called from inside its top-k (moe_utils.py:700), so gates, gradients and dispatch are Megatron's.
Megatron's own class (router_replay.py) is not used because it replays every row, padding included,
and keeps its instances in a list by construction order.

Shapes: B sequences, S tokens, L MoE layers, K experts per token, N = S·B / tp rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

NO_ROUTE = -1  # in place of an expert id: the router chooses for itself


class RouteReplay:
    """Gives each router of a model the expert sets of the micro-batch at hand."""

    def __init__(self, routers: dict[int, TopKRouter]):
        """`routers` by layer number, as a `RouterTap` finds them."""
        self._routers = [routers[number] for number in sorted(routers)]
        self._number = sorted(routers)

    @contextmanager
    def replaying(self, routes_BSLK: torch.Tensor) -> Iterator[None]:
        """Hold the routers to `routes_BSLK` for one forward (and its backward).

        A row whose ids are `NO_ROUTE` (padding, and the last token of a sequence, which no engine
        feeds) is routed natively. Raises RuntimeError where a router did not use its routes exactly
        once.
        """
        shards_sBLK = routes_BSLK.transpose(0, 1).chunk(
            parallel_state.get_tensor_model_parallel_world_size()
        )
        mine_sBLK = shards_sBLK[parallel_state.get_tensor_model_parallel_rank()]
        by_layer_sBK = mine_sBLK.unbind(dim=2)
        hooks = [_Forced(routes_sBK.flatten(0, 1)) for routes_sBK in by_layer_sBK]
        before = [router.router_replay for router in self._routers]
        try:
            for router, hook in zip(self._routers, hooks, strict=True):
                router.router_replay = hook
            yield
        finally:
            for router, hook in zip(self._routers, before, strict=True):
                router.router_replay = hook
        wrong = {
            number - 1: hook.uses
            for number, hook in zip(self._number, hooks, strict=True)
            if hook.uses != 1
        }
        if wrong:
            raise RuntimeError(
                f"Replayed routes were not used exactly once by the routers of layers {wrong} "
                "(layer: uses)."
            )


class _Forced:
    """One router's expert sets, with the method that Megatron's top-k calls."""

    def __init__(self, routes_NK: torch.Tensor):
        self.routes_NK = routes_NK.long()
        self.uses = 0

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, native=None):
        self.uses += 1
        _, native_NK = native(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.routes_NK.shape != native_NK.shape:
            raise RuntimeError(
                f"Routes {tuple(self.routes_NK.shape)} for a router that routes "
                f"{tuple(native_NK.shape)} (tokens, experts each)."
            )
        given_N1 = self.routes_NK[:, :1] != NO_ROUTE
        chosen_NK = torch.where(given_N1, self.routes_NK, native_NK)
        # In the order of the native top-k, best first: a set that is the native one then gives the
        # same gates to the last bit.
        scores_NK, order_NK = scores.gather(1, chosen_NK).sort(dim=1, descending=True, stable=True)
        return scores_NK, chosen_NK.gather(1, order_NK)
