# ruff: noqa: E402
"""slime's or miles' own training actor on CPU ranks over gloo. A script: it imports the checkout.

    python -m tests.integrations.slime_ranks slime|miles CHECKOUT CHECKPOINT FOLDER

The stack is imported once; each job then forks its ranks. What is not the stack's here, and why:

- modules that are not installed here (`stack_plugin.NAMES`); used of them is get_args alone;
- its Megatron: the lines that slime's patch puts into two files are put into megatron-core 0.16.1,
  those of miles' fork likewise (radixark/Megatron-LM 2e64d78);
- building the model and loading its weights, Transformer Engine's: moe_upgrpo.megatron does it;
- attention over packed sequences and with context parallelism, which Megatron's local one refuses;
- Ray, trackers, weight updates, the scheduler of the learning rate.

All else is the stack's: actor.train_actor, its layout of batches, replay, forward_only, train,
loss dispatch, advantages, and Megatron-Core's schedules, DDP and distributed optimizer.
"""

import os
import pickle
import sys
import warnings
from argparse import Namespace
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import MagicMock

from tests.integrations.stack_plugin import NAMES, StandIns
from tests.ranks import RankFailed, run_ranks

warnings.filterwarnings("ignore")
os.environ["TORCHDYNAMO_DISABLE"] = "1"

STACK, CHECKOUT = sys.argv[1:3]
# The released 0.0.2: its names are elsewhere, and it makes the micro-batches of a rollout itself.
WHEEL = STACK == "miles" and not Path(CHECKOUT, "miles/backends/training_utils/loss_hub").exists()
# slime v0.2.4 makes the schedule of micro-batches in the trainer, too.
BEFORE_SCHEDULES = STACK == "slime" and not Path(CHECKOUT, "slime/utils/dp_schedule.py").exists()
ANCHORS = {  # the line of megatron-core 0.16.1 that the stack's lines stand before
    "megatron.core.transformer.moe.moe_utils": '    if score_function == "softmax":',
    "megatron.core.transformer.moe.router": "    def _maintain_float32_expert_bias(self):",
}


def added_lines(module: str) -> str:
    """Lines that the stack's Megatron has more than NVIDIA's in a file, for routing replay."""
    if STACK == "miles":
        register = (
            "        from miles.utils.replay_base import routing_replay_manager\n"
            '        routing_replay_manager.register_to_module(self, "routing_replay")\n'
        )
        replay = (
            "    from miles.utils.replay_base import routing_replay_manager\n"
            "    compute_topk = routing_replay_manager.get_topk_fn(_compute_topk, "
            "return_probs=True)\n"
        )
        return replay if module.endswith("moe_utils") else register
    patch = Path(CHECKOUT, "docker/patch/latest/megatron.patch").read_text()
    path = module.replace(".", "/") + ".py"
    (of_file,) = [x for x in patch.split("diff --git ") if x.startswith(f"a/{path} ")]
    lines = [x[1:] for x in of_file.splitlines() if x.startswith("+") and x[:3] != "+++"]
    return "\n".join(lines) + "\n"


class Patched(SourceFileLoader):
    def get_code(self, name):
        source = Path(self.path).read_text()
        head, anchor, tail = source.partition(ANCHORS[name] + "\n")
        assert anchor, name
        return compile(head + added_lines(name) + anchor + tail, self.path, "exec")


class PatchedMegatron(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path) if name in ANCHORS else None
        if spec:
            spec.loader = Patched(name, spec.origin)
        return spec


sys.meta_path[:0] = [StandIns(), PatchedMegatron()]
sys.path.append(CHECKOUT)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.module import Float16Module
from transformers import AutoConfig

from moe_upgrpo.integrations.slime_miles.revisions import first_module, taken
from moe_upgrpo.megatron import backend, model
from moe_upgrpo.megatron.layout import Layout
from tests.integrations import slime_attention, slime_schedule
from tests.integrations.local_gpt import loaded

NAMES.append("triton")  # not for Megatron and torch, which can do without it
if STACK == "slime":
    import ray
    from slime.backends.megatron_utils import actor as actor_module
    from slime.backends.megatron_utils import cp_utils
    from slime.backends.megatron_utils import loss as loss_module
    from slime.backends.megatron_utils import model as model_module
    from slime.utils.misc import load_function

    # What v0.3.0 calls the sums over a rollout's masks.
    older_name = "group_mask_sums" in Path(loss_module.__file__).read_text()
    MASK_SUMS = "group_mask_sums" if older_name else "rollout_mask_sums"
    tracking = first_module("slime.observability.logging_utils", "slime.utils.logging_utils")
    ray.get = lambda given: given
    if Path(CHECKOUT, "slime/utils/accelerator").exists():  # newer than v0.3.1, which asks CUDA
        from slime.utils import accelerator
        from slime.utils.accelerator.cuda import CUDAAccelerator

        class Cpu(CUDAAccelerator):
            name = device_type = "cpu"

            def is_available(self):
                return True

            def current_device(self):
                return "cpu"

            def device(self, index=None):
                return torch.device("cpu")

        accelerator.set_accelerator(Cpu())
else:
    from miles.backends.megatron_utils import actor as actor_module
    from miles.backends.megatron_utils import model as model_module
    from miles.backends.megatron_utils import parallel as megatron_parallel
    from miles.backends.training_utils import cp_utils, parallel
    from miles.backends.training_utils import loss as loss_module
    from miles.utils import replay_base
    from miles.utils.misc import load_function

    if WHEEL:
        import ray
        from miles.backends.training_utils import data as data_module
        from miles.utils import tracking_utils as tracking

        ray.get = lambda given: given
    else:
        from miles.ray.rollout import train_data_conversion
        from miles.utils.ft_utils.process_group_utils import GroupInfo
        from miles.utils.tracking_utils import tracking


class Args(Namespace):
    """The flags that matter here; the others are off."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def args_of(**flags) -> Args:
    ours = f"moe_upgrpo.integrations.{STACK}"
    defaults = dict(
        loss_type="custom_loss",
        custom_loss_function_path=f"{ours}.loss",
        custom_megatron_init_path=f"{ours}.init",
        advantage_estimator="grpo",
        allgather_cp=False,
        balance_data=False,
        balance_by_flops=False,
        eps_clip=0.2,
        eps_clip_high=0.2,
        entropy_coef=0.0,
        kl_coef=0.0,
        kl_loss_type="k3",
        tis_clip=2.0,
        tis_clip_low=0.0,
        rollout_temperature=1.0,
        rollout_top_p=1.0,
        log_probs_chunk_size=-1,
        compute_advantages_and_returns=True,
        calculate_per_token_loss=False,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=19,  # two sequences
        use_dynamic_global_batch_size=False,
        qkv_format="thd",
        data_pad_size_multiplier=4,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        micro_batch_size=1,
        seq_length=64,
        sequence_parallel=False,
        use_rollout_routing_replay=False,
        use_routing_replay=False,
        check_for_nan_in_loss_and_grad=True,
        profile_target=(),
        log_reward_category=None,
        hf_checkpoint=None,
        num_layers=2,
        num_experts=8,
        rollout_batch_size=2,
        n_samples_per_prompt=4,
        global_batch_size=4,
    )
    args = Args(**(defaults | flags))
    args.use_routing_replay = args.use_routing_replay or args.use_rollout_routing_replay
    return args


def set_up(args: Args) -> None:
    """Process groups, and what the stack keeps in its process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    model_module.get_args = lambda: args
    if STACK == "miles":
        megatron_parallel.get_args = lambda: args
        trivial = [] if WHEEL else [GroupInfo(rank=0, size=1, group=None)]
        parallel.set_parallel_state(megatron_parallel.create_megatron_parallel_state(*trivial))


# --- losses


def losses(jobs: list[dict], data: dict, context_parallel_size: int) -> list[dict]:
    """Results of each job, a set of flags: value, logits' gradient, the dispatch's metrics."""
    found = []
    set_up(args_of(context_parallel_size=context_parallel_size))
    with backend.apply():
        for flags in jobs:
            args = args_of(context_parallel_size=context_parallel_size, **flags)
            found.append(one_loss(args, data))
    return found


def one_loss(args: Args, data: dict) -> dict:
    total, response = data["total_lengths"], data["response_lengths"]

    def sliced(rows):
        return [
            cp_utils.slice_log_prob_with_cp(row, t, r)
            for row, t, r in zip(rows, total, response, strict=True)
        ]

    def logits_slice(rows):  # with the stack's own padding of each sequence
        return torch.cat([cp_utils.slice_with_cp(row, 0.0) for row in rows])[None]

    leaves = [x.clone().requires_grad_() for x in data["logits"]]
    sums = torch.stack([mask.sum() for mask in data["loss_masks"]]).float()
    batch = {
        "unconcat_tokens": data["tokens"],
        "total_lengths": total,
        "response_lengths": response,
        "loss_masks": data["loss_masks"],
        "rollout_mask_sums": sums,
        "group_mask_sums": sums,  # in slime v0.3.0
        **{
            name: sliced(data[name])
            for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages")
        },
    }
    # Older releases take --global-batch-size.
    sizes = taken(
        loss_module.loss_function,
        step_global_batch_size=4,
        num_rollouts=4,
        apply_megatron_loss_scaling=True,
    )
    loss, tokens, logged = loss_module.loss_function(
        args, batch, 1, logits=logits_slice(leaves), **sizes
    )
    loss.backward()
    values = dict(zip(logged["keys"], logged["values"].tolist()[1:], strict=True))
    return {
        "loss": loss.item(),
        "tokens": float(tokens),
        "values": values,
        "grads": [x.grad for x in leaves],
    }


# --- the actor


def chunk_of(args: Args, checkpoint: str):
    """A pipeline stage with its weights, in Megatron's DDP."""
    hf = AutoConfig.from_pretrained(checkpoint)
    layout = Layout(
        tp=args.tensor_model_parallel_size,
        ep=args.expert_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
    )
    dtype = torch.float32 if args.fp32 else torch.bfloat16
    config = model.transformer_config(hf, layout, dtype)
    config.context_parallel_size = args.context_parallel_size
    config.sequence_parallel = args.sequence_parallel
    config.variable_seq_lengths = True
    gpt = loaded(config, hf, checkpoint, slime_attention.Attention)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    gpt_module = gpt if args.fp32 else Float16Module(config, gpt)
    return DistributedDataParallel(config, ddp, gpt_module)


def actor_of(args: Args, checkpoint: str):
    """The stack's actor as its init leaves it."""
    load_function(args.custom_megatron_init_path)(args)
    actor = object.__new__(actor_module.MegatronTrainRayActor)
    if STACK == "miles":
        for manager in actor_module.all_replay_managers:
            manager.enabled = bool(getattr(args, f"use_{manager.name}_replay"))
    if STACK == "miles" and not WHEEL:
        for manager in actor_module.all_replay_managers:
            manager.register_replay_list_func = actor_module.register_replay_list_sequential
        actor_module.routing_replay_manager.register_replay_list_func = (
            actor_module.register_replay_list_moe
        )
        actor._heartbeat = actor._ft_test_action_executor = MagicMock()
        actor.with_ref = actor.with_opd_teacher = False
    chunk = chunk_of(args, checkpoint)
    actor.args, actor.model, actor.role = args, [chunk], "actor"
    actor.optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, bf16=not args.fp32, use_distributed_optimizer=True,
            params_dtype=torch.float32 if args.fp32 else torch.bfloat16, clip_grad=1.0,
        ),
        actor.model,
    )  # fmt: skip
    actor.opt_param_scheduler = MagicMock(get_lr=lambda group: 1e-2)
    actor.weights_backuper = MagicMock(backup_tags=["actor"])
    actor._active_model_tag = "actor"
    actor.prof = MagicMock()
    actor.weight_updater = MagicMock(pop_metrics=dict)
    actor.rollout_data_postprocess = None
    actor_module.Timer().start("train_wait")
    return actor


def rollout_data_of(args: Args, sequences: list[dict]) -> dict:
    """This rank's part as the actor gets it from Ray: two optimizer steps of two micro-batches.

    With args.stack_schedules the stack's own schedule, by --max-tokens-per-gpu, say.
    """
    rank, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    half = len(sequences) // size // 2
    partition = list(range(rank, len(sequences), size))
    size_of = 2 if args.use_dynamic_batch_size else args.micro_batch_size
    indices = [list(range(at, at + size_of)) for at in range(0, 2 * half, size_of)]
    schedule = {
        # not in order, as balancing by length has it
        "micro_batch_indices": [x[::-1] for x in indices]
        if args.use_dynamic_batch_size
        else indices,
        "num_microbatches": [half // size_of] * 2,
        "global_batch_sizes": [len(sequences) // 2] * 2,
    }
    whole_lengths = [len(s["prompt"] + s["response"]) for s in sequences]
    if args.stack_schedules and STACK == "slime" and not BEFORE_SCHEDULES:
        partition, schedule = slime_schedule.of_rank(args, whole_lengths, rank, size)
    mine = [sequences[i] for i in partition]
    lengths = [(len(s["prompt"] + s["response"]), len(s["response"])) for s in mine]
    more = {}
    if args.qkv_format == "bshd":  # as the actors have it
        pad = args.tensor_model_parallel_size * args.data_pad_size_multiplier
        longest = -(-max(whole_lengths) // pad) * pad
        more = {"max_seq_lens": [longest] * len(mine)}
        if args.context_parallel_size > 1:
            lengths = [(*both, "bshd", longest) for both in lengths]
    sums = torch.tensor([float(sum(s["mask"])) for s in mine])
    data = more | {
        "partition": partition,
        "tokens": [torch.tensor(s["prompt"] + s["response"]) for s in mine],
        "total_lengths": whole_lengths,
        "response_lengths": [response for _, response, *_ in lengths],
        "loss_masks": [torch.tensor(s["mask"], dtype=torch.int) for s in mine],
        "rollout_log_probs": [
            cp_utils.slice_log_prob_with_cp(torch.tensor(s["logp_rollout"]), *place)
            for s, place in zip(mine, lengths, strict=True)
        ],
        "rewards": [s["advantage"] for s in mine],
        "raw_reward": [s["reward"] for s in sequences],
        "rollout_routed_experts": [torch.tensor(s["routes"][:-1]).int() for s in mine],
    }
    shards = [Namespace(inner=data)] * size
    if STACK == "slime":
        if not BEFORE_SCHEDULES:
            data |= schedule | {MASK_SUMS: sums}
        return actor_module.process_rollout_data(args, shards, rank, size)
    if WHEEL:
        return data_module.process_rollout_data(args, shards, rank, size)
    if not args.stack_schedules:
        data |= schedule
    data |= {"rollout_mask_sums": sums, "num_rollouts": [len(sequences) // 2] * 2}
    return train_data_conversion.process_rollout_data_shard(args, data)


def train(checkpoint: str, folder: Path, sequences: list[dict], flags: dict, steps: int) -> dict:
    os.environ |= {
        "MOE_UPGRPO_RUN": str(folder),
        "ENABLE_ROUTING_REPLAY": str(int(bool(flags.get("use_rollout_routing_replay")))),
    }
    args = args_of(hf_checkpoint=checkpoint, **flags)
    set_up(args)
    slime_attention.set_layout(args.allgather_cp and args.context_parallel_size > 1)
    reported = []
    with backend.apply():
        for name in ("get_rng_state", "set_rng_state", "manual_seed"):
            setattr(torch.cuda, name, lambda *_: torch.empty(0))
        torch.cuda.mem_get_info = lambda *_: (1, 1)
        megatron_random._set_cuda_rng_state = lambda *_, **__: None
        empty_like = torch.empty_like
        torch.empty_like = lambda *a, pin_memory=False, **k: empty_like(*a, **k)
        actor = actor_of(args, checkpoint)
        actor_module.log_perf_data = lambda *a, **k: None
        if hasattr(actor_module, "train_metric_utils"):  # slime newer than v0.3.1
            actor_module.train_metric_utils.log_perf_data = lambda *a, **k: None
        tracking.log = lambda a, row, step_key: reported.append(row)
        recorded = []
        replay = actor_module.RoutingReplay if STACK == "slime" else replay_base.Replay
        record = replay.record
        replay.record = lambda self, x: (recorded.append(x.clone()), record(self, x))[1]
        microbatches, get_iterator = [], actor_module.get_data_iterator

        def kept(*arguments):
            found = get_iterator(*arguments)
            iterators = found[0] if isinstance(found, tuple) else found
            microbatches[:] = iterators[0].micro_batch_indices or []
            return found

        actor_module.get_data_iterator = kept
        more = {"witness_info": None, "attempt": 0} if STACK == "miles" and not WHEEL else {}
        for rollout_id in range(steps):
            data = rollout_data_of(args, sequences)
            actor.train_actor(rollout_id, data, **more)
    return {"reported": reported, "recorded": recorded, "microbatches": microbatches}


def on_ranks(world, function, *arguments) -> list:
    return run_ranks(world, function, *arguments, timeout_s=600, context=get_context("fork"))


def main(checkpoint: str, folder: str):
    folder = Path(folder)
    jobs = pickle.loads((folder / "jobs.pkl").read_bytes())
    results = {}
    for name, job in jobs.items():
        if name.startswith("losses"):
            results[name] = on_ranks(job["world"], losses, *job["arguments"])
        else:
            try:
                results[name] = on_ranks(
                    job["world"], train, checkpoint, folder / name, *job["arguments"]
                )
            except RankFailed as failed:
                if "UserError" not in str(failed):
                    raise
                results[name] = str(failed)  # refused
    (folder / "results.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[3:])
