# SPDX-License-Identifier: Apache-2.0
"""The plan of a comparison, fixed before the first run: arms, seeds, endpoint, contrasts."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from moe_upgrpo.errors import UserError
from moe_upgrpo.train.command_line import parsed
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.options import mapping_arguments, read_yaml
from moe_upgrpo.train.passed_words import folded

Summary = Literal["mean", "last", "best"]
_OF_SAMPLES = ("avg", "best", "maj", "pass")
"""Metrics of n samples of a held-out problem, eval/KIND@n (`train.evaluate.finish`)."""


@dataclass(frozen=True, kw_only=True)
class Primary:
    """The endpoint that the comparison is decided by.

    mean: over the evaluations after step 0 (the area under the curve in steps); last; best.
    """

    metric: str = "eval/pass@1"
    summary: Summary = "mean"

    def __post_init__(self):
        if not self.metric.startswith("eval/"):
            raise UserError(f"primary.metric={self.metric!r}: a metric eval/... is needed.")
        if self.summary not in ("mean", "last", "best"):
            raise UserError(f"primary.summary={self.summary!r}: use mean, last or best.")


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Choice of every arm's learning rate, from the same values, seeds and steps for each.

    It takes the value with the highest mean of `metric` over the last half of the steps, averaged
    over `seeds`, which no compared run uses. The metric is of training, so that held-out problems
    choose nothing. A run that ended early counts as 0 for the steps it lacks.
    """

    values: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    metric: str = "reward/correct_rate"

    def __post_init__(self):
        if len(set(self.values)) < 2 or not self.seeds or self.steps < 2:
            raise UserError(
                f"learning_rates: {len(set(self.values))} values, {len(self.seeds)} seeds, "
                f"{self.steps} steps; at least 2 values, 1 seed and 2 steps are needed."
            )
        for name, given in (("values", self.values), ("seeds", self.seeds)):
            if len(set(given)) < len(given):  # two runs would write to one folder
                raise UserError(f"learning_rates.{name}={list(given)}: one is listed twice.")
        if self.metric.startswith("eval/"):
            raise UserError("learning_rates.metric: held-out problems must not choose anything.")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms × seeds of one training job, and the questions asked of the results."""

    name: str
    question: str
    base: dict[str, Any]
    """Options of `train` that all arms share."""
    arms: dict[str, dict[str, Any]]
    """Options of each arm, over those of `base`."""
    seeds: tuple[int, ...]
    contrasts: tuple[tuple[str, str], ...]
    """Pairs (arm, the arm it is compared with), tested together: Holm's correction is over them."""
    primary: Primary = field(default_factory=Primary)
    learning_rates: LearningRates | None = None
    """None: the options give the learning rate."""
    warm_start_by_seed: bool = True
    """Where the model is warm-started: seed s starts from warm start s."""
    nproc: int = 1
    """Ranks of a run."""
    confidence: float = 0.95

    def __post_init__(self):
        if len(self.arms) < 2 or not self.contrasts:
            raise UserError("a comparison needs at least 2 arms and 1 contrast.")
        for what, name in (("name", self.name), *(("arm", arm) for arm in self.arms)):
            # Names are parts of file names, and arms are keys of plan.json.
            if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
                raise UserError(f"{what} {name!r}: letters, digits and . _ + - are needed.")
        for arm in (arm for pair in self.contrasts for arm in pair):
            if arm not in self.arms:
                raise UserError(f"contrasts: {arm!r} is not an arm; known: {', '.join(self.arms)}.")
        # The report could not test these, but would say so only after the last run.
        pairs = {frozenset(pair) for pair in self.contrasts}
        if len(pairs) < len(self.contrasts) or any(len(pair) < 2 for pair in pairs):
            raise UserError("contrasts: a pair is an arm with itself, or is listed more than once.")
        if not isinstance(self.confidence, float) or not 0 < self.confidence < 1:
            raise UserError(f"confidence={self.confidence!r}: a number such as 0.95 is needed.")
        if not isinstance(self.warm_start_by_seed, bool):
            given = self.warm_start_by_seed
            raise UserError(f"warm_start_by_seed={given!r}: true or false is needed.")
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise UserError(f"seeds={list(self.seeds)}: at least 2, all different.")
        if not all(type(seed) is int and seed >= 0 for seed in self.seeds):
            raise UserError(f"seeds={list(self.seeds)}: whole numbers of at least 0 are needed.")
        if self.learning_rates and {*self.seeds} & {*self.learning_rates.seeds}:
            raise UserError("learning_rates.seeds: other seeds than those compared are needed.")
        if self.nproc < 1:
            raise UserError(f"nproc={self.nproc}: at least 1 is needed.")
        for name in self.arms:
            given = {*self.base, *self.arms[name]} & {"seed", "output_dir", "resume", "config"}
            if given:
                raise UserError(f"arm {name}: {', '.join(given)} is set by the comparison.")
            for run in (Run(arm=name, seed=self.seeds[0]), *self.tuning()[:1]):
                config = self.config(run)
                config.layout(self.nproc)
                if not run.tuning:
                    self._check_measured(name, config.evaluation.eval_samples)

    def _check_measured(self, arm: str, samples: int) -> None:
        """Raise UserError where the arm's evaluations do not give the primary metric."""
        known = {"greedy", "pass@1", *(f"{kind}@{samples}" for kind in _OF_SAMPLES)}
        if self.primary.metric.removeprefix("eval/") not in known:
            raise UserError(
                f"primary.metric={self.primary.metric!r} is not measured with arm {arm}'s "
                f"eval_samples={samples}; known: eval/{', eval/'.join(sorted(known))}."
            )

    def options(self, run: Run) -> dict[str, Any]:
        """The options of `train` for one run."""
        found = _merged(self.base, self.arms[run.arm], {"seed": run.seed, "report": False})
        if self.warm_start_by_seed and "model" not in found:
            found = _merged(found, {"warm_start": {"seed": run.seed}})
        if run.lr is not None:
            found = _merged(found, {"optimizer": {"lr": run.lr}})
        if run.tuning:
            found |= {"steps": self.learning_rates.steps}
            found |= {"eval_every": self.learning_rates.steps, "eval_problems": 1}
        return found

    def config(self, run: Run) -> TrainConfig:
        """The checked config of one run. Raises UserError naming the arm."""
        try:
            words = folded(mapping_arguments(self.options(run)))
            return parsed(TrainConfig, words, "moe-upgrpo train")
        except UserError as error:
            raise UserError(f"arm {run.arm}: {error}") from None

    def tuning(self) -> list[Run]:
        """The runs that choose the learning rates."""
        if self.learning_rates is None:
            return []
        return [
            Run(arm=arm, seed=seed, lr=lr, tuning=True)
            for seed in self.learning_rates.seeds
            for lr in self.learning_rates.values
            for arm in self.arms
        ]

    def runs(self, rates: dict[str, float]) -> list[Run]:
        """The compared runs, all arms of a seed before the next seed."""
        return [Run(arm=a, seed=s, lr=rates.get(a)) for s in self.seeds for a in self.arms]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a comparison; lr None: as in the options."""

    arm: str
    seed: int
    lr: float | None = None
    tuning: bool = False

    @property
    def key(self) -> str:
        """Its name in paths."""
        rate = f"-lr{self.lr:g}" if self.tuning else ""
        return f"{'tuning-' if self.tuning else ''}{self.arm}{rate}-seed{self.seed}"


def read_plan(path: Path) -> Comparison:
    """Read the comparison in a YAML (or JSON) file. Raises UserError naming the file."""
    needed = "fields of a comparison (name, question, base, arms, ...)"
    return read_yaml(path, from_values, named=str(path), needed=needed)


def from_values(values: dict[str, Any]) -> Comparison:
    known = {f.name for f in fields(Comparison)}
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{', '.join(unknown)}: not a field; known: {', '.join(sorted(known))}.")
    needed = ("name", "question", "base", "arms", "seeds", "contrasts")
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{', '.join(missing)} is missing.")
    try:
        made = dict(values)
        made["arms"] = {name: options or {} for name, options in values["arms"].items()}
        made["seeds"] = tuple(values["seeds"])
        made["contrasts"] = tuple((first, second) for first, second in values["contrasts"])
        if values.get("primary") is not None:
            made["primary"] = Primary(**values["primary"])
        if values.get("learning_rates") is not None:
            rates = values["learning_rates"]
            # 1e-4, without a dot, is a string in YAML.
            lists = {"values": tuple(map(float, rates["values"])), "seeds": tuple(rates["seeds"])}
            made["learning_rates"] = LearningRates(**rates | lists)
        return Comparison(**made)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"a field has the wrong form: {error}.") from None


def default_parallel(nproc: int) -> int:
    """Runs at a time: one for each core that a rank can have to itself."""
    return max(1, len(os.sched_getaffinity(0)) // nproc)


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Later values win; groups of options are merged field by field."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            key = key.replace("-", "_")
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = _merged(found[key], value) if both else value
    return found
