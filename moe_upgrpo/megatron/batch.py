# SPDX-License-Identifier: Apache-2.0
"""Sequences of mixed lengths as padded tensors, aligned with the rows of the model's output.

B sequences, S padded length. Row s of every tensor belongs to the input at position s, whose output
is the distribution of the token at position s + 1: the same join as that of the routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.tap import NO_ROUTE
from moe_upgrpo.routing.sets import ascending, repeated


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sequence as the actor needs it: P prompt tokens, T response tokens."""

    tokens: np.ndarray  # [P+T] integers
    prompt_length: int
    # [T] float32; this and the next are for updates only. None: from the update's own forward.
    old_log_probs: np.ndarray | None = None
    rollout_log_probs: np.ndarray | None = None  # [T] float32
    reference_log_probs: np.ndarray | None = None  # [T] float32, for the KL term
    advantage: float | np.ndarray = 0.0  # or [T] float32
    number: int = 0  # unique among the sequences of the batch, over all ranks
    group: int = 0  # equal for the responses to one prompt
    token_weights: np.ndarray | None = None  # [T] float32, for a loss that uses them
    routes: np.ndarray | None = None  # [P+T-1, L, K] expert sets to replay; None: native routing
    sampled: np.ndarray | None = None  # [T] bool: response tokens that count; None: all

    @property
    def response_rows(self) -> slice:
        """The rows whose outputs are the response's log-probs."""
        return slice(self.prompt_length - 1, len(self.tokens) - 1)

    @property
    def counted(self) -> np.ndarray | slice:
        """Response tokens that count, as an index into arrays over the response."""
        return slice(None) if self.sampled is None else self.sampled


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch. Padding is on the right, where causal attention does not see it."""

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor  # the token after each row; the last row's is arbitrary
    mask_BS: torch.Tensor  # bool: rows whose target is a response token that counts
    old_log_probs_BS: torch.Tensor | None  # 0 outside the mask, as the next three; None: not given
    rollout_log_probs_BS: torch.Tensor
    reference_log_probs_BS: torch.Tensor
    numbers_B: torch.Tensor
    groups_B: torch.Tensor
    token_weights_BS: torch.Tensor | None  # 0 outside the mask; None: not given
    advantages_BS: torch.Tensor
    routes_BSLK: torch.Tensor | None  # int16, NO_ROUTE where the router chooses; None: native

    @property
    def positions_BS(self) -> torch.Tensor:
        return torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device).expand_as(
            self.tokens_BS
        )

    def to(self, device: torch.device) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{n: t if t is None else t.to(device) for n, t in tensors.items()})


def make_batch(
    samples: Sequence[Sample], *, multiple_of: int = 1, shape: tuple[int, int] = (1, 1), pad_id=0
) -> Batch:
    """Pad to the longest sequence, rounded up to `multiple_of` (sequence parallelism shards S).

    shape: the least (B, S); rows without a sequence are all padding.
    """
    longest = max([shape[1]] + [len(s.tokens) for s in samples])
    shape = max(shape[0], len(samples)), -(-longest // multiple_of) * multiple_of
    tokens = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    old, rollout, reference, advantages = (np.zeros(shape, dtype=np.float32) for _ in range(4))
    numbers, groups = (np.zeros(shape[0], dtype=np.int64) for _ in range(2))
    without = sum(sample.token_weights is None for sample in samples)
    if 0 < without < len(samples):
        raise ValueError("Some samples have token weights and others have none.")
    weights = None if without else np.zeros(shape, dtype=np.float32)
    routes = None
    for sample in samples:
        if sample.routes is not None:
            routes = np.full((*shape, *sample.routes.shape[1:]), NO_ROUTE, dtype=np.int16)
            break
    given_old = {sample.old_log_probs is not None for sample in samples}
    if len(given_old) > 1:
        raise ValueError("Some samples have old log-probs and others have none.")
    for b, sample in enumerate(samples):
        rows = sample.response_rows
        tokens[b, : len(sample.tokens)] = sample.tokens
        mask[b, rows] = True if sample.sampled is None else sample.sampled
        advantages[b, rows] = sample.advantage
        numbers[b], groups[b] = sample.number, sample.group
        if sample.routes is not None:
            _check_routes(sample.routes)
            routes[b, : len(sample.routes)] = sample.routes
        for target, values in (
            (old, sample.old_log_probs),
            (rollout, sample.rollout_log_probs),
            (reference, sample.reference_log_probs),
            (weights, sample.token_weights),
        ):
            if values is not None:
                target[b, rows] = values

    def tensor(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array)

    return Batch(
        tokens_BS=tensor(tokens),
        targets_BS=tensor(tokens).roll(-1, dims=1),
        mask_BS=tensor(mask),
        old_log_probs_BS=tensor(old) if True in given_old else None,
        rollout_log_probs_BS=tensor(rollout),
        reference_log_probs_BS=tensor(reference),
        numbers_B=tensor(numbers),
        groups_B=tensor(groups),
        token_weights_BS=tensor(weights),
        advantages_BS=tensor(advantages),
        routes_BSLK=tensor(routes),
    )


def _check_routes(routes_TLK: np.ndarray) -> None:
    """Raise UserError where a set names an expert twice.

    A router that replays it would send the token to fewer than K experts. Megatron's dispatchers
    take that for dropped tokens, or fail with an error about the sizes of a split.
    """
    twice_TL = repeated(ascending(routes_TLK))
    if twice_TL.any():
        row, layer = np.argwhere(twice_TL)[0]
        raise UserError(
            f"Routes to replay, row {row} of a sequence, MoE layer {layer}: "
            f"{routes_TLK[row, layer].tolist()} names an expert twice. Rows of routes that were "
            "never filled look like this; check how the engine records them, or train without "
            "replay."
        )
