# SPDX-License-Identifier: Apache-2.0
"""Figures of one run, each a pure function of its kept data.

An evaluation that a crashed run did not reach counts as accuracy 0, and a training step as reward
0; every other figure uses the steps that exist. Values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_upgrpo.compare.data import RunData
from moe_upgrpo.errors import UserError

REWARD = "reward/correct_rate"
KL = "kl/warm_start"
ESS = "effective_sample_size"
"""A curve of its own: `loss/ratio_effective_sample_size` over the visited tokens."""
SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "last": lambda values: float(values[-1]),
    "best": lambda values: float(max(values)),
}
REACHED_BY = 0.75
"""Share of the runs that have to reach the level of `matched_reward`."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`of` gives the figure, None where the run has none; `is_share`: shown in percent."""

    key: str
    label: str
    meaning: str
    of: Callable[[RunData], float | None]
    is_share: bool = False


def evaluation_metrics(runs: Sequence[RunData]) -> list[str]:
    """Accuracies measured: greedy, pass@K and maj@K by K. avg@K is pass@1, best@K is pass@K."""
    names = {name for run in runs for row in run.rows for name, x in row.items() if x is not None}
    found = ["eval/greedy"] if "eval/greedy" in names else []
    for kind in ("pass", "maj"):
        known = [name for name in names if name.startswith(f"eval/{kind}@")]
        found += sorted(known, key=lambda name: int(name.split("@")[1]))
    return found


def evaluations_due(run: RunData) -> list[int]:
    """The steps after which the run was due for evaluation: each eval_every-th, and the last."""
    steps, every = run.about.steps, run.about.config.get("eval_every")
    if not every:
        raise UserError(f"{_name(run)}: its config has no eval_every.")
    return sorted({*range(every, steps + 1, every), steps})


def evaluations(run: RunData, metric: str) -> dict[int, float]:
    """Step → value, step 0 (before training) where it was measured.

    A crashed run has 0 for those it missed. Raises UserError: a finished run lacks an evaluation.
    """
    found = _finite(run, metric)
    missing = [step for step in evaluations_due(run) if step not in found]
    if missing and run.about.status != "crashed":
        raise UserError(f"{_name(run)} finished, and has no {metric} at step {missing[0]}.")
    return dict(sorted((found | dict.fromkeys(missing, 0.0)).items()))


def summary(run: RunData, metric: str, how: str) -> float:
    """mean, last or best of the evaluations after step 0.

    They are evenly spaced except for the last, so the mean is the area under the curve over its
    length.
    """
    return SUMMARIES[how]([x for step, x in evaluations(run, metric).items() if step > 0])


def curve(run: RunData, metric: str) -> dict[int, float]:
    """Step → value, as the figures show it: with a crashed run's zeros where those count."""
    if metric.startswith("eval/"):
        return evaluations(run, metric)
    if metric == ESS:
        sizes, visited = (_finite(run, f"{name}") for name in (_SIZE, "tokens/visited"))
        return {step: size / visited[step] for step, size in sizes.items() if visited.get(step)}
    found = {step: value for step, value in _finite(run, metric).items() if step > 0}
    if metric == REWARD and run.about.status == "crashed":
        found = dict.fromkeys(range(1, run.about.steps + 1), 0.0) | found
    return found


_SIZE = "loss/ratio_effective_sample_size"


def window(runs: Sequence[RunData]) -> int:
    """Steps that the training reward is smoothed over: 5, in short runs a quarter of them."""
    return min(5, max(1, min(run.about.steps for run in runs) // 4))


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means of `width` consecutive values: entry i covers values i to i + width − 1."""
    return [float(np.mean(values[i : i + width])) for i in range(len(values) - width + 1)]


def matched_reward(runs: Sequence[RunData]) -> float | None:
    """R*: the highest smoothed training reward that three quarters of all runs reach.

    For n runs, with M the maxima of their smoothed reward, it is the ⌈3n/4⌉-th largest M. Which arm
    a run belongs to plays no part. None where a run has no training reward.
    """
    width = window(runs)
    maxima = [max(smoothed(list(curve(run, REWARD).values()), width), default=None) for run in runs]
    if None in maxima:
        return None
    return sorted(maxima, reverse=True)[math.ceil(REACHED_BY * len(maxima)) - 1]


def step_at_reward(run: RunData, level: float, width: int) -> int | None:
    """The last step of the first window of `width` steps whose mean reward is `level` or more."""
    found = curve(run, REWARD)
    for i, mean in enumerate(smoothed(list(found.values()), width)):
        if mean >= level:
            return list(found)[i + width - 1]
    return None


def kl_at_reward(run: RunData, level: float, width: int) -> float | None:
    """Mean KL from the warm start over that window; None for a run that never reaches `level`."""
    last = step_at_reward(run, level, width)
    found = curve(run, KL)
    values = [] if last is None else [x for s, x in found.items() if last - width < s <= last]
    return float(np.mean(values)) if values else None


def ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and of the last five values; with fewer than ten, of each half."""
    if len(values) < 2:
        return None
    n = min(5, len(values) // 2)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def router_rate(run: RunData) -> float | None:
    """Σ router_numerator / Σ router_denominator over the steps."""
    return _pooled(run, "mismatch/router_numerator", "mismatch/router_denominator")


def token_any_rate(run: RunData) -> float | None:
    """Share of all the run's tokens that have another choice in at least one layer."""
    histograms = [row["mismatch/histogram"] for row in run.rows if row.get("mismatch/histogram")]
    total = sum(sum(counts) for counts in histograms)
    return sum(sum(counts[1:]) for counts in histograms) / total if total else None


def by_tokens(run: RunData, metric: str) -> float | None:
    """Mean over the steps, each weighted by its sampled tokens."""
    tokens, values = _finite(run, "tokens/sampled"), _finite(run, metric)
    steps = [step for step in values if tokens.get(step)]
    if not steps:
        return None
    return float(np.average([values[s] for s in steps], weights=[tokens[s] for s in steps]))


def measures(runs: Sequence[RunData]) -> list[Measure]:
    """All secondary measures that any of `runs` has; those at matched reward depend on all runs."""
    level, width = matched_reward(runs), window(runs)

    def over_steps(metric: str, how: Callable[[list[float]], float]):
        def of(run: RunData) -> float | None:
            values = list(curve(run, metric).values())
            return float(how(values)) if values else None

        return of

    def end(metric: str):
        return lambda run: (found := ends(list(curve(run, metric).values()))) and found[1]

    def entropy_change(run: RunData) -> float | None:
        found = ends(list(curve(run, "entropy/mean").values()))
        return found and found[1] - found[0]

    steps = plural_steps(width)
    all_measures = [
        Measure(
            key=f"{name}/{how}",
            label=f"{name.removeprefix('eval/')}, {how}",
            meaning=f"held-out {name.removeprefix('eval/')}, {SAID[how]}",
            of=lambda run, name=name, how=how: summary(run, name, how),
            is_share=True,
        )
        for name in evaluation_metrics(runs)
        for how in SUMMARIES
    ]
    all_measures += [
        Measure(
            key="reward_end",
            label="training reward, end",
            meaning="share of right responses on training problems, mean of the last five steps",
            of=end(REWARD),
            is_share=True,
        ),
        Measure(
            key="entropy_change",
            label="entropy, end − beginning",
            meaning="mean of the last five steps − mean of the first five, nats per token",
            of=entropy_change,
        ),
        Measure(
            key="kl_end",
            label="KL, end",
            meaning="KL from the warm start (k3, nats per token), mean of the last five steps",
            of=end(KL),
        ),
        Measure(
            key="kl_max",
            label="KL, largest",
            meaning="the largest KL from the warm start of any step",
            of=over_steps(KL, max),
        ),
        Measure(
            key="clip_positive",
            label="clipped, A > 0",
            meaning="share of token visits with positive advantage whose gradient the loss's rule "
            "took away, mean over the steps",
            of=over_steps("clip/positive", np.mean),
            is_share=True,
        ),
        Measure(
            key="clip_negative",
            label="clipped, A < 0",
            meaning="the same of those with negative advantage",
            of=over_steps("clip/negative", np.mean),
            is_share=True,
        ),
        Measure(
            key="gradient_share_positive",
            label="gradient on positives",
            meaning="Σ w·|A|·c over tokens with A > 0, as a share of the sum over all tokens "
            "(docs/losses.md), mean over the steps",
            of=over_steps("loss/gradient_share_positive", np.mean),
            is_share=True,
        ),
        Measure(
            key="positive_beyond_upper",
            label="positives beyond the upper bound",
            meaning="share of tokens with A > 0 that the loss of the negative branch would cut: "
            "there an UP loss and its base differ; mean over the steps",
            of=over_steps("loss/positive_beyond_upper_fraction", np.mean),
            is_share=True,
        ),
        Measure(
            key="grad_norm_median",
            label="gradient norm, median",
            meaning="global norm before clipping, of each step the mean over its optimizer steps; "
            "median over the steps",
            of=over_steps("grad_norm", np.median),
        ),
        Measure(
            key="grad_norm_max",
            label="gradient norm, largest",
            meaning="the same, the largest of any step",
            of=over_steps("grad_norm", max),
        ),
        Measure(
            key="effective_sample_size",
            label="effective sample size",
            meaning="(Σr)²/Σr² of the ratios r = π/π_old as a share of the token visits, mean over "
            "the steps",
            of=over_steps(ESS, np.mean),
            is_share=True,
        ),
        Measure(
            key="router_rate",
            label="routers that differ",
            meaning="(token, MoE layer) pairs in which rollout and trainer chose other experts, "
            "over the pairs compared: both summed over the steps",
            of=router_rate,
            is_share=True,
        ),
        Measure(
            key="token_any_rate",
            label="tokens that differ in any layer",
            meaning="tokens with such a pair, over the tokens: both summed over the steps",
            of=token_any_rate,
            is_share=True,
        ),
        Measure(
            key="logp_gap_abs",
            label="log-prob gap, mean |d|",
            meaning="d = log p_train − log p_rollout at the weights before the update, nats; mean "
            "over all tokens",
            of=lambda run: by_tokens(run, "logp_gap/mean_abs"),
        ),
        Measure(
            key="logp_gap_k3",
            label="log-prob gap, k3",
            meaning="KL(rollout ‖ trainer) by k3, nats; mean over all tokens",
            of=lambda run: by_tokens(run, "logp_gap/k3"),
        ),
        Measure(
            key="seconds",
            label="wall-clock, s",
            meaning="of a whole run, its start included; not known of runs that were resumed",
            of=lambda run: run.about.seconds,
        ),
    ]
    if level is not None:
        at = next(i for i, m in enumerate(all_measures) if m.key == "kl_max") + 1
        matched = Measure(
            key="kl_at_reward",
            label="KL at matched reward",
            meaning=f"KL from the warm start when the training reward, as a mean over {steps}, "
            f"first reaches R* = {level:.1%}: mean over the same steps; only of runs that reach it",
            of=lambda run: kl_at_reward(run, level, width),
        )
        all_measures.insert(at, matched)
    return [m for m in all_measures if any(m.of(run) is not None for run in runs)]


SAID = {
    "mean": "mean of the evaluations after step 0: the area under the curve",
    "last": "at the last evaluation",
    "best": "at the best evaluation after step 0",
}


def plural_steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _pooled(run: RunData, numerator: str, denominator: str) -> float | None:
    above, below = _finite(run, numerator), _finite(run, denominator)
    total = sum(below.values())
    return sum(above.values()) / total if total else None


def _finite(run: RunData, metric: str) -> dict[int, float]:
    pairs: Sequence[tuple[int, Any]] = list(zip(*run.series(metric), strict=True))
    return {step: float(value) for step, value in pairs if math.isfinite(value)}


def _name(run: RunData) -> str:
    return f"the run of arm {run.about.arm} with seed {run.about.seed}"
