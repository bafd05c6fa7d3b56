# SPDX-License-Identifier: Apache-2.0
"""Kinds of figures and their words: which metrics a figure shows, and what it says of a run.

Shape suffixes: L MoE layers, M numbers of layers 0..L.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from moe_upgrpo.report.runs import Run

Format = Callable[[float], str]
Entry = dict[str, Any]

# noise/KIND/…: the two passes of one side that are compared.
FLOORS = {
    "trainer_repeat": "floor: trainer twice",
    "trainer_batch_shape": "floor: trainer, batch shape",
    "engine_repeat": "floor: engine twice",
    "engine_batch_shape": "floor: engine, one pass",
}


# With fewer, one cannot say whether a metric changes.
MIN_STEPS = 5


def percent(value: float) -> str:
    return f"{100 * value:.3g}%" if abs(value) < 0.9995 else f"{100 * value:.4g}%"


def number(value: float) -> str:
    return f"{value:.3g}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


_SENTENCES = re.compile(r"(?<=[.!?]) (?=[A-Z0-9])")
_BRIEF = 240  # characters: about four lines of a card


def brief(text: str) -> str:
    """The first one or two sentences of a finding, or the first parts of a long sentence."""
    first, *rest = _SENTENCES.split(text)
    if rest and len(first) + len(rest[0]) < _BRIEF:
        return f"{first} {rest[0]}"
    if len(first) <= _BRIEF:
        return first
    parts = first.split("; ")
    while len(parts) > 1 and len("; ".join(parts)) > _BRIEF:
        parts.pop()
    return "; ".join(parts).rstrip(".") + "."


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Metrics over steps. ``metrics`` gives (name, label) for a run, as pass@K differs by run.

    ``floor`` is the last part of the noise floor's metrics, noise/KIND/``floor``: marks at the
    analysed steps, a line at their mean.
    """

    key: str
    title: str
    metrics: Callable[[Run], list[tuple[str, str]]]
    read: str = ""
    says: Callable[[Run], str] = lambda run: ""
    is_share: bool = False
    log_scale: bool = False
    points_only: bool = False
    from_zero: bool = False
    floor: str | None = None

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        """One entry for each run and metric that has values."""
        entries = []
        for run in runs:
            metrics = [(name, label, False) for name, label in self.metrics(run)]
            if self.floor:
                metrics += [(f"noise/{k}/{self.floor}", label, True) for k, label in FLOORS.items()]
            for name, label, is_floor in metrics:
                steps, values = run.series(name)
                if is_floor and steps and run.stale_steps:
                    # Stale samples also differ by an update: no floor is comparable with them.
                    stale = set(run.stale_steps)
                    fresh = [i for i, step in enumerate(steps) if step not in stale]
                    steps, values = ([found[i] for i in fresh] for found in (steps, values))
                if values:
                    entry = {"run": run.label, "metric": name, "label": label, "floor": is_floor}
                    entries.append(entry | thinned(steps, values))
        return entries

    def finding(self, run: Run, entries: list[Entry]) -> str:
        return self.says(run)


MAX_POINTS = 2000  # of a curve: more than a page has pixels across
_BINS = 400


def thinned(steps: list[int], values: list[float]) -> Entry:
    """A curve's points; for a long run, the lowest and highest of each of 400 stretches of steps,
    so that no spike is lost, and each stretch's mean beside them."""
    if len(values) <= MAX_POINTS:
        return {"steps": steps, "values": values}
    kept, middles, means = [], [], []
    for part in np.array_split(np.arange(len(values)), _BINS):
        found = np.array(values[part[0] : part[-1] + 1])
        kept += sorted({int(part[found.argmin()]), int(part[found.argmax()])})
        middles.append(steps[int(part[len(part) // 2])])
        means.append(float(found.mean()))
    shown = {"steps": [steps[i] for i in kept], "values": [values[i] for i in kept]}
    return shown | {"middles": middles, "means": means}


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A list of L rates, layer × step, one drawing for each run."""

    key: str
    title: str
    metric: str
    read: str
    says: Callable[[Run], str]

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        entries = []
        for run in runs:
            if (found := run.by_layer(self.metric)) is None:
                continue
            steps, rates = found
            if len(steps) > MAX_POINTS:
                parts = np.array_split(np.arange(len(steps)), _BINS)
                steps = [steps[int(part[len(part) // 2])] for part in parts]
                with warnings.catch_warnings():  # about a layer without a number in a stretch
                    warnings.simplefilter("ignore", RuntimeWarning)
                    rates = np.stack([np.nanmean(rates[part], axis=0) for part in parts])
            nullable = np.where(np.isnan(rates), None, rates.astype(object))
            layers = run.layer_ids(rates.shape[1])
            entry = {"run": run.label, "metric": self.metric, "layer_ids": layers}
            entries.append(entry | {"steps": steps, "rates": nullable.tolist()})
        return entries

    def finding(self, run: Run, entries: list[Entry]) -> str:
        return self.says(run)


@dataclass(frozen=True, kw_only=True)
class ByLayer:
    """A list of L rates pooled over the steps; ``floor`` adds noise/KIND/by_layer.

    A run with stale samples gets no pooled floor, as it would not be comparable with the rates.
    """

    key: str
    title: str
    metric: str
    label: str
    read: str = ""
    says: Callable[[Run], str] = lambda run: ""
    floor: bool = False

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        metrics = [(self.metric, self.label, False)]
        entries = []
        for run in runs:
            floors = FLOORS if self.floor and not run.stale_steps else {}
            pooled = [(f"noise/{kind}/by_layer", label, True) for kind, label in floors.items()]
            for name, label, is_floor in metrics + pooled:
                rates = run.pooled_by_layer(name)
                if rates is not None:
                    entry = {"run": run.label, "metric": name, "label": label, "floor": is_floor}
                    layers = {"layer_ids": run.layer_ids(len(rates)), "rates": rates.tolist()}
                    entries.append(entry | layers)
        return entries

    def finding(self, run: Run, entries: list[Entry]) -> str:
        return self.says(run)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Tokens by their number of mismatched layers, summed over the steps, with the noise floors.

    A run with stale samples gets no floors, as in `ByLayer`.
    """

    key: str
    title: str
    read: str
    says: Callable[[Run, list[Entry]], str]

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        metrics = [("mismatch/histogram", "engine against trainer", False)]
        floors = [(f"noise/{kind}/histogram", label, True) for kind, label in FLOORS.items()]
        entries = []
        for run in runs:
            for name, label, is_floor in metrics if run.stale_steps else metrics + floors:
                tokens_M = run.summed(name)
                if tokens_M is None or not tokens_M.sum():
                    continue
                entry = {"run": run.label, "metric": name, "label": label, "floor": is_floor}
                entries.append(
                    entry
                    | {
                        "layers": list(range(len(tokens_M))),
                        "tokens": tokens_M.tolist(),
                        "shares": (tokens_M / tokens_M.sum()).tolist(),
                    }
                )
        return entries

    def finding(self, run: Run, entries: list[Entry]) -> str:
        return self.says(run, entries) if entries else no_routes(run)


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Several drawings in one card; each of its entries names its ``panel``."""

    key: str
    title: str
    parts: tuple[Any, ...]
    read: str
    says: Callable[[Run, dict[str, list[Entry]]], str]

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        return [{"panel": part.key} | entry for part in self.parts for entry in part.data(runs)]

    def finding(self, run: Run, entries: list[Entry]) -> str:
        by_panel = {part.key: [e for e in entries if e["panel"] == part.key] for part in self.parts}
        return self.says(run, by_panel)


def only(*metrics: tuple[str, str]) -> Callable[[Run], list[tuple[str, str]]]:
    return lambda run: list(metrics)


def absent(run: Run, what: str) -> str:
    """Why a training metric is missing."""
    if run.is_probe:
        return "a probe samples and compares: it has no rewards and trains nothing."
    return f"{what} was not logged."


def no_routes(run: Run) -> str:
    """Why a run has no routing figure."""
    return "the model has no MoE layer." if run.is_dense else "no routes were compared."


def trend(run: Run, name: str, what: str, form: Format = number) -> str:
    """The beginning of a run against its end, and whether they differ by more than step noise.

    The noise of one step is taken as the standard deviation of the differences of consecutive
    values over √2 or, for the reward, its standard error if that is larger. A change counts when it
    is beyond the 95% interval (Student's t) of the difference between two means of n steps.
    """
    steps, values = run.series(name)
    if not values:
        return absent(run, name)
    if len(values) == 1:
        return f"{what} is {form(values[0])} at step {steps[0]}, the only one logged."
    if len(values) < MIN_STEPS:
        return (
            f"{what} is {form(values[0])} at step {steps[0]} and {form(values[-1])} at step "
            f"{steps[-1]}: {len(values)} steps are too few to say whether it changes."
        )
    first, last, n = run.ends(name)
    noise = np.std(np.diff(values), ddof=1) / np.sqrt(2)
    if name == "reward/mean":
        noise = max(noise, _reward_error(run))
    if abs(last - first) <= student_t.ppf(0.975, len(values) - 2) * noise * np.sqrt(2 / n):
        return (
            f"{what} is {form(first)} in the first and {form(last)} in the last {n} steps: "
            "no change beyond the noise from step to step."
        )
    verb = "rises" if last > first else "falls"
    return (
        f"{what} {verb} from {form(first)} to {form(last)} between the first and the last {n} "
        "steps."
    )


def _reward_error(run: Run) -> float:
    """Standard error of a step's mean reward, root mean square over the steps that record it.

    A step samples tokens/sampled ÷ response/length_mean sequences.
    """
    names = ("reward/std", "response/length_mean", "tokens/sampled")
    known = [[row[n] for n in names] for row in run.rows if all(row.get(n) for n in names)]
    squares = [std**2 * length / tokens for std, length, tokens in known]
    return float(np.sqrt(np.mean(squares))) if squares else 0.0


def says_trend(name: str, what: str, form: Format = number) -> Callable[[Run], str]:
    return lambda run: trend(run, name, what, form)
