"""The record of one RL step: rows of the token log, and sums from which its metrics are made.

Every mean is carried as (numerator, denominator) until the data-parallel ranks are summed, so that
a metric does not depend on how sequences lie on ranks. Names: `moe_upgrpo.store.metrics`.

Shapes: N response tokens of this rank, L MoE layers, P prompt and T response tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.routing import ComparisonKind, RoutingDivergence, compare_routes
from moe_upgrpo.routing.gates import gate_overlap, layer_sums
from moe_upgrpo.train.analysis import OldScores, gap_terms
from moe_upgrpo.train.batch import Sampled
from moe_upgrpo.train.sums import Sums, count_sums, measured, routing_sums


@dataclass(kw_only=True)
class StepRecord:
    """This data-parallel rank's part of one step, sequence by sequence."""

    first_sequence: int  # index, over all ranks, of this rank's first sequence
    group: int  # responses to each prompt
    replay: str
    weight_version: int  # the trainer's, before the step's first update
    rollouts: Sequence[Rollout]
    rewards: np.ndarray
    advantages: np.ndarray
    old: OldScores
    reference: Sequence[Scored] | None
    updates: Sequence[Update]
    logp_train: Sequence[np.ndarray]  # [T], of each sequence's last optimizer visit
    clipped: Sequence[np.ndarray]  # [T], of that visit
    gradient_weight: Sequence[np.ndarray]  # [T], of that visit
    noise: Sums  # the noise floors, where this step measures them
    num_experts: int
    sampled: Sampled | None = None  # None: nothing was sampled for training
    updates_counted: int  # optimizer steps on the first data-parallel rank, 0 on the others

    @property
    def _lengths(self) -> np.ndarray:
        return np.array([len(r.response_ids) for r in self.rollouts])

    @property
    def _staleness(self) -> np.ndarray:
        """RL steps between the weights that sampled each sequence and the trainer's."""
        return np.array([self.weight_version - r.weight_version for r in self.rollouts])

    @property
    def _logp_rollout_N(self) -> np.ndarray:
        return np.concatenate([r.logp_rollout for r in self.rollouts])

    @property
    def _logp_old_N(self) -> np.ndarray:
        return np.concatenate([s.log_probs for s in self.old.policy(self.replay)])

    @property
    def _entropy_N(self) -> np.ndarray:
        return np.concatenate([s.entropy for s in self.old.policy(self.replay)])

    @property
    def dense(self) -> bool:
        return self.old.native[0].routes.shape[1] == 0

    def _of_response(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The response tokens' part of arrays over whole sequences: row p - 1 for position p."""
        return np.concatenate(
            [x[len(r.prompt_ids) - 1 :] for x, r in zip(rows, self.rollouts, strict=True)]
        )

    @cached_property
    def _routes_NLK(self) -> tuple[np.ndarray, np.ndarray]:
        """Rollout's and trainer's routes of the response tokens."""
        return (
            self._of_response([r.routes for r in self.rollouts]),
            self._of_response([s.routes for s in self.old.native]),
        )

    def _compare(
        self, train: Sequence[np.ndarray], kind: ComparisonKind
    ) -> tuple[RoutingDivergence, RoutingDivergence]:
        """Rollout's routes against `train`: of whole sequences, and of the response tokens.

        A fault in the routes names its sequence.
        """

        def compare(sequences: Sequence[int]) -> RoutingDivergence:
            sides = (
                torch.from_numpy(np.concatenate([routes[i] for i in sequences]))
                for routes in ([r.routes for r in self.rollouts], train)
            )
            return compare_routes(*sides, num_experts=self.num_experts, kind=kind)

        try:
            whole = compare(range(len(train)))
        except (UserError, ValueError):  # numpy's, where the sequences' routes do not fit together
            for i in range(len(train)):
                try:
                    compare([i])
                except UserError as error:
                    raise UserError(f"sequence {self.first_sequence + i}: {error}") from None
            raise
        is_response = [np.arange(len(r.routes)) >= len(r.prompt_ids) - 1 for r in self.rollouts]
        return whole, whole.select(torch.from_numpy(np.concatenate(is_response)))

    @cached_property
    def _free_running(self) -> tuple[RoutingDivergence, RoutingDivergence]:
        return self._compare([s.routes for s in self.old.native], ComparisonKind.FREE_RUNNING)

    @property
    def divergence(self) -> RoutingDivergence:
        """Rollout against trainer on the response tokens, free-running, at the old weights."""
        return self._free_running[1]

    @cached_property
    def conditional(self) -> RoutingDivergence | None:
        """Rollout against what the trainer's routers would choose while held to the rollout's
        routes, at the old weights; None where no such forward was made."""
        if self.old.held is None or self.dense:
            return None
        return self._compare([s.own_routes for s in self.old.held], ComparisonKind.CONDITIONAL)[1]

    @cached_property
    def _gap_terms(self) -> dict[str, np.ndarray]:
        if not self.old.analysed:
            return {}
        counterpart = self.old.counterpart
        return gap_terms(
            self.replay,
            rollout=self._logp_rollout_N,
            native=np.concatenate([s.log_probs for s in self.old.native]),
            held=np.concatenate([s.log_probs for s in self.old.held]),
            counterpart=None if counterpart is None else np.concatenate(counterpart),
            train=np.concatenate(self.logp_train),
            behind=None if self.old.behind is None else np.concatenate(self.old.behind),
        )

    def _routing_columns(self) -> dict[str, np.ndarray]:
        if self.dense:
            return {"layers_mismatched": np.zeros(self._lengths.sum(), np.int16)}
        whole, _ = self._free_running
        rollout_NLK, train_NLK = self._routes_NLK
        ends = np.cumsum([len(r.routes) for r in self.rollouts])[:-1]
        by_sequence = np.split(whole.routers_per_token.numpy(), ends)
        columns = {
            "layers_mismatched": self.divergence.routers_per_token.numpy(),
            "overlap": self.divergence.overlap.numpy(),
            "rollout_routes": rollout_NLK,
            "train_routes": train_NLK,
            "prefix_mismatched": self._of_response([m.cumsum() - m for m in by_sequence]),
            "margin_min": self._of_response([s.margins for s in self.old.native]).min(axis=1),
        }
        if self.conditional is not None:
            per_token_N = self.conditional.routers_per_token.numpy()
            columns["layers_mismatched_conditional"] = per_token_N
        return columns

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
            "staleness": np.repeat(self._staleness, lengths),
            "token_id": np.concatenate([r.response_ids for r in self.rollouts]),
            "reward": np.repeat(self.rewards, lengths),
            "advantage": np.repeat(self.advantages, lengths),
            "logp_rollout": self._logp_rollout_N,
            "logp_old": self._logp_old_N,
            "logp_train": logp_train,
            "ratio": np.exp(logp_train - self._logp_old_N),
            "clipped": np.concatenate(self.clipped),
            "gradient_weight": np.concatenate(self.gradient_weight),
            "entropy": self._entropy_N,
            **self._routing_columns(),
            **self._gap_terms,
        }

    def loss_metrics(self) -> Sums:
        """The loss library's metrics over all optimizer steps, this rank's share."""
        return merge_metrics([update.metrics for update in self.updates])

    def sums(self) -> Sums:
        """Every other mean of the step, this rank's share."""
        sequences, tokens = len(self.rollouts), int(self._lengths.sum())
        gap_N = self._logp_old_N - self._logp_rollout_N
        pairs = {
            # The ranks' losses add up to the loss: it has global denominators already.
            "loss/policy": (sum(u.loss for u in self.updates), self.updates_counted),
            "reward/mean": (float(self.rewards.sum()), sequences),
            "reward/mean_square": (float((self.rewards**2).sum()), sequences),
            "response/length_mean": (tokens, sequences),
            "response/finished_rate": (sum(r.finished for r in self.rollouts), sequences),
            "staleness/mean": (int(self._staleness.sum()), sequences),
            "entropy/mean": (float(self._entropy_N.sum()), tokens),
            "logp_gap/mean_abs": (float(np.abs(gap_N).sum()), tokens),
            "logp_gap/k3": (_k3_sum(self._logp_old_N, self._logp_rollout_N), tokens),
        }
        if self.sampled is not None:
            pairs |= self.sampled.shares()
        if self.reference is not None:
            reference_N = np.concatenate([s.log_probs for s in self.reference])
            pairs["kl/warm_start"] = (_k3_sum(reference_N, self._logp_old_N), tokens)
        for name, term_N in self._gap_terms.items():
            short = name.replace("_", "/", 1)
            pairs[f"{short}/mean"] = (float(term_N.sum()), tokens)
            pairs[f"{short}/mean_abs"] = (float(np.abs(term_N).sum()), tokens)
        sums = {name: Metric(*pair) for name, pair in pairs.items()} | self.noise
        return sums if self.dense else sums | self._routing_sums()

    def _routing_sums(self) -> Sums:
        counts = self.divergence  # first: it names the sequence where routes cannot be
        sums = routing_sums(counts, self._routes_NLK[0])
        if self.conditional is not None:
            sums |= count_sums("conditional", self.conditional)
        if self.old.analysed:
            routes_and_gates = [
                torch.from_numpy(self._of_response([getattr(s, name) for s in side]))
                for side in (self.old.held, self.old.native)
                for name in ("routes", "gates")
            ]
            by_layer, tokens = layer_sums(gate_overlap(*routes_and_gates))
            sums["conditional/gate_overlap"] = Metric(float(by_layer.sum()), tokens * len(by_layer))
        return sums

    def maxima(self) -> dict[str, float]:
        gap_N = self._logp_old_N - self._logp_rollout_N
        ratio_N = np.exp(np.concatenate(self.logp_train) - self._logp_old_N)
        return {"logp_gap/max_abs": float(np.abs(gap_N).max()), "ratio/max": float(ratio_N.max())}


def _k3_sum(logp_target: np.ndarray, logp_sampler: np.ndarray) -> float:
    """Sum over tokens of the k3 estimate of KL(sampler || target)."""
    sampler, target = (torch.from_numpy(x).double() for x in (logp_sampler, logp_target))
    return float(k3(sampler, target).sum())


def finish(
    sums: Sums, loss_metrics: Sums, maxima: dict[str, float]
) -> dict[str, float | list[float]]:
    """All metrics of a step, from sums and maxima over all ranks."""
    of_loss = finalize_metrics(loss_metrics)
    clipped = {f"clip/{sign}": of_loss[f"clip_fraction_{sign}"] for sign in _SIGNS}
    named = {f"loss/{name}": value for name, value in of_loss.items()}
    return measured(sums) | clipped | named | maxima


_SIGNS = ("positive", "negative")
