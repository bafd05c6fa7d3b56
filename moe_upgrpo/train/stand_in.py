# SPDX-License-Identifier: Apache-2.0
"""A tiny model with another model's architecture, to try its config on a CPU."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.train.warm_start import tiny_model_config

KV_HEADS = 2  # so that tp=2 divides them
HEAD_DIM = 16
FAMILIES = ("qwen3", "qwen3_moe")


def stand_in_config(
    like: Path, *, layers: int, hidden: int, expert_intermediate: int
) -> PretrainedConfig:
    """The config of the model folder `like` (its config.json alone is read), made small.

    Kept: the family, experts and top-k, query heads per key/value head, which layers are dense,
    tied embeddings, the normalisation of gates. Small: layers, hidden sizes, two key/value heads of
    16, the arithmetic vocabulary. Raises UserError for a folder without config.json or a family
    that is not Qwen3's.
    """
    hf = read_model_config(like)
    if hf.model_type not in FAMILIES:
        raise UserError(
            f"tiny.like={like}: a {hf.model_type!r} model; {' and '.join(FAMILIES)} have tiny "
            "stand-ins."
        )
    experts = getattr(hf, "num_experts", 0)
    small = tiny_model_config(
        layers=layers,
        hidden=hidden,
        heads=hf.num_attention_heads // hf.num_key_value_heads * KV_HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        experts=experts,
        top_k=hf.num_experts_per_tok if experts else 1,
        expert_intermediate=expert_intermediate if experts else 2 * hidden,
    )
    small.tie_word_embeddings = hf.tie_word_embeddings
    small.rms_norm_eps = hf.rms_norm_eps
    if experts:
        small.norm_topk_prob = hf.norm_topk_prob
        small.decoder_sparse_step = hf.decoder_sparse_step
        small.mlp_only_layers = [layer for layer in hf.mlp_only_layers if layer < layers]
    return small
