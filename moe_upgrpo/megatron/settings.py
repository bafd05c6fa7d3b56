# SPDX-License-Identifier: Apache-2.0
"""Settings of the actor. Imports no Megatron, so that the command line starts fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moe_upgrpo.errors import UserError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """Megatron's optimizer: AdamW, its state split over the data-parallel ranks."""

    algorithm: str = "adam"
    """adam, or sgd (then without the split state: Megatron-Core splits Adam's only)."""
    lr: float = 1e-4
    """Learning rate."""
    beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    beta2: float = 0.99
    """Decay of Adam's mean of squared gradients."""
    eps: float = 1e-8
    """Adam's ε."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 10
    """Optimizer steps over which lr rises linearly to its value, where it stays."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    frozen: Literal["nothing", "router"] = "nothing"
    """Weights that are not trained: nothing, or those of the MoE layers' routers."""

    def __post_init__(self):
        if self.algorithm not in ("adam", "sgd"):
            raise UserError(f"algorithm={self.algorithm!r}: use 'adam' or 'sgd'.")
        for name in ("lr", "warmup_steps", "clip_grad", "weight_decay", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: a number of at least 0 is needed.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: 0 or more and below 1 is needed.")

    @property
    def splits_state(self) -> bool:
        """Whether the data-parallel ranks share the optimizer's state among them."""
        return self.algorithm == "adam"
