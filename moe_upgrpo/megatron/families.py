"""The families of models that the trainer takes: what each of transformers' is in Megatron-Core.

A family is one description: its fields in Megatron-Core's config, the names of its weights, and
what of its config is not supported. docs/models.md says how to add one. Imports no Megatron.

Shapes: H hidden, D head dimension, G key/value heads, Q query heads per key/value head,
I intermediate size, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from moe_upgrpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Tensors = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """How Hugging Face tensors lie in one Megatron tensor and along which axis ranks share it.

    fuse: Hugging Face tensors -> one array with the shared axis at `axis` (None: not shared).
    split: its inverse. local_shape: what a rank's flat 2-d shard is viewed as before it is joined.
    """

    fuse: Callable[[Tensors, PretrainedConfig], torch.Tensor]
    split: Callable[[torch.Tensor, PretrainedConfig], Tensors]
    axis: int | None
    local_shape: Callable[[torch.Tensor, PretrainedConfig], tuple[int, ...]]

    def shard(self, tensors: Tensors, hf: PretrainedConfig, rank: int, size: int) -> torch.Tensor:
        full = self.fuse(tensors, hf)
        part = full if self.axis is None else full.chunk(size, dim=self.axis)[rank]
        return part.reshape(-1, part.shape[-1]) if part.dim() == 3 else part

    def join(self, shards: Tensors, hf: PretrainedConfig) -> Tensors:
        if self.axis is None:
            return self.split(shards[0], hf)
        parts = [shard.reshape(self.local_shape(shard, hf)) for shard in shards]
        return self.split(torch.cat(parts, dim=self.axis), hf)


def head_dim(hf: PretrainedConfig) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def _rows_q(hf: PretrainedConfig) -> int:
    return hf.num_attention_heads // hf.num_key_value_heads * head_dim(hf)


def _fuse_qkv(qkv: Tensors, hf: PretrainedConfig) -> torch.Tensor:
    """Query, key and value rows [Q·D | D | D] of each key/value head together: [G, (Q+2)·D, H]."""
    return torch.cat([t.reshape(hf.num_key_value_heads, -1, t.shape[-1]) for t in qkv], dim=1)


def _split_qkv(full: torch.Tensor, hf: PretrainedConfig) -> Tensors:
    parts = full.split([_rows_q(hf), head_dim(hf), head_dim(hf)], dim=1)
    return [part.reshape(-1, part.shape[-1]) for part in parts]


def _same_shape(shard: torch.Tensor, hf: PretrainedConfig) -> tuple[int, ...]:
    return tuple(shard.shape)


def _one(axis: int | None) -> Form:
    return Form(lambda tensors, hf: tensors[0], lambda full, hf: [full], axis, _same_shape)


WHOLE, ROWS, COLUMNS = _one(None), _one(0), _one(1)
QKV = Form(
    _fuse_qkv,
    _split_qkv,
    0,
    lambda shard, hf: (-1, _rows_q(hf) + 2 * head_dim(hf), shard.shape[-1]),
)
GATE_UP = Form(  # each rank holds its rows of the gate above its rows of the up projection
    lambda tensors, hf: torch.stack(tensors),  # [2, I, H]
    lambda full, hf: list(full),
    1,
    lambda shard, hf: (2, -1, shard.shape[-1]),
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of a table: a Megatron tensor, the Hugging Face tensors in it, and their form.

    {layer} counts the model's layers, {expert} the model's experts in `hugging_face` and the rank's
    own in `megatron`. A rule of mlp.linear_... is of the dense layers, every other rule of mlp.…
    of the MoE layers.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    form: Form

    @property
    def is_expert(self) -> bool:
        return "{expert}" in self.megatron

    def layers(self, count: int, moe: set[int]) -> list[int]:
        """The layers that have it, of `count` layers of which those in `moe` hold experts."""
        if "{layer}" not in self.megatron:
            return [0]
        if ".mlp.linear_" in self.megatron:
            return sorted(set(range(count)) - moe)
        return sorted(moe) if ".mlp." in self.megatron else list(range(count))


def _in_layer(here: str, there: str, rows: dict[str, tuple[str | tuple[str, ...], Form]]):
    """Rules for weights of each layer: Megatron's name below `here`, the others' below `there`."""
    return tuple(
        Rule(
            f"decoder.layers.{{layer}}.{here}{name}.weight",
            tuple(
                f"model.layers.{{layer}}.{there}{n}.weight"
                for n in ([names] if isinstance(names, str) else names)
            ),
            form,
        )
        for name, (names, form) in rows.items()
    )


def _mlp(here: str, there: str, gate="gate_proj", up="up_proj", down="down_proj"):
    return _in_layer(
        here, there, {"linear_fc1": ((gate, up), GATE_UP), "linear_fc2": (down, COLUMNS)}
    )


_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
    Rule("output_layer.weight", ("lm_head.weight",), ROWS),
)
_NORMS = _in_layer(
    "",
    "",
    {
        "input_layernorm": ("input_layernorm", WHOLE),
        "pre_mlp_layernorm": ("post_attention_layernorm", WHOLE),
    },
)
_GROUPED_QUERY_ATTENTION = _in_layer(
    "self_attention.",
    "self_attn.",
    {"linear_qkv": (("q_proj", "k_proj", "v_proj"), QKV), "linear_proj": ("o_proj", COLUMNS)},
)
_QK_NORM = _in_layer(
    "self_attention.",
    "self_attn.",
    {"q_layernorm": ("q_norm", WHOLE), "k_layernorm": ("k_norm", WHOLE)},
)
_LATENT_ATTENTION = _in_layer(
    "self_attention.",
    "self_attn.",
    {
        "linear_kv_down_proj": ("kv_a_proj_with_mqa", WHOLE),
        "kv_layernorm": ("kv_a_layernorm", WHOLE),
        "linear_kv_up_proj": ("kv_b_proj", ROWS),
        "linear_proj": ("o_proj", COLUMNS),
    },
)
_WHOLE_QUERY = _in_layer("self_attention.", "self_attn.", {"linear_q_proj": ("q_proj", ROWS)})
_LATENT_QUERY = _in_layer(
    "self_attention.",
    "self_attn.",
    {
        "linear_q_down_proj": ("q_a_proj", WHOLE),
        "q_layernorm": ("q_a_layernorm", WHOLE),
        "linear_q_up_proj": ("q_b_proj", ROWS),
    },
)
_DENSE_MLP = _mlp("mlp.", "mlp.")
_ROUTER = _in_layer("mlp.", "mlp.", {"router": ("gate", WHOLE)})
_EXPERTS = _mlp("mlp.experts.local_experts.{expert}.", "mlp.experts.{expert}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What a family asks of a field of its config."""

    field: str
    value: Any
    supported: str
    ok: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One architecture of transformers.

    rules: where its weights go. settings: fields of Megatron's TransformerConfig beside those that
    all families share (MLATransformerConfig's where multi_latent_attention is among them).
    tp_sizes: fields that tensor parallelism divides. experts, expert_size: the fields with the
    number of experts and their intermediate size. moe_layers: the layers that hold experts.
    limits: what of the config is supported.
    """

    rules: Callable[[PretrainedConfig], tuple[Rule, ...]]
    settings: Callable[[PretrainedConfig], dict[str, Any]]
    tp_sizes: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "vocab_size")
    experts: str | None = None
    expert_size: str = "moe_intermediate_size"
    moe_layers: Callable[[PretrainedConfig], list[int]] = lambda hf: []
    rope_types: tuple[str, ...] = ("default",)
    limits: Callable[[PretrainedConfig], list[Limit]] = lambda hf: []


def _grouped_query_attention(hf: PretrainedConfig, *, qk_norm: bool) -> dict[str, Any]:
    return dict(
        num_query_groups=hf.num_key_value_heads, kv_channels=head_dim(hf), qk_layernorm=qk_norm
    )


def _qwen3(hf: PretrainedConfig) -> dict[str, Any]:
    return _grouped_query_attention(hf, qk_norm=True)


def _qwen3_moe(hf: PretrainedConfig) -> dict[str, Any]:
    # With norm_topk_prob the softmax is over the chosen experts, else over all of them.
    return _qwen3(hf) | dict(moe_router_pre_softmax=not hf.norm_topk_prob)


def _qwen3_moe_layers(hf: PretrainedConfig) -> list[int]:
    """As in transformers, modeling_qwen3_moe.py:308."""
    return [
        layer
        for layer in range(hf.num_hidden_layers if hf.num_experts else 0)
        if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
    ]


def _mixtral(hf: PretrainedConfig) -> dict[str, Any]:
    return _grouped_query_attention(hf, qk_norm=False)


def _deepseek_v3(hf: PretrainedConfig) -> dict[str, Any]:
    rope = hf.rope_parameters
    settings = dict(
        multi_latent_attention=True,
        qk_layernorm=True,  # of the latents
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_head_dim=hf.qk_nope_head_dim,
        qk_pos_emb_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        kv_channels=hf.v_head_dim,  # what DotProductAttention takes the width of its output from
        rope_type="rope",
        rotary_base=rope["rope_theta"],
        moe_shared_expert_intermediate_size=hf.n_shared_experts * hf.moe_intermediate_size,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=hf.routed_scaling_factor,
        # The bias is added for the choice only. It stays as the checkpoint has it: nothing in RL
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


def _deepseek_v3_limits(hf: PretrainedConfig) -> list[Limit]:
    rope, top_k, shared = hf.rope_parameters, hf.num_experts_per_tok, hf.n_shared_experts
    dense, layers = hf.first_k_dense_replace, hf.num_hidden_layers
    fixed = {
        "rope_interleave": True,
        # Of the published config.json files; transformers reads none of them.
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


def _deepseek_v3_rules(hf: PretrainedConfig) -> tuple[Rule, ...]:
    return (
        *_ENDS,
        *_NORMS,
        *(_WHOLE_QUERY if hf.q_lora_rank is None else _LATENT_QUERY),
        *_LATENT_ATTENTION,
        *_ROUTER,
        Rule(
            "decoder.layers.{layer}.mlp.router.expert_bias",
            ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            WHOLE,
        ),
        *_EXPERTS,
        *_mlp("mlp.shared_experts.", "mlp.shared_experts."),
        *_DENSE_MLP,
    )


_QWEN3 = (*_ENDS, *_NORMS, *_GROUPED_QUERY_ATTENTION, *_QK_NORM, *_DENSE_MLP)
_MIXTRAL = (
    *_ENDS,
    *_NORMS,
    *_GROUPED_QUERY_ATTENTION,
    *_in_layer("mlp.", "block_sparse_moe.", {"router": ("gate", WHOLE)}),
    *_mlp(
        "mlp.experts.local_experts.{expert}.",
        "block_sparse_moe.experts.{expert}.",
        *("w1", "w3", "w2"),
    ),
)

FAMILIES: dict[str, Family] = {
    "qwen3": Family(rules=lambda hf: _QWEN3, settings=_qwen3),
    "qwen3_moe": Family(
        rules=lambda hf: (*_QWEN3, *_ROUTER, *_EXPERTS),
        settings=_qwen3_moe,
        experts="num_experts",
        moe_layers=_qwen3_moe_layers,
    ),
    "mixtral": Family(
        rules=lambda hf: _MIXTRAL,
        settings=_mixtral,
        experts="num_local_experts",
        expert_size="intermediate_size",
        moe_layers=lambda hf: list(range(hf.num_hidden_layers)),
    ),
    "deepseek_v3": Family(
        rules=_deepseek_v3_rules,
        settings=_deepseek_v3,
        tp_sizes=("num_attention_heads", "vocab_size", "moe_intermediate_size"),
        experts="n_routed_experts",
        moe_layers=lambda hf: list(range(hf.first_k_dense_replace, hf.num_hidden_layers)),
        rope_types=("default", "yarn"),
        limits=_deepseek_v3_limits,
    ),
}


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
    """The Hugging Face config of a checkpoint folder, refused by name where it is not supported."""
    model_dir = Path(model_dir)
    try:
        model_type = json.loads((model_dir / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{model_dir} holds no config.json, or none that can be read: a Hugging Face "
            "checkpoint folder is expected (config.json, *.safetensors, tokenizer files)."
        ) from None
    if model_type not in FAMILIES:
        raise UserError(
            f"{model_dir} is a {model_type!r} model; the trainer supports model_type "
            f"{', '.join(FAMILIES)}."
        )
    from transformers import AutoConfig  # seconds, which the command line has no need of

    hf = AutoConfig.from_pretrained(model_dir)
    for limit in (*_common_limits(hf), *family(hf).limits(hf)):
        if not limit.ok:
            raise UserError(
                f"{model_dir}: {limit.field}={limit.value} is not supported for {model_type} "
                f"models; supported: {limit.supported}."
            )
    extra = sorted(n for n in tensor_names(model_dir) if _layer(n) >= hf.num_hidden_layers)
    if extra:
        raise UserError(
            f"{model_dir} holds {len(extra)} tensors of layers behind its num_hidden_layers="
            f"{hf.num_hidden_layers}, for example {extra[0]}: multi-token prediction layers are "
            "not supported. Loaded and saved by transformers, the checkpoint is without them."
        )
    return hf


def _common_limits(hf: PretrainedConfig) -> list[Limit]:
    def limit(field: str, value: Any, supported: str, ok: bool) -> Limit:
        return Limit(field=field, value=value, supported=supported, ok=ok)

    def optional(field: str, supported: str) -> Limit:
        value = getattr(hf, field, None)
        return limit(field, value, supported, not value)

    rope, rope_types = hf.rope_parameters, family(hf).rope_types
    layer_types = sorted(set(getattr(hf, "layer_types", None) or ["full_attention"]))
    window = getattr(hf, "use_sliding_window", True) and getattr(hf, "sliding_window", None)
    partial = rope.get("partial_rotary_factor", 1.0)
    return [
        optional("attention_bias", "False"),
        optional("mlp_bias", "False"),
        optional("quantization_config", "weights in bfloat16 or float32, without this field"),
        limit("sliding_window", window, "None", not window),
        limit("layer_types", layer_types, "full_attention", layer_types == ["full_attention"]),
        limit("hidden_act", hf.hidden_act, "silu", hf.hidden_act == "silu"),
        limit(
            "rope_type", rope["rope_type"], " or ".join(rope_types), rope["rope_type"] in rope_types
        ),
        limit("partial_rotary_factor", partial, "1.0", partial == 1),
    ]


def _layer(tensor: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(found[1]) if found else -1


def tensor_names(model_dir: Path) -> set[str]:
    """The names of a checkpoint folder's tensors, from the files' headers; no files, no names."""
    names = set()
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names |= set(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or not a safetensors file: {error}") from None
    return names
