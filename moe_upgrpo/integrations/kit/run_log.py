# SPDX-License-Identifier: Apache-2.0
"""The run folder of another stack's trainer: token rows and metrics.

There is one `RunLog` for each data-parallel rank; `write_step` is a collective over `group`. What a
stack cannot tell is left out: a column that no sequence has, a metric with nothing counted for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.folder import downloaded
from moe_upgrpo.hugging_face.tokenizer import keep_vocabulary
from moe_upgrpo.losses import Metric, finalize_metrics, merge_metrics
from moe_upgrpo.record import SequenceRecord, StepRecord, alarms, gap_terms, measured
from moe_upgrpo.record.limits import AlarmLimits
from moe_upgrpo.record.weights import changed, fingerprint
from moe_upgrpo.store import RunFolder, TokenLogWriter

_REPORTED = (
    "mismatch/",
    "conditional/",
    "logp_gap/",
    "gap/",
    "counterfactual/",
    "ratio/",
    "clip/",
    "alarms/",
    "weights/",
    "advantage/",
)


def reported(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step that go to the stack's own trackers too."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(_REPORTED) and not isinstance(value, list)
    }


def gap_under_r3(
    logp_rollout: np.ndarray, logp_old: np.ndarray, native: np.ndarray, logp_train: np.ndarray
) -> dict[str, np.ndarray]:
    """The gap's terms when old and current policy are held to the rollout's routes."""
    return gap_terms(
        "R3",
        rollout=logp_rollout,
        native=native,
        held=logp_old,
        counterpart=None,
        train=logp_train,
    )


@dataclass
class Step:
    """Figures, besides its sequences, that one data-parallel rank gathered in a step.

    sequences: `prompt` tells their prompts from others of the step, on any rank.
    """

    sequences: list[SequenceRecord] = field(default_factory=list)
    loss_metrics: list[dict[str, Metric]] = field(default_factory=list)
    loss_sum: float = 0.0  # this rank's share of the losses of all optimizer steps
    updates: float = 0
    visited: int = 0  # tokens, at each optimizer step that uses them
    without_routes: int | None = None  # response tokens whose rollout routes are missing
    clips: dict[str, np.ndarray] = field(
        default_factory=lambda: {s: np.zeros(2) for s in ("positive", "negative")}
    )  # token visits clipped, and all, by the sign of A

    def add(self, other: Step) -> None:
        """Add what another rank gathered in the same optimizer steps, except its sequences."""
        self.loss_metrics += other.loss_metrics
        self.loss_sum += other.loss_sum
        self.visited += other.visited
        for sign, counts in other.clips.items():
            self.clips[sign] += counts

    def visit(self, clipped, advantage, mask) -> None:
        """Count one visit of tokens, as tensors or arrays of one shape."""
        self.visited += int(mask.sum())
        for sign, here in (("positive", advantage > 0), ("negative", advantage < 0)):
            self.clips[sign] += [int((clipped & here).sum()), int((mask & here).sum())]


def check_free(path: Path) -> None:
    """Raise UserError if the folder already holds a run."""
    if RunFolder(path).config_path.exists():
        raise UserError(
            f"{path} already holds a run: name a new folder (a job that is resumed writes one of "
            "its own), or delete it"
        )


def keep_texts(run: Path, tokenizer: str | Path | None) -> None:
    """Write the texts of tokens into a run folder, or say how to get them into its report later.

    The job never ends because of them, whatever a tokenizer's library raises: the log is complete
    without.
    """
    try:
        if tokenizer is None:
            raise UserError("no tokenizer is named")
        keep_vocabulary(run, downloaded(tokenizer))
    except Exception as error:  # if the disk is full, the log's own next write says so
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        why = (str(error).splitlines() or ["no reason given"])[0]
        print(
            f"moe_upgrpo: the report of {run} shows token ids in place of texts, unless it is made "
            f"with moe-upgrpo report {run} --tokenizer FOLDER: {kind}{why}",
            flush=True,
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
        modules: Sequence[nn.Module] = (),
        limits: AlarmLimits | None = None,
        tokenizer: str | Path | None = None,
    ):
        """group: the data-parallel ranks. share: of the sequences whose rows are kept.

        modules: the trained model, where one can check whether a step changed its weights.
        tokenizer: the folder or name of the model whose tokenizer gives tokens their texts.
        """
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.num_experts = num_experts
        level = "full" if share == 1 else "sampled"
        limits = limits or AlarmLimits()
        self.watch = alarms.Watch(limits, replay=config.get("replay"))
        self.modules = modules
        self._fingerprint: list[float] | None = None
        self._explained: set[str] = set()
        config = config | {
            "moe_layers": list(layer_ids),
            "top_k": top_k,
            "num_experts": num_experts,
            "world_size": dist.get_world_size(),
            "token_log": level,
            "token_log_share": share,
            "alarms": alarms.texts(limits),
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
        # Held as long as the process lives: a follower of the run sees its end by it.
        self._lock = self.run.locked() if self.rank == 0 else nullcontext()
        self._lock.__enter__()
        if self.rank == 0:
            keep_texts(path, tokenizer)
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
        problem, sums, maxima = None, {}, {}
        try:
            if step.sequences:
                record = StepRecord(
                    sequences=[replace(s, prompt=index[s.prompt]) for s in step.sequences],
                    first_sequence=first,
                    num_experts=self.num_experts,
                )
                sums, maxima = record.sums(), record.maxima()
                self.writer.write_prompts(number, record.prompts())
                self.writer.write(number, record.token_rows())
        except UserError as error:
            problem = f"data-parallel rank {self.rank}: {error}"
        # Every rank makes the same optimizer steps, and its losses add up to those of the batch.
        sums["loss/policy"] = Metric(step.loss_sum, step.updates if self.rank == 0 else 0)
        sums |= {f"clip/{sign}": Metric(*map(float, pair)) for sign, pair in step.clips.items()}
        of_rank = problem, sums, step.loss_metrics, maxima, step.visited, step.without_routes
        gathered = self._gather(of_rank)
        problems = [problem for problem, *_ in gathered if problem]
        if problems:
            raise UserError(f"step {number}: {problems[0]}")
        total = _added([sums for _, sums, *_ in gathered])
        if "reward/mean" not in total:
            raise UserError(f"step {number}: no sequence with a response token was visited")
        metrics = measured(total)
        if of_loss := [part for _, _, parts, *_ in gathered for part in parts]:
            values = finalize_metrics(merge_metrics(of_loss))
            metrics |= {f"loss/{name}": value for name, value in values.items()}
        for name in dict.fromkeys(name for *_, maxima, _, _ in gathered for name in maxima):
            metrics[name] = max(maxima[name] for *_, maxima, _, _ in gathered if name in maxima)
        metrics["tokens/visited"] = sum(visited for *_, visited, _ in gathered)
        without = [count for *_, count in gathered if count is not None]
        if without:
            metrics["mismatch/tokens_without_routes"] = float(sum(without))
        if self.modules:
            before, self._fingerprint = self._fingerprint, fingerprint(self.modules)
            if before:  # from the second step on
                moved, tensors = changed(before, self._fingerprint)
                metrics["weights/changed_rate"] = moved / tensors
        raised = self.watch.add_to(metrics)
        names = metrics.pop("alarms")
        if self.rank == 0:
            self.run.append_metrics({"step": number} | metrics | {"alarms": names})
            for one in raised:  # explained when it is first raised, then only named
                new = one.name not in self._explained
                means = f": {alarms.ALARMS[one.name].means}" if new else ""
                self._explained.add(one.name)
                print(f"moe_upgrpo ALARM at step {number}: {one.short}{means}", flush=True)
        return metrics


def _added(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Sum over ranks; a rank without a sequence may lack names."""
    names = dict.fromkeys(name for part in parts for name in part)
    pairs = {name: [part[name] for part in parts if name in part] for name in names}
    return {n: Metric(*map(sum, zip(*found, strict=True))) for n, found in pairs.items()}
