"""The loss of a micro-batch, as Megatron's schedule calls it, and what is kept of it.

B sequences, S padded length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from moe_upgrpo.losses import (
    LossTerms,
    Metric,
    PolicyLossConfig,
    loss_terms,
    merge_metrics,
    policy_loss,
)
from moe_upgrpo.megatron.batch import Batch

NO_TERMS = LossTerms()


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Result of the loss for one micro-batch, as plain numbers."""

    # [B, S]: log-probs, clipped, gradient weight and, where anything is recorded, entropy
    arrays: tuple[np.ndarray, ...] = ()
    loss: float = 0.0
    metrics: dict[str, Metric] | None = None
    terms: dict[str, float] | None = None
    term_metrics: dict[str, Metric] | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The policy loss and the terms beside it, over all micro-batches and ranks.

    tokens, sequences: of all of them. undo_means: what gradients are divided by afterwards, once
    for the micro-batches and once for the ranks; the loss has the global denominators already.
    """

    loss: PolicyLossConfig
    terms: LossTerms
    tokens: torch.Tensor
    sequences: torch.Tensor
    undo_means: int

    def __call__(self, batch: Batch, output_BSx: torch.Tensor) -> tuple[torch.Tensor, Seen]:
        """The loss to be backpropagated. output_BSx: log-probs, and entropy where it is there."""
        log_probs_BS, *entropy_BS = output_BSx.unbind(-1)
        bad = ~log_probs_BS.isfinite() & batch.mask_BS
        if bad.any():
            b, row = bad.nonzero()[0].tolist()
            return log_probs_BS.sum() * 0, Seen(
                problem=f"The trainer's log-prob of token {batch.targets_BS[b, row]} at position "
                f"{row + 1} of a sequence is {log_probs_BS[b, row]}: the weights have diverged or "
                "are broken. Lower the learning rate or clip the gradient; the weights were not "
                "changed by this step."
            )
        old_BS = batch.old_log_probs_BS
        result = policy_loss(
            log_probs_BS,
            log_probs_BS.detach() if old_BS is None else old_BS,
            batch.advantages_BS,
            batch.mask_BS,
            config=self.loss,
            rollout_log_probs=batch.rollout_log_probs_BS,
            global_tokens=self.tokens,
            global_sequences=self.sequences,
        )
        total, added, term_metrics = result.loss, {}, {}
        if self.terms.active:
            added, term_metrics = loss_terms(
                log_probs_BS,
                batch.mask_BS,
                terms=self.terms,
                config=self.loss,
                reference_log_probs=batch.reference_log_probs_BS,
                entropy=entropy_BS[0] if entropy_BS else None,
                global_tokens=self.tokens,
                global_sequences=self.sequences,
            )
            total = sum(added.values(), total)
        value = float(total.detach())
        if not math.isfinite(value):
            return log_probs_BS.sum() * 0, Seen(
                problem=f"The loss of a micro-batch is {value}, of finite log-probs: ratios or "
                "advantages overflow. The weights were not changed by this step."
            )
        arrays_BS = [log_probs_BS, result.clipped, result.gradient_weight, *entropy_BS]
        return total * self.undo_means, Seen(
            arrays=tuple(tensor.detach().cpu().numpy() for tensor in arrays_BS),
            loss=float(result.loss.detach()),
            metrics=merge_metrics([result.metrics]),
            terms={name: float(term.detach()) for name, term in added.items()},
            term_metrics=merge_metrics([term_metrics]),
        )
