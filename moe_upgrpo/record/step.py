# SPDX-License-Identifier: Apache-2.0
"""One RL step: its rows of the token log, and the sums that its metrics are made from.

Every mean is carried as (numerator, denominator) until the data-parallel ranks are summed, so that
a metric does not depend on how sequences are spread over ranks. Names: `moe_upgrpo.store.metrics`.

Shapes: N response tokens of this rank, R rows of whole sequences, L MoE layers, K experts each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.record.sequence import SequenceRecord
from moe_upgrpo.record.sums import Sums, count_sums, position_sums, routing_sums, tail_sums
from moe_upgrpo.routing import ComparisonKind, RoutingDivergence, compare_routes
from moe_upgrpo.routing.compare import concatenated
from moe_upgrpo.routing.gates import gate_overlap, layer_sums
from moe_upgrpo.routing.sets import are_ascending, ascending, unequal


@dataclass(kw_only=True)
class StepRecord:
    """This data-parallel rank's part of one step.

    first_sequence: index, over all ranks, of this rank's first sequence.
    noise_layers: columns of the noise floors, [N] each: layers in which a side differs from itself.
    """

    sequences: Sequence[SequenceRecord]
    first_sequence: int
    num_experts: int
    noise_layers: Mapping[str, np.ndarray] = field(default_factory=dict)

    def knows(self, *names: str) -> bool:
        """Whether the source of these sequences filled these fields."""
        return all(getattr(s, name) is not None for s in self.sequences for name in names)

    def of_tokens(self, name: str) -> np.ndarray:
        """An [N] field of all sequences, one after the other."""
        return np.concatenate([getattr(s, name) for s in self.sequences])

    def pieces(self, name: str) -> list[np.ndarray]:
        """A field over whole sequences, at the rows of each one's tokens: row p - 1 for position p.

        Views where the tokens are consecutive.
        """
        return [getattr(s, name)[_rows(s)] for s in self.sequences]

    def of_rows(self, name: str) -> np.ndarray:
        """The pieces in one array, [N, ...]."""
        return np.concatenate(self.pieces(name))

    @property
    def dense(self) -> bool:
        return self.sequences[0].train_routes.shape[1] == 0

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(s.positions) for s in self.sequences])

    @cached_property
    def _ratio(self) -> np.ndarray:
        """exp(log p_train − log p_old); null where no old log-probs are known."""
        if not self.knows("logp_old"):
            return self._null
        return np.exp(self.of_tokens("logp_train") - self.of_tokens("logp_old"))

    @property
    def _null(self) -> np.ndarray:
        return np.ma.masked_all(int(self._lengths.sum()), float)

    @cached_property
    def _gap(self) -> dict[str, np.ndarray]:
        """The columns of the gap's terms."""
        gaps = [s.gap for s in self.sequences if s.gap is not None]
        if len(gaps) < len(self.sequences):
            return {}
        return {name: np.concatenate([gap[name] for gap in gaps]) for name in gaps[0]}

    def _repeated(self, name: str) -> np.ndarray:
        return np.repeat([getattr(s, name) for s in self.sequences], self._lengths)

    @property
    def _ends(self) -> np.ndarray:
        """Ends of the sequences but the last among the rows R."""
        return np.cumsum([len(s.train_routes) for s in self.sequences])[:-1]

    def _compare(self, train: str, kind: ComparisonKind) -> tuple[np.ndarray, RoutingDivergence]:
        """Compare the rollout's routes with those of the field `train`: the layers that differ in
        each row of the whole sequences [R], and the comparison of the response tokens [N].

        A fault in the routes names its sequence.
        """

        def compare(sequences: Sequence[SequenceRecord]) -> RoutingDivergence:
            sides = (
                _joined([getattr(s, name) for s in sequences]) for name in ("rollout_routes", train)
            )
            return compare_routes(
                *sides, num_experts=self.num_experts, valid=_known(sequences), kind=kind
            )

        mismatched: list[np.ndarray] = []
        of_tokens: list[RoutingDivergence] = []
        end = 0
        try:
            for run in self._runs:
                whole = compare(run)
                mismatched.append(whole.routers_per_token.numpy())
                rows = slice(end, end + len(whole.valid))
                end = rows.stop
                # What is kept of a run is what its tokens need. Without any there is none, unless
                # no run has one, which the last one says.
                if self._is_token[rows].any() or (end == len(self._is_token) and not of_tokens):
                    of_tokens.append(whole.select(torch.from_numpy(self._is_token[rows])))
        except (UserError, ValueError):  # ValueError: numpy's, where routes do not fit together
            for i, sequence in enumerate(self.sequences):
                try:
                    compare([sequence])
                except UserError as error:
                    raise UserError(f"sequence {self.first_sequence + i}: {error}") from None
            raise
        return np.concatenate(mismatched), concatenated(of_tokens)

    @property
    def _runs(self) -> list[Sequence[SequenceRecord]]:
        """The sequences, in runs with about as many (row, layer) pairs as are compared at once."""
        if any(s.known is not None for s in self.sequences):
            return [self.sequences]  # a run may have no row that is known
        runs: list[list[SequenceRecord]] = [[]]
        held = 0
        for sequence in self.sequences:
            if held >= _COMPARED:
                runs.append([])
                held = 0
            runs[-1].append(sequence)
            held += len(sequence.train_routes) * sequence.train_routes.shape[1]
        return [*runs[:-2], runs[-2] + runs[-1]] if len(runs) > 1 and not held else list(runs)

    @cached_property
    def _is_token(self) -> np.ndarray:
        """Whether a row [R] belongs to a token that counts."""
        found = [np.zeros(len(s.train_routes), bool) for s in self.sequences]
        for i, (sequence, rows) in enumerate(zip(self.sequences, found, strict=True)):
            rows[sequence.positions - 1] = True
            if sequence.known is not None and (rows & ~sequence.known).any():
                row = int((rows & ~sequence.known).argmax())
                sides = sequence.rollout_routes[row].tolist(), sequence.train_routes[row].tolist()
                raise UserError(
                    f"sequence {self.first_sequence + i}: the token at position {row + 1} counts, "
                    f"but has no valid routes: rollout {sides[0]}, training {sides[1]}"
                )
        return np.concatenate(found)

    @cached_property
    def _free_running(self) -> tuple[np.ndarray, RoutingDivergence]:
        return self._compare("train_routes", ComparisonKind.FREE_RUNNING)

    @property
    def divergence(self) -> RoutingDivergence:
        """Rollout against trainer on the response tokens, free-running, at the old weights."""
        return self._free_running[1]

    @cached_property
    def conditional(self) -> RoutingDivergence | None:
        """Rollout against what the trainer's routers would choose while held to the rollout's
        routes, at the old weights; None where no such forward was made."""
        if self.dense or not self.knows("own_routes"):
            return None
        return self._compare("own_routes", ComparisonKind.CONDITIONAL)[1]

    def _prefix_mismatched(self) -> np.ndarray:
        """(row, layer) pairs that differ before each token's row; null after an unknown row."""
        mismatched_R, _ = self._free_running
        starts = np.concatenate([[0], self._ends]).astype(int)
        rows_N = np.concatenate(
            [s.positions - 1 + start for s, start in zip(self.sequences, starts, strict=True)]
        )
        first_N = np.repeat(starts, self._lengths)

        def before(counted_R: np.ndarray) -> np.ndarray:
            sums_R = np.concatenate([[0], counted_R.cumsum()])
            return sums_R[rows_N] - sums_R[first_N]

        counts_N = before(mismatched_R)
        known_R = _known(self.sequences)
        if known_R is None or not (unknown_N := before(~known_R) > 0).any():
            return counts_N
        return np.ma.masked_array(counts_N, unknown_N)

    def _routing_columns(self) -> dict[str, np.ndarray | list[np.ndarray]]:
        if self.dense:
            return {"layers_mismatched": np.zeros(self._lengths.sum(), np.int16)}
        columns: dict[str, np.ndarray | list[np.ndarray]] = {
            "layers_mismatched": self.divergence.routers_per_token.numpy(),
            "overlap": self.divergence.overlap.numpy(),
            "rollout_routes": self.pieces("rollout_routes"),
            "train_routes": self.pieces("train_routes"),
            "prefix_mismatched": self._prefix_mismatched(),
        }
        if self.knows("margins"):
            least = [margins_nL.min(axis=1) for margins_nL in self.pieces("margins")]
            columns["margin_min"] = np.concatenate(least)
        if self.conditional is not None:
            per_token_N = self.conditional.routers_per_token.numpy()
            columns["layers_mismatched_conditional"] = per_token_N
        return columns

    def token_rows(self) -> dict[str, np.ndarray | list[np.ndarray]]:
        """The columns of the token log except `step`: [N], `overlap` [N, L], routes [N, L, K].

        Routes come in pieces, one for each sequence, so that memory holds them once.
        """
        lengths = self._lengths
        sequence = self.first_sequence + np.arange(len(lengths))
        rows: dict[str, np.ndarray | list[np.ndarray]] = {
            "sequence": np.repeat(sequence, lengths),
            "prompt": self._repeated("prompt"),
            "position": self.of_tokens("positions"),
            "token_id": np.concatenate([s.token_ids[s.positions] for s in self.sequences]),
            "reward": self._repeated("reward").astype(np.float64),
            "advantage": self.of_tokens("advantage"),
            "logp_rollout": self.of_tokens("logp_rollout"),
            "logp_old": self.of_tokens("logp_old") if self.knows("logp_old") else self._null,
            "logp_train": self.of_tokens("logp_train"),
            "ratio": self._ratio,
            "clipped": self.of_tokens("clipped"),
            "gradient_weight": self.of_tokens("gradient_weight"),
            **self._routing_columns(),
            **self._gap,
            **self.noise_layers,
        }
        if self.knows("staleness"):
            behind = [
                np.broadcast_to(np.asarray(s.staleness, int), len(s.positions))
                for s in self.sequences
            ]
            rows["staleness"] = np.concatenate(behind)
        if self.knows("entropy"):
            rows["entropy"] = self.of_tokens("entropy")
        return rows

    def prompts(self) -> dict[int, np.ndarray]:
        """The token ids of each prompt, by its index within the step."""
        return {
            sequence.prompt: np.asarray(sequence.token_ids)[: int(sequence.positions[0])]
            for sequence in self.sequences
            if len(sequence.positions)
        }

    def sums(self) -> Sums:
        """This rank's share of every mean over the sequences."""
        sequences, tokens = len(self.sequences), int(self._lengths.sum())
        rewards = np.array([s.reward for s in self.sequences])
        pairs: dict[str, tuple[float, float]] = {
            "reward/mean": (float(rewards.sum()), sequences),
            "reward/mean_square": (float((rewards**2).sum()), sequences),
            "response/length_mean": (tokens, sequences),
        }
        if self.knows("finished"):
            finished = sum(bool(s.finished) for s in self.sequences)
            pairs["response/finished_rate"] = (finished, sequences)
        if self.knows("staleness"):
            behind = [np.asarray(s.staleness, float) for s in self.sequences]
            updates = sum(float(one.mean()) for one in behind)
            pairs["staleness/mean"] = (updates, sequences)
        if self.knows("entropy"):
            pairs["entropy/mean"] = (float(self.of_tokens("entropy").sum()), tokens)
        advantage_N = self.of_tokens("advantage")
        pairs["advantage/nonzero_rate"] = (int((advantage_N != 0).sum()), tokens)
        rollout_N = self.of_tokens("logp_rollout").astype(np.float64)
        pairs["entropy/sampled"] = (float(-rollout_N.sum()), tokens)
        for name, term_N in self._gap.items():
            short = name.replace("_", "/", 1)
            pairs[f"{short}/mean"] = (float(term_N.sum()), tokens)
            pairs[f"{short}/mean_abs"] = (float(np.abs(term_N).sum()), tokens)
        sums = {name: Metric(*pair) for name, pair in pairs.items()}
        if self.knows("logp_old"):
            sums |= self._gap_sums()
        return sums if self.dense else sums | self._routing_sums()

    def _gap_sums(self) -> Sums:
        """Sums of the gap and of the ratio, which need log-probs at the old weights."""
        old_N, rollout_N = self.of_tokens("logp_old"), self.of_tokens("logp_rollout")
        gap_N, tokens = np.abs(old_N - rollout_N), len(old_N)
        sums = {
            "logp_gap/mean_abs": Metric(float(gap_N.sum()), tokens),
            "logp_gap/k3": Metric(_k3_sum(old_N, rollout_N), tokens),
        }
        if self.knows("logp_reference"):
            reference_N = self.of_tokens("logp_reference")
            sums["kl/warm_start"] = Metric(_k3_sum(reference_N, old_N), tokens)
        old_N, train_N = (x.astype(np.float64) for x in (old_N, self.of_tokens("logp_train")))
        sums |= tail_sums("logp_gap", old_N - rollout_N)
        sums |= tail_sums("ratio", train_N - old_N)
        return sums | position_sums("logp_gap", self.of_tokens("positions"), gap_N)

    def _routing_sums(self) -> Sums:
        counts = self.divergence  # first: it names a sequence with impossible routes
        rollout_routes = (
            np.concatenate([s.rollout_routes[_rows(s)] for s in run]) for run in self._runs
        )
        sums = routing_sums(counts, rollout_routes)
        mismatched_N = counts.routers_per_token.numpy()
        positions_N = self.of_tokens("positions")
        sums |= position_sums("mismatch", positions_N, mismatched_N, counts.num_layers)
        for name, side in (("", "rollout_routes"), ("_trainer", "train_routes")):
            repeated = sum(_repeats(self._runs, side))
            sums[f"mismatch/repeated_rows{name}"] = Metric(repeated, len(mismatched_N))
        if self.conditional is not None:
            sums |= count_sums("conditional", self.conditional)
        gated = ("held_routes", "held_gates", "train_routes", "native_gates")
        if self.knows(*gated):
            by_layer, tokens = layer_sums(
                gate_overlap(*(torch.from_numpy(self.of_rows(name)) for name in gated))
            )
            sums["conditional/gate_overlap"] = Metric(float(by_layer.sum()), tokens * len(by_layer))
        return sums

    def maxima(self) -> dict[str, float]:
        """Largest values on this rank, by metric."""
        if not self.knows("logp_old"):
            return {}
        gap_N = self.of_tokens("logp_old") - self.of_tokens("logp_rollout")
        return {
            "logp_gap/max_abs": float(np.abs(gap_N).max()),
            "ratio/max": float(self._ratio.max()),
        }


def _rows(sequence: SequenceRecord, start: int = 0) -> slice | np.ndarray:
    """The rows of a sequence's tokens; start: the row of its first input."""
    rows = sequence.positions - 1 + start
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # positions ascend
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return np.asarray(rows)


_LAYERS_LOOKED_AT = 4
_COMPARED = 1 << 16


def _repeats(runs: Iterable[Sequence[SequenceRecord]], side: str) -> list[int]:
    """Count, for each sequence, its tokens whose row of routes is that of another input.

    This is the row before it or, where all of a sequence's rows repeat, a row of another sequence.
    Sets are compared, in a few layers: a stale row is stale in all of them.
    """
    inputs_of: dict[bytes, set[bytes]] = {}  # by digests, so that no step's sets are held
    counts, keys = [], []
    for sequences in runs:
        again_R, sets_R, ids_R, starts = _again(sequences, side)
        for sequence, start in zip(sequences, starts, strict=True):
            rows = _rows(sequence, start)
            counts.append((int(np.count_nonzero(again_R[rows])), len(sequence.positions)))
            keys.append(_digest(sets_R[rows]))
            inputs_of.setdefault(keys[-1], set()).add(_digest(ids_R[rows]))
    return [
        tokens if len(inputs_of[key]) > 1 else count
        for key, (count, tokens) in zip(keys, counts, strict=True)
    ]


def _again(
    sequences: Sequence[SequenceRecord], side: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Tell for each row [R] whether its sets are those of the row before it, for another token.

    Returned with the sets, in a few layers, the tokens' ids, and each sequence's first row.
    """
    routes = [getattr(sequence, side) for sequence in sequences]
    few = np.unique(np.linspace(0, routes[0].shape[1] - 1, _LAYERS_LOOKED_AT).round().astype(int))
    sets_R = _joined([routes_TLK[:, few] for routes_TLK in routes])
    sets_R = sets_R if are_ascending(sets_R) else ascending(sets_R)
    ids_R = _joined([s.token_ids[: len(rows)] for s, rows in zip(sequences, routes, strict=True)])
    starts = np.cumsum([0] + [len(routes_TLK) for routes_TLK in routes])[:-1]
    again_R = np.zeros(len(sets_R), bool)
    again_R[1:] = ~unequal(sets_R[1:], sets_R[:-1]).any(axis=1) & (ids_R[1:] != ids_R[:-1])
    again_R[starts[starts < len(again_R)]] = False
    if (known_R := _known(sequences)) is not None:
        again_R[1:] &= known_R[:-1]
    return again_R, sets_R, ids_R, starts.tolist()


def _digest(values: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One after the other; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _known(sequences: Sequence[SequenceRecord]) -> np.ndarray | None:
    if all(s.known is None for s in sequences):
        return None
    return np.concatenate(
        [np.ones(len(s.train_routes), bool) if s.known is None else s.known for s in sequences]
    )


def _k3_sum(logp_target: np.ndarray, logp_sampler: np.ndarray) -> float:
    """Sum over tokens of the k3 estimate of KL(sampler || target)."""
    sampler, target = (torch.from_numpy(x).double() for x in (logp_sampler, logp_target))
    return float(k3(sampler, target).sum())
