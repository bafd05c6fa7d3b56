"""The checks, in the order in which they run: a path that is cheapest to find broken comes first.

If a module cannot be imported, only its own checks are lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """A function `module.function(job) -> Outcome` with its own time limit.

    on_cpu: it sees no GPU, on any machine.
    """

    name: str
    module: str
    function: str
    budget_s: float
    means: str  # for docs/gpu.md
    on_cpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Findings of a check: one line for people, figures for the file, and what is wrong."""

    line: str
    figures: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


CHECKS = (
    Check(
        "doctor",
        "benchmarks.gpu.environment",
        "doctor",
        30,
        "what is installed, and which code that selects",
    ),
    Check(
        "reference on the CPU",
        "benchmarks.gpu.parity",
        "reference",
        90,
        "a model in fp32 without the GPU: log-probs, gradient, Adam's step",
        on_cpu=True,
    ),
    Check(
        "against the CPU's fp32",
        "benchmarks.gpu.parity",
        "against_reference",
        60,
        "the same on the GPU, held to the same experts; routers free; bf16",
    ),
    Check(
        "replay",
        "benchmarks.gpu.replay",
        "replay",
        60,
        "a model's own routes change nothing, planted ones are used, recomputed ones too",
    ),
    Check(
        "deterministic",
        "benchmarks.gpu.replay",
        "deterministic",
        60,
        "the same step twice, with `--deterministic` and without; what it costs",
    ),
    Check(
        "decomposition",
        "benchmarks.gpu.mismatch",
        "decomposition",
        60,
        "the terms of the log-prob gap after a step add up to it",
    ),
    Check(
        "mismatch by layer",
        "benchmarks.gpu.mismatch",
        "by_layer",
        90,
        "engine against trainer in bf16 and with FP8 weights; the noise floor",
    ),
    Check(
        "core attention",
        "benchmarks.gpu.layers",
        "attention",
        45,
        "against Megatron-Core's, which makes all scores",
    ),
    Check(
        "grouped experts",
        "benchmarks.gpu.layers",
        "experts",
        45,
        "against Megatron-Core's loop over the experts",
    ),
    Check(
        "optimizer step",
        "benchmarks.gpu.layers",
        "adam",
        30,
        "torch's AdamW in the call that is used, against its own choice",
    ),
    Check(
        "log-probs",
        "benchmarks.gpu.tensors",
        "log_probs",
        45,
        "a few rows of logits at a time, against all logits at once",
    ),
    Check(
        "route comparison",
        "benchmarks.gpu.tensors",
        "routes",
        30,
        "against a naive broadcast; share of the memory bandwidth",
    ),
    Check(
        "loss",
        "benchmarks.gpu.tensors",
        "loss",
        30,
        "with all its metrics, against GRPO's formula alone",
    ),
    Check(
        "large layers against plan",
        "benchmarks.gpu.training",
        "large_layers",
        120,
        "two layers of Qwen3-30B-A3B: tokens/s, and peak memory against `moe-upgrpo plan`",
    ),
    Check(
        "training run",
        "benchmarks.gpu.training",
        "run",
        90,
        "`moe-upgrpo train` from a warm start: tokens/s",
    ),
)
