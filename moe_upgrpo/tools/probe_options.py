# SPDX-License-Identifier: Apache-2.0
"""The options of `moe-upgrpo probe`, without what a probe needs to run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from moe_upgrpo.errors import UserError
from moe_upgrpo.record.limits import AlarmLimits
from moe_upgrpo.rollout.engines import check_engine
from moe_upgrpo.store.files import new_folder
from moe_upgrpo.train.parts import at_least


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Compare a rollout engine with the Megatron trainer on one checkpoint, or two route dumps."""

    model: Path | None = None
    """Hugging Face checkpoint folder with its tokenizer: docs/models.md."""
    trust_remote_code: bool = False
    """Run Python code of the model folder that its tokenizer needs."""
    prompts: Path | None = None
    """Text file, one prompt a line."""
    samples: int = 8
    """Responses to each prompt."""
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    engine: str = "hf"
    """Rollout engine, in every rank or a server: hf (transformers), vllm, sglang, or a plug-in's:
    docs/engines.md."""
    engine_url: str | None = None
    """A running server of the engine, http://HOST:PORT. None: in every rank, or started here."""
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the trainer."""
    micro_batch: int = 64
    output_dir: Path | None = None
    """Where the report goes; must not hold another run. None: runs/probe-DATE-TIME."""
    rollout_routes: Path | None = None
    """In place of a model: expert ids [tokens, layers, top-k] of the rollout, or of a batch
    [sequences, tokens, layers, top-k], as an .npy, .npz or torch file, and ..."""
    train_routes: Path | None = None
    """... of the trainer: row t of both belongs to the same token."""
    num_experts: int | None = None
    """Experts in each layer; needed with the two dumps."""
    dump_samples: int | None = None
    """Sequences of a dumped batch that answer the same prompt, one after the other. With it rates
    have intervals, which are by prompt."""

    alarm: AlarmLimits = field(default_factory=AlarmLimits)
    """Where alarms ring: docs/mismatch.md."""

    @cached_property
    def folder(self) -> Path:
        """Where the report goes: a new folder, unless one is named."""
        return self.output_dir or new_folder("probe")

    def __post_init__(self):
        dumps = [x is not None for x in (self.rollout_routes, self.train_routes, self.num_experts)]
        of_model = [x is not None for x in (self.model, self.prompts)]
        if not (all(dumps) and not any(of_model)) and not (all(of_model) and not any(dumps)):
            raise UserError(
                "give either --model and --prompts, or --rollout-routes, --train-routes and "
                "--num-experts."
            )
        if self.dump_samples is not None and self.rollout_routes is None:
            raise UserError(
                "--dump-samples goes with two dumps: with a model, --samples says how many "
                "responses a prompt has."
            )
        names = ("samples", "max_new_tokens", "micro_batch", "num_experts", "dump_samples")
        at_least(self, 1, *names)
        at_least(self, 0, "seed")
        check_engine(self.engine, url=self.engine_url)
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: above 0 is needed; at 0 nothing is sampled."
            )
