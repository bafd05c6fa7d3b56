# ruff: noqa: E402
"""verl's own Megatron engine on CPU ranks over gloo. A script, because verl patches Megatron.

    python -m tests.integrations.verl_ranks CHECKPOINT FOLDER

verl is imported once; each job then forks its ranks. What is not verl's here, and why:

- the platform: verl has none for CPUs; this one is set by verl's own `set_platform`;
- the bridge (the model and its weights): mbridge and Megatron-Bridge build layers of Transformer
  Engine alone; here moe_upgrpo.megatron builds and loads the same GPTModel;
- attention over packed sequences, which Megatron's local attention refuses.

All else is verl's: engine, micro-batches, forward, replay, loss, DDP, distributed optimizer.
"""

import json
import os
import pickle
import sys
import types
import warnings
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["MOE_UPGRPO_RUN"] = "set in each job"

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform

from moe_upgrpo.megatron import backend, model, weights
from moe_upgrpo.megatron.layout import Layout
from tests.ranks import run_ranks


class Cpu(PlatformCUDA):
    device_name = "cpu"
    device_module = torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def empty_cache(self):
        pass


set_platform(Cpu())


class Attention(DotProductAttention):
    """Causal attention, sequence by sequence; padding is on the right, so no mask is needed."""

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        def attend(q, k, v):
            return super(Attention, self).forward(q, k, v, None, attn_mask_type=AttnMaskType.causal)

        if packed_seq_params is None:
            return attend(query, key, value)
        ends = packed_seq_params.cu_seqlens_q_padded.tolist()
        parts = [
            attend(*(x[start:end, None] for x in (query, key, value)))
            for start, end in pairwise(ends)
        ]
        return torch.cat(parts).squeeze(1)


class Bridge:
    """Answers that the engine asks of mbridge's AutoBridge."""

    @classmethod
    def from_config(cls, hf_config, dtype):
        self = cls()
        self.hf = hf_config
        layout = Layout(
            tp=parallel_state.get_tensor_model_parallel_world_size(),
            ep=parallel_state.get_expert_model_parallel_world_size(),
            pp=parallel_state.get_pipeline_model_parallel_world_size(),
        )
        self.config = model.transformer_config(hf_config, layout, dtype)
        self.config.variable_seq_lengths = True
        return self

    def set_extra_args(self, **kwargs):
        pass

    def get_model(self, *, wrap_with_ddp, ddp_config, **kwargs):
        spec = model.block_spec(self.config, None)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = Attention
        chunk = Float16Module(
            self.config,
            GPTModel(
                config=self.config,
                transformer_layer_spec=spec,
                vocab_size=self.hf.vocab_size,
                max_sequence_length=self.hf.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
            ),
        )
        config = DistributedDataParallelConfig(**ddp_config)
        return [DistributedDataParallel(self.config, config, chunk)]

    def load_weights(self, chunks, path):
        weights.load_weights([c.module.module for c in chunks], self.hf, Path(path))


bridge = types.ModuleType("verl.models.mcore.mbridge")
bridge.AutoBridge = Bridge
bridge.freeze_moe_router = bridge.make_value_model = None
sys.modules[bridge.__name__] = bridge

# After the stand-ins. The plugin has been loaded by `import verl` and waits for this import.
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
from verl.workers.config.actor import PolicyLossConfig, RouterReplayConfig
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding


def engine_of(checkpoint, mode: str, packed: bool, **sizes) -> MegatronEngineWithLMHead:
    model_config = HFModelConfig(
        path=str(checkpoint),
        load_tokenizer=False,
        override_config={"attn_implementation": "eager"},
        use_remove_padding=packed,
    )
    model_config.tokenizer = types.SimpleNamespace(pad_token_id=0)
    engine_config = McoreEngineConfig(
        vanilla_mbridge=True,
        use_remove_padding=packed,
        use_dynamic_bsz=False,
        sequence_parallel=sizes.get("tensor_model_parallel_size", 1) > 1,
        router_replay=RouterReplayConfig(mode=mode),
        **sizes,
    )
    optimizer = McoreOptimizerConfig(
        lr=1e-2, lr_decay_steps=9, lr_warmup_steps=0, total_training_steps=9
    )
    engine = MegatronEngineWithLMHead(model_config, engine_config, optimizer, CheckpointConfig())
    engine.initialize()
    return engine


def nested(parts):
    return torch.nested.as_nested_tensor([torch.as_tensor(p) for p in parts], layout=torch.jagged)


def padded(parts, left: bool = False):
    parts = [torch.as_tensor(p) for p in parts]
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_side=side)


def padded_batch_of(sequences: list[dict]) -> TensorDict:
    """As verl's older trainer hands it to a worker: padded, then verl's own way out of it."""
    prompts, responses = ([s[side] for s in sequences] for side in ("prompt", "response"))
    sides = padded(prompts, left=True), padded(responses)
    there = (
        padded([[1] * len(p) for p in prompts], left=True),
        padded([[1] * len(r) for r in responses]),
    )
    width = sides[0].shape[1]
    routes = [[[[0] * 2] * 2] * (width - len(s["prompt"])) + s["routes"] for s in sequences]
    mask = torch.cat(there, dim=1)
    of_token = {
        "response_mask": [s["mask"] for s in sequences],
        "rollout_log_probs": [s["logp_rollout"] for s in sequences],
        "advantages": [[s["advantage"]] * len(s["response"]) for s in sequences],
        "token_level_scores": [[0.0] * (len(s["response"]) - 1) + [s["reward"]] for s in sequences],
    }
    data = {
        "prompts": sides[0],
        "responses": sides[1],
        "input_ids": torch.cat(sides, dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "routed_experts": padded(routes).to(torch.int16),
        "temperature": torch.ones(len(sequences)),
        **{name: padded(rows) for name, rows in of_token.items()},
    }
    return left_right_2_no_padding(
        tu.get_tensordict(
            data | {"uid": [s["uid"] for s in sequences]},
            non_tensor_dict={"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
        )
    )


def batch_of(sequences: list[dict]) -> TensorDict:
    """As verl's trainer hands it to a worker: nested, without padding."""
    names = {
        "prompts": lambda s: s["prompt"],
        "responses": lambda s: s["response"],
        "input_ids": lambda s: s["prompt"] + s["response"],
        "position_ids": lambda s: list(range(len(s["prompt"] + s["response"]))),
        "response_mask": lambda s: s["mask"],
        "loss_mask": lambda s: s["mask"],
        "rollout_log_probs": lambda s: torch.tensor(s["logp_rollout"]),
        "advantages": lambda s: torch.full((len(s["response"]),), s["advantage"]),
        "rm_scores": lambda s: torch.tensor([0.0] * (len(s["response"]) - 1) + [s["reward"]]),
        "routed_experts": lambda s: torch.tensor(s["routes"], dtype=torch.int16),
    }
    tensors = {name: nested([of(s) for s in sequences]) for name, of in names.items()}
    tensors["temperature"] = torch.ones(len(sequences))
    return tu.get_tensordict(
        tensors | {"uid": [s["uid"] for s in sequences]},
        non_tensor_dict={"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
    )


def train(checkpoint, folder, sequences, mode, loss_mode, packed, sizes, steps, epochs) -> dict:
    """RL steps as verl's worker makes them, on this rank; what the last one gave."""
    os.environ["MOE_UPGRPO_RUN"] = str(folder)
    dist.init_process_group("gloo")
    with backend.apply():
        for name in ("get_rng_state", "set_rng_state", "manual_seed"):
            setattr(torch.cuda, name, lambda *_: torch.empty(0))
        megatron_random._set_cuda_rng_state = lambda *_, **__: None
        engine = engine_of(checkpoint, mode, packed, **sizes)
        rank, size = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
        share = len(sequences) // size
        mine = sequences[rank * share : (rank + 1) * share]
        if steps > 1:  # a forward without an update, as under critic_warmup
            scored(engine, batch_of(mine[:2]), mode)
        for _ in range(steps):
            found = one_step(engine, mine, mode, loss_mode, packed, epochs)
        return found


def scored(engine, data: TensorDict, mode: str) -> dict[str, list]:
    """The old log-probs, and the routes that R2 records."""
    tu.assign_non_tensor(
        data, enable_routing_replay=mode != "disabled", calculate_entropy=True, compute_loss=False
    )
    with engine.eval_mode():
        return exchange(engine, engine.infer_batch(data.clone(recurse=False)))


def one_step(engine, mine, mode, loss_mode, packed, epochs) -> dict:
    """Old log-probs, then an optimizer step for each half of the sequences in each epoch."""
    data = batch_of(mine) if packed else padded_batch_of(mine)
    old = scored(engine, data, mode)
    if packed:
        data["old_log_probs"] = nested(
            [old["log_probs"][i][len(x["prompt"]) - 1 : -1] for i, x in enumerate(mine)]
        )
    else:
        data["old_log_probs"] = no_padding_2_padding(nested(old["log_probs"]), data)
    if "routed_experts" in old:  # R2: what the trainer writes back
        data["routed_experts"] = nested(old["routed_experts"])
    actor = ActorConfig(
        strategy="megatron",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    tu.assign_non_tensor(data, global_batch_size=None)
    source, metrics = engine.is_mp_src_rank_with_outputs(), []
    with engine.train_mode():
        for i in range(2 * epochs):
            part = tu.chunk_tensordict(data, 2)[i % 2]
            tu.assign_non_tensor(part, update_lr_scheduler=i == 2 * epochs - 1)
            result = engine.train_batch(part, loss_function=partial(ppo_loss, actor))
            if source:
                result.pop("model_output")
                metrics.append(of_worker(engine, result))
    recorded = [x.numpy() for x in old.get("routed_experts", ())]
    return {"source": source, "metrics": metrics, "recorded": recorded}


def exchange(engine, output) -> dict[str, list]:
    """The output of the last stage on every rank of the replica, as the trainer's data has it."""
    mine = {}
    if engine.is_mp_src_rank_with_outputs():
        mine = {n: [t.float() if t.is_floating_point() else t for t in x.unbind()]
                for n, x in output["model_output"].items()}  # fmt: skip
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (engine.get_data_parallel_rank(), mine))
    return next(m for dp, m in everyone if m and dp == engine.get_data_parallel_rank())


def of_worker(engine, output) -> dict:
    """The metrics as verl's worker reduces them over micro-batches and data-parallel ranks."""
    from verl.utils.metric import Metric
    from verl.utils.torch_functional import allgather_dict_into_dict

    metrics = output["metrics"]
    metrics.pop("grad_norm")
    gathered = allgather_dict_into_dict(data=metrics, group=engine.get_data_parallel_group())
    return {
        name: float(Metric.aggregate_dp(values))
        for name, values in gathered.items()
        if isinstance(values[0], Metric)
    }


def main(checkpoint: str, folder: str):
    folder = Path(folder)
    jobs = json.loads((folder / "jobs.json").read_text())
    results = {}
    for name, spec in jobs.items():
        world = spec.pop("world")
        results[name] = run_ranks(
            world, train, checkpoint, folder / name, *spec.values(), context=get_context("fork")
        )
    (folder / "results.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
