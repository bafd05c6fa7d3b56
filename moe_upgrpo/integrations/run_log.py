"""The run folder of a trainer that is not ours: token rows and metrics of what a stack hands over.

One `RunLog` for each data-parallel rank; `write_step` is a collective over `group`. What a stack
cannot tell is left out: a column that no sequence has, a metric that nothing was counted for.

Shapes: S tokens of a sequence, N of its response tokens that count, L MoE layers, K experts each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.routing import ComparisonKind, RoutingDivergence, compare_routes
from moe_upgrpo.store import RunFolder, TokenLogWriter
from moe_upgrpo.train.sums import count_sums, measured, routing_sums


@dataclass(kw_only=True)
class LoggedSequence:
    """A sequence at its last optimizer visit. Routes are whole: row p - 1 for the token at p.

    prompt: what tells its prompt from others of the step, on whatever rank.
    positions: `[N]` of the response tokens that count, in prompt + response.
    held_logp: `[N]`, R3: log-probs at the old weights, held to the rollout's routes.
    native_logp: `[N]`, R3: the same in a forward without replay.
    own_routes: R3: what the routers would have chosen in the held forward.
    """

    prompt: str
    token_ids: np.ndarray  # [S]
    positions: np.ndarray
    reward: float
    advantage: np.ndarray
    logp_rollout: np.ndarray
    logp_old: np.ndarray
    logp_train: np.ndarray
    clipped: np.ndarray
    gradient_weight: np.ndarray
    rollout_routes: np.ndarray  # [S - 1, L, K]
    train_routes: np.ndarray
    own_routes: np.ndarray | None = None
    native_logp: np.ndarray | None = None
    entropy: np.ndarray | None = None


@dataclass
class Step:
    """Figures that one data-parallel rank gathered of a step besides its sequences."""

    sequences: list[LoggedSequence] = field(default_factory=list)
    loss_metrics: list[dict[str, Metric]] = field(default_factory=list)
    loss_sum: float = 0.0  # this rank's share of the losses of all optimizer steps
    updates: int = 0
    clips: dict[str, np.ndarray] = field(
        default_factory=lambda: {s: np.zeros(2) for s in ("positive", "negative")}
    )  # token visits clipped, and all, by the sign of A


def check_free(path: Path) -> None:
    """UserError where a run lies there already."""
    if RunFolder(path).config_path.exists():
        raise UserError(
            f"{path} already holds a run: name a new folder (a job that is resumed writes one of "
            "its own), or delete it"
        )


class RunLog:
    """Writes the steps of one data-parallel rank into a run folder that all ranks share."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        *,
        group: dist.ProcessGroup | None,
        layer_ids: Sequence[int],
        top_k: int,
        num_experts: int,
        share: float = 1.0,
    ):
        """group: the data-parallel ranks. share: of the sequences whose rows are kept."""
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.num_experts = num_experts
        level = "full" if share == 1 else "sampled"
        config = config | {
            "moe_layers": list(layer_ids),
            "top_k": top_k,
            "num_experts": num_experts,
            "world_size": dist.get_world_size(),
            "token_log": level,
            "token_log_share": share,
        }
        problem = None
        if self.rank == 0:
            try:
                check_free(path)
                RunFolder.create(path, config)
            except UserError as error:
                problem = str(error)
        problem = self._gather(problem)[0]
        if problem:
            raise UserError(problem)
        self.run = RunFolder(path)
        self.writer = TokenLogWriter(
            self.run.tokens,
            rank=self.rank,
            layer_ids=layer_ids,
            top_k=top_k,
            num_experts=num_experts,
            level=level,
            share=share,
        )

    def _gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def write_step(self, number: int, step: Step) -> dict[str, float | list[float]]:
        """Token rows, then the metrics row; returns the metrics, the same on every rank.

        Raises:
            UserError, on every rank: what was wrong with a rank's sequences.
        """
        prompts = self._gather([s.prompt for s in step.sequences])
        first = sum(map(len, prompts[: self.rank]))
        index = {p: i for i, p in enumerate(dict.fromkeys(p for rank in prompts for p in rank))}
        problem, sums = None, {}
        try:
            if step.sequences:
                columns, sums = _columns_and_sums(step, first, index, self.num_experts)
                self.writer.write(number, columns)
        except UserError as error:
            problem = f"data-parallel rank {self.rank}: {error}"
        # Every rank makes the same optimizer steps, and its losses add up to those of the batch.
        sums["loss/policy"] = Metric(step.loss_sum, step.updates if self.rank == 0 else 0)
        sums |= {f"clip/{sign}": Metric(*map(float, pair)) for sign, pair in step.clips.items()}
        gathered = self._gather((problem, sums, step.loss_metrics))
        problems = [problem for problem, *_ in gathered if problem]
        if problems:
            raise UserError(f"step {number}: {problems[0]}")
        total = _added([sums for _, sums, _ in gathered])
        if "reward/mean" not in total:
            raise UserError(f"step {number}: no sequence with a response token was visited")
        metrics = measured(total)
        if of_loss := [part for *_, parts in gathered for part in parts]:
            values = finalize_metrics(merge_metrics(of_loss))
            metrics |= {f"loss/{name}": value for name, value in values.items()}
        if self.rank == 0:
            self.run.append_metrics({"step": number} | metrics)
        return metrics


def _added(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Sum over ranks some of which may have had no sequence, so that they lack names."""
    names = dict.fromkeys(name for part in parts for name in part)
    pairs = {name: [part[name] for part in parts if name in part] for name in names}
    return {n: Metric(*map(sum, zip(*found, strict=True))) for n, found in pairs.items()}


def _columns_and_sums(
    step: Step, first: int, prompts: dict[str, int], num_experts: int
) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
    sequences = step.sequences
    lengths = np.array([len(s.positions) for s in sequences])
    number = first + np.arange(len(sequences))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(s, name) for s in sequences])

    logp_train, logp_old, logp_rollout = map(joined, ("logp_train", "logp_old", "logp_rollout"))
    rollout_NLK, train_NLK = _response_rows(sequences, "rollout_routes", "train_routes")
    divergence = _compare(sequences, number, rollout_NLK, train_NLK, num_experts)
    columns = {
        "sequence": np.repeat(number, lengths),
        "prompt": np.repeat([prompts[s.prompt] for s in sequences], lengths),
        "position": joined("positions"),
        "token_id": np.concatenate([s.token_ids[s.positions] for s in sequences]),
        "reward": np.repeat([float(s.reward) for s in sequences], lengths),
        "advantage": joined("advantage"),
        "logp_rollout": logp_rollout,
        "logp_old": logp_old,
        "logp_train": logp_train,
        "ratio": np.exp(logp_train - logp_old),
        "clipped": joined("clipped"),
        "gradient_weight": joined("gradient_weight"),
        "layers_mismatched": divergence.routers_per_token.numpy(),
        "overlap": divergence.overlap.numpy(),
        "rollout_routes": rollout_NLK,
        "train_routes": train_NLK,
    }
    tokens = int(lengths.sum())
    rewards, gap_N = np.array([s.reward for s in sequences]), logp_old - logp_rollout
    old, rollout = (torch.from_numpy(x).double() for x in (logp_old, logp_rollout))
    pairs = {
        "reward/mean": (rewards.sum(), len(sequences)),
        "reward/mean_square": ((rewards**2).sum(), len(sequences)),
        "response/length_mean": (tokens, len(sequences)),
        "logp_gap/mean_abs": (np.abs(gap_N).sum(), tokens),
        "logp_gap/k3": (float(k3(rollout, old).sum()), tokens),
    }
    sums = {}
    if all(s.entropy is not None for s in sequences):
        columns["entropy"] = joined("entropy")
        pairs["entropy/mean"] = (columns["entropy"].sum(), tokens)
    if all(s.own_routes is not None for s in sequences):  # R3
        (own_NLK,) = _response_rows(sequences, "own_routes")
        conditional = _compare(
            sequences, number, rollout_NLK, own_NLK, num_experts, ComparisonKind.CONDITIONAL
        )
        sums |= count_sums("conditional", conditional)
        columns["layers_mismatched_conditional"] = conditional.routers_per_token.numpy()
        terms = {
            "gap_numerics": gap_N,
            "gap_update": logp_train - logp_old,
            "counterfactual_engine_routing": joined("native_logp") - logp_old,
        }
        columns |= terms
        for name, term_N in terms.items():
            short = name.replace("_", "/", 1)
            pairs[f"{short}/mean"] = (term_N.sum(), tokens)
            pairs[f"{short}/mean_abs"] = (np.abs(term_N).sum(), tokens)
    sums |= routing_sums(divergence, rollout_NLK)
    return columns, sums | {name: Metric(*map(float, pair)) for name, pair in pairs.items()}


def _response_rows(sequences: Sequence[LoggedSequence], *names: str) -> list[np.ndarray]:
    return [
        np.concatenate([getattr(s, name)[s.positions - 1] for s in sequences]) for name in names
    ]


def _compare(
    sequences, number, rollout_NLK, train_NLK, num_experts, kind=ComparisonKind.FREE_RUNNING
) -> RoutingDivergence:
    """A fault in the routes names its sequence."""

    def compare(rows: slice) -> RoutingDivergence:
        first, second = (
            torch.from_numpy(np.ascontiguousarray(side[rows])) for side in (rollout_NLK, train_NLK)
        )
        return compare_routes(first, second, num_experts=num_experts, kind=kind)

    try:
        return compare(slice(None))
    except UserError:
        start = 0
        for i, sequence in zip(number, sequences, strict=True):
            rows = slice(start, start + len(sequence.positions))
            start = rows.stop
            try:
                compare(rows)
            except UserError as error:
                raise UserError(f"sequence {i}: {error}") from None
        raise
