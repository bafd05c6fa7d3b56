# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 and Moonlight in Megatron-Core: latent attention, sigmoid routing; no Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_upgrpo.megatron import rules
from moe_upgrpo.megatron.description import Family, Limit
from moe_upgrpo.megatron.rules import Rule

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _settings(hf: PretrainedConfig) -> dict[str, Any]:
    rope = hf.rope_parameters
    settings = dict(
        multi_latent_attention=True,
        qk_layernorm=True,  # of the latents
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_head_dim=hf.qk_nope_head_dim,
        qk_pos_emb_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        kv_channels=hf.v_head_dim,  # DotProductAttention takes the width of its output from it
        rope_type="rope",
        rotary_base=rope["rope_theta"],
        moe_shared_expert_intermediate_size=hf.n_shared_experts * hf.moe_intermediate_size,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=hf.routed_scaling_factor,
        # The bias is added only to choose experts. It stays as in the checkpoint: nothing in RL
        # balances the experts.
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,
    )
    if rope["rope_type"] == "yarn":
        settings |= dict(
            rope_type="yarn",
            rotary_scaling_factor=rope["factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            mscale=rope["mscale"],
            mscale_all_dim=rope["mscale_all_dim"],
        )
    if _limits_groups(hf):
        settings |= dict(moe_router_num_groups=hf.n_group, moe_router_group_topk=hf.topk_group)
    return settings


def _limits_groups(hf: PretrainedConfig) -> bool:
    return hf.topk_group < hf.n_group


def _limits(hf: PretrainedConfig) -> list[Limit]:
    rope, top_k, shared = hf.rope_parameters, hf.num_experts_per_tok, hf.n_shared_experts
    dense, layers = hf.first_k_dense_replace, hf.num_hidden_layers
    fixed = {
        "rope_interleave": True,
        # Fields of the published config.json files; transformers reads none of them.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    limits = [
        Limit(field=f, value=getattr(hf, f, v), supported=str(v), ok=getattr(hf, f, v) == v)
        for f, v in fixed.items()
    ]
    limits += [
        Limit(field="n_shared_experts", value=shared, supported="1 or more", ok=bool(shared)),
        Limit(
            field="first_k_dense_replace",
            value=dense,
            supported=f"0 to num_hidden_layers - 1 = {layers - 1}",
            ok=0 <= dense < layers,
        ),
        Limit(
            field="norm_topk_prob",
            value=hf.norm_topk_prob,
            supported="True with num_experts_per_tok > 1, False with 1",
            ok=hf.norm_topk_prob == (top_k > 1),
        ),
        Limit(
            field="topk_group",
            value=hf.topk_group,
            # transformers adds the best two scores of a group to choose groups, Megatron-Core the
            # best top-k / topk_group (moe_utils.py:554).
            supported="half of num_experts_per_tok, or n_group",
            ok=not _limits_groups(hf) or top_k // hf.topk_group == 2,
        ),
    ]
    if rope["rope_type"] == "yarn":
        mscale = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
        limits.append(
            Limit(
                field="rope_parameters",
                value=mscale,
                supported="both given and above 0 with rope_type=yarn",
                ok=all(mscale.values()),
            )
        )
    return limits


def _rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    return (
        *rules.ENDS,
        *rules.NORMS,
        *(rules.WHOLE_QUERY if hf.q_lora_rank is None else rules.LATENT_QUERY),
        *rules.LATENT_ATTENTION,
        *rules.ROUTER,
        Rule(
            "decoder.layers.{layer}.mlp.router.expert_bias",
            ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            rules.WHOLE,
        ),
        *rules.EXPERTS,
        *rules.mlp("mlp.shared_experts.", "mlp.shared_experts."),
        *rules.DENSE_MLP,
    )


DEEPSEEK_V3 = Family(
    rules=_rules,
    settings=_settings,
    tp_sizes=("num_attention_heads", "vocab_size", "moe_intermediate_size"),
    experts="n_routed_experts",
    moe_layers=lambda hf: list(range(hf.first_k_dense_replace, hf.num_hidden_layers)),
    rope_types=("default", "yarn"),
    counts=(
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
    ),
    limits=_limits,
)
