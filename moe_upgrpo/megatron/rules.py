# SPDX-License-Identifier: Apache-2.0
"""Where each weight of a Hugging Face checkpoint lies in Megatron-Core's tensors, in parts.

A family of models puts its table together from these. Imports no Megatron.

Shapes: H hidden, D head dimension, G key/value heads, Q query heads per key/value head,
I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_upgrpo.lazy import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Tensors = list["torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Form:
    """Place of Hugging Face tensors in one Megatron tensor, and the axis that ranks share.

    fuse: Hugging Face tensors -> one array with the shared axis at `axis` (None: not shared).
    split: its inverse. local_shape: the shape as which a rank's flat 2-d shard is joined.
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
QKV_BIASES = Form(  # as QKV, one number a row
    lambda qkv, hf: _fuse_qkv([t[:, None] for t in qkv], hf).flatten(),
    lambda full, hf: [t[:, 0] for t in _split_qkv(full.view(hf.num_key_value_heads, -1, 1), hf)],
    0,
    _same_shape,
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
    own in `megatron`. A rule of mlp.linear_... is for dense layers, every other rule of mlp.… for
    MoE layers.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    form: Form

    @property
    def is_expert(self) -> bool:
        return "{expert}" in self.megatron

    def layers(self, count: int, moe: set[int]) -> list[int]:
        """The layers with this weight, of `count` layers of which those in `moe` hold experts."""
        if "{layer}" not in self.megatron:
            return [0]
        if ".mlp.linear_" in self.megatron:
            return sorted(set(range(count)) - moe)
        return sorted(moe) if ".mlp." in self.megatron else list(range(count))


def in_layer(here: str, there: str, rows: dict[str, tuple[str | tuple[str, ...], Form]]):
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


def mlp(here: str, there: str, gate="gate_proj", up="up_proj", down="down_proj"):
    return in_layer(
        here, there, {"linear_fc1": ((gate, up), GATE_UP), "linear_fc2": (down, COLUMNS)}
    )


ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
    Rule("output_layer.weight", ("lm_head.weight",), ROWS),
)
NORMS = in_layer(
    "",
    "",
    {
        "input_layernorm": ("input_layernorm", WHOLE),
        "pre_mlp_layernorm": ("post_attention_layernorm", WHOLE),
    },
)
GROUPED_QUERY_ATTENTION = in_layer(
    "self_attention.",
    "self_attn.",
    {"linear_qkv": (("q_proj", "k_proj", "v_proj"), QKV), "linear_proj": ("o_proj", COLUMNS)},
)
QKV_BIAS = (
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        tuple(f"model.layers.{{layer}}.self_attn.{name}_proj.bias" for name in "qkv"),
        QKV_BIASES,
    ),
)
QK_NORM = in_layer(
    "self_attention.",
    "self_attn.",
    {"q_layernorm": ("q_norm", WHOLE), "k_layernorm": ("k_norm", WHOLE)},
)
LATENT_ATTENTION = in_layer(
    "self_attention.",
    "self_attn.",
    {
        "linear_kv_down_proj": ("kv_a_proj_with_mqa", WHOLE),
        "kv_layernorm": ("kv_a_layernorm", WHOLE),
        "linear_kv_up_proj": ("kv_b_proj", ROWS),
        "linear_proj": ("o_proj", COLUMNS),
    },
)
WHOLE_QUERY = in_layer("self_attention.", "self_attn.", {"linear_q_proj": ("q_proj", ROWS)})
LATENT_QUERY = in_layer(
    "self_attention.",
    "self_attn.",
    {
        "linear_q_down_proj": ("q_a_proj", WHOLE),
        "q_layernorm": ("q_a_layernorm", WHOLE),
        "linear_q_up_proj": ("q_b_proj", ROWS),
    },
)
DENSE_MLP = mlp("mlp.", "mlp.")
ROUTER = in_layer("mlp.", "mlp.", {"router": ("gate", WHOLE)})
EXPERTS = mlp("mlp.experts.local_experts.{expert}.", "mlp.experts.{expert}.")
SHARED_EXPERT_GATE = (
    Rule(
        "decoder.layers.{layer}.mlp.shared_experts.gate_weight",
        ("model.layers.{layer}.mlp.shared_expert_gate.weight",),
        WHOLE,
    ),
)
