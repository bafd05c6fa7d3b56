# SPDX-License-Identifier: Apache-2.0
"""Aggregate per-token losses to one number: loss = Σ_b w_b · Σ_t per_token[b, t].

Every mode is one weight per sequence, built from a denominator over *all* micro-batches and ranks,
so that summing the micro-batches' losses gives the batch's loss whatever the split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.names import check_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Aggregation:
    """denominator: which global count it divides by; weight: w_b from (lengths `[B]`, count, H)."""

    denominator: str
    formula: str
    weight: Callable[[Tensor, float, float], Tensor]
    source: str


AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": Aggregation(
        "global_tokens",
        "1/N",
        lambda lengths, tokens, norm: torch.full_like(lengths, 1 / tokens),
        "DAPO, arXiv 2503.14476; verl's default",
    ),
    "seq-mean-token-mean": Aggregation(
        "global_sequences",
        "1/(S·length)",
        lambda lengths, sequences, norm: 1 / (sequences * lengths.clamp(min=1)),
        "GRPO, arXiv 2402.03300; GSPO, GMPO, SAPO",
    ),
    "seq-mean-token-sum": Aggregation(
        "global_sequences",
        "1/S",
        lambda lengths, sequences, norm: torch.full_like(lengths, 1 / sequences),
        "TIC-GRPO, TOPR",
    ),
    "seq-mean-token-sum-norm": Aggregation(
        "global_sequences",
        "1/(S·H), H = `token_sum_norm`",
        lambda lengths, sequences, norm: torch.full_like(lengths, 1 / (sequences * norm)),
        "Dr.GRPO, arXiv 2503.20783",
    ),
}


def aggregation_weights(
    lengths_B: Tensor,
    mode: str,
    *,
    global_tokens: float | None = None,
    global_sequences: float | None = None,
    token_sum_norm: float | None = None,
) -> Tensor:
    """The weight of each sequence's summed token losses, `[B]`.

    Args:
        lengths_B: response tokens per sequence, floating point.
        mode: a name in `AGGREGATIONS`.
        global_tokens: response tokens over all micro-batches and ranks; None: the local count.
        global_sequences: sequences over all micro-batches and ranks; None: the local count of
            non-empty ones.
        token_sum_norm: constant H of `seq-mean-token-sum-norm`, such as the longest response.

    Raises:
        UserError: unknown mode, H missing, a denominator that is not positive, or (without a global
            denominator) a mask that selects nothing.
    """
    check_name("aggregation", mode, AGGREGATIONS)
    if mode == "seq-mean-token-sum-norm" and not (token_sum_norm and token_sum_norm > 0):
        raise UserError(
            f"token_sum_norm: {token_sum_norm} given; allowed: a constant > 0, needed by "
            "aggregation 'seq-mean-token-sum-norm' (the longest response, for instance)"
        )
    name = AGGREGATIONS[mode].denominator
    given = {"global_tokens": global_tokens, "global_sequences": global_sequences}[name]
    if given is None:
        counted = lengths_B if name == "global_tokens" else lengths_B > 0
        count = float(counted.sum(dtype=torch.float64))
        if count == 0:
            raise UserError(
                f"mask: 0 tokens selected; allowed: at least one, or {name} > 0 if the batch has "
                "some in other micro-batches"
            )
    else:
        count = float(given)
        if not 0 < count < float("inf"):
            raise UserError(f"{name}: {given} given; allowed: a finite count > 0")
    return AGGREGATIONS[mode].weight(lengths_B, count, token_sum_norm or 1.0)
