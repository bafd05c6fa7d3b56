# ruff: noqa: E402
"""NeMo-RL's own Megatron worker on CPU ranks over gloo: `get_logprobs` and `train` of its class.

    python -m tests.integrations.nemo_rl_ranks CHECKPOINT FOLDER

The checkout is that of MOE_UPGRPO_NEMO_RL; each job forks its ranks. What is not NeMo-RL's here:

- the worker's constructor (Ray, Megatron-Bridge's model of Transformer Engine layers): here
  moe_upgrpo.megatron builds and loads the same GPTModel in float32, Megatron-Core 0.16.1 wraps it;
- four functions of Megatron-Bridge and of NeMo-RL's newer Megatron-Core, defined below, and the
  packages of nemo_rl_stand_ins;
- attention over packed sequences, which Megatron's local attention refuses; under context
  parallelism each rank makes the whole of it, from NeMo-RL's gathered shards;
- of a model that slices its inputs itself, and of a draft model, the little that the worker sees;
- TransferQueue: NeMo-RL's in-memory data plane.

All else is NeMo-RL's: micro-batches, packing, context-parallel shards, forward, router replay,
loss dispatch, updates, metrics.
"""

import copy
import json
import os
import pickle
import sys
import types
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["MOE_UPGRPO_RUN"] = "set in each job"

import ray
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router import TopKRouter

from moe_upgrpo.megatron import backend, model
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.layout import Layout
from tests.integrations import nemo_rl_stand_ins
from tests.integrations.local_gpt import loaded
from tests.ranks import run_ranks

nemo_rl_stand_ins.install()
nemo_rl_stand_ins.install_worker()

import nemo_rl.models.megatron.data as nemo_data
import nemo_rl.models.policy.workers.megatron_policy_worker as worker_module
from nemo_rl.algorithms.loss import ClippedPGLossConfig
from nemo_rl.data_plane.adapters.noop import NoOpDataPlaneClient
from nemo_rl.data_plane.column_io import write_columns
from nemo_rl.data_plane.interfaces import KVBatchMeta
from nemo_rl.data_plane.preshard import shard_meta_for_dp
from nemo_rl.data_plane.schema import DP_TRAIN_FIELDS, LP_SEED_FIELDS
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.model_utils import (
    _get_tokens_on_this_cp_rank,
    allgather_cp_sharded_tensor,
)
from nemo_rl.models.megatron.router_replay import validate_router_replay_config
from nemo_rl.utils.timer import Timer

from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn
from moe_upgrpo.integrations.nemo_rl_worker import logged


class Attention(DotProductAttention):
    """Causal attention, sequence by sequence; padding is on the right, so no mask is needed."""

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        def attend(q, k, v):
            return super(Attention, self).forward(q, k, v, None, attn_mask_type=AttnMaskType.causal)

        if packed_seq_params is None:
            return attend(query, key, value)
        size = parallel_state.get_context_parallel_world_size()
        group = parallel_state.get_context_parallel_group()
        rank, parts = parallel_state.get_context_parallel_rank(), []
        for start, end in pairwise((packed_seq_params.cu_seqlens_q_padded // size).tolist()):
            mine = [x[start:end, None] for x in (query, key, value)]
            if size == 1:
                parts.append(attend(*mine))
                continue
            whole = (allgather_cp_sharded_tensor(x.contiguous(), group, seq_dim=0) for x in mine)
            parts.append(_get_tokens_on_this_cp_rank(attend(*whole), rank, size, seq_dim=0))
        return torch.cat(parts).squeeze(1)


class SlicingModel(GPTModel):
    """Takes the whole packed row and keeps this rank's part, as Nemotron Omni does."""

    model_slices_context_parallel_inputs = True

    def forward(self, input_ids, *args, packed_seq_params, **kwargs):
        mine = partition_indices(
            packed_seq_params,
            total_tokens=input_ids.shape[1],
            cp_size=parallel_state.get_context_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            device=None,
        )
        return super().forward(
            input_ids[:, mine], *args, packed_seq_params=packed_seq_params, **kwargs
        )


def partition_indices(packed_seq_params, *, total_tokens, cp_size, cp_rank, device):
    """Those of Transformer Engine's `thd_get_partitioned_indices`: of each sequence two pieces."""
    found = []
    for start, end in pairwise(packed_seq_params.cu_seqlens_q_padded.tolist()):
        pieces = torch.arange(start, end).chunk(2 * cp_size)
        found += [pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]]
    assert sum(map(len, found)) * cp_size == total_tokens
    return torch.cat(found)


class Draft(torch.nn.Module):
    """A draft model with a router of its own, which the log leaves out."""

    eagle_module = None

    def __init__(self, settings):
        super().__init__()
        self.router = TopKRouter(settings, ProcessGroupCollection.use_mpu_process_groups())
        self.router.set_layer_number(1)


def packed_params(*, total_tokens=None, pad_between_seqs=None, **fields):
    """NeMo-RL's Megatron-Core has two more fields, for Mamba and Transformer Engine."""
    return PackedSeqParams(**fields)


def masks_and_positions(data, *args, **kwargs):
    positions = torch.arange(data.shape[1]).expand(data.shape)
    return None, None, positions


nemo_data.PackedSeqParams = packed_params
BatchedDataDict.to = lambda self, device: self
nemo_data.get_ltor_masks_and_position_ids = masks_and_positions
nemo_data.get_packed_seq_cp_partition_indices = partition_indices
worker_module.get_pg_collection = lambda _: types.SimpleNamespace(mp=None)
worker_module.logical_and_across_model_parallel_group = lambda value, mp_group: value
worker_module.reduce_max_stat_across_model_parallel_group = lambda value, mp_group: value
worker_module.get_moe_metrics = lambda **_: {}
worker_module.get_aux_loss_track_names = lambda _: []


def constructed(self, config, checkpoint: str) -> None:
    """In the place of the worker's constructor; the configuration is checked as there."""
    validate_router_replay_config(config)
    sizes = config["megatron_cfg"]
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes["tensor_model_parallel_size"],
        pipeline_model_parallel_size=sizes["pipeline_model_parallel_size"],
        context_parallel_size=sizes["context_parallel_size"],
        expert_model_parallel_size=sizes["expert_model_parallel_size"],
        expert_tensor_parallel_size=1,
    )
    self.cfg, self.dtype, self.timer = config, torch.float32, Timer()
    self.rank, self.dp_size = dist.get_rank(), parallel_state.get_data_parallel_world_size()
    self._router_replay_enabled = worker_module.router_replay_enabled(config)
    hf = read_model_config(Path(checkpoint))
    layout = Layout(
        tp=sizes["tensor_model_parallel_size"],
        pp=sizes["pipeline_model_parallel_size"],
        ep=sizes["expert_model_parallel_size"],
    )
    settings = model.transformer_config(hf, layout, torch.float32)
    settings.variable_seq_lengths = True
    settings.moe_enable_routing_replay = self._router_replay_enabled
    settings.calculate_per_token_loss = True  # as megatron/setup.py: gradients are added up
    settings.context_parallel_size = sizes["context_parallel_size"]
    self.model_slices_context_parallel_inputs = "slices" in config["stand_ins"]
    kind = SlicingModel if "slices" in config["stand_ins"] else GPTModel
    chunk = loaded(settings, hf, checkpoint, Attention, kind)
    self.draft_model = None
    if "draft" in config["stand_ins"]:
        chunk.draft_model = self.draft_model = Draft(settings)
    self.model = DistributedDataParallel(settings, DistributedDataParallelConfig(), chunk)
    self.optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=1.0, sgd_momentum=0.0, params_dtype=torch.float32),
        [self.model],
    )
    self.optimizer.grad_norms_by_group = {}
    self.scheduler = types.SimpleNamespace(
        get_lr=lambda group: group["lr"], get_wd=lambda: 0.0, step=lambda increment: None
    )
    settings.finalize_model_grads_func = finalize_model_grads  # as Megatron-Bridge binds it
    self.mcore_state = types.SimpleNamespace(straggler_timer=None)
    self.megatron_cfg = types.SimpleNamespace(optimizer=None)
    self.sampling_params = self.media_placeholder_token_id = None
    self.delegate_pack_to_model = "packs" in config["stand_ins"]
    self.delegate_mtp_loss_mask_to_model = self.defer_fp32_logits = False
    self.should_disable_forward_pre_hook = False
    self._first_train_step_forward_pre_hook_disabled = False


worker_module.MegatronPolicyWorkerImpl.__init__ = constructed
if not hasattr(worker_module, "logged"):  # the checkout is not patched
    logged(worker_module.MegatronPolicyWorkerImpl)


def config_of(
    checkpoint: str,
    sizes: dict,
    replay: dict,
    packed: bool,
    count: int,
    stand_ins: list[str],
    updates: int,
) -> dict:
    return {
        "model_name": checkpoint,
        "stand_ins": stand_ins,
        "router_replay": replay,
        "generation": {"backend": "vllm"},
        "megatron_cfg": {
            "enabled": True,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "expert_model_parallel_size": 1,
            "context_parallel_size": 1,
            "sequence_parallel": sizes.get("tensor_model_parallel_size", 1) > 1,
            "empty_unused_memory_level": 0,
            "moe_per_layer_logging": False,
            "distributed_data_parallel_config": {"overlap_grad_reduce": False},
            **sizes,
        },
        "make_sequence_length_divisible_by": 4,
        "sequence_packing": {
            "enabled": packed,
            "train_mb_tokens": 48,
            "logprob_mb_tokens": 32,
            "algorithm": "modified_first_fit_decreasing",
            "fuse_loss": "fused" in stand_ins,
        },
        "dynamic_batching": {"enabled": False},
        "train_global_batch_size": count // updates,
        "train_micro_batch_size": 2,
        "logprob_batch_size": 2,
        "max_total_sequence_length": 64,
    }


def batch_of(sequences: list[dict]) -> BatchedDataDict:
    """As grpo.py:3166 makes it of the rollouts: padded on the right."""

    def padded(of):
        rows = [torch.as_tensor(of(s)) for s in sequences]
        found = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        short = -found.shape[1] % 4
        return torch.nn.functional.pad(found, (0, 0) * (found.dim() - 2) + (0, short))

    def response(s, values):
        return [0.0] * len(s["prompt"]) + [float(x) for x in values]

    return BatchedDataDict(
        {
            "input_ids": padded(lambda s: s["prompt"] + s["response"]),
            "input_lengths": torch.tensor([len(s["prompt"] + s["response"]) for s in sequences]),
            "generation_logprobs": padded(lambda s: response(s, s["logp_rollout"])),
            "token_mask": padded(lambda s: response(s, s["mask"])),
            "sample_mask": torch.tensor([float(s["counts"]) for s in sequences]),
            "routed_experts": padded(lambda s: s["routes"]).to(torch.int16),
            "advantages": padded(lambda s: response(s, [s["advantage"]] * len(s["response"]))),
            "total_reward": torch.tensor([s["reward"] for s in sequences]),
        }
    )


def packing(config: dict, tokens: str) -> dict | None:
    if not config["sequence_packing"]["enabled"]:
        return None
    return {
        "algorithm": config["sequence_packing"]["algorithm"],
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "sequence_length_pad_multiple": config["make_sequence_length_divisible_by"],
        "max_tokens_per_microbatch": config["sequence_packing"][tokens],
    }


def shards(data: BatchedDataDict, size: int, batch_size: int | None, packs: dict | None):
    """As lm_policy.py shards a batch; the second is the order of the first's rows, if changed."""
    if packs is None:
        return data.shard_by_batch_size(size, batch_size=batch_size), None
    return data.shard_by_batch_size(size, batch_size=batch_size, sequence_packing_args=packs)


def one_step(worker, sequences: list[dict], loss) -> dict:
    """The worker's part of a step of grpo.py: old log-probs, then all optimizer steps."""
    config = worker.cfg
    rank, size = parallel_state.get_data_parallel_rank(), worker.dp_size
    data = batch_of(sequences)
    logprobs = old_logprobs(worker, data)
    count = config["train_global_batch_size"]
    parts, _ = shards(data, size, count, packing(config, "train_mb_tokens"))
    result = worker.train(parts[rank], loss, gbs=count, mbs=config["train_micro_batch_size"])
    return {"logprobs": logprobs, "metrics": dict(result["all_mb_metrics"])}


def old_logprobs(worker, data: BatchedDataDict) -> torch.Tensor:
    """Those of the whole batch, which are put into it, too."""
    config = worker.cfg
    rank, size = parallel_state.get_data_parallel_rank(), worker.dp_size
    unfit = {n: v for n, v in data.items() if n not in ("advantages", "total_reward")}
    parts, order = shards(BatchedDataDict(unfit), size, None, packing(config, "logprob_mb_tokens"))
    mine = worker.get_logprobs(data=parts[rank])["logprobs"]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (rank, mine))
    logprobs = torch.cat([dict(everyone)[r] for r in range(size)])
    if order is not None:
        logprobs = logprobs[torch.argsort(torch.tensor(order))]
    data["prev_logprobs"] = logprobs
    data["reference_policy_logprobs"] = logprobs + 0.1
    return logprobs


def one_step_in_chunks(worker, sequences: list[dict], loss) -> dict:
    """The worker's part of a step of single_controller.py: chunks as their rollouts are done.

    The first try of the step is given up.
    """
    rank, size, logprobs = parallel_state.get_data_parallel_rank(), worker.dp_size, []
    for given_up in (True, False):
        for i in range(0, len(sequences), 4):
            data = batch_of(sequences[i : i + 4])
            found = old_logprobs(worker, data)
            if i == 0:
                worker.begin_train_step(loss_fn=loss)
            parts, _ = shards(data, size, None, packing(worker.cfg, "train_mb_tokens"))
            worker.train_microbatch(data=parts[rank])
            if given_up:
                worker.abort_train_step()
                break
            logprobs.append(found)
    result = worker.finish_train_step()
    return {"logprobs": logprobs, "metrics": dict(result["all_mb_metrics"])}


def one_step_by_data_plane(worker, sequences: list[dict], loss, chunks: bool) -> dict:
    """As the steps before, by the worker's methods that fetch their batch from the data plane.

    Each rank has NeMo-RL's in-memory client, in the place of TransferQueue, with all rows.
    """
    rank, size = parallel_state.get_data_parallel_rank(), worker.dp_size
    worker._dp_client = client = NoOpDataPlaneClient()
    client.register_partition("train", [], len(sequences), [])
    worker._replica_group_cache = None  # else the ranks of one would share their fetch over NCCL

    def shard(meta, fields, tokens: str, count=None):
        """This rank's part, as TQPolicy cuts it."""
        meta = replace(meta, fields=[*dict.fromkeys(fields), "routed_experts"])
        packs = packing(worker.cfg, tokens)
        return shard_meta_for_dp(
            meta,
            dp_world=size,
            batch_size=count,
            sequence_packing_args=packs,
            dynamic_batching_args=None,
        )[0][rank]

    step = 4 if chunks else len(sequences)
    for given_up in (True, False) if chunks else (False,):
        for i in range(0, len(sequences), step):
            data = batch_of(sequences[i : i + step])
            meta = KVBatchMeta(
                partition_id="train",
                task_name="train",
                sample_ids=[f"{given_up} {i + n}" for n in range(step)],
                sequence_lengths=data["input_lengths"].tolist(),
            )
            write_columns(client, meta, {n: v for n, v in data.items() if n != "advantages"})
            mine = shard(meta, LP_SEED_FIELDS, "logprob_mb_tokens")
            worker.get_logprobs_presharded(mine)
            found = client.get_samples(mine.sample_ids, "train", ["prev_logprobs"])
            everyone = [None] * size
            rows = dict(zip(mine.sample_ids, found["prev_logprobs"].unbind(), strict=True))
            group = parallel_state.get_data_parallel_group()
            dist.all_gather_object(everyone, rows, group)
            rows = {name: row for part in everyone for name, row in part.items()}
            old = [rows[name] for name in meta.sample_ids]
            old = torch.nn.utils.rnn.pad_sequence(old, batch_first=True)
            others = {
                "advantages": data["advantages"],
                "prev_logprobs": old,
                "reference_policy_logprobs": old + 0.1,
            }
            write_columns(client, meta, others)
            fields = [*DP_TRAIN_FIELDS, "total_reward"]
            if not chunks:
                mine = shard(meta, fields, "train_mb_tokens", len(sequences))
                result = worker.train_presharded(mine, loss, gbs=len(sequences))
                continue
            if i == 0:
                worker.begin_train_step_presharded(loss_fn=loss)
            worker.train_microbatch_presharded(shard(meta, fields, "train_mb_tokens"))
            if given_up:
                worker.abort_train_step_presharded()
                break
    if chunks:
        result = worker.finish_train_step_presharded()
    return {"metrics": dict(result["all_mb_metrics"])}


def train(
    checkpoint, folder, sequences, sizes, replay, packed, loss, steps, stand_ins, way
) -> dict:
    os.environ["MOE_UPGRPO_RUN"] = str(folder)
    dist.init_process_group("gloo")
    with backend.apply():
        for name in ("get_rng_state", "set_rng_state", "manual_seed", "get_device_name"):
            setattr(torch.cuda, name, lambda *_: torch.empty(0))
        torch.cuda.empty_cache = lambda: None
        tensor = torch.tensor
        torch.tensor = lambda *args, pin_memory=None, **kwargs: tensor(*args, **kwargs)
        torch.Tensor.cuda = lambda self, *_, **__: self  # in a backward, where no mode holds
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
        megatron_random._set_cuda_rng_state = lambda *_, **__: None
        updates = 2 if way == "two updates" else 1
        config = config_of(checkpoint, sizes, replay, packed, len(sequences), stand_ins, updates)
        # As it comes out of Ray's pickle in a worker's process: the methods with their own globals.
        actor = ray.remote(worker_module.MegatronPolicyWorkerImpl).__ray_metadata__.modified_class
        worker = ray.cloudpickle.loads(ray.cloudpickle.dumps(actor))(config, checkpoint)
        loss_fn = PolicyLossFn(ClippedPGLossConfig(**loss))
        step = {
            "chunks": one_step_in_chunks,
            "data plane": partial(one_step_by_data_plane, chunks=False),
            "data plane in chunks": partial(one_step_by_data_plane, chunks=True),
        }.get(way, one_step)
        for _ in range(steps):
            found = step(worker, sequences, loss_fn)
        of_all_ranks = {
            name: parameter.detach().double().norm().item()
            for name, parameter in worker.model.named_parameters()
            if "experts" not in name
        }
    return found | {"parameters": of_all_ranks}


def main(checkpoint: str, folder: str):
    folder = Path(folder)
    jobs = json.loads((folder / "jobs.json").read_text())
    results = {}
    for name, spec in jobs.items():
        world = spec.pop("world")
        results[name] = run_ranks(
            world,
            train,
            checkpoint,
            folder / name,
            *spec.values(),
            context=get_context("fork"),
            timeout_s=180,
        )
    (folder / "results.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
