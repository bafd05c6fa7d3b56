# SPDX-License-Identifier: Apache-2.0
"""The options of the tiny model that is made where none is given, and of its warm start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """The Qwen3-MoE (dense Qwen3 with experts=0) that is made where no --model is given."""

    layers: int = 4
    """Transformer layers, each with experts."""
    hidden: int = 128
    """Width of the model, a multiple of 32."""
    experts: int = 8
    """Experts in each layer; 0: a dense model."""
    top_k: int = 2
    """Experts that each token uses."""
    expert_intermediate: int = 64
    """Width of an expert, a multiple of 32."""
    like: Path | None = None
    """Model folder, or one with its config.json: take that architecture, of that many experts."""

    def __post_init__(self):
        for name in ("hidden", "expert_intermediate"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise UserError(f"tiny.{name}={getattr(self, name)}: a multiple of 32 is needed.")
        if self.layers < 1:
            raise UserError(f"tiny.layers={self.layers}: at least 1 is needed.")
        if self.experts < 0:
            raise UserError(f"tiny.experts={self.experts}: 0 (a dense model) or more is needed.")
        if self.top_k < 1 or (self.experts and self.top_k > self.experts):
            raise UserError(f"tiny.top_k={self.top_k}: 1 to tiny.experts={self.experts}.")

    @property
    def dense(self) -> bool:
        """Whether it has no MoE layer."""
        if self.like is None:
            return self.experts == 0
        from moe_upgrpo.megatron.families import moe_layers  # reads the config with transformers

        return not moe_layers(self.hugging_face())

    def hugging_face(self) -> PretrainedConfig:
        """Its config; of the arithmetic vocabulary."""
        # Here: they take seconds to import.
        from moe_upgrpo.train.stand_in import stand_in_config
        from moe_upgrpo.train.warm_start import tiny_model_config

        sizes = {n: getattr(self, n) for n in ("layers", "hidden", "expert_intermediate")}
        if self.like is not None:
            return stand_in_config(self.like, **sizes)
        return tiny_model_config(**sizes, experts=self.experts, top_k=self.top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised training on problems with their solutions, fp32 AdamW.

    It stops once the expected pass@1 at temperature 1 on `probe_problems` *training* problems
    reaches `target_pass_at_1`: held-out problems choose nothing.
    """

    seed: int = 0
    """Seed of the weights and of the problems."""
    target_pass_at_1: float = 0.35
    """Accuracy at temperature 1 at which it stops."""
    probe_every: int = 10
    """Steps between measurements of that accuracy."""
    probe_problems: int = 512
    """Training problems that it is measured on."""
    max_steps: int = 3000
    """Steps after which a warm start that has not reached its target fails."""
    batch_size: int = 64
    """Problems in a step."""
    learning_rate: float = 2e-3
    """Learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decays of AdamW's two means."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises to its value."""
    clip_grad_norm: float = 1.0
    """Largest gradient norm."""
    random_router: bool = False
    """Leave the routers as they were initialised. Trained ones of models this small decide with
    wide margins; random ones are as near to ties as those of large models."""

    def __post_init__(self):
        if not 0 < self.target_pass_at_1 < 1:
            raise UserError(
                f"target_pass_at_1 is {self.target_pass_at_1}; between 0 and 1 is allowed."
            )
        for name in ("probe_every", "probe_problems", "max_steps", "batch_size", "warmup_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1 is needed.")
