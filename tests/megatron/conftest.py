import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_upgrpo.megatron.layout import Layout
from tests.megatron import whole_work
from tests.megatron.measured import LAYOUTS, measure
from tests.ranks import run_ranks

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_position_embeddings=128,
    initializer_range=0.2,
    eos_token_id=1,
    pad_token_id=0,
)


WITHOUT_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
LATENT = WITHOUT_HEAD_DIM | dict(
    num_key_value_heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,  # 20 are queries and keys
    moe_intermediate_size=32,
    num_experts_per_tok=4,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4,
    beta_slow=1,
    mscale=0.7,
    mscale_all_dim=0.9,
)
FAMILIES = {
    "deepseek": DeepseekV3Config(
        **LATENT,
        q_lora_rank=16,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        rope_parameters=YARN,
    ),
    # As Moonlight: queries without a latent, no groups, another epsilon, no scaling of positions.
    "moonlight": DeepseekV3Config(
        **(LATENT | dict(num_hidden_layers=2, v_head_dim=24)),
        q_lora_rank=None,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        rms_norm_eps=1e-2,
    ),
    "mixtral": MixtralConfig(**(SIZES | dict(num_hidden_layers=2)), num_local_experts=8),
    "qwen2": Qwen2MoeConfig(
        **(WITHOUT_HEAD_DIM | dict(num_hidden_layers=3)),
        mlp_only_layers=[1],
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    ),
    "olmoe": OlmoeConfig(
        **(WITHOUT_HEAD_DIM | dict(num_hidden_layers=2)), num_experts=8, num_experts_per_tok=2
    ),
}


def save_random(model, path):
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is skipped or swapped
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith(".bias"):  # as zeros would a bias
            torch.nn.init.normal_(weight, std=0.2)
    for name, bias in model.named_buffers():
        if "e_score_correction_bias" in name:
            torch.nn.init.normal_(bias, std=0.2)
    model.save_pretrained(path)
    return path


def save_checkpoints(folder):
    """Those that measured.py describes but `tiny`, by name."""
    torch.manual_seed(1)
    mixed = Qwen3MoeConfig(
        **SIZES,
        mlp_only_layers=[1],
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=False,
        tie_word_embeddings=False,
    )
    dense = Qwen3Config(**SIZES, tie_word_embeddings=True)
    return {
        "mixed": save_random(Qwen3MoeForCausalLM(mixed), folder / "mixed"),
        "dense": save_random(Qwen3ForCausalLM(dense), folder / "dense"),
    } | {
        name: save_random(AutoModelForCausalLM.from_config(config), folder / name)
        for name, config in FAMILIES.items()
    }


@pytest.fixture(scope="session")
def checkpoints(tiny_checkpoint, tmp_path_factory):
    """The checkpoints that measured.py describes, by name."""
    return {"tiny": tiny_checkpoint} | save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def measured(checkpoints):
    """Name of a checkpoint, or of a layout -> what its job measured, one entry for each rank."""
    done = {}

    def of(name: str, dtype: str = "float32") -> list[dict]:
        if (name, dtype) not in done:
            checkpoint, world_size, layout = LAYOUTS.get(name, (name, 1, Layout()))
            done[name, dtype] = run_ranks(
                world_size, measure, layout, checkpoints[checkpoint], dtype
            )
        return done[name, dtype]

    return of


@pytest.fixture(scope="session")
def fixed(checkpoints):
    """The whole work by the checkpoint: one process, padded micro-batches of 3 in their order."""
    made = {}

    def of(name: str) -> dict:
        if name not in made:
            made[name] = whole_work.measure(Layout(), checkpoints[name], micro_batch_size=3)
        return made[name]

    return of
