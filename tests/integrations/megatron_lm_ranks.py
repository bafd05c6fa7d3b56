# ruff: noqa: E402
"""Ranks of Megatron-LM's own RL on a CPU over gloo, from a patched checkout on PYTHONPATH.

    python -m tests.integrations.megatron_lm_ranks JOBS

JOBS: a pickled list of (job, folder, number of ranks, environment). Megatron-LM is imported once;
each job then forks its ranks, whose train_rl reads the environment. What is not Megatron-LM's
here: CUDA (moe_upgrpo.megatron.backend); attention over packed and split sequences, which its local
attention refuses (megatron_lm_models.py); the forward and the scheduler of its inference engine,
which need a GPU (megatron_lm_engine.py). All else is: data for the update, packing, the partition
of context parallelism, pipeline schedules, the inference model's groups and the copy of the weights
into it, the engine's books, train_rl.forward_step and its loss function.
"""

import importlib
import itertools
import os
import pickle
import sys
import warnings
import zlib
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

warnings.filterwarnings("ignore")

import gpt_builders  # noqa: F401
import hybrid_builders  # noqa: F401
import model_provider  # noqa: F401
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.inference_request import DynamicInferenceRequest, FinishedRequestRecord
from megatron.core.inference.shards import build_inference_pg_collection
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.resharding.refit import swap_model_weights
from megatron.inference.utils import add_inference_args
from megatron.rl import rl_utils, sequence_packing_utils
from megatron.rl.agent.api import RolloutGroup, TokenRollout
from megatron.training import global_vars
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, PolicyLossConfig, RolloutCorrection
from moe_upgrpo.megatron import backend
from tests.integrations import megatron_lm_engine as engine
from tests.integrations.megatron_lm_models import (
    EXPERTS,
    LAYERS,
    VOCAB,
    WIDTH,
    Bigrams,
    model_of,
    summed_gradients,
    whole_names,
)
from tests.integrations.tried import TRIED
from tests.ranks import run_ranks

TOKENIZER = SimpleNamespace(
    pad=62,
    eod=63,
    bos=None,
    vocab_size=VOCAB,
    library=None,
    detokenize=lambda tokens: [str(x) for x in tokens],
)


def start(**changes):
    """Megatron-LM's arguments and one process group."""
    dist.init_process_group("gloo")
    args = parse_args(ignore_unknown_args=True)
    given = dict(
        num_layers=LAYERS,
        num_attention_heads=2,
        hidden_size=32,
        vocab_size=VOCAB,
        max_position_embeddings=WIDTH,
        seq_length=WIDTH,
        micro_batch_size=1,
        eval_micro_batch_size=1,
        num_experts=EXPERTS,
        perform_rl_step=True,
        grpo_prompts_per_step=4,
        grpo_group_size=2,
        global_batch_size=8,
        grpo_kl_beta=0.0,
        curr_iteration=1,
        wandb_project=None,
    )
    for name, value in (given | changes).items():
        setattr(args, name, value)
    with mock.patch("megatron.training.arguments.get_device_arch_version", lambda: 10):
        args = validate_args(args)
    set_global_variables(args, False)
    sequence_packing_utils.get_tokenizer = lambda: TOKENIZER
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    return args


def finished(name: str) -> FinishedRequestRecord:
    """The record of a request without routes."""
    request = DynamicInferenceRequest(
        request_id=0, uid=name, policy_epoch=[(0, 0)], kv_cache_epoch=[(0, 0)]
    )
    return FinishedRequestRecord.from_request(request)


def rollouts_of(plan: list[list[dict]], server=None) -> tuple[list, dict]:
    """Groups of rollouts, and the ledger of their finished requests.

    plan: by group and rollout: turns [(tokens, prompt length)], reward, planted [(turn, position,
    layer)] where inference is made to have chosen another expert for the token at that position.
    server: of inference; None: no routes, and the plan's own log-probs.
    """
    requests = [
        (f"{g}-{r}-{t}", *turn, bool(rollout.get("evicted")))
        for g, group in enumerate(plan)
        for r, rollout in enumerate(group)
        for t, turn in enumerate(rollout["turns"])
    ]
    if server is None:
        ledger = {name: finished(name) for name, *_ in requests}
    else:
        logps, ledger = engine.collected(server, requests)
        assert list(ledger) and all(type(name) is str and " " not in name for name in ledger)
    groups = []
    for g, group in enumerate(plan):
        made = []
        for r, rollout in enumerate(group):
            names = [f"{g}-{r}-{t}" for t in range(len(rollout["turns"]))]
            logprobs = rollout.get("logprobs", [])
            if server is not None:
                logprobs = [[x - 0.05 for x in logps[name]] for name in names]
                for turn, position, layer in rollout.get("planted", []):
                    routes = ledger[names[turn]].routing_indices
                    if routes is None:
                        continue
                    chosen = routes[position - 1, layer]
                    chosen[0] = next(e for e in range(EXPERTS) if e not in chosen.tolist())
            made.append(
                TokenRollout(
                    trajectory=[tokens for tokens, _ in rollout["turns"]],
                    reward=rollout["reward"],
                    generation_mask=[
                        [i >= prompt for i in range(len(tokens))]
                        for tokens, prompt in rollout["turns"]
                    ],
                    logprobs=logprobs,
                    env_id="toy",
                    problem_id=str(g),
                    completion_ids=names,
                )
            )
        groups.append(RolloutGroup(rollouts=made))
    return groups, ledger


def collect(model, plan, packed: bool, correct: bool = False, server=None):
    groups, ledger = rollouts_of(plan, server)
    iterator, *_ = rl_utils.prepare_data_for_update(
        model=[model],
        ref_state_dict=model.state_dict(),
        rollouts=groups,
        tokenizer=TOKENIZER,
        sequence_packing=packed,
        is_correction=correct,
        request_ledger=ledger,
    )
    return iterator


def losses(folder: Path) -> None:
    """Every preset, packed or not, through train_rl.forward_step and its loss function."""
    args = start(
        global_batch_size=6,
        grpo_prompts_per_step=3,
        rl_inference_logprobs_is_correction=True,
        rl_sequence_packing_max_sequences_per_bin=3,
    )
    plan = pickle.loads((folder / "plan.pkl").read_bytes())
    train_rl = importlib.import_module("train_rl")
    hooks = importlib.import_module("moe_upgrpo.integrations.megatron_lm").hooks
    hooks.install()
    model, found = Bigrams(), []
    preset = PolicyLossConfig.preset
    configs = {name: PRESETS[name] for name in TRIED}
    correction = RolloutCorrection(weight="sequence-tis", positive=True)
    configs["gspo, corrected"] = preset("gspo", correction=correction)
    configs["upstream's"] = None
    configs["grpo as upstream's"] = preset("grpo", clip_low=0.01, clip_high=0.01, dual_clip=None)
    for packed, size in ((False, 2), (True, 1)):
        args.rl_use_sequence_packing, args.micro_batch_size = packed, size
        iterator = collect(model, plan, packed, correct=True)
        batches = [next(iterator) for _ in range(get_num_microbatches())]
        counts = hooks.counts
        # Alone, or as a part of the collection by either of Megatron-LM's normalisations.
        variants = ((False, False), (False, True), (True, True))
        for name, (per_token, whole) in itertools.product(configs, variants):
            config, as_upstream = configs[name], "upstream's" in name
            hooks.config, hooks.counts = config, counts if whole else None
            args.calculate_per_token_loss = per_token
            args.grpo_kl_beta, args.grpo_entropy_term_weight = (0.1, 0.2) if as_upstream else (0, 0)
            args.rl_importance_sampling_truncation_coef = 1.1 if as_upstream else None
            args.rl_inference_logprobs_is_correction = as_upstream or bool(config.arguments)
            found += [
                {
                    "name": name,
                    "packed": packed,
                    "size": size,
                    "per_token": per_token,
                    "whole": whole,
                }
                | update(train_rl, batch)
                for batch in batches
            ]
    (folder / "losses.pkl").write_bytes(pickle.dumps(found))


def update(train_rl, batch) -> dict:
    """train_rl.forward_step on a micro-batch, with log-probs some way off from the old ones."""
    context = rl_utils.get_rl_runtime_state().packing_context
    old = batch[2] if context is None else context.old_logprobs[batch[0].item() :][:1]
    torch.manual_seed(round(1000 * float(old.abs().sum())))
    leaf, given = (old + 0.4 * torch.randn(old.shape)).requires_grad_(), {}
    call = train_rl.calculate_grpo_loss

    def record(**arguments):
        given.update(arguments)
        return call(**arguments)

    train_rl.get_logprobs = lambda *args, **kwargs: leaf
    train_rl.calculate_grpo_loss = record
    output, function = train_rl.forward_step(iter([batch]), None)
    train_rl.calculate_grpo_loss = call
    loss, tokens, _ = function(output)
    (grad,) = torch.autograd.grad(loss, leaf)
    return {
        "loss": loss.item(),
        "tokens": int(tokens),
        "grad": grad.numpy(),  # Megatron-LM changes how tensors are pickled
        "terms": [x.detach().numpy() for x in function.args[1:6]],
        "output": output.detach().numpy(),
        "given": {n: x.detach().numpy() if torch.is_tensor(x) else x for n, x in given.items()},
    }


def split(packed: bool, **changes) -> SimpleNamespace:
    """Arguments of the layout that the environment names: TP, PP, FIRST layers of stage 0, CP."""
    tp, pp, cp = (int(os.environ.get(name, "1")) for name in ("TP", "PP", "CP"))
    return start(
        rl_use_sequence_packing=packed,
        rl_sequence_packing_max_sequences_per_bin=3,
        calculate_per_token_loss=packed,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        decoder_first_pipeline_num_layers=int(os.environ["FIRST"]) if pp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=tp,
        expert_tensor_parallel_size=1,
        sequence_parallel=tp > 1,
        **changes,
    )


def inference_model_of(args):
    """A model of inference's own, as training.py:1841 builds it; None: it has the trainer's."""
    stages = os.environ.get("INFERENCE_PP")
    if stages is None and args.context_parallel_size == 1:
        return None
    args.rl_inference_pipeline_model_parallel_size = stages and int(stages)
    groups = build_inference_pg_collection(
        args.world_size,
        pp_size=args.rl_inference_pipeline_model_parallel_size,
        cp_size=1 if args.context_parallel_size > 1 else None,
        use_tp_pp_dp_mapping=args.use_tp_pp_dp_mapping,
    )
    if args.decoder_first_pipeline_num_layers is None:
        args.decoder_first_pipeline_num_layers = int(os.environ.get("FIRST", "0")) or None
    model = model_of(args, groups, context_parallel_size=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the weights come with the copy
    return model


def one_pass(train_rl, model, iterator) -> None:
    model.zero_grad()
    get_forward_backward_func()(
        forward_step_func=train_rl.forward_step,
        data_iterator=iterator,
        model=[model],
        num_microbatches=get_num_microbatches(),
        seq_length=WIDTH,
        micro_batch_size=1,
        decoder_seq_length=WIDTH,
        forward_only=False,
    )
    summed_gradients(model)


def routes(folder: Path) -> None:
    """Two collections, the first visited twice, with an SGD step after each pass."""
    packed = os.environ["PACKED"] == "1"
    args = split(packed)
    train_rl = importlib.import_module("train_rl")
    plans = pickle.loads((folder / "plan.pkl").read_bytes())
    model = model_of(args)
    own = inference_model_of(args)
    if os.environ.get("REFUSED"):
        (folder / "refused.txt").write_text(refused(args, model, plans[0]))
    for passes, plan in zip((2, 1), plans, strict=True):
        if own is not None:
            swap_model_weights([model], [own], "gloo")
        served = model if own is None else own
        server = engine.started(args, served, graphs=os.environ.get("GRAPHS") == "1")
        iterator = collect(model, plan, packed, server=server)
        for _ in range(passes):
            one_pass(train_rl, model, iterator)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-2 * parameter.grad
    # The end of the job: upstream's function ends the process.
    with mock.patch("os._exit"):
        rl_utils.rl_inference_interface_shutdown()


def refused(args, model, plan) -> str:
    """The end of a collection whose requests have no routes."""
    try:
        collect(model, plan, packed=False)
    except UserError as error:
        return str(error)
    return ""


def gradients(folder: Path) -> None:
    """Every preset in this layout, without a log: gradients of a collection, by parameter."""
    name, packed = os.environ["NAME"], os.environ["PACKED"] == "1"
    args = split(packed, rl_inference_logprobs_is_correction=True)
    train_rl = importlib.import_module("train_rl")
    hooks = importlib.import_module("moe_upgrpo.integrations.megatron_lm").hooks
    hooks.install()
    plan = pickle.loads((folder / "plan.pkl").read_bytes())
    model, found = model_of(args), {}
    iterator = collect(model, plan, packed, correct=True)
    with torch.no_grad():
        for key, parameter in whole_names(model).items():  # away from the old log-probs
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + 1)
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    for preset in TRIED:
        hooks.config = config = PRESETS[preset]
        args.rl_inference_logprobs_is_correction = bool(config.arguments)
        one_pass(train_rl, model, iterator)
        found[preset] = {
            key: parameter.grad.numpy().copy()
            for key, parameter in whole_names(model).items()
            if parameter.grad is not None
        }
    (folder / f"{name}-{dist.get_rank()}.pkl").write_bytes(pickle.dumps(found))


def settings(folder: Path) -> None:
    """Answers at start-up: of an import of the integration, for each environment asked, and
    to the arguments of Megatron-LM's own scripts, as its own parser has them."""
    plan, said = pickle.loads((folder / "plan.pkl").read_bytes()), []
    for variables in plan["environments"]:
        with mock.patch.dict(os.environ, variables):
            try:
                importlib.import_module("moe_upgrpo.integrations.megatron_lm.install")
            except UserError as error:
                said.append(str(error))
            for name in [n for n in sys.modules if n.startswith("moe_upgrpo.integrations.megat")]:
                del sys.modules[name]
    os.environ |= {"MOE_UPGRPO_RUN": str(folder / "run"), "MOE_UPGRPO_LOSS": "up-grpo"}
    importlib.import_module("moe_upgrpo.integrations.megatron_lm.install")
    inference = importlib.import_module("moe_upgrpo.integrations.megatron_lm.inference")
    for words, changes in plan["arguments"]:
        with mock.patch.object(sys, "argv", ["train_rl.py", *words]):
            # It does not know --tokenizer-hf-include-special-tokens, which one script has.
            args = parse_args(add_inference_args, ignore_unknown_args=True)
        for name, value in changes.items():
            assert hasattr(args, name)
            setattr(args, name, value)
        global_vars._GLOBAL_ARGS = None
        try:
            global_vars.set_args(args)
            said.append("accepted" if global_vars._GLOBAL_ARGS is args else "not set")
        except UserError as error:
            said.append(str(error))
    first, second = (inference.Finished(number, str(number), None) for number in (1, 2))
    try:
        inference.put_together({}, [(1, [first, second]), (1, [second, first])])
    except UserError as error:
        said.append(str(error))
    (folder / "said.pkl").write_bytes(pickle.dumps(said))


JOBS = {"losses": losses, "routes": routes, "gradients": gradients, "settings": settings}


def rank(job: str, folder: str, variables: dict) -> None:
    os.environ.update(variables)
    with backend.apply():
        JOBS[job](Path(folder))


def main() -> None:
    for job, folder, size, variables in pickle.loads(Path(sys.argv[1]).read_bytes()):
        told = (job, folder, variables)
        run_ranks(size, rank, *told, timeout_s=600, context=get_context("fork"))


if __name__ == "__main__":
    main()
