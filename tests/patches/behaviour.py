"""Checks of the Megatron-Core that this process imports, one for each fault that we work around.

    PYTHONPATH=DIR:. python -m tests.patches.behaviour FOLDER

DIR: a copy of Megatron-Core, patched or not. Prints JSON: for each check its error, or null. The
package's own mends and refusals of the fault in question are off; its stand-ins for CUDA are on.
faults.json has what each supported release gave, faults.py what each check is about.
"""

import dataclasses
import json
import multiprocessing
import sys
import traceback
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import backend, families, groups, model, rules
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from tests import ranks
from tests.megatron.conftest import FAMILIES, SIZES, save_random
from tests.megatron.measured import NO_STEP, gradients_by_name, make_samples
from tests.megatron.test_transformers import TEMPERATURE, load, log_probs_of

CONFIG = Qwen3MoeConfig(
    **SIZES,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    tie_word_embeddings=False,
)


def router_without_transformer_engine(_):
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    logits = moe_utils.router_gating_linear(x, w, None, torch.float32)
    torch.testing.assert_close(logits, x @ w.T)
    logits.sum().backward()
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(5, 4))


def mla_without_transformer_engine(_):
    with mock.patch.object(backend, "mends", list), groups.process_groups(Layout()):
        assert len(model.build_model(FAMILIES["moonlight"], Layout(), torch.float32)) == 1


def like_transformers(folder: Path, config: DeepseekV3Config) -> None:
    """Log-probs of a random model, with what the family refuses let through."""
    unlimited = dataclasses.replace(families.FAMILIES["deepseek_v3"], limits=lambda hf: [])
    checkpoint = save_random(AutoModelForCausalLM.from_config(config), folder)
    with (
        mock.patch.dict(families.FAMILIES, deepseek_v3=unlimited),
        groups.process_groups(Layout()),
    ):
        actor = MegatronActor(checkpoint, Layout(), temperature=TEMPERATURE, micro_batch_size=8)
        scores = actor.score(make_samples(), record=())
    reference = load(checkpoint)
    with torch.no_grad():
        expected = [log_probs_of(reference, sample).numpy() for sample in make_samples()]
    off = max(
        abs(one.log_probs - log_probs).max()
        for one, log_probs in zip(scores, expected, strict=True)
    )
    assert off < 1e-4, f"log-probs are {off:.3g} from those of transformers"


def latent(**changes) -> DeepseekV3Config:
    return DeepseekV3Config.from_dict(FAMILIES["deepseek"].to_dict() | changes)


def query_without_latent(folder):
    """Built with Megatron's own choice of norms, which the package replaces."""
    with mock.patch.object(model, "LatentSelfAttention", MLASelfAttention):
        like_transformers(folder / "moonlight", FAMILIES["moonlight"])


def few_groups(folder):
    like_transformers(folder / "few_groups", latent(topk_group=1))


def gates_not_normalised(folder):
    like_transformers(folder / "gates", latent(norm_topk_prob=False))


def rotary_halves(folder):
    like_transformers(folder / "halves", latent(rope_interleave=False))


def small_config(**settings) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **settings)


def norm_with_sequence_parallel(_):
    config = small_config(
        normalization="RMSNorm", tensor_model_parallel_size=2, sequence_parallel=True
    )
    WrappedTorchNorm(config=config, hidden_size=8)


def latent_head_sizes(_):
    """The arguments that multi_latent_attention.py gives to any core attention."""
    with groups.process_groups(Layout()):
        DotProductAttention(
            config=small_config(),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            k_channels=4,
            v_channels=4,
        )


def marks_without_initialisation(_):
    """The mark by which gradient norms tell weights that are split from those that are whole."""
    with groups.process_groups(Layout()):
        config = small_config(perform_initialization=False)
        layer = ColumnParallelLinear(8, 8, config=config, init_method=None, bias=False)
        assert getattr(layer.weight, "tensor_model_parallel", False), "the weight has no mark"


def splits_on_cpu(_):
    splits = moe_utils.maybe_move_tensor_to_cpu(torch.tensor([3, 1]), as_numpy=True)
    assert isinstance(splits, np.ndarray) and splits.tolist() == [3, 1]
    assert torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(torch.tensor([3, 1])))


def replay_with_router_fusion(_):
    """The kernel is Transformer Engine's, so one that takes the first experts stands in for it."""

    def kernel(logits, topk, **_):
        first = torch.zeros_like(logits, dtype=torch.bool)
        first[:, :topk] = True
        return first / topk, first

    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    with (
        mock.patch.object(moe_utils, "HAVE_TE", True),
        mock.patch.object(moe_utils, "fused_topk_with_score_function", kernel, create=True),
    ):
        replay = RouterReplay()
        replay.set_target_indices(torch.tensor([[0, 2], [1, 3]]))
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        _, routes = moe_utils.topk_routing_with_score_function(
            logits, 2, fused=True, router_replay=replay
        )
        assert routes.nonzero()[:, 1].tolist() == [0, 2, 1, 3], routes
        replay.set_router_replay_action(RouterReplayAction.RECORD)
        moe_utils.topk_routing_with_score_function(logits, 2, fused=True, router_replay=replay)
        assert replay.get_recorded_indices().tolist() == [[3, 2], [0, 1]]
        _, routes = moe_utils.topk_routing_with_score_function(logits, 2, fused=True)
        assert routes.nonzero()[:, 1].tolist() == [0, 1, 0, 1]  # without a replay, the kernel's


def gradients(checkpoint: Path, sizes: dict, settings: dict) -> dict[str, torch.Tensor]:
    """Gradients of one update on this rank. The package may refuse the layout, and latent
    attention is the local layer spec's own, which the package replaces."""
    for rule in (*rules.LATENT_ATTENTION, *rules.LATENT_QUERY):
        if "_down_proj" in rule.megatron:
            object.__setattr__(rule, "form", rules.ROWS)
    whole = sizes | {"dispatcher": "alltoall"}
    with mock.patch.object(Layout, "__post_init__", lambda self: None):
        layout = Layout(**{f.name: whole.get(f.name, 1) for f in dataclasses.fields(Layout)})

    def config(*args):
        made = transformer_config(*args)
        for name, value in settings.items():
            setattr(made, name, value)
        return made

    transformer_config = model.transformer_config
    with (
        mock.patch.object(model, "transformer_config", config),
        mock.patch.object(model, "Linear", ColumnParallelLinear),
        groups.process_groups(layout),
    ):
        actor = MegatronActor(checkpoint, layout, micro_batch_size=2, optimizer=NO_STEP)
        actor.update(make_samples(), PolicyLossConfig.preset("grpo"))
        return gradients_by_name(actor)


@cache
def one_process(folder: Path) -> dict[str, torch.Tensor]:
    return ranks.run_ranks(1, gradients, folder, {}, {})[0]


def compare(folder: Path, sizes: dict, settings: dict, world_size: int = 2) -> None:
    """Several ranks against one: no tensor's gradient is further off than rounding."""
    one = one_process(folder)
    assert len(one) > 100
    for rank in ranks.run_ranks(world_size, gradients, folder, sizes, settings):
        off = {n: float((rank[n] - one[n]).norm() / (one[n].norm() + 1e-6)) for n in one}
        worst = max(off, key=off.get)
        wrong = [name for name in off if not off[name] < 1e-4]
        assert not wrong, f"{len(wrong)} of {len(off)} gradients are wrong, {worst} by {off[worst]}"


def expert_gradients_with_etp(folder):
    compare(folder / "qwen3_moe", {"tp": 2, "etp": 1}, {})


def shards_of_different_sizes(folder):
    """Tensors that the ranks of an expert gather of each other, with the all-to-all dispatcher."""
    compare(folder / "qwen3_moe", {"tp": 2, "ep": 2, "etp": 2}, {}, world_size=4)


def rotary_key_gradient(folder):
    compare(folder / "deepseek", {"tp": 2, "etp": 2}, {})


def two_interleaved_stages(folder):
    """batch_p2p_comm without overlap is Megatron-Core's default."""
    compare(
        folder / "qwen3_moe",
        {"pp": 2, "vpp": 2, "etp": 1},
        {"overlap_p2p_comm": False, "batch_p2p_comm": True},
    )


def send_and_deallocate() -> bool:
    """Rank 0 frees an output as the schedule does, before rank 1 has begun to receive it."""
    with groups.process_groups(Layout(pp=2)):
        config = ModelParallelConfig(
            pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, batch_p2p_comm=False
        )
        stages = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
        shape = (256, 1, 256)
        expected = torch.arange(256.0 * 256).reshape(shape)
        if groups.rank() == 0:
            output = expected.clone()
            storage = StorageWeakRef(output.untyped_storage())
            _, handles = stages.send_forward_recv_forward(
                output, recv_prev=False, tensor_shape=shape, overlap_p2p_comm=True
            )
            deallocate_output_tensor(output, True)
            assert not storage.expired(), "the storage is freed and still to be sent"
            torch.distributed.barrier()
            for handle in handles.values():
                handle.wait()
            del handles, handle
            return storage.expired()  # and then it is freed
        torch.distributed.barrier()
        received, handles = stages.send_forward_recv_forward(
            None, recv_prev=True, tensor_shape=shape, overlap_p2p_comm=True
        )
        handles["recv_prev"].wait()
        return torch.equal(received, expected)


def outputs_in_flight(_):
    assert ranks.run_ranks(2, send_and_deallocate, timeout_s=30) == [True, True]


CHECKS = (
    # Those that fork come first, before this process has groups of its own.
    expert_gradients_with_etp,
    shards_of_different_sizes,
    rotary_key_gradient,
    two_interleaved_stages,
    outputs_in_flight,
    router_without_transformer_engine,
    mla_without_transformer_engine,
    query_without_latent,
    few_groups,
    gates_not_normalised,
    rotary_halves,
    norm_with_sequence_parallel,
    latent_head_sizes,
    marks_without_initialisation,
    splits_on_cpu,
    replay_with_router_fusion,
)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranks._context = multiprocessing.get_context("fork")  # without another import of everything
    for name, hf in (("qwen3_moe", CONFIG), ("deepseek", FAMILIES["deepseek"])):
        save_random(AutoModelForCausalLM.from_config(hf), folder / name)
    found = {}
    for check in CHECKS:
        try:
            check(folder)
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    print(json.dumps({"megatron": moe_utils.__file__, "checks": found}))


if __name__ == "__main__":
    main()
