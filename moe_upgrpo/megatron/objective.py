# SPDX-License-Identifier: Apache-2.0
"""The loss of a micro-batch, as Megatron's schedule calls it, and its results.

B sequences, S padded length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moe_upgrpo.losses import (
    Context,
    LossTerms,
    Metric,
    PolicyLossConfig,
    batch_statistics,
    loss_terms,
    merge_metrics,
    policy_loss,
    token_draws,
)
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.batch import Batch, Sample, make_batch

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

    tokens, sequences: their global numbers. undo_means: the number by which gradients are divided
    later, once for the micro-batches and once for the ranks; the loss already has the global
    denominators. seed: for the random numbers that a loss draws for its tokens. statistics: from
    `statistics_of`.
    """

    loss: PolicyLossConfig
    terms: LossTerms
    tokens: torch.Tensor
    sequences: torch.Tensor
    undo_means: int
    seed: int = 0
    statistics: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def over(cls, batches: Sequence[Batch], samples: int, **given: Any) -> Objective:
        """Make the objective over these micro-batches of `samples` sequences and those of the other
        data-parallel ranks. A collective of these ranks."""
        group = parallel_state.get_data_parallel_group()
        counts = torch.tensor(
            [sum(int(batch.mask_BS.sum()) for batch in batches), samples],
            dtype=torch.float64,
            device=groups.device(),
        )
        dist.all_reduce(counts, group=group)
        # DistributedDataParallel divides gradients by the data-parallel ranks and the schedule by
        # the micro-batches. The former also divides by the context-parallel ranks, the latter
        # multiplies by them (schedules.py:268).
        undo = group.size() * len(batches)
        return cls(tokens=counts[0], sequences=counts[1], undo_means=undo, **given)

    def __call__(self, batch: Batch, output_BSx: torch.Tensor) -> tuple[torch.Tensor, Seen]:
        """The loss to be backpropagated. output_BSx: log-probs, and entropy if it is computed."""
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
            context=_context(self.loss, batch, entropy_BS, self.seed, self.statistics),
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


def _context(
    loss: PolicyLossConfig,
    batch: Batch,
    entropy_BS: Sequence[torch.Tensor],
    seed: int,
    statistics: Mapping[str, torch.Tensor] | None,
) -> Context:
    """The optional inputs of losses that this loss uses."""
    draws_BS = None
    if "draws" in loss.arguments:
        draws_BS = token_draws(seed, batch.numbers_B, batch.mask_BS.shape[1])
    return Context(
        entropy=entropy_BS[0].detach() if entropy_BS else None,
        draws=draws_BS,
        groups=batch.groups_B,
        token_weights=batch.token_weights_BS,
        statistics=statistics,
    )


def statistics_of(
    samples: Sequence[Sample], scored: Sequence[Any] | None, loss: PolicyLossConfig, seed: int
) -> dict[str, torch.Tensor]:
    """Statistics of a mini-batch over all data-parallel ranks; a collective of these ranks.

    scored: log-probs and entropy of this rank's samples at the weights of the update, as from
    `MegatronActor.score`; None: the statistics use neither.
    """
    if scored is None:
        found = [(np.float32(0), np.float32(0))] * len(samples)
    else:
        found = [(one.log_probs, one.entropy) for one in scored]
    mine = [
        (replace(sample, routes=None), *values)
        for sample, values in zip(samples, found, strict=True)
    ]
    samples, *found = zip(*groups.gather_over_data_parallel(mine), strict=True)
    batch = make_batch(samples)
    log_probs_BS, entropy_BS = (torch.zeros(batch.mask_BS.shape) for _ in found)
    for values_BS, values in zip((log_probs_BS, entropy_BS), found, strict=True):
        for b, (sample, of_sample) in enumerate(zip(samples, values, strict=True)):
            values_BS[b, sample.response_rows] = torch.as_tensor(of_sample)
    statistics = batch_statistics(
        log_probs_BS,
        log_probs_BS if batch.old_log_probs_BS is None else batch.old_log_probs_BS,
        batch.advantages_BS,
        batch.mask_BS,
        config=loss,
        rollout_log_probs=batch.rollout_log_probs_BS,
        context=_context(loss, batch, [entropy_BS], seed, None),
    )
    return {name: value.to(groups.device()) for name, value in statistics.items()}
