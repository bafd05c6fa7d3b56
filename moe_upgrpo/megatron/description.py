# SPDX-License-Identifier: Apache-2.0
"""The description of a family of models, and demands on its config. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_upgrpo.megatron.rules import Rule

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADS_AND_VOCABULARY = ("num_attention_heads", "num_key_value_heads", "vocab_size")
# Megatron-Core refuses it too (transformer_config.py:1633).
ALWAYS_1 = "a gate that is divided by itself is 1, and no gradient reaches the router"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A demand that a family makes of a field of its config."""

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
    counts: further fields that must be whole numbers. limits: the supported values of fields.
    norms_all_heads: queries and keys are normed over all heads together, not over each.
    """

    rules: Callable[[PretrainedConfig], tuple[Rule, ...]]
    settings: Callable[[PretrainedConfig], dict[str, Any]]
    tp_sizes: tuple[str, ...] = HEADS_AND_VOCABULARY
    experts: str | None = None
    expert_size: str = "moe_intermediate_size"
    moe_layers: Callable[[PretrainedConfig], list[int]] = lambda hf: []
    rope_types: tuple[str, ...] = ("default",)
    counts: tuple[str, ...] = ()
    limits: Callable[[PretrainedConfig], list[Limit]] = lambda hf: []
    norms_all_heads: bool = False
