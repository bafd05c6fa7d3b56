"""The checks, in the order in which they run: what a broken path would cost least comes first.

A module that cannot be imported takes only its own checks with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """A function `module.function(job) -> Outcome` with a time of its own.

    on_cpu: it sees no GPU, on any machine.
    """

    name: str
    module: str  # below benchmarks.gpu
    function: str
    budget_s: float
    on_cpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a check found: one line for people, figures for the file, and what is wrong."""

    line: str
    figures: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


CHECKS = (
    Check("doctor", "environment", "doctor", 30),
    Check("reference on the CPU", "parity", "reference", 90, on_cpu=True),
    Check("against the CPU's fp32", "parity", "against_reference", 60),
    Check("replay", "replay", "replay", 60),
    Check("deterministic", "replay", "deterministic", 60),
    Check("decomposition", "mismatch", "decomposition", 60),
    Check("mismatch by layer", "mismatch", "by_layer", 90),
    Check("core attention", "layers", "attention", 45),
    Check("grouped experts", "layers", "experts", 45),
    Check("optimizer step", "layers", "adam", 30),
    Check("log-probs", "tensors", "log_probs", 45),
    Check("route comparison", "tensors", "routes", 30),
    Check("loss", "tensors", "loss", 30),
    Check("large layers against plan", "training", "large_layers", 120),
    Check("training run", "training", "run", 90),
)
