# SPDX-License-Identifier: Apache-2.0
"""The protocol of rollout engines, and the rollouts that they return.

P prompt tokens, T response tokens, S = P + T, L MoE layers, K experts per token.

The row join: row s of the routes is the input at position s, whose output gave the log-prob of the
token at position s + 1. The last sampled token is never fed back, so there are S - 1 rows, and
they cover every response token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_upgrpo.errors import NumericalFailure, UserError
from moe_upgrpo.lazy import torch


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One sampled response with the log-probs and the routes of the engine that sampled it.

    Fields:
        prompt_ids: `[P]` integers, P >= 1.
        response_ids: `[T]` integers, T >= 1, EOS included where the sequence finished.
        logp_rollout: `[T]` float32, log-prob of each response token under the sampling temperature
            (at temperature 0: under temperature 1).
        routes: `[P+T-1, L, K]`, unsigned, of the smallest type that holds the expert ids
            (`routes_dtype`); expert sets in the engine's own order; L counts MoE layers only.
        weight_version: the version of the weights that sampled it, or its first tokens.
        finished: whether it ended with EOS (False: cut at `max_new_tokens`).
        sampled: `[T]` bool, False for tokens of the response that the policy did not sample, such
            as the result of a tool, whose log-prob is 0 here. None: all were sampled.
        versions: `[T]` int32, the version of the weights that sampled each token, ascending from
            `weight_version`. None: one version sampled all.

    Raises UserError naming the sequence if a shape, a type or the number of rows is wrong or a
    log-prob is not finite. Expert ids and duplicates are checked where routes are compared.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logp_rollout: np.ndarray
    routes: np.ndarray
    weight_version: int
    finished: bool
    sampled: np.ndarray | None = None
    versions: np.ndarray | None = None

    def __post_init__(self):
        for name in ("prompt_ids", "response_ids"):
            ids = getattr(self, name)
            if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
                raise UserError(
                    f"{name} is {ids.dtype} {ids.shape}; a non-empty row of integers is needed."
                )
        tokens = len(self.response_ids)
        if self.logp_rollout.shape != (tokens,) or self.logp_rollout.dtype != np.float32:
            raise UserError(
                f"logp_rollout of {self._named} is {self.logp_rollout.dtype} "
                f"{self.logp_rollout.shape}; float32 ({tokens},) is needed."
            )
        if not np.isfinite(self.logp_rollout).all():
            position = int(np.flatnonzero(~np.isfinite(self.logp_rollout))[0])
            raise broken_weights(self.weight_version)(
                f"logp_rollout of {self._named} is {self.logp_rollout[position]} at response "
                f"position {position}. Finite log-probs are needed: look for non-finite weights "
                f"(weight version {self.weight_version})."
            )
        if self.sampled is not None and (
            self.sampled.shape != (tokens,) or self.sampled.dtype != bool or not self.sampled[0]
        ):
            raise UserError(
                f"sampled of {self._named} is {self.sampled.dtype} {self.sampled.shape}; bool "
                f"({tokens},) is needed, and that the first token of the response was sampled."
            )
        if self.versions is not None and (
            self.versions.shape != (tokens,)
            or self.versions.dtype != np.int32
            or self.versions[0] != self.weight_version
            or (np.diff(self.versions) < 0).any()
        ):
            raise UserError(
                f"versions of {self._named} are {self.versions.dtype} {self.versions.tolist()}; "
                f"int32 ({tokens},), ascending from {self.weight_version}, are needed."
            )
        if self.routes.ndim != 3 or self.routes.dtype.kind != "u":
            raise UserError(
                f"routes of {self._named} are {self.routes.dtype} {self.routes.shape}; "
                "unsigned integers [P+T-1, L, K] are needed."
            )
        rows = len(self.prompt_ids) + tokens - 1
        if len(self.routes) != rows:
            raise UserError(
                f"routes of {self._named} have {len(self.routes)} rows; P+T-1 = {rows} are needed: "
                "one for each token that was fed in, none for the last sampled token."
            )

    @property
    def sampled_or_all(self) -> np.ndarray:
        """Whether each token of the response was sampled, `[T]`."""
        return np.ones(len(self.response_ids), bool) if self.sampled is None else self.sampled

    @property
    def versions_or_all(self) -> np.ndarray:
        """The version of the weights that sampled each token of the response, `[T]` int32."""
        if self.versions is not None:
            return self.versions
        return np.full(len(self.response_ids), self.weight_version, np.int32)

    @property
    def _named(self) -> str:
        return f"the sequence {self.prompt_ids.tolist()} -> {self.response_ids.tolist()}"


def routes_dtype(num_experts: int) -> np.dtype:
    """The smallest unsigned integer type that holds the expert ids 0 ... num_experts - 1."""
    return np.min_scalar_type(max(num_experts - 1, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Sampling of responses: from the whole vocabulary, at one temperature.

    Temperature 0 is greedy decoding; the log-probs are then those at temperature 1.
    """

    temperature: float = 1.0
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; 0 (greedy) or more is allowed.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed.")
        for name, value, off in (("top_p", self.top_p, (1.0,)), ("top_k", self.top_k, (0, -1))):
            if value not in off:
                raise UserError(
                    f"{name} is {value}; only {off[0]} (off) is allowed: tokens would be sampled "
                    "from a truncated distribution, whose log-probs are not the ones the trainer "
                    "computes, so every ratio would be wrong. Lower the temperature instead."
                )

    @property
    def logp_temperature(self) -> float:
        """Divisor of the logits before the log-softmax, here and in the trainer."""
        return self.temperature or 1.0


def request_seeds(seed: int, count: int) -> np.ndarray:
    """A seed below 2^63 for each of `count` requests `[N]`."""
    return np.random.SeedSequence(seed).generate_state(count, np.uint64) >> 1


def check_prompts(prompts: Sequence[np.ndarray], samples_per_prompt: int) -> None:
    """Raise UserError unless there is something to sample, from prompts of at least one token."""
    if not len(prompts) or samples_per_prompt < 1:
        raise UserError(
            f"{len(prompts)} prompts with {samples_per_prompt} samples each asked for; "
            "at least one of both is needed."
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("A prompt is empty; each needs at least one token.")


def broken_weights(version: int) -> type[UserError]:
    """The kind of error for log-probs that are not finite, by the weights that gave them.

    The trainer's weights have diverged; those of version 0 were like that from the start.
    """
    return NumericalFailure if version else UserError


def check_sequences(sequences: Sequence[np.ndarray]) -> None:
    """Raise UserError unless there are sequences, each with a row of routes."""
    if not len(sequences) or any(len(sequence) < 2 for sequence in sequences):
        raise UserError(
            f"{len(sequences)} sequences given; at least one is needed, of 2 tokens or more."
        )


class Engine(Protocol):
    """Samples responses and takes new weights."""

    @property
    def weight_version(self) -> int:
        """The version of the weights now held; 0 is the checkpoint that the engine started from."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        *,
        samples_per_prompt: int,
        seed: int,
    ) -> list[Rollout]:
        """`samples_per_prompt` responses to each prompt `[P]` of token ids, prompt-major.

        Response i belongs to prompt i // samples_per_prompt. The same weights, prompts, settings
        and seed give the same result.
        """

    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The routes `[S-1, L, K]` of whole sequences `[S]`, S >= 2, each computed in one pass.

        Nothing is taken from a cache: two calls are two computations, and their difference is the
        engine's own noise floor; the difference to the routes of `generate` is its noise over batch
        shapes.
        """

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """Replace every weight by the tensor of its Hugging Face checkpoint name.

        Names and shapes are those on disk (one tensor per expert); bf16 or fp32. The tensors are
        copied, and all of them gone through: making them may be a collective. Missing or
        unexpected names and wrong shapes raise UserError; the version stays, and the weights too,
        or nothing is sampled until an update is whole.
        """

    def close(self) -> None:
        """Free what the engine holds; it is not used afterwards."""
