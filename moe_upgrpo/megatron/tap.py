"""Which experts the trainer's routers choose, for every token of whole sequences.

Shapes: B sequences, S tokens in each, L MoE layers, K experts per token, E experts,
N = S·B / tp tokens of this rank under sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from moe_upgrpo.errors import UserError


class RouterTap:
    """Records the routing of every forward made inside `with tap:`; `take` hands it over.

    A forward hook on Megatron's own routers: nothing upstream is replaced, and the layers are told
    apart by their layer number, not by the order in which they were built.
    """

    def __init__(self, model: torch.nn.Module):
        self.routers: dict[int, TopKRouter] = {}
        for module in model.modules():
            if isinstance(module, TopKRouter):
                if module.config.moe_router_fusion:
                    raise UserError(
                        "moe_router_fusion=True: the fused router returns no native top-k to "
                        "record (moe_utils.py:608). Turn the fusion off to record routes."
                    )
                if module.layer_number in self.routers:
                    raise UserError(
                        f"Two routers carry the layer number {module.layer_number}: routes could "
                        "not be told apart. Multi-token-prediction layers are not supported."
                    )
                self.routers[module.layer_number] = module
        self.layer_ids = [number - 1 for number in sorted(self.routers)]  # Megatron counts from 1
        self._maps: dict[int, torch.Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> RouterTap:
        self._maps.clear()
        self._hooks = [r.register_forward_hook(self._record) for r in self.routers.values()]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, router: TopKRouter, inputs, outputs) -> None:
        if router.layer_number in self._maps:
            raise RuntimeError(
                f"The router of layer {router.layer_number - 1} ran twice in one forward: its "
                "routes cannot be assigned to tokens."
            )
        self._maps[router.layer_number] = outputs[1]

    def take(self, batch: int) -> torch.Tensor:
        """The routes of the last forward, as [B, S, L, K] int16, expert ids ascending in each row.

        A collective over the tensor-parallel ranks, which hold shards of the sequence. Raises
        RuntimeError where a router never ran or did not choose exactly K experts for each token.
        """
        silent = sorted(self.routers.keys() - self._maps.keys())
        if silent:
            raise RuntimeError(
                f"The routers of layers {[n - 1 for n in silent]} never ran in this forward: "
                "nothing was recorded for them."
            )
        if not self.routers:
            return torch.empty(batch, 0, 0, 0, dtype=torch.int16)
        layers = []
        for number in sorted(self.routers):
            map_NE = self._maps[number]
            top_k = self.routers[number].topk
            if not (map_NE.sum(dim=1) == top_k).all():
                raise RuntimeError(
                    f"The router of layer {number - 1} did not choose exactly {top_k} experts for "
                    "each token: token dropping and capacity limits are not supported."
                )
            layers.append(map_NE.nonzero()[:, 1].reshape(-1, batch, top_k))
        self._maps.clear()
        routes_sBLK = torch.stack(layers, dim=2).to(torch.int16).contiguous()
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            as_bytes = routes_sBLK.view(torch.uint8)  # gloo has no int16
            shards = [torch.empty_like(as_bytes) for _ in range(group.size())]
            dist.all_gather(shards, as_bytes, group=group)
            routes_sBLK = torch.cat(shards).view(torch.int16)
        return routes_sBLK.transpose(0, 1)
