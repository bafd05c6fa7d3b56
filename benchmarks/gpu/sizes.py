"""How large everything is: on a card, and on a CPU, where the same script takes seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    # For the whole model of the checks that compare values (fields of a Qwen3MoeConfig).
    model: dict[str, int]
    sequences: int
    prompt: int
    response: int
    # For one layer, in the checks of kernels, and for a model of two such layers.
    layer: dict[str, int]
    lengths: tuple[int, ...]  # of sequences
    adam_parameters: int
    route_tokens: int
    loss_shape: tuple[int, int]
    train_steps: int
    train_prompts: int
    repeats: int  # timed calls, after one that is not timed


CARD = Sizes(
    model=dict(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=64,
        num_experts_per_tok=8,
    ),
    sequences=8,
    prompt=32,
    response=224,
    # Of Qwen3-30B-A3B (examples/configs/models/qwen3-30b-a3b).
    layer=dict(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    lengths=(2048, 8192),
    adam_parameters=2**28,
    route_tokens=500_000,
    loss_shape=(512, 8192),
    train_steps=3,
    train_prompts=32,
    repeats=5,
)
TINY = Sizes(
    model=dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    sequences=4,
    prompt=4,
    response=12,
    layer=dict(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    lengths=(128,),
    adam_parameters=2**14,
    route_tokens=500,
    loss_shape=(16, 64),
    train_steps=1,
    train_prompts=4,
    repeats=1,
)
