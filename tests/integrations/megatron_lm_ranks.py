# ruff: noqa: E402
"""Ranks of Megatron-LM's own RL on a CPU over gloo, from a patched checkout on PYTHONPATH.

    python -m tests.integrations.megatron_lm_ranks JOBS

JOBS: a pickled list of (job, folder, number of ranks, environment). Megatron-LM is imported once;
each job then forks its ranks, whose train_rl reads the environment. What is not Megatron-LM's
here: CUDA (moe_upgrpo.megatron.backend); attention over packed sequences, which its local
attention refuses; the inference engine, which needs a GPU: a request is of Megatron-LM's own class,
with the routes that its replay records in a forward of the model. All else is: data for the update,
packing, forwards, schedules, train_rl.forward_step and its loss function.
"""

import importlib
import itertools
import os
import pickle
import sys
import warnings
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
from megatron.core.enums import ModelType
from megatron.core.inference.inference_request import DynamicInferenceRequest, FinishedRequestRecord
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.rl import rl_utils, sequence_packing_utils
from megatron.rl.agent.api import RolloutGroup, TokenRollout
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, PolicyLossConfig, RolloutCorrection
from moe_upgrpo.megatron import backend
from tests.ranks import run_ranks

VOCAB, WIDTH, EXPERTS, TOP_K = 64, 16, 8, 2
TOKENIZER = SimpleNamespace(
    pad=62,
    eod=63,
    bos=None,
    vocab_size=VOCAB,
    library=None,
    detokenize=lambda tokens: [str(x) for x in tokens],
)


class Attention(DotProductAttention):
    """Causal attention, sequence by sequence."""

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        def attend(start, end):
            parts = [x[start:end] for x in (query, key, value)]
            if parts[0].dim() == 3:
                parts = [x[:, None] for x in parts]
            return super(Attention, self).forward(*parts, None, attn_mask_type=AttnMaskType.causal)

        ends = [0, query.shape[0]]
        if packed_seq_params is not None:
            ends = packed_seq_params.cu_seqlens_q.tolist()
        out = torch.cat([attend(a, b) for a, b in itertools.pairwise(ends) if b > a])
        return out.squeeze(1) if query.dim() == 3 else out


def start(**changes):
    """Megatron-LM's arguments and one process group."""
    dist.init_process_group("gloo")
    args = parse_args(ignore_unknown_args=True)
    given = dict(
        num_layers=3,
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
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    return args


class Norm(torch.nn.RMSNorm):
    """Megatron-LM's own without Transformer Engine refuses sequence parallelism."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Model(GPTModel):
    """In single precision, where Megatron-LM has no Float16Module that takes the argument away."""

    def forward(self, *args, fp32_output=None, **kwargs):
        return super().forward(*args, **kwargs)


def model_of(args) -> Model:
    """A dense layer and two MoE layers, the same weights on every data-parallel rank."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=64,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_layer_freq=[0, 1, 1],
        moe_ffn_hidden_size=32,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        moe_token_dispatcher_type="alltoall",
        moe_enable_routing_replay=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        sequence_parallel=args.sequence_parallel,
        calculate_per_token_loss=args.calculate_per_token_loss,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        layer.submodules.self_attention.submodules.core_attention = Attention
    return Model(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=WIDTH,
        position_embedding_type="learned_absolute",
    )


class Bigrams(torch.nn.Module):
    """For the losses' jobs: Megatron-LM's attention takes one sequence at a time where they are not
    packed (its forward always says thd), so no model of it makes a micro-batch of two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(VOCAB, VOCAB))
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.model_type = ModelType.encoder_or_decoder

    def forward(self, tokens, *args, **kwargs):
        return self.logits[tokens]

    def set_input_tensor(self, tensor):
        pass


def inference(model, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes `[S - 1, L, K]` as Megatron-LM's replay records them, and log-probs `[S - 1]`."""
    padded = torch.tensor([tokens + [TOKENIZER.pad] * (WIDTH - len(tokens))])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    with torch.no_grad():
        logits = model(padded, torch.arange(WIDTH)[None], None, runtime_gather_output=True)
    routes = torch.stack(RouterReplay.get_recorded_data(), dim=1)
    RouterReplay.clear_global_router_replay_action()
    if model.config.sequence_parallel:
        routes = gather_from_sequence_parallel_region(routes.contiguous())
    logps = rl_utils.selective_log_softmax(logits[:, :-1], padded[:, 1:])[0]
    return routes[: len(tokens) - 1], logps[: len(tokens) - 1]


def finished(name: str, tokens: list[int], prompt: int, routes) -> FinishedRequestRecord:
    request = DynamicInferenceRequest(
        request_id=0,
        uid=name,
        sampling_params=SamplingParams(termination_id=TOKENIZER.eod),
        prompt_tokens=torch.tensor(tokens[:prompt]),
        generated_tokens=tokens[prompt:],
        policy_epoch=[(0, 0)],
        kv_cache_epoch=[(0, 0)],
        routing_indices=None if routes is None else routes.numpy().astype("int16"),
    )
    record = FinishedRequestRecord.from_request(request)
    request.serialize()  # what goes over HTTP
    return record


def rollouts_of(plan: list[list[dict]], model=None) -> tuple[list, dict]:
    """Groups of rollouts, and the ledger of their finished requests.

    plan: by group and rollout: turns [(tokens, prompt length)], reward, planted [(turn, position,
    layer)] where inference is made to have chosen another expert for the token at that position.
    """
    groups, ledger = [], {}
    for g, group in enumerate(plan):
        made = []
        for r, rollout in enumerate(group):
            names = [f"{g}-{r}-{t}" for t in range(len(rollout["turns"]))]
            logprobs = rollout.get("logprobs", [])
            for t, (name, (tokens, prompt)) in enumerate(zip(names, rollout["turns"], strict=True)):
                routes = None
                if model is not None:
                    routes, logps = inference(model, tokens)
                    for turn, position, layer in rollout.get("planted", []):
                        if turn == t:
                            chosen = routes[position - 1, layer]
                            chosen[0] = next(e for e in range(EXPERTS) if e not in chosen.tolist())
                    first = rollout["turns"][t][1]
                    logprobs = [*logprobs, (logps[first - 1 :] - 0.05).tolist()]
                if rollout.get("evicted"):
                    routes = None
                ledger[name] = finished(name, tokens, prompt, routes)
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


def collect(model, plan, packed: bool, correct: bool = False, routes: bool = True):
    groups, ledger = rollouts_of(plan, model if routes else None)
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
    configs = {n: p for n, p in PRESETS.items() if p.arguments <= {"rollout_log_probs"}}
    correction = RolloutCorrection(weight="sequence-tis", positive=True)
    configs["gspo, corrected"] = preset("gspo", correction=correction)
    configs["upstream's"] = None
    configs["grpo as upstream's"] = preset("grpo", clip_low=0.01, clip_high=0.01, dual_clip=None)
    for packed, size in ((False, 2), (True, 1)):
        args.rl_use_sequence_packing, args.micro_batch_size = packed, size
        iterator = collect(model, plan, packed, correct=True, routes=False)
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


def routes(folder: Path) -> None:
    """Two collections, the first visited twice, with an SGD step after each pass."""
    packed = os.environ["PACKED"] == "1"
    tp = int(os.environ.get("TP", "1"))
    args = start(
        rl_use_sequence_packing=packed,
        rl_sequence_packing_max_sequences_per_bin=3,
        calculate_per_token_loss=packed,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=tp,
        expert_tensor_parallel_size=1,
        sequence_parallel=tp > 1,
    )
    train_rl = importlib.import_module("train_rl")
    plans = pickle.loads((folder / "plan.pkl").read_bytes())
    model = model_of(args)
    if dist.get_world_size() == 1:
        (folder / "refused.txt").write_text("\n".join(refused(args, model, plans[0])))
    for passes, plan in zip((2, 1), plans, strict=True):
        iterator = collect(model, plan, packed)
        for _ in range(passes):
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
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is None:
                        continue
                    groups = [parallel_state.get_data_parallel_group()]
                    if getattr(parameter, "sequence_parallel", False):
                        groups.append(parallel_state.get_tensor_model_parallel_group())
                    for group in groups:
                        dist.all_reduce(parameter.grad, group=group)
                    parameter -= 1e-2 * parameter.grad
    # The end of the job: upstream's function ends the process.
    with mock.patch("os._exit"):
        rl_utils.rl_inference_interface_shutdown()


def refused(args, model, plan) -> list[str]:
    """The end of a collection: under four settings, and where no routes were recorded."""
    said = []
    for name, value in (
        ("pipeline_model_parallel_size", 2),
        ("context_parallel_size", 2),
        ("rl_training_cuda_graphs", True),
        ("rl_inference_expert_model_parallel_size", 1),
        ("curr_iteration", 1),
    ):
        with mock.patch.object(args, name, value):
            try:
                collect(model, plan, packed=False, routes=False)
            except UserError as error:
                said.append(str(error))
    return said


def settings(folder: Path) -> None:
    """The end of an import of the integration, for each environment asked."""
    said = []
    for variables in pickle.loads((folder / "plan.pkl").read_bytes()):
        with mock.patch.dict(os.environ, variables):
            try:
                importlib.import_module("moe_upgrpo.integrations.megatron_lm")
            except UserError as error:
                said.append(str(error))
            for name in [n for n in sys.modules if n.startswith("moe_upgrpo.integrations.megat")]:
                del sys.modules[name]
    (folder / "said.pkl").write_bytes(pickle.dumps(said))


JOBS = {"losses": losses, "routes": routes, "settings": settings}


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
