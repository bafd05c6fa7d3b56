# SPDX-License-Identifier: Apache-2.0
"""A rollout engine and the Megatron trainer on one checkpoint, as probe and diagnose start them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.tokenizer import read_tokenizer
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.engines import EngineWeights, make_engine


class PairOptions(Protocol):
    """The options of a command that starts a pair, as `ProbeConfig` explains them."""

    model: Path
    trust_remote_code: bool
    prompts: Path
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    engine: str
    engine_url: str | None
    engine_dtype: str
    dtype: str
    micro_batch: int


def start_actor(options: PairOptions, dtype: str | None = None) -> MegatronActor:
    """Start the trainer in this process, inside `groups.process_groups`. dtype: a number type other
    than the requested one."""
    return MegatronActor(
        options.model,
        Layout(),
        dtype=dtype or options.dtype,
        temperature=options.temperature,
        micro_batch_size=options.micro_batch,
    )


def read_lines(options: PairOptions) -> list[str]:
    """Read the prompts of a file, one a line."""
    try:
        lines = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {options.prompts}: {error}") from None
    if not lines:
        raise UserError(f"{options.prompts} holds no prompt: one a line is needed.")
    return lines


def read_prompts(options: PairOptions, actor: MegatronActor) -> list[np.ndarray]:
    """Read the token ids of each prompt, checked against the model's number of positions."""
    tokenizer = read_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    prompts = [np.array(tokenizer(line).input_ids) for line in read_lines(options)]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    try:
        actor.check_length(len(prompts[longest]) + options.max_new_tokens)
    except UserError as error:
        raise UserError(
            f"{options.prompts}, prompt {longest + 1} ({len(prompts[longest])} tokens) with "
            f"max_new_tokens={options.max_new_tokens}: {error}"
        ) from None
    return prompts


def start_engine(
    options: PairOptions,
    prompts: Sequence[np.ndarray],
    *,
    server_log: Path,
    weights: EngineWeights = "as-trained",
) -> Engine:
    """Start the requested engine, or connect to the server at its URL."""
    return make_engine(
        options.engine,
        options.model,
        dtype=options.engine_dtype,
        weights=weights,
        device=groups.device(),
        max_tokens=max(map(len, prompts)) + options.max_new_tokens,
        seed=options.seed,
        url=options.engine_url,
        server_log=server_log,
    )


def sampled(
    options: PairOptions, prompts: Sequence[np.ndarray], engine: Engine
) -> tuple[list[Rollout], list[Sample]]:
    """Return the engine's responses to the prompts, and the same tokens as trainer's samples."""
    sampling = SamplingConfig(
        temperature=options.temperature, max_new_tokens=options.max_new_tokens
    )
    rollouts = engine.generate(
        prompts, sampling, samples_per_prompt=options.samples, seed=options.seed
    )
    samples = [
        Sample(
            tokens=np.concatenate([r.prompt_ids, r.response_ids]), prompt_length=len(r.prompt_ids)
        )
        for r in rollouts
    ]
    return rollouts, samples
