# SPDX-License-Identifier: Apache-2.0
"""The experts that Megatron-LM's inference chose, of every finished request, on all ranks.

With --moe-enable-routing-replay its engine records `routing_indices` for each request
(inference_request.py:518), but nothing in megatron/rl reads them. This module puts them into the
ledger of finished requests, which all ranks share, and keeps them out of the answer sent over HTTP.
Two things need care:

- The engine records every router of the process, including the trainer's where inference has a
  model of its own (always under context parallelism); then it records nothing at all or puts two
  models in one table. So only the inference model's routers stay in the list that it reads.
- Under pipeline parallelism each stage has the routes of its own layers, and the first alone
  answers. The other stages keep theirs until the ledgers are merged, and give them to the first.

Shapes: S tokens of a request, L MoE layers, K experts each.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import FinishedRequestRecord
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.rl import rl_utils
from megatron.rl.inference.megatron import MegatronLocal

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import routers
from moe_upgrpo.integrations.kit.environment import RUN


@dataclass(frozen=True)
class Finished:
    """A request as a stage has it: `uid` differs between ranks, the number is common to all."""

    number: int
    uid: str
    routes_SLK: np.ndarray | None


def listed(model: list) -> list[RouterReplay]:
    """Keep only the recorders of a model's own layers in the list that Megatron-LM's engine reads:
    no other model's, and none of multi-token prediction."""
    found = [r for chunk in rl_utils.unwrap_model(model) for r in routers.counted(chunk)]
    found.sort(key=lambda router: router.layer_number)
    left = [router.router_replay for router in found]
    for recorder in RouterReplay.global_router_replay_instances:
        if not any(recorder is one for one in left):
            recorder.clear_router_replay_action()
            recorder.clear_static_buffer()
    RouterReplay.global_router_replay_instances[:] = left
    return left


class Stages:
    """The requests that finished on this rank since the ledgers were merged, under pipeline
    parallelism of inference."""

    def __init__(self):
        self.finished: list[Finished] = []

    def install(self) -> None:
        interface = rl_utils.get_inference_interface
        from_request = FinishedRequestRecord.from_request.__func__
        process = DynamicInferenceEngine.post_process_requests
        merge = MegatronLocal.merge_global_request_ledgers

        @functools.wraps(interface)
        def get_inference_interface(args, loop, model):
            listed(model)
            return interface(args, loop, model)

        @functools.wraps(from_request)
        def with_routes(cls, request):
            record = from_request(cls, request)
            record.routing_indices, request.routing_indices = request.routing_indices, None
            return record

        @functools.wraps(process)
        def post_process_requests(engine, *args, **kwargs):
            active, finished = process(engine, *args, **kwargs)
            if takes_part(engine):
                for record in finished:
                    # If a request was evicted on the way, the engine has no routes for it.
                    routes = None if len(record.requests) > 1 else record[0].routing_indices
                    told = Finished(record[0].request_id, record[0].uid, routes)
                    self.finished.append(told)
            return active, finished

        @functools.wraps(merge)
        def merge_global_request_ledgers(server):
            self.join(server._inference_engine)
            return merge(server)

        rl_utils.get_inference_interface = get_inference_interface
        FinishedRequestRecord.from_request = classmethod(with_routes)
        DynamicInferenceEngine.post_process_requests = post_process_requests
        MegatronLocal.merge_global_request_ledgers = merge_global_request_ledgers

    def join(self, engine: DynamicInferenceEngine) -> None:
        """Put the routes of all stages into the ledger of the first. A collective of the stages."""
        if not takes_part(engine):
            return
        mine, self.finished = self.finished, []
        group, here = engine.pg_collection.pp, dist.get_rank()
        first = dist.get_process_group_ranks(group)[0]
        stages = [None] * dist.get_world_size(group) if here == first else None
        layers = len(RouterReplay.global_router_replay_instances)
        dist.gather_object((layers, mine), stages, dst=first, group=group)
        if stages is not None:
            put_together(engine.local_metadata_ledger, stages)


def put_together(ledger: dict[str, Any], stages: list[tuple[int, list[Finished]]]) -> None:
    """Set the routes over all layers in the first stage's records of its finished requests.

    stages: number of MoE layers and finished requests of each, all in one order.
    """
    numbers = [[request.number for request in finished] for _, finished in stages]
    if any(other != numbers[0] for other in numbers):
        raise UserError(
            f"{RUN}: the pipeline stages of inference finished other requests "
            f"({', '.join(str(len(other)) for other in numbers)} of them by stage), so that their "
            f"routes cannot be put together. Unset {RUN}, or set "
            "--rl-inference-pipeline-model-parallel-size to 1"
        )
    for parts in zip(*(finished for _, finished in stages), strict=True):
        record = ledger.get(parts[0].uid)
        if record is None:  # one that failed has no record
            continue
        counts = (layers for layers, _ in stages)
        routes = [part.routes_SLK for part, layers in zip(parts, counts, strict=True) if layers]
        whole = routes and all(x is not None for x in routes)
        record.routing_indices = np.concatenate(routes, axis=1) if whole else None


def takes_part(engine: DynamicInferenceEngine) -> bool:
    """Whether this rank represents its stage, where there are several."""
    groups = engine.pg_collection
    return dist.get_world_size(groups.pp) > 1 and dist.get_rank(groups.tp) == 0
