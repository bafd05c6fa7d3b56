# SPDX-License-Identifier: Apache-2.0
"""The families of models that the trainer takes: each one's counterpart in Megatron-Core.

A family is one description: its fields in Megatron-Core's config, the names of its weights (put
together from `moe_upgrpo.megatron.rules`), and the limits of its config. docs/models.md says how to
add one. Imports no Megatron.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_upgrpo.errors import UserError, nearest
from moe_upgrpo.hugging_face.config import is_tied, read_config, read_raw_config
from moe_upgrpo.hugging_face.folder import HEAD, Weights, has_weights
from moe_upgrpo.megatron import rules
from moe_upgrpo.megatron.deepseek import DEEPSEEK_V3
from moe_upgrpo.megatron.description import ALWAYS_1, HEADS_AND_VOCABULARY, Family, Limit
from moe_upgrpo.megatron.rules import Rule, head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = ("F32", "F16", "BF16")  # of a checkpoint's tensors, as safetensors has them


def _grouped_query_attention(hf: PretrainedConfig, *, qk_norm: bool) -> dict[str, Any]:
    return dict(
        num_query_groups=hf.num_key_value_heads, kv_channels=head_dim(hf), qk_layernorm=qk_norm
    )


def _qwen3(hf: PretrainedConfig) -> dict[str, Any]:
    return _grouped_query_attention(hf, qk_norm=True)


def _qwen3_moe(hf: PretrainedConfig) -> dict[str, Any]:
    return _qwen3(hf) | _softmax_gates(hf)


def _softmax_gates(hf: PretrainedConfig) -> dict[str, Any]:
    # With norm_topk_prob the softmax is over the chosen experts, else over all of them.
    return dict(moe_router_pre_softmax=not hf.norm_topk_prob)


def _qwen_moe_layers(hf: PretrainedConfig) -> list[int]:
    """As in transformers, modeling_qwen3_moe.py:308 and modeling_qwen2_moe.py:370."""
    return [
        layer
        for layer in range(hf.num_hidden_layers if hf.num_experts else 0)
        if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
    ]


def _softmax_gates_limits(hf: PretrainedConfig) -> list[Limit]:
    return [
        Limit(
            field="norm_topk_prob",
            value=hf.norm_topk_prob,
            supported=f"False with num_experts_per_tok=1: {ALWAYS_1}",
            ok=hf.num_experts_per_tok > 1 or not hf.norm_topk_prob,
        )
    ]


def _qwen2_moe(hf: PretrainedConfig) -> dict[str, Any]:
    return (
        _grouped_query_attention(hf, qk_norm=False)
        | _softmax_gates(hf)
        | dict(
            add_qkv_bias=hf.qkv_bias,
            moe_shared_expert_intermediate_size=hf.shared_expert_intermediate_size,
            moe_shared_expert_gate=True,
        )
    )


def _qwen2_moe_rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    return (
        *rules.ENDS,
        *rules.NORMS,
        *rules.GROUPED_QUERY_ATTENTION,
        *(rules.QKV_BIAS if hf.qkv_bias else ()),
        *rules.ROUTER,
        *rules.EXPERTS,
        *rules.mlp("mlp.shared_experts.", "mlp.shared_expert."),
        *rules.SHARED_EXPERT_GATE,
        *rules.DENSE_MLP,
    )


def _olmoe_limits(hf: PretrainedConfig) -> list[Limit]:
    clip = Limit(field="clip_qkv", value=hf.clip_qkv, supported="None", ok=hf.clip_qkv is None)
    return [clip, *_softmax_gates_limits(hf)]


def _mixtral(hf: PretrainedConfig) -> dict[str, Any]:
    return _grouped_query_attention(hf, qk_norm=False)


def _mixtral_limits(hf: PretrainedConfig) -> list[Limit]:
    return [
        Limit(
            field="num_experts_per_tok",
            value=hf.num_experts_per_tok,
            supported=f"2 or more: Mixtral renormalises its gates, and {ALWAYS_1}",
            ok=hf.num_experts_per_tok > 1,
        )
    ]


_QWEN3 = (
    *rules.ENDS,
    *rules.NORMS,
    *rules.GROUPED_QUERY_ATTENTION,
    *rules.QK_NORM,
    *rules.DENSE_MLP,
)
_QWEN3_MOE = (*_QWEN3, *rules.ROUTER, *rules.EXPERTS)
_MIXTRAL = (
    *rules.ENDS,
    *rules.NORMS,
    *rules.GROUPED_QUERY_ATTENTION,
    *rules.in_layer("mlp.", "block_sparse_moe.", {"router": ("gate", rules.WHOLE)}),
    *rules.mlp(
        "mlp.experts.local_experts.{expert}.",
        "block_sparse_moe.experts.{expert}.",
        *("w1", "w3", "w2"),
    ),
)

FAMILIES: dict[str, Family] = {
    "qwen3": Family(rules=lambda hf: _QWEN3, settings=_qwen3),
    "qwen3_moe": Family(
        rules=lambda hf: _QWEN3_MOE,
        settings=_qwen3_moe,
        experts="num_experts",
        moe_layers=_qwen_moe_layers,
        limits=_softmax_gates_limits,
    ),
    "qwen2_moe": Family(
        rules=_qwen2_moe_rules,
        settings=_qwen2_moe,
        tp_sizes=(*HEADS_AND_VOCABULARY, "shared_expert_intermediate_size"),
        experts="num_experts",
        moe_layers=_qwen_moe_layers,
        limits=_softmax_gates_limits,
    ),
    "olmoe": Family(
        rules=lambda hf: _QWEN3_MOE,
        settings=_qwen3_moe,
        experts="num_experts",
        expert_size="intermediate_size",
        moe_layers=lambda hf: list(range(hf.num_hidden_layers)),
        limits=_olmoe_limits,
        norms_all_heads=True,
    ),
    "mixtral": Family(
        rules=lambda hf: _MIXTRAL,
        settings=_mixtral,
        experts="num_local_experts",
        expert_size="intermediate_size",
        moe_layers=lambda hf: list(range(hf.num_hidden_layers)),
        limits=_mixtral_limits,
    ),
    "deepseek_v3": DEEPSEEK_V3,
}


# Models that people ask for and the trainer does not take, and why.
NOT_TAKEN = {
    "qwen3_next": "three quarters of its layers are gated delta nets, which Megatron-Core 0.16 "
    "builds with fla's kernels alone (ssm/gated_delta_net.py:103), on a GPU: whether they compute "
    "what transformers does was not tested",
    "gpt_oss": "its attention has sinks, and windows in every second layer, and its experts have "
    "biases and a clamped activation: the layers that stand in for Transformer Engine's "
    "(megatron/attention.py, megatron/experts.py) have none of these",
}


def register_family(model_type: str, description: Family) -> None:
    """Register a family of models, by the `model_type` of its config.json.

    Raises UserError where it is already registered with another description.
    """
    if FAMILIES.get(model_type, description) is not description:
        raise UserError(
            f"register_family: {model_type!r} given; allowed: a model_type that is not described, "
            f"as are {', '.join(FAMILIES)}"
        )
    FAMILIES[model_type] = description


def family(hf: PretrainedConfig) -> Family:
    return FAMILIES[hf.model_type]


def moe_layers(hf: PretrainedConfig) -> list[int]:
    """The layers of the model that hold experts, counted from 0; none: a dense model."""
    return family(hf).moe_layers(hf)


def num_experts(hf: PretrainedConfig) -> int:
    """Routed experts in each MoE layer; 0 for a dense model."""
    return getattr(hf, family(hf).experts) if moe_layers(hf) else 0


def top_k(hf: PretrainedConfig) -> int:
    """Experts that a token is routed to in each MoE layer; 0 for a dense model."""
    return hf.num_experts_per_tok if moe_layers(hf) else 0


def read_model_config(model_dir: Path) -> PretrainedConfig:
    """The Hugging Face config of a checkpoint folder; raises UserError for unsupported fields.

    It also refuses weights other than those that the config describes; a folder may have none.
    """
    model_dir = Path(model_dir)
    model_type = read_raw_config(model_dir).get("model_type")
    if model_type in NOT_TAKEN and model_type not in FAMILIES:
        raise UserError(
            f"{model_dir} is a {model_type!r} model, which is not supported: "
            f"{NOT_TAKEN[model_type]}. The trainer supports model_type {', '.join(FAMILIES)}."
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"{model_dir} is a {model_type!r} model; the trainer supports model_type "
            f"{', '.join(FAMILIES)}{nearest(model_type, FAMILIES)}."
        )
    hf = read_config(model_dir)
    # One after the other: a field that is not a number would trip the later limits.
    for limits in (_counts, _common_limits, family(hf).limits):
        for limit in limits(hf):
            if not limit.ok:
                raise UserError(
                    f"{model_dir}: {limit.field}={limit.value} is not supported for {model_type} "
                    f"models; supported: {limit.supported}."
                )
    if has_weights(model_dir):
        with Weights(model_dir, tied=is_tied(hf)) as weights:
            check_weights(weights, hf)
    return hf


def tensor_names(hf: PretrainedConfig) -> set[str]:
    """The names of a model's tensors in a checkpoint."""
    moe, names = set(moe_layers(hf)), set()
    for rule in family(hf).rules(hf):
        if rule.megatron == "output_layer.weight" and is_tied(hf):
            continue
        for layer in rule.layers(hf.num_hidden_layers, moe):
            for expert in range(num_experts(hf) if rule.is_expert else 1):
                names |= {name.format(layer=layer, expert=expert) for name in rule.hugging_face}
    return names


def check_weights(weights: Weights, hf: PretrainedConfig) -> None:
    """Raise UserError unless the tensors have the names that follow from config.json.

    Their shapes are compared when they are loaded.
    """
    found, expected, folder = weights.names(), tensor_names(hf), weights.folder
    if behind := sorted(name for name in found if _layer(name) >= hf.num_hidden_layers):
        raise UserError(
            f"{folder} holds {len(behind)} tensors of layers behind its num_hidden_layers="
            f"{hf.num_hidden_layers}, for example {behind[0]}: multi-token prediction layers are "
            "not supported. Loaded and saved by transformers, the checkpoint is without them."
        )
    missing, extra = expected - found, found - expected
    if missing or extra:
        parts = [
            f"{len(names)} tensor(s) {what}, for example {min(names)}"
            for names, what in ((missing, "are missing"), (extra, "are not of this model"))
            if names
        ]
        tied = ", of which tie_word_embeddings says that it is no copy of the embedding"
        raise UserError(
            f"{folder} does not fit its config.json: {' and '.join(parts)}"
            f"{tied if missing == {HEAD} else ''}."
        )
    odd = sorted(name for name, dtype in weights.dtypes().items() if dtype not in DTYPES)
    if odd:
        raise UserError(
            f"{folder}: {odd[0]} is {weights.dtypes()[odd[0]]}; supported: weights in bfloat16, "
            "float16 or float32."
        )


_FROM_0 = ("num_experts", "first_k_dense_replace")  # 0: all layers are dense; none is


def _counts(hf: PretrainedConfig) -> list[Limit]:
    """Limits of fields that must be whole numbers; some are null in published config.json files."""
    of_family = family(hf)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"]
    names += [*of_family.tp_sizes, *of_family.counts]
    if of_family.experts:
        names += [of_family.experts, "num_experts_per_tok", of_family.expert_size]
    limits = []
    for name in dict.fromkeys(names):
        value, least = getattr(hf, name, None), int(name not in _FROM_0)
        limits.append(
            Limit(
                field=name,
                value=value,
                supported=f"a whole number of at least {least}",
                ok=isinstance(value, int) and value >= least,
            )
        )
    experts = getattr(hf, of_family.experts, None) if of_family.experts else None
    if experts and all(limit.ok for limit in limits):
        limits.append(
            Limit(
                field="num_experts_per_tok",
                value=hf.num_experts_per_tok,
                supported=f"1 to {of_family.experts}={experts}",
                ok=hf.num_experts_per_tok <= experts,
            )
        )
    return limits


def _common_limits(hf: PretrainedConfig) -> list[Limit]:
    def limit(field: str, value: Any, supported: str, ok: bool) -> Limit:
        return Limit(field=field, value=value, supported=supported, ok=ok)

    def optional(field: str, supported: str) -> Limit:
        value = getattr(hf, field, None)
        return limit(field, value, supported, not value)

    rope, rope_types = hf.rope_parameters, family(hf).rope_types
    layer_types = sorted(set(getattr(hf, "layer_types", None) or ["full_attention"]))
    window = getattr(hf, "use_sliding_window", True) and getattr(hf, "sliding_window", None)
    rope_type = rope.get("rope_type", "one for each type of layer")
    partial = rope.get("partial_rotary_factor", 1.0)
    return [
        optional("attention_bias", "False"),
        optional("mlp_bias", "False"),
        optional("quantization_config", "weights in bfloat16 or float32, without this field"),
        limit("sliding_window", window, "None", not window),
        limit("layer_types", layer_types, "full_attention", layer_types == ["full_attention"]),
        limit("hidden_act", hf.hidden_act, "silu", hf.hidden_act == "silu"),
        limit("rope_type", rope_type, " or ".join(rope_types), rope_type in rope_types),
        limit("partial_rotary_factor", partial, "1.0", partial == 1),
    ]


def _layer(tensor: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(found[1]) if found else -1
