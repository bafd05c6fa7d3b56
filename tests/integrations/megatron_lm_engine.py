"""Megatron-LM's inference engine on a CPU: its books are its own, its forward is not.

A request is run in one forward of the model over its tokens (no scheduler, no paged attention, no
sampling: they need a GPU). Megatron-LM's own are: the recorders of the routers and their buffers of
CUDA graphs (`RoutingMetadata`), the collection of a step (`_router_record_bookkeeping`), the store
by blocks, what finishes a request (`post_process_requests`), the ledger of the answering stage
(`_send_request_records_to_coordinator`) and its merge over all ranks.
"""

from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.kv_block_allocator import KVBlockAllocator
from megatron.core.inference.contexts.routing_metadata import RoutingMetadata
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import (
    DynamicInferenceRequest,
    DynamicInferenceRequestRecord,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import get_asyncio_loop
from megatron.rl import rl_utils
from megatron.rl.inference.megatron import MegatronLocal

from tests.integrations.megatron_lm_models import WIDTH

BLOCK = 4
PAD = 62


class Server:
    """In place of the engine's server over HTTP."""

    def __init__(self, engine: DynamicInferenceEngine):
        self._inference_engine = engine

    async def kill(self) -> None:
        pass

    def merge_global_request_ledgers(self) -> dict:
        return MegatronLocal.merge_global_request_ledgers(self)


def engine_of(model, graphs: bool) -> DynamicInferenceEngine:
    engine = object.__new__(DynamicInferenceEngine)
    groups = engine.pg_collection = model.pg_collection
    first = dist.get_rank(groups.tp) == 0 and dist.get_rank(groups.pp) == 0
    engine.use_coordinator = engine.local_metadata_ledger_enabled = True
    engine.is_mp_coordinator = first
    engine.local_metadata_ledger, engine.requests = {}, {}
    engine.finished_request_count = engine.num_speculative_tokens = 0
    engine.track_generated_token_events = False
    engine.stop_word_being_finished_ids, engine.stop_word_finished_request_ids = set(), set()
    engine.socket_for_receiving_requests = SimpleNamespace(send=lambda payload: None)
    # A batch holds less than a micro-batch of training; sequence parallelism wants an even number.
    most = WIDTH if model.config.sequence_parallel else WIDTH - 1
    context = engine.context = SimpleNamespace(
        max_tokens=most,
        padded_active_token_count=most,
        block_size_tokens=BLOCK,
        using_cuda_graph_this_step=lambda: graphs,
        remove_vlm_request_data=lambda number: None,
    )
    allocator = context.kv_block_allocator = object.__new__(KVBlockAllocator)
    allocator.context, allocator.block_routing, allocator.dummy_block_idx = context, {}, -1
    context.moe_routing_metadata = RoutingMetadata(context, model.config.moe_router_topk)
    engine.controller = object.__new__(TextGenerationController)
    engine.controller.inference_wrapped_model = SimpleNamespace(
        model=model, inference_context=context, tp_group=groups.tp
    )
    return engine


def started(args, model, graphs: bool) -> Server:
    """The server that Megatron-LM starts with its first collection."""

    async def launch(cls, model, **kwargs):
        return Server(engine_of(model, graphs))

    with mock.patch.object(MegatronLocal, "launch", classmethod(launch)):
        return rl_utils.get_inference_interface(args, get_asyncio_loop(), [model])


def forward(engine: DynamicInferenceEngine, tokens: list[int]) -> torch.Tensor | None:
    """Logits of a request's tokens but the last, on the last stage."""
    context, model = engine.context, engine.controller.inference_wrapped_model.model
    count, most = len(tokens) - 1, context.padded_active_token_count
    ids = torch.tensor([tokens[:-1] + [PAD] * (most - count)])
    context.active_token_count = count
    position = torch.arange(count)
    # Blocks of one request after the other would do; these are handed out backwards.
    context.token_to_block_idx = 100 - position // BLOCK
    context.token_to_local_position_within_kv_block = position % BLOCK
    # As text_generation_controller.py:3236 and dynamic_context.py:2635 have it: never switched off.
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    if context.using_cuda_graph_this_step():
        context.moe_routing_metadata.enable_static_buffer_recording()
    else:
        context.moe_routing_metadata.disable_static_buffer_recording()
    group = engine.pg_collection.pp
    ranks, stage = dist.get_process_group_ranks(group), dist.get_rank(group)
    if stage > 0:
        tp = dist.get_world_size(engine.pg_collection.tp) if model.config.sequence_parallel else 1
        hidden = torch.empty(most // tp, 1, model.config.hidden_size)
        dist.recv(hidden, src=ranks[stage - 1])
        model.set_input_tensor(hidden)
    with torch.no_grad():
        out = model(ids, torch.arange(most)[None], None, runtime_gather_output=True)
    allocator = context.kv_block_allocator
    allocator.block_routing.clear()
    allocator.store_routing_per_block(engine.controller._router_record_bookkeeping())
    if stage + 1 < len(ranks):
        dist.send(out.contiguous(), dst=ranks[stage + 1])
        return None
    return out[0, :count]


def generated(engine, number: int, name: str, tokens: list[int], prompt: int, evicted: bool):
    """Log-probs of the sampled tokens on the last stage; the request is finished on all stages."""
    logits, first = forward(engine, tokens), engine.is_mp_coordinator
    request = DynamicInferenceRequest(
        request_id=number,
        uid=name if first else f"{name} as rank {dist.get_rank()} calls it",
        sampling_params=SamplingParams(
            termination_id=63, num_tokens_to_generate=len(tokens) - prompt
        ),
        prompt_tokens=torch.tensor(tokens[:prompt]),
        generated_tokens=tokens[prompt:-1],
        policy_epoch=[(0, 0)],
        kv_cache_epoch=[(0, 0)],
    )
    request.add_event_add_engine()
    record = DynamicInferenceRequestRecord.from_request(request)
    engine.requests[number] = SimpleNamespace(
        record=record, future=SimpleNamespace(set_result=lambda record: None)
    )
    blocks = {} if evicted else {number: [100 - i for i in range(-(-(len(tokens) - 1) // BLOCK))]}
    _, finished = engine.post_process_requests(
        *(torch.tensor([number]), torch.tensor([number]), None, 0.0, torch.tensor([tokens[-1]])),
        *(None, None, -1),
        finished_routing_block_ids=blocks,
    )
    assert finished[0][0].generated_tokens == tokens[prompt:]
    if first:
        engine._send_request_records_to_coordinator(finished)
    if logits is None:
        return None
    logps = rl_utils.selective_log_softmax(logits[None], torch.tensor([tokens[1:]]))[0]
    return logps[prompt - 1 :].tolist()


def collected(server: Server, requests: list[tuple]) -> tuple[dict, dict]:
    """Log-probs and ledger of requests (name, tokens, prompt, evicted), on all ranks.

    Each model-parallel replica of inference takes its share.
    """
    engine = server._inference_engine
    replicas, mine = dist.get_world_size(engine.pg_collection.dp), {}
    for number, (name, *request) in enumerate(requests):
        if number % replicas == dist.get_rank(engine.pg_collection.dp):
            logps = generated(engine, number, name, *request)
            if logps is not None:
                mine[name] = logps
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    ledger = server.merge_global_request_ledgers()
    return {name: x for rank in everywhere for name, x in rank.items()}, ledger
