"""The plan's arithmetic against real models: their parameters, and what autograd keeps of them.

Not covered: a GPU, whose allocator and kernels need more; NCCL.
"""

import json
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import LossTerms, PolicyLossConfig
from moe_upgrpo.megatron import elementwise, groups, memory, plan, tap
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import MicroBatch
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.megatron.live import Live
from tests.ranks import run_ranks

BONUS = LossTerms(entropy_coef=0.01)
LOSS = PolicyLossConfig.preset("up-grpo")
SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    eos_token_id=1,
    tie_word_embeddings=False,
)
MOE = dict(
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True,
    mlp_only_layers=[1],
)  # fmt: skip
BATCH = MicroBatch(sequences=4, length=32)
WITHOUT_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
OTHERS = {
    "qwen2": Qwen2MoeConfig(**WITHOUT_HEAD_DIM | MOE, shared_expert_intermediate_size=128),
    "olmoe": OlmoeConfig(
        **WITHOUT_HEAD_DIM | dict(num_experts=8, num_experts_per_tok=2, intermediate_size=96)
    ),
}


def config(**changes) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**SIZES | MOE | changes)


def checkpoint(hf, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf).save_pretrained(folder)
    return folder


def samples(batch: MicroBatch = BATCH) -> list[Sample]:
    rng = np.random.default_rng(0)
    response = batch.length - 6
    return [
        Sample(
            tokens=rng.integers(2, 90, size=batch.length),
            prompt_length=6,
            rollout_log_probs=np.full(response, -1, np.float32),
            advantage=1.0,
        )
        for _ in range(batch.sequences)
    ]


@dataclass
class Kept:
    """Bytes of the different tensors, parameters aside, that autograd keeps."""

    def __post_init__(self):
        self.tensors = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # and stays alive
        return tensor


def as_on_a_gpu():
    """Torch's own norm, rotation and gate in fp32 too: the plan is of machines with GPUs."""
    return mock.patch.object(elementwise, "takes", lambda *_: False)


def kept_bytes(folder, layout: Layout, dtype: str, **options) -> int:
    """On a rank: bytes that autograd keeps in an update of one micro-batch."""
    with groups.process_groups(layout), as_on_a_gpu():
        actor = MegatronActor(
            folder,
            layout,
            dtype=dtype,
            optimizer=OptimizerSettings(),
            micro_batch_size=4,
            **options,
        )
        held = {p.untyped_storage().data_ptr() for c in actor.chunks for p in c.parameters()}
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            actor.update(samples(), LOSS)
    return sum(t.untyped_storage().nbytes() for p, t in kept.tensors.items() if p not in held)


def expected_kept(hf, layout: Layout, dtype: str, batch: MicroBatch = BATCH) -> float:
    stage = plan.stages(hf, layout, layout.tp * layout.cp * layout.pp)[0]
    model = memory.Sizes.of(hf)
    sizes = memory.activations(model, layout, stage, batch, dtype=dtype)
    c = memory.DTYPE_BYTES[dtype]
    head = (8 * hf.hidden_size + 4) / layout.tp + hf.hidden_size * c
    return sum(sizes.values()) + batch.tokens * head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_autograd_keeps(dtype, tmp_path):
    hf = config()
    measured = kept_bytes(checkpoint(hf, tmp_path), Layout(), dtype)
    assert measured == pytest.approx(expected_kept(hf, Layout(), dtype), rel=0.005)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", OTHERS)
def test_what_autograd_keeps_in_other_families(family, dtype, tmp_path):
    """QKV biases and a shared expert with its gate; norms over all heads."""
    hf = OTHERS[family]
    measured = kept_bytes(checkpoint(hf, tmp_path), Layout(), dtype)
    # Megatron-Core 0.19 keeps 3 KB a layer more of these small models, where tokens go: .7%.
    assert measured == pytest.approx(expected_kept(hf, Layout(), dtype), rel=0.01)
    (stage,) = plan.stages(hf, Layout(), 1)
    assert stage.parameters == memory.model_parameters(memory.Sizes.of(hf))


def test_what_autograd_keeps_of_a_shard(tmp_path):
    hf, layout = config(), Layout(tp=2, ep=2)
    ranks = run_ranks(2, kept_bytes, checkpoint(hf, tmp_path), layout, "bfloat16")
    # The ranks' experts get different numbers of tokens; on average what an even router gives them.
    assert sum(ranks) / 2 == pytest.approx(expected_kept(hf, layout, "bfloat16"), rel=0.005)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_autograd_keeps_of_a_part_of_the_sequences(dtype, tmp_path):
    """On two context-parallel ranks; the keys and values are those of both."""
    hf, layout = config(), Layout(cp=2)
    ranks = run_ranks(2, kept_bytes, checkpoint(hf, tmp_path), layout, dtype)
    part = MicroBatch(sequences=BATCH.sequences, length=BATCH.length // 2)
    assert sum(ranks) / 2 == pytest.approx(expected_kept(hf, layout, dtype, part), rel=0.005)


def tensors_of(actor: MegatronActor) -> dict[str, list[torch.Tensor]]:
    (chunk,) = actor.chunks
    state = [t for o in actor.optimizer.chained_optimizers for s in o.optimizer.state.values()
             for t in s.values() if torch.is_tensor(t) and t.dim()]  # fmt: skip
    own = [p for o in actor.optimizer.chained_optimizers for g in o.optimizer.param_groups
           for p in g["params"]]  # fmt: skip
    return {
        "parameters": list(chunk.parameters()),
        "gradients": [p.main_grad for p in chunk.parameters()],
        "optimizer": state + own,
    }


def storages(tensors) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def peaks(folder, dtype: str, recompute: str, batch: MicroBatch) -> tuple[dict, dict, int]:
    """Bytes held, and the most bytes beside them: in an update, one that records, and a score."""
    with groups.process_groups(Layout()), as_on_a_gpu():
        actor = MegatronActor(
            folder, Layout(), dtype=dtype, optimizer=OptimizerSettings(), recompute=recompute
        )
        given = samples(batch)
        actor.update(given, LOSS)  # the optimizer's state is made
        held, found = {}, {}
        for name, tensors in tensors_of(actor).items():
            new = {k: size for k, size in storages(tensors).items() if k not in found}
            held[name] = sum(new.values())
            found |= new
        peak = {}
        for purpose, call in (
            ("update", lambda: actor.update(given, LOSS)),
            ("recorded update", lambda: actor.update(given, LOSS, record=("routes", "margins"))),
            ("update with entropy", lambda: actor.update(given, LOSS, terms=BONUS)),
            ("score", lambda: actor.score(given)),
        ):
            with Live(set(found)) as live:
                call()
            peak[purpose] = live.peak
        return held, peak, actor.parameter_count()


CASES = {
    "activations": (config(), "bfloat16", "none", MicroBatch(sequences=4, length=64)),
    "fp32": (config(), "float32", "none", MicroBatch(sequences=4, length=64)),
    "head": (config(vocab_size=4096), "bfloat16", "none", MicroBatch(sequences=4, length=64)),
    "recomputed": (config(), "bfloat16", "full", MicroBatch(sequences=2, length=512)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_most_that_an_update_holds(case, tmp_path):
    """Measured on a CPU: tensors' bytes, without what an allocator loses between them."""
    hf, dtype, recompute, batch = CASES[case]
    hf.max_position_embeddings = 512
    held, peak, parameters = peaks(checkpoint(hf, tmp_path), dtype, recompute, batch)
    model, (stage,) = memory.Sizes.of(hf), plan.stages(hf, Layout(), 1)
    assert stage.parameters == parameters == memory.model_parameters(model)
    expected = memory.weights(stage, Layout(), 1, dtype=dtype)
    assert expected["optimizer"] == parameters * (12 if dtype == "bfloat16" else 8)
    for name, size in expected.items():
        assert held[name] == pytest.approx(size, rel=0.02), name
    layers = memory.activations(model, Layout(), stage, batch, dtype=dtype, recompute=recompute)
    for purpose, measured in peak.items():
        kept = sum(layers.values()) if purpose != "score" else 0
        head = memory.head(model, Layout(), batch, dtype=dtype, purpose=purpose)
        space = memory.working_space(model, Layout(), batch, dtype=dtype)
        assert measured == pytest.approx(kept + max(head, space), rel=0.15), purpose


@pytest.mark.parametrize(
    ("hf", "layout", "world_size"),
    [
        (config(num_hidden_layers=4), Layout(tp=2, ep=2, pp=2), 8),
        (config(tie_word_embeddings=True), Layout(tp=2), 4),
        (config(), Layout(tp=1, ep=4, pp=2, vpp=2), 8),
        (config(), Layout(tp=2, ep=2, etp=2, dispatcher="allgather"), 8),
        (Qwen3Config(**SIZES), Layout(tp=2, pp=2), 4),
    ],
    ids=str,
)
def test_the_ranks_shares_add_up_to_the_model(hf, layout, world_size):
    """And the ranks of a pipeline stage hold as much as the one of them that `stages` builds."""
    ranks = [plan.rank_share(hf, layout, world_size, rank) for rank in range(world_size)]
    of_stage = plan.stages(hf, layout, world_size)
    assert ranks == [of_stage[rank.index] for rank in ranks]
    assert {rank.index for rank in ranks} == set(range(layout.pp))
    # Norms and routers lie whole on every tensor-parallel rank.
    h, moe = hf.hidden_size, getattr(hf, "num_experts", 0)
    copied = 4 * 2 * (h + 32) + h + (3 * moe * h if moe else 0)
    tied_again = hf.tie_word_embeddings * (layout.pp > 1) * hf.vocab_size * h
    model = memory.Sizes.of(hf)
    shared = sum(stage.shared for stage in of_stage) * layout.tp - copied * (layout.tp - 1)
    experts = sum(stage.expert for stage in of_stage) * layout.ep * layout.expert_tp
    assert shared + experts - tied_again == memory.model_parameters(model)
    total = AutoModelForCausalLM.from_config(hf).num_parameters()
    assert memory.model_parameters(model) == total
    assert sum(stage.layers for stage in of_stage) == 4
    assert sum(stage.moe_layers for stage in of_stage) == (3 if moe else 0)


def test_a_distributed_optimizer_keeps_a_share():
    """TP2·EP4 on 8 ranks: 4 copies of what is shared, 2 of each expert."""
    layout = Layout(tp=2, ep=4)
    stage = memory.Stage(
        index=0, shared=800, expert=600, layers=1, moe_layers=1, first=True, last=True
    )
    sizes = memory.weights(stage, layout, 8, dtype="bfloat16")
    assert sizes == {"parameters": 2800, "gradients": 5600, "optimizer": 12 * (200 + 300)}
    sizes = memory.weights(stage, layout, 8, dtype="float32", algorithm="sgd")
    assert sizes == {"parameters": 5600, "gradients": 5600, "optimizer": 0}


def test_what_a_rank_sends():
    """Hand-worked: TP2·EP4 on 8 ranks, one MoE layer, 100 tokens of hidden size 64, top-2, bf16."""
    layout = Layout(tp=2, ep=4)
    stage = memory.Stage(
        index=0, shared=800, expert=600, layers=1, moe_layers=1, first=True, last=True
    )
    sent = memory.communication(
        memory.Sizes.of(config()), layout, stage, 8, tokens=100, dtype="bfloat16",
        forwards=2, backwards=1, optimizer_steps=4,
    )  # fmt: skip
    hidden = 100 * 64 * 2
    assert sent == {
        # A gather and a reduction of half; embedding and head, three times each.
        "tensor-parallel": ((2 + 1.5) * 2 + 3 * 2) * hidden / 2,
        # 3 of 4 tokens leave, with their gates.
        "expert-parallel": 3 * (2 * hidden + 100 * 4) / 2 * 2 * 3 / 4,
        # Gradients of 4 bytes, weights of 2 gathered for each of two optimizers.
        "data-parallel": 4 * 8 * (800 * 3 / 4 + 600 / 2),
        "engine": 2 * (800 + 600 * 3),
    }


@pytest.mark.parametrize("experts", [256, 257])
def test_what_a_rank_hands_over_of_its_routers_is_counted(experts):
    """Two layers and sequences of six tokens on each of two tensor-parallel ranks."""
    traces = {}
    for layer in (1, 2):
        traces[layer] = tap._Trace(None, ("routes", "margins"))
        ids = torch.arange(12 * 3, dtype=torch.int16).view(12, 3)
        traces[layer].own_NK = traces[layer].used_NK = ids
        traces[layer].margins_N = torch.rand(12)
    ((_, _, arrays),) = tap.hand_over([tap.Visit(None, traces, 2)], tap.Run(slice(1)), experts)
    model = replace(memory.Sizes.of(config()), experts=experts, top_k=3)
    expected = memory.traces(model, Layout(tp=2), tokens=24, layers=2)
    assert sum(array.nbytes for array in arrays.values()) == expected


def test_latent_attention_is_refused_by_name():
    from transformers import DeepseekV3Config

    with pytest.raises(UserError, match=r"deepseek_v3.*grouped queries"):
        memory.Sizes.of(DeepseekV3Config())


PUBLISHED = {  # fields of config.json, parameters of a token in their names or papers
    "Qwen1.5-MoE-A2.7B": (
        dict(
            model_type="qwen2_moe", hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
            num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=8192,
            max_window_layers=21, sliding_window=32768, use_sliding_window=False,
            rope_theta=1000000.0, rms_norm_eps=1e-06, tie_word_embeddings=False, vocab_size=151936,
            decoder_sparse_step=1, moe_intermediate_size=1408, norm_topk_prob=False,
            shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4,
        ),
        2.7e9,
    ),
    "OLMoE-1B-7B-0924": (
        dict(
            model_type="olmoe", attention_bias=False, clip_qkv=None, hidden_size=2048,
            intermediate_size=1024, max_position_embeddings=4096, norm_topk_prob=False,
            num_attention_heads=16, num_experts=64, num_experts_per_tok=8, num_hidden_layers=16,
            num_key_value_heads=16, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
            tie_word_embeddings=False, vocab_size=50304,
        ),
        1.3e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_read_and_counted(name, tmp_path):
    fields, active = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    hf = read_model_config(tmp_path)
    with torch.device("meta"):
        total = AutoModelForCausalLM.from_config(hf).num_parameters()
    model = memory.Sizes.of(hf)
    assert memory.model_parameters(model) == total
    assert memory.active_parameters(model) == pytest.approx(active, rel=0.02)
