# ruff: noqa: E402
"""verl's own Megatron engine on CPU ranks over gloo. A script, because verl patches Megatron.

    python -m tests.integrations.verl_ranks CHECKPOINT FOLDER

verl is imported once; each job then forks its ranks. What is not verl's here, and why:

- the platform: verl has none for CPUs; this one is set by verl's own `set_platform`;
- the bridge (the model and its weights): mbridge and Megatron-Bridge build layers of Transformer
  Engine alone; here moe_upgrpo.megatron builds and loads the same GPTModel;
- attention over packed sequences, and what wide settings need (`verl_stand_ins`).

All else is verl's: engine, micro-batches, forward, replay, loss, DDP, distributed optimizer.
"""

import json
import os
import pickle
import sys
import types
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["MOE_UPGRPO_RUN"] = "set in each job"

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.module import Float16Module
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform

from moe_upgrpo.megatron import backend, model
from moe_upgrpo.megatron.layout import Layout
from tests.integrations import verl_stand_ins
from tests.integrations.local_gpt import loaded
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


class Bridge:
    """Answers that the engine asks of mbridge's AutoBridge; the two are set in each job."""

    folder: Path
    adapters = None

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
        """As Megatron-Bridge, which also takes the loss per token under context parallelism."""
        config = self.config
        config.context_parallel_size = parallel_state.get_context_parallel_world_size()
        config.calculate_per_token_loss = config.context_parallel_size > 1
        for name, value in kwargs.items():
            if hasattr(config, name):
                setattr(config, name, value)

    def get_model(self, *, wrap_with_ddp, ddp_config, **kwargs):
        chunk = loaded(self.config, self.hf, self.folder, verl_stand_ins.Attention)
        if self.adapters:
            self.adapters(chunk)
        if self.config.bf16:
            chunk = Float16Module(self.config, chunk)
        config = DistributedDataParallelConfig(**ddp_config)
        return [DistributedDataParallel(self.config, config, chunk)]

    def load_weights(self, chunks, path):
        """Done: the adapters' wrappers would be in the way."""


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


def engine_of(checkpoint, mode: str, packed: bool, **settings) -> MegatronEngineWithLMHead:
    """settings: fields of verl's engine config; dtype may be float32, which verl has no use for."""
    dtype = settings.pop("dtype", "bfloat16")
    model_config = HFModelConfig(
        path=str(checkpoint),
        load_tokenizer=False,
        override_config={"attn_implementation": "eager"},
        use_remove_padding=packed,
    )
    model_config.tokenizer = types.SimpleNamespace(pad_token_id=0)
    model_config.local_tokenizer_path = str(checkpoint)
    engine_config = McoreEngineConfig(
        vanilla_mbridge=True,
        use_remove_padding=packed,
        sequence_parallel=settings.get("tensor_model_parallel_size", 1) > 1,
        router_replay=RouterReplayConfig(mode=mode),
        **{"use_dynamic_bsz": False} | settings,
    )
    object.__setattr__(engine_config, "dtype", dtype)
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


def put_in_place(wide: list[str], checkpoint):
    """The stand-ins that a job's settings need."""
    from megatron.core.transformer.moe import token_dispatcher
    from verl.models.mcore import model_forward_fused
    from verl.workers.config import megatron_peft

    Bridge.folder = Path(checkpoint)
    if "fused" in wide:
        model_forward_fused.linear_cross_entropy = verl_stand_ins.linear_cross_entropy
    if "deepep" in wide:
        for name in ("fused_dispatch", "fused_combine"):
            setattr(token_dispatcher, name, getattr(verl_stand_ins, name))
        token_dispatcher.set_deepep_num_sms = lambda _: None
    if "lora" in wide:
        Bridge.adapters = verl_stand_ins.Adapters()
        megatron_peft.get_peft_cls = lambda **_: Bridge.adapters
    if "dynamic-cp" in wide:
        verl_stand_ins.dynamic_context_parallel()


def train(
    checkpoint, folder, sequences, mode, loss_mode, packed, sizes, steps, epochs, wide=()
) -> dict:
    """RL steps as verl's worker makes them, on this rank; what the last one gave."""
    os.environ["MOE_UPGRPO_RUN"] = str(folder)
    dist.init_process_group("gloo")
    with backend.apply():
        put_in_place(wide, checkpoint)
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
            found = one_step(engine, mine, mode, loss_mode, packed, epochs, wide)
        return found


def scored(engine, data: TensorDict, mode: str) -> dict[str, list]:
    """The old log-probs, and the routes that R2 records."""
    tu.assign_non_tensor(
        data, enable_routing_replay=mode != "disabled", calculate_entropy=True, compute_loss=False
    )
    with engine.eval_mode():
        return exchange(engine, engine.infer_batch(data.clone(recurse=False)))


def one_step(engine, mine, mode, loss_mode, packed, epochs, wide=()) -> dict:
    """Old log-probs, then an optimizer step for each half of the sequences in each epoch.

    bypass: none of the former, as under verl's bypass_mode. lora: a reference model, which is the
    model without its adapters, is asked first.
    """
    data = batch_of(mine) if packed else padded_batch_of(mine)
    if "dynamic-batch" in wide:
        tu.assign_non_tensor(data, use_dynamic_bsz=True, max_token_len_per_gpu=24)
    if "fused" in wide:  # verl's worker says it of each batch
        tu.assign_non_tensor(data, use_fused_kernels=True)
    if "lora" in wide:
        with engine.disable_adapter():
            scored(engine, data, mode)
    old = {} if "bypass" in wide else scored(engine, data, mode)
    if "bypass" in wide:
        data["old_log_probs"] = data["rollout_log_probs"]
    elif packed:
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
    tu.assign_non_tensor(data, global_batch_size=None, enable_routing_replay=mode != "disabled")
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
    entropy = [x.tolist() for x in old.get("entropy", ())]
    return {"source": source, "metrics": metrics, "recorded": recorded, "entropy": entropy}


def exchange(engine, output) -> dict[str, list]:
    """The output of the last stage on every rank of the replica, as the trainer's data has it."""
    mine: dict[str, list] = {}
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
            world, partial(train, **spec), checkpoint, folder / name, context=get_context("fork")
        )
    (folder / "results.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
