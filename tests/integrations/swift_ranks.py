"""Megatron-SWIFT's own GRPO trainer on CPU ranks over gloo, out of the released wheels.

`main` imports ms-swift once, in a process of its own; each job then forks its ranks. What is not
ms-swift's here, and why (`load`, `trainer_class`):

- packages that it imports and that nothing here calls: `NAMES`, of which Transformer Engine and
  triton take CUDA; with the registries of its models, templates and data sets (seconds of imports);
- the model: mcore-bridge builds layers of Transformer Engine alone; here moe_upgrpo.megatron builds
  and loads the same GPTModel, with attention over packed and context-parallel sequences
  as in `slime_attention`;
- the engine (vLLM), the reward, and the template's encoding: sequences are given;
- the arguments: the defaults of its own dataclass, without their checks of a model on disk.

All else is ms-swift's: the trainer, collating, forward, replay, masks and weights, loss, metrics,
DDP, the optimizer step.
"""

import dataclasses
import importlib
import json
import os
import pickle
import sys
import traceback
import types
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from tests.integrations.places import SWIFT_WHEELS
from tests.ranks import run_ranks

NAMES = (
    *("transformer_engine", "triton", "modelscope", "json_repair", "aiohttp", "einops", "dacite"),
    *("msgspec", "swift.model.models", "swift.template.templates", "swift.dataset.dataset"),
)
TE_LAYERS = ("TEGroupedLinear", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")


def load() -> None:
    """Import the module of the real trainer, with the stand-ins in place."""
    import megatron.core.extensions.transformer_engine as extensions

    from tests.integrations import stack_plugin

    for name in (*TE_LAYERS, "TEFusedMLP"):  # None without Transformer Engine, and patched
        setattr(extensions, name, type(name, (torch.nn.Module,), {}))
    stack_plugin.NAMES[:] = NAMES
    sys.meta_path.insert(0, stack_plugin.StandIns())
    sys.path.insert(0, str(SWIFT_WHEELS))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        del sys.modules[name]  # ms-swift takes one before 1.0
    module = importlib.import_module("swift.megatron.trainers.grpo_trainer")
    assert Path(module.__file__).is_relative_to(SWIFT_WHEELS)
    # Megatron-Core asks what is there, and its version.
    stack_plugin.NAMES.remove("transformer_engine")
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


def arguments(**given) -> types.SimpleNamespace:
    """ms-swift's own defaults, with what its checks would make of them, and `given`."""
    from swift.megatron.arguments import MegatronRLHFArguments

    missing = dataclasses.MISSING
    found = {}
    for f in dataclasses.fields(MegatronRLHFArguments):
        made = f.default_factory() if f.default_factory is not missing else None
        found[f.name] = made if f.default is missing else f.default
    found |= {"rlhf_type": "grpo", "loss_type": "grpo", "beta": 0.0, "tuner_type": "full"}
    found |= {"kl_in_reward": False, "scale_rewards": "group", "task_type": "causal_lm"}
    # No step to go on from, nothing to look up.
    found |= {"finetune": True, "check_model": False, "is_multimodal": False}
    found |= {"use_vllm": False, "vllm_mode": "colocate", "callbacks": [], "report_to": []}
    dtypes = ("main_grads", "main_params", "exp_avg", "exp_avg_sq")
    found |= {f"{name}_dtype": torch.float32 for name in dtypes}
    found |= {f"{end}_weight_decay": found["weight_decay"] for end in ("start", "end")}
    return types.SimpleNamespace(**found | given)


# --- losses


def loss_of(module, batch: dict, **given) -> dict:
    """Value, gradient and metrics of the real trainer's loss_func, ours in it where it is named.

    By its own __init__ of parameters, as its Ray workers make a trainer for the loss alone.
    """
    args = arguments(**given)
    trainer = module.MegatronGRPOTrainer.__new__(module.MegatronGRPOTrainer)
    trainer.args = args
    trainer._setup_teacher()
    # 4.6.0 takes a trainer without a teacher for its own, and then refuses an off-policy mask.
    trainer._has_teacher = trainer._has_teacher_explicit
    trainer._init_grpo_params()
    trainer._prepare_metrics()
    trainer.disable_rollout_importance_sampling = False
    trainer.max_completion_length, trainer._step = 64, 0
    trainer.unwrapped_models = [types.SimpleNamespace(training=True)]
    batch = {**batch}
    leaf = batch.pop("log_probs").clone().requires_grad_()
    data = {"per_token_entropy": batch.pop("entropy"), "grpo_batch": module.GRPOBatch(**batch)}
    loss, metrics = trainer.loss_func(leaf, data)
    loss.backward()
    metrics = {name: x.tolist() for name, x in metrics.items()}
    return {"loss": loss.item(), "grad": leaf.grad, "metrics": metrics}


def losses(jobs: list[dict]) -> list:
    """The result of each job, or the UserError's text."""
    from megatron.core import parallel_state

    from moe_upgrpo.errors import UserError

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    module, results = sys.modules["swift.megatron.trainers.grpo_trainer"], []
    for job in jobs:
        os.environ["MOE_UPGRPO_LOSS_SETTINGS"] = json.dumps(job.pop("settings", {}))
        try:
            results.append(loss_of(module, **job))
        except UserError as error:
            results.append(str(error))
    return results


def start_of(args, of_config: dict | None = None, **more) -> types.SimpleNamespace:
    """As much of a trainer as our start-up reads; its model has no router on this rank."""
    config = {"num_moe_experts": 8, "moe_router_fusion": False, "sequence_parallel": False}
    config = types.SimpleNamespace(**config | (of_config or {}))
    model = torch.nn.Module()
    return types.SimpleNamespace(args=args, config=config, unwrapped_models=[model], **more)


def refused(jobs: list[dict]) -> list[str | None]:
    """The answer of our start-up to each job's arguments: the UserError's text, or None."""
    from megatron.core import parallel_state

    from moe_upgrpo.errors import UserError
    from moe_upgrpo.integrations.ms_swift.log import TrainerLog
    from moe_upgrpo.integrations.ms_swift.loss import loss_config

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    results = []
    for job in jobs:
        os.environ["MOE_UPGRPO_LOSS_SETTINGS"] = json.dumps(job.pop("settings", {}))
        os.environ["MOE_UPGRPO_RUN"] = job.pop("run", "a/new/folder")
        of_config = job.pop("config", {})
        trainer = start_of(arguments(**job), of_config)
        try:
            loss_config(trainer.args)
            TrainerLog(trainer)
            results.append(None)
        except UserError as error:
            results.append(str(error))
    return results


def fields() -> list[str]:
    """The names of ms-swift's own arguments."""
    from swift.megatron.arguments import MegatronRLHFArguments

    return [f.name for f in dataclasses.fields(MegatronRLHFArguments)]


def context_parallel(packed: bool, mode: str) -> list[bool]:
    """Whether each of two sequences comes back whole from shards that ms-swift's own split made."""
    from mcore_bridge import split_cp_inputs
    from megatron.core import parallel_state

    from moe_upgrpo.integrations.ms_swift.log import TrainerLog

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    lengths = [8, 12]
    generator = torch.Generator().manual_seed(0)
    shape = (1, sum(lengths)) if packed else (2, 12)
    whole = torch.randint(1 << 30, (*shape, 3, 4), generator=generator, dtype=torch.int32)
    params = None
    if packed:
        ends = torch.tensor([0, 8, 20], dtype=torch.int32)
        params = types.SimpleNamespace(cu_seqlens_q=ends, seq_lens=torch.tensor(lengths))
    told = {} if mode == "zigzag" else {"cp_partition_mode": mode}
    mine = split_cp_inputs(whole, params and params.cu_seqlens_q, 1, **told)
    os.environ["MOE_UPGRPO_RUN"] = "a/new/folder"
    args = arguments(padding_free=packed, context_parallel_size=2, cp_partition_mode=mode)
    log = TrainerLog(start_of(args, _prepare_batch=lambda _: {"packed_seq_params": params}))
    batch = types.SimpleNamespace(
        completion_mask=torch.ones(2, 12), seq_lengths=torch.tensor(lengths), moe_upgrpo_rows=[5, 6]
    )
    found = log._of_sequences(mine.transpose(0, 1).flatten(0, 1), {}, batch)
    expected = [whole[0, :8], whole[0, 8:]] if packed else list(whole)
    return [torch.equal(found[row], x) for row, x in zip((5, 6), expected, strict=True)]


# --- training


def trainer_class(module, checkpoint: str, generated: list[dict]):
    """MegatronGRPOTrainer with the stand-ins for its model, engine, reward and encoding."""
    from megatron.core.models.gpt import GPTModel
    from swift.megatron.utils import wrap_model
    from transformers import AutoConfig

    from moe_upgrpo.megatron import model
    from moe_upgrpo.megatron.layout import Layout
    from tests.integrations.local_gpt import loaded
    from tests.integrations.slime_attention import Attention

    class Model(GPTModel):
        def _preprocess(self, input_ids, position_ids, *args, packed_seq_params=None, **kwargs):
            decoder_input, freqs, *rest = super()._preprocess(
                input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
            )
            if packed_seq_params is not None:  # as mcore-bridge's model (gpt_model.py:301)
                freqs = freqs[position_ids[0]]
            return decoder_input, freqs, *rest

    class Trainer(module.MegatronGRPOTrainer):
        def prepare_model(self):
            hf = AutoConfig.from_pretrained(checkpoint)
            args = self.args
            layout = Layout(
                tp=args.tensor_model_parallel_size,
                ep=args.expert_model_parallel_size,
                pp=args.pipeline_model_parallel_size,
            )
            self.config = model.transformer_config(hf, layout, torch.float32)
            self.config.moe_enable_routing_replay = args.router_replay_mode != "disabled"
            self.config.variable_seq_lengths = True
            self.config.context_parallel_size = args.context_parallel_size
            chunk = loaded(self.config, hf, checkpoint, Attention, Model)
            self.unwrapped_models = self.peft_models = self.ref_models = [chunk]
            self.wrapped_models = wrap_model(args, self.unwrapped_models)

        def _prepare_rewards(self):
            self.reward_funcs, self.reward_func_names, self.use_gym_env = [], ["given"], False
            self.reward_weights, self.reward_model_plugins = torch.tensor([2.0]), []

        def _generate_completions(self, samples):
            for sample in samples:
                given = generated[sample.extra["index"]]
                sample.rollout_logprobs = [given["logp_rollout"]]
                sample.finish_reason = "length" if given["truncated"] else "stop"
                sample.routed_experts = given["routes"]
            return samples

        def get_local_rollout_batch(self, batch):
            """Its own, with a sequence of their own for each copy of a prompt."""
            batch = super().get_local_rollout_batch(batch)
            group = self._get_rollout_group()
            first = dist.get_rank(group) * len(batch)
            for i, sample in enumerate(batch):
                sample.extra["index"] = sample.extra["first"] + (first + i) % self.num_generations
            return batch

    def score(samples, device, **_):
        rewards = [[generated[s.extra["index"]]["reward"]] for s in samples]
        return torch.tensor(rewards, device=device)

    def encode(sample, template):
        given = generated[sample.extra["index"]]
        ids, responses = given["prompt"] + given["response"], given["response"]
        kept = [t if there else -100 for t, there in zip(responses, given["mask"], strict=True)]
        labels = [-100] * len(given["prompt"]) + kept
        return {"input_ids": ids, "labels": labels, "length": len(ids)}

    module.score_completions, module.encode_sample = score, encode
    # Of kernels that are compiled for CUDA.
    sys.modules["swift.megatron.trainers.base"].warmup_jit_function = lambda *_: None
    return Trainer


def template_of(args):
    """ms-swift's own collating, without a tokenizer."""
    from swift.template import Template

    template = Template.__new__(Template)
    named = {"packing": False, "task_type": "causal_lm", "mode": "train", "padding_side": "right"}
    named |= {
        "use_megatron": True,
        "padding_free": args.padding_free,
        "remove_unused_columns": True,
    }
    named |= {"sequence_parallel_size": args.context_parallel_size, "max_length": None}
    named |= {"processor": types.SimpleNamespace(pad_token_id=0), "is_training": True}
    for name, value in named.items():
        try:
            setattr(template, name, value)
        except AttributeError:  # a property of what is set
            continue
    return template


def train(checkpoint: str, folder: str | None, generated: list[dict], steps: int, given: dict):
    """Optimizer steps of the real trainer on this rank; what it reported of each."""
    from accelerate.state import PartialState
    from megatron.core import parallel_state

    from moe_upgrpo.megatron import backend

    if folder:
        os.environ["MOE_UPGRPO_RUN"] = folder
    dist.init_process_group("gloo")
    PartialState._reset_state()  # of the process that imported ms-swift, which was alone
    PartialState(cpu=True)
    world = dist.get_world_size()
    args = arguments(**given)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    dp = parallel_state.get_data_parallel_world_size()
    args.per_device_generation_batch_size = args.generation_batch_size // world
    args.num_microbatches = args.global_batch_size // (args.micro_batch_size * dp)
    args.model_info = types.SimpleNamespace(model_dir=checkpoint)
    args.model = checkpoint
    module = sys.modules["swift.megatron.trainers.grpo_trainer"]
    with backend.apply():
        trainer = trainer_class(module, checkpoint, generated)(
            args, template_of(args), vllm_client=None
        )
        trainer.setup_model_training()
        groups = len(generated) // args.num_generations // dp
        mine = range(parallel_state.get_data_parallel_rank() * groups, 10**6)[:groups]
        rows = [
            {"messages": [], "first": group * args.num_generations, "index": 0} for group in mine
        ]
        size = args.micro_batch_size
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        data = iter(batches * steps)
        reported = []
        for _ in range(steps * args.steps_per_generation):
            metrics, *_ = trainer.train_step(data)
            reported.append([{n: x.tolist() for n, x in m.items()} for m in metrics])
            means: dict = {}
            trainer._aggregated_metrics(metrics, means)  # as its `train` does, for its trackers
            for of_micro_batch in reported[-1]:
                of_micro_batch["logged"] = {
                    name: float(x[0] / x[1]) for name, x in means.items() if name != "n_steps"
                }
        return reported


def main(folder: str) -> None:
    """Run jobs.pkl of the folder, and leave results.pkl there, or the traceback in error.txt."""
    path = Path(folder)
    try:
        load()
        os.environ["MOE_UPGRPO_RUN"] = folder  # a job with a log; each names its own, or none
        importlib.import_module("moe_upgrpo.integrations.ms_swift")  # as the plugin's file does
        del os.environ["MOE_UPGRPO_RUN"]
        results = {}
        for name, (world, function, *job) in pickle.loads((path / "jobs.pkl").read_bytes()).items():
            results[name] = run_ranks(world, function, *job, context=get_context("fork"))
        (path / "results.pkl").write_bytes(pickle.dumps(results))
    except BaseException:
        (path / "error.txt").write_text(traceback.format_exc())
        raise
