"""What one RL step leaves: rows of the token log, and sums from which its metrics are made.

Every mean is carried as (numerator, denominator) until the data-parallel ranks are summed, so that
a metric does not depend on how sequences lie on ranks. Names: `moe_upgrpo.store.metrics`.

Shapes: N response tokens of this rank, L MoE layers, P prompt and T response tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moe_upgrpo.losses import Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.routing import RoutingDivergence, compare_routes
from moe_upgrpo.train.analysis import Gap

Sums = dict[str, Metric]


@dataclass(kw_only=True)
class StepRecord:
    """This data-parallel rank's part of one step, sequence by sequence."""

    first_sequence: int  # index, over all ranks, of this rank's first sequence
    group: int  # responses to each prompt
    rollouts: Sequence[Rollout]
    rewards: np.ndarray
    advantages: np.ndarray
    old: Sequence[Scored]
    reference: Sequence[Scored] | None
    updates: Sequence[Update]
    logp_train: Sequence[np.ndarray]  # [T], of each sequence's last optimizer visit
    clipped: Sequence[np.ndarray]  # [T], of that visit
    gap: Gap | None  # where this step takes the log-prob gap apart
    noise: Sums  # the trainer's noise floor, where this step measures it
    num_experts: int
    updates_counted: int  # optimizer steps on the first data-parallel rank, 0 on the others

    @property
    def _lengths(self) -> np.ndarray:
        return np.array([len(r.response_ids) for r in self.rollouts])

    @property
    def _logp_rollout_N(self) -> np.ndarray:
        return np.concatenate([r.logp_rollout for r in self.rollouts])

    @property
    def _logp_old_N(self) -> np.ndarray:
        return np.concatenate([s.log_probs for s in self.old])

    @cached_property
    def _routes_NLK(self) -> tuple[np.ndarray, np.ndarray]:
        """Rollout's and trainer's routes of the response tokens: row p - 1 for position p."""
        rollout, train = (
            np.concatenate(
                [
                    side.routes[len(r.prompt_ids) - 1 :]
                    for side, r in zip(sides, self.rollouts, strict=True)
                ]
            )
            for sides in (self.rollouts, self.old)
        )
        return rollout, train

    @cached_property
    def _gap_terms(self) -> dict[str, np.ndarray]:
        return {} if self.gap is None else self.gap.terms(self.rollouts, self.old, self.logp_train)

    @cached_property
    def divergence(self) -> RoutingDivergence:
        """Rollout against trainer, free-running, at the old weights."""
        rollout_NLK, train_NLK = self._routes_NLK
        return compare_routes(
            torch.from_numpy(rollout_NLK),
            torch.from_numpy(train_NLK),
            num_experts=self.num_experts,
        )

    def token_rows(self) -> dict[str, np.ndarray]:
        """The columns of the token log but `step`: [N], `overlap` [N, L], routes [N, L, K]."""
        lengths = self._lengths
        sequence = self.first_sequence + np.arange(len(lengths))
        logp_train = np.concatenate(self.logp_train)
        return {
            "sequence": np.repeat(sequence, lengths),
            "prompt": np.repeat(sequence // self.group, lengths),
            "position": np.concatenate(
                [len(r.prompt_ids) + np.arange(len(r.response_ids)) for r in self.rollouts]
            ),
            "token_id": np.concatenate([r.response_ids for r in self.rollouts]),
            "reward": np.repeat(self.rewards, lengths),
            "advantage": np.repeat(self.advantages, lengths),
            "logp_rollout": self._logp_rollout_N,
            "logp_old": self._logp_old_N,
            "logp_train": logp_train,
            "ratio": np.exp(logp_train - self._logp_old_N),
            "clipped": np.concatenate(self.clipped),
            "layers_mismatched": self.divergence.routers_per_token.numpy(),
            "overlap": self.divergence.overlap.numpy(),
            "rollout_routes": self._routes_NLK[0],
            "train_routes": self._routes_NLK[1],
            "entropy": np.concatenate([s.entropy for s in self.old]),
            **self._gap_terms,
        }

    def loss_metrics(self) -> Sums:
        """The loss library's metrics over all optimizer steps, this rank's share."""
        return merge_metrics([update.metrics for update in self.updates])

    def sums(self) -> Sums:
        """Every other mean of the step, this rank's share."""
        sequences, tokens = len(self.rollouts), int(self._lengths.sum())
        gap_N = self._logp_old_N - self._logp_rollout_N
        d = self.divergence
        pairs = {
            # The ranks' losses add up to the loss: it has global denominators already.
            "loss/policy": (sum(u.loss for u in self.updates), self.updates_counted),
            "reward/mean": (float(self.rewards.sum()), sequences),
            "reward/mean_square": (float((self.rewards**2).sum()), sequences),
            "response/length_mean": (tokens, sequences),
            "response/finished_rate": (sum(r.finished for r in self.rollouts), sequences),
            "entropy/mean": (float(sum(s.entropy.sum() for s in self.old)), tokens),
            "logp_gap/mean_abs": (float(np.abs(gap_N).sum()), tokens),
            "logp_gap/k3": (_k3_sum(self._logp_old_N, self._logp_rollout_N), tokens),
            "mismatch/router_rate": (d.routers_mismatched, d.routers_compared),
            "mismatch/slot_rate": (d.slots_mismatched, d.slots_compared),
            "mismatch/token_any_rate": (d.tokens_mismatched, d.tokens_compared),
            "mismatch/routers_per_token": (d.routers_mismatched, d.tokens_compared),
        }
        for layer, count in enumerate(d.routers_mismatched_by_layer.tolist()):
            pairs[f"mismatch/by_layer/{layer}"] = (count, d.tokens_compared)
        if self.reference is not None:
            reference_N = np.concatenate([s.log_probs for s in self.reference])
            pairs["kl/warm_start"] = (_k3_sum(reference_N, self._logp_old_N), tokens)
        for name, term_N in self._gap_terms.items():
            short = "gap/" + name.removeprefix("gap_")
            pairs[f"{short}/mean"] = (float(term_N.sum()), tokens)
            pairs[f"{short}/mean_abs"] = (float(np.abs(term_N).sum()), tokens)
        return {name: Metric(*pair) for name, pair in pairs.items()} | self.noise

    def maxima(self) -> dict[str, float]:
        gap_N = self._logp_old_N - self._logp_rollout_N
        ratio_N = np.exp(np.concatenate(self.logp_train) - self._logp_old_N)
        return {"logp_gap/max_abs": float(np.abs(gap_N).max()), "ratio/max": float(ratio_N.max())}


def _k3_sum(logp_target: np.ndarray, logp_sampler: np.ndarray) -> float:
    """Sum over tokens of the k3 estimate of KL(sampler || target)."""
    sampler, target = (torch.from_numpy(x).double() for x in (logp_sampler, logp_target))
    return float(k3(sampler, target).sum())


def measured(sums: Sums) -> dict[str, float | list[float]]:
    """The metrics that do not come from the loss, from sums over all ranks."""
    metrics: dict = {
        name: pair.numerator / pair.denominator for name, pair in sums.items() if pair.denominator
    }
    variance = metrics.pop("reward/mean_square") - metrics["reward/mean"] ** 2
    metrics["reward/std"] = math.sqrt(max(variance, 0.0))
    layers = sum(name.startswith("mismatch/by_layer/") for name in sums)
    metrics["mismatch/by_layer"] = [metrics.pop(f"mismatch/by_layer/{i}") for i in range(layers)]
    metrics["mismatch/router_numerator"] = sums["mismatch/router_rate"].numerator
    metrics["mismatch/router_denominator"] = sums["mismatch/router_rate"].denominator
    metrics["tokens/sampled"] = sums["response/length_mean"].numerator
    return metrics


def finish(
    sums: Sums, loss_metrics: Sums, maxima: dict[str, float]
) -> dict[str, float | list[float]]:
    """All metrics of a step, from sums and maxima over all ranks."""
    of_loss = finalize_metrics(loss_metrics)
    clipped = {f"clip/{sign}": of_loss[f"clip_fraction_{sign}"] for sign in _SIGNS}
    named = {f"loss/{name}": value for name, value in of_loss.items()}
    return measured(sums) | clipped | named | maxima


_SIGNS = ("positive", "negative")
