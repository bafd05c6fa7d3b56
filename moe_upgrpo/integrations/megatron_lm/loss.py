# SPDX-License-Identifier: Apache-2.0
"""Every preset in place of Megatron-LM's `calculate_grpo_loss`.

The patched train_rl.py hands over the loss mask and the tokens. The environment of all ranks says
which preset to use (`settings`).

Megatron-LM expects the losses of the tokens and divides their sum itself: with
--calculate-per-token-loss by the response tokens of the optimizer step, otherwise by those of the
micro-batch, averaging over micro-batches and ranks. A loss with one weight for each sequence is
scaled so that the result is the mean over the sequences of the collection (everything that one call
of `prepare_data_for_update` made from its rollouts).

Shapes: B rows of a micro-batch (for a packed bin, its sequences), T positions; the log-prob at
index t is that of the token at t + 1. Flags and limits: docs/megatron-lm.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.rl import rl_utils
from megatron.training import get_args
from torch import Tensor

from moe_upgrpo.integrations.megatron_lm.settings import check_correction
from moe_upgrpo.losses import (
    Metric,
    PolicyLossConfig,
    aggregation_weights,
    policy_loss,
)

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Counts:
    """Sums of a collection, over all data-parallel ranks."""

    tokens: float
    sequences: float
    micro_batches: float

    def divisor(self, per_token: bool, tokens: float) -> float:
        """Divisor that a micro-batch's sum of token losses gets in the end; `tokens` are its own.

        With --calculate-per-token-loss all tokens, otherwise its tokens times the micro-batches.
        """
        return self.tokens if per_token else max(tokens, 1.0) * self.micro_batches


@dataclass(frozen=True)
class Rows:
    """The sequences of a micro-batch: `[B, T]` indices into its flattened tensors, and which of
    them are real (the rows of a packed bin differ in length)."""

    index_BT: Tensor
    there_BT: Tensor

    @classmethod
    def of(cls, shape: torch.Size, seq_starts, seq_lengths, device) -> "Rows":
        if seq_starts is None:
            index_BT = torch.arange(shape.numel(), device=device).view(shape)
            return cls(index_BT, torch.ones_like(index_BT, dtype=torch.bool))
        # A sequence has one log-prob less than tokens. A bin that fills up the batch has none.
        lengths = seq_lengths or [0]
        offsets_T = torch.arange(max(*lengths, 2) - 1, device=device)
        starts_B1, lengths_B1 = (
            torch.tensor(x, dtype=torch.long, device=device)[:, None]
            for x in (seq_starts[: len(seq_lengths)] or [0], lengths)
        )
        there_BT = offsets_T < lengths_B1 - 1
        return cls(torch.where(there_BT, starts_B1 + offsets_T, 0), there_BT)

    def take(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1)[self.index_BT]

    def put_back(self, x_BT: Tensor, shape: torch.Size) -> Tensor:
        """Zeros where there is no sequence."""
        flat = x_BT.new_zeros(shape.numel())
        return flat.index_put((self.index_BT[self.there_BT],), x_BT[self.there_BT]).view(shape)


def evaluate(
    given: dict[str, Any], loss_mask: Tensor, config: PolicyLossConfig | None, counts: Counts | None
) -> tuple[Terms, dict[str, Metric]]:
    """Result of `rl_utils.calculate_grpo_loss`, with the policy term of `config`, and the
    library's metrics. `given`: its arguments; counts: None, those of this micro-batch.

    Its fifth and sixth entries are Megatron-LM's in form only: positive and negative tokens whose
    gradient was removed by the loss's own rule.
    """
    terms = rl_utils.calculate_grpo_loss(**given)
    if config is None:
        return terms, {}
    _, kl_term, ratios, entropy_term, *_ = terms
    current = given["current_logprobs"]
    shape, device = current.shape, current.device
    rows = Rows.of(shape, given.get("seq_starts"), given.get("seq_lengths"), device)
    mask_BT = (rows.take(loss_mask) > 0) & rows.there_BT
    advantages_B = given["advantages"].to(device)
    if not len(advantages_B):
        advantages_B = advantages_B.new_zeros(1)
    advantages_BT = advantages_B.view(-1, 1).expand(mask_BT.shape)
    inference, weights_BT = given.get("inference_logprobs"), None
    reads_rollout = "rollout_log_probs" in config.arguments
    check_correction(config, inference is not None, given.get("is_truncation_coef"))
    if inference is not None and not reads_rollout:
        weights_BT = (given["old_logprobs"].float() - inference.to(device).float()).exp()
        if given.get("is_truncation_coef") is not None:
            weights_BT = weights_BT.clamp(max=given["is_truncation_coef"])
        weights_BT = rows.take(weights_BT)
    tokens, lengths_B = float(mask_BT.sum()), mask_BT.sum(dim=1)
    counts = counts or Counts(max(tokens, 1.0), max(float((lengths_B > 0).sum()), 1.0), 1.0)
    totals = {"global_tokens": max(tokens, 1.0), "global_sequences": counts.sequences}
    result = policy_loss(
        rows.take(current),
        rows.take(given["old_logprobs"]),
        advantages_BT,
        mask_BT,
        config=config,
        rollout_log_probs=rows.take(inference) if reads_rollout else None,
        **totals,
    )
    policy_BT = result.per_token
    if weights_BT is not None:
        policy_BT = policy_BT * torch.where(mask_BT, weights_BT, 0.0)
    if config.aggregation != "token-mean":
        weights_B = aggregation_weights(
            lengths_B.float(), config.aggregation, token_sum_norm=config.token_sum_norm, **totals
        )
        divisor = counts.divisor(get_args().calculate_per_token_loss, tokens)
        policy_BT = policy_BT * weights_B[:, None] * divisor
    loss = (
        rows.put_back(policy_BT, shape)
        + given["kl_beta"] * kl_term
        - given["entropy_weight"] * entropy_term
    )
    cut = [
        rows.put_back(result.clipped & side, shape)
        for side in (advantages_BT > 0, advantages_BT < 0)
    ]
    return (loss, kl_term, ratios, entropy_term, *cut), result.metrics
