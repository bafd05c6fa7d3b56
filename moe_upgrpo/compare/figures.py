# SPDX-License-Identifier: Apache-2.0
"""Figures of a comparison, and their drawing. Each arm has one colour everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from moe_upgrpo.compare.data import RunData
from moe_upgrpo.compare.measures import KL, REWARD, curve, evaluation_metrics, smoothed
from moe_upgrpo.report.plots import COLORS, SOFT, STYLE
from moe_upgrpo.stats import Comparison, mean_interval

# The report's colours, and three more; those are dashed as well.
_ARMS = (*COLORS, "#332288", "#882255", "#999933")
_MARKERS = "os^DvPX<>*"
_SIZE = (5.6, 3.5)
_LOG_FROM = 30  # the largest over the median: above it a linear axis would show only the largest

ByArm = Mapping[str, Sequence[RunData]]
Drawing = dict[str, Any]
"""key, title, read (what it is), runs (of each arm), data, canvas."""


@dataclass(frozen=True)
class Curve:
    metric: str
    title: str
    read: str
    is_share: bool = False
    from_zero: bool = True


CURVES = [
    Curve(REWARD, "Training reward", "Share of right responses on training problems.", True),
    Curve("entropy/mean", "Entropy", "Of the next token, nats, mean over response tokens."),
    Curve(KL, "KL from the warm start", "Estimated by k3 on sampled tokens, nats per token."),
    Curve(
        "clip/positive",
        "Clipped, positive advantage",
        "Share of token visits with A > 0 whose gradient the loss's rule took away.",
        True,
    ),
    Curve(
        "clip/negative",
        "Clipped, negative advantage",
        "Share of token visits with A < 0 whose gradient the loss's rule took away.",
        True,
    ),
    Curve("grad_norm", "Gradient norm", "Before clipping, mean over a step's optimizer steps."),
    Curve(
        "mismatch/router_rate",
        "Routers that differ between rollout and trainer",
        "Share of (token, MoE layer) pairs, before the update.",
        True,
    ),
    Curve(
        "logp_gap/mean_abs",
        "Log-prob gap",
        "Mean |log p_train − log p_rollout| before the update, nats.",
    ),
]


def over_seeds(
    runs: Sequence[RunData], metric: str, confidence: float, width: int = 1
) -> dict[str, list]:
    """Mean and pointwise t interval at each step over the runs that have it, and their number.

    A run's value is its mean over the `width` values up to that step.
    """
    values: dict[int, list[float]] = {}
    for run in runs:
        found = curve(run, metric)
        means = smoothed(list(found.values()), width)
        for step, value in zip(list(found)[width - 1 :], means, strict=True):
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    found = [(*mean_interval(values[step], confidence), len(values[step])) for step in steps]
    mean, low, high, count = (list(x) for x in zip(*found, strict=True)) if found else [[]] * 4
    return {"steps": steps, "mean": mean, "low": low, "high": high, "runs": count}


def draw_all(
    by_arm: ByArm,
    *,
    all_runs: ByArm,
    primary: Mapping[str, Mapping[int, float]],
    primary_label: str,
    contrasts: Sequence[Comparison],
    confidence: float,
    width: int,
) -> list[Drawing]:
    """All figures that have data: curves of `by_arm`, the strip of `all_runs`.

    `primary`: arm → seed → figure; `width`: steps that curves of training are smoothed over.
    """
    runs = [run for found in by_arm.values() for run in found]
    made = [_strip(all_runs, primary, primary_label, confidence)]
    if contrasts:
        made.append(_forest(list(by_arm), contrasts, primary_label))
    evaluated = [
        Curve(name, f"Held-out {_short(name)}", _EVALUATION[_kind(name)], True, False)
        for name in evaluation_metrics(runs)
    ]
    for about in [*evaluated, *CURVES]:
        data = [
            {"arm": arm}
            | over_seeds(found, about.metric, confidence, 1 if about in evaluated else width)
            for arm, found in by_arm.items()
        ]
        if any(entry["steps"] for entry in data):
            made.append(_curves(about, data, confidence, 1 if about in evaluated else width))
        if about.metric == KL and (drawing := _kl_against_reward(by_arm, confidence, width)):
            made.append(drawing)
    return made


_EVALUATION = {
    "greedy": "Share of held-out problems that the greedy answer solves. Step 0 is the warm start.",
    "pass": "Chance that one of K sampled answers to a held-out problem is right.",
    "maj": "Share of held-out problems whose most frequent sampled answer is right.",
}


def _kind(name: str) -> str:
    return _short(name).split("@")[0]


def _short(name: str) -> str:
    return name.removeprefix("eval/")


def style_of(arm: int) -> dict[str, Any]:
    """Colour, line and mark of the arm of that number."""
    return {
        "color": _ARMS[arm % len(_ARMS)],
        "ls": "-" if arm < len(COLORS) else "--",
        "marker": _MARKERS[arm % len(_MARKERS)],
    }


def _curves(about: Curve, data: list[dict], confidence: float, width: int) -> Drawing:
    with _canvas() as (canvas, axes):
        spacing = min(_spacing(entry["steps"]) for entry in data if entry["steps"])
        points = about.metric.startswith("eval/")
        for i, entry in enumerate(data):
            x = np.array(entry["steps"], float)
            mean, low, high = (np.array(entry[name], float) for name in ("mean", "low", "high"))
            style = style_of(i)
            if points:  # intervals side by side, so that ten arms can be told apart
                x = x + 0.5 * spacing * ((i + 0.5) / len(data) - 0.5)
                axes.vlines(x, low, high, color=style["color"], lw=1.1, alpha=0.6)
                axes.plot(x, mean, ms=4, lw=1.3, **style)
            else:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.10, lw=0)
                axes.plot(x, mean, **style | {"marker": None}, lw=1.5)
        means = np.array([v for entry in data for v in entry["mean"]])
        is_log = (
            not about.is_share and (means > 0).all() and means.max() > _LOG_FROM * np.median(means)
        )
        if is_log:
            _log(axes.yaxis, axes.set_yscale, axes.set_ylim, means)
        else:
            ends = np.array([v for e in data for v in (*e["low"], *e["high"])], float)
            axes.set_ylim(*_limits(means, ends, zero=about.from_zero, share=about.is_share))
        if about.is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("step")
        steps = sorted({step for entry in data for step in entry["steps"]})
        if points and len(steps) <= 10:
            axes.set_xticks(steps)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _arms_legend(canvas, [entry["arm"] for entry in data], points=points)
    counts = [n for entry in data for n in entry["runs"]]
    each = f"each run's value the mean of {width} steps; " if width > 1 else ""
    return {
        "key": about.metric.replace("/", "-"),
        "title": about.title,
        "read": f"{about.read} Mean over seeds and pointwise {confidence:.0%} interval; "
        f"{each}{span(counts)} of each arm.{' Logarithmic.' if is_log else ''}",
        "data": data,
        "canvas": canvas,
    }


def _kl_against_reward(by_arm: ByArm, confidence: float, width: int) -> Drawing | None:
    """KL against reward, both as means over `width` steps and then over seeds."""
    data = []
    for arm, runs in by_arm.items():
        found = []
        for run in runs:
            kl, reward = curve(run, KL), curve(run, REWARD)
            steps = [step for step in reward if step in kl]
            found.append(
                {
                    s: pair
                    for s, *pair in zip(
                        steps[width - 1 :],
                        smoothed([kl[s] for s in steps], width),
                        smoothed([reward[s] for s in steps], width),
                        strict=True,
                    )
                }
            )
        shared = sorted(set.intersection(*map(set, found))) if found else []
        entry = {"arm": arm, "steps": shared, "runs": len(runs)}
        for at, name in enumerate(("kl", "reward")):
            ends = [mean_interval([run[s][at] for run in found], confidence) for s in shared]
            for part, key in enumerate(("mean", "low", "high")):
                entry[f"{name}_{key}"] = [end[part] for end in ends]
        data.append(entry)
    if not any(entry["steps"] for entry in data):
        return None
    with _canvas() as (canvas, axes):
        for i, entry in enumerate(data):
            style, steps = style_of(i), entry["steps"]
            if not steps:
                continue
            kl, reward = (np.array(entry[f"{name}_mean"]) for name in ("kl", "reward"))
            axes.plot(kl, reward, **style | {"marker": None}, lw=1.4)
            axes.plot(kl[-1:], reward[-1:], **style, ms=6)
            for at in sorted({len(steps) // 2, len(steps) - 1}):
                low, high = entry["reward_low"][at], entry["reward_high"][at]
                axes.vlines(kl[at], low, high, color=style["color"], lw=1, alpha=0.5)
                low, high = entry["kl_low"][at], entry["kl_high"][at]
                axes.hlines(reward[at], low, high, color=style["color"], lw=1, alpha=0.5)
        kl, reward, low, high = (
            np.array([v for e in data for v in e[name]], float)
            for name in ("kl_mean", "reward_mean", "reward_low", "reward_high")
        )
        is_log = (kl > 0).all() and kl.max() > _LOG_FROM * np.median(kl)
        if is_log:
            _log(axes.xaxis, axes.set_xscale, axes.set_xlim, kl)
        else:
            axes.set_xlim(0, 1.25 * kl.max() or 1.0)
        ends = np.concatenate([low, high])
        axes.set_ylim(*_limits(reward, ends, zero=False, share=True))
        axes.set_xlabel("KL from the warm start, nats per token")
        axes.set_ylabel("training reward")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _arms_legend(canvas, list(by_arm), points=True)
    return {
        "key": "kl-against-reward",
        "title": "KL against reward",
        "read": f"Each line follows the steps, to the mark at the end; both axes are means over "
        f"{width} steps and then over seeds, with {confidence:.0%} intervals at the middle and the "
        f"end; {span([entry['runs'] for entry in data])} of each arm. Further left at the same "
        "height: the same reward with less change of the policy.",
        "data": data,
        "canvas": canvas,
    }


def _strip(
    by_arm: ByArm, primary: Mapping[str, Mapping[int, float]], label: str, confidence: float
) -> Drawing:
    """Every run's primary figure by arm, a line for each seed, mean and interval beside."""
    arms = list(by_arm)
    ended = {
        (r.about.arm, r.about.seed): r.about.status for found in by_arm.values() for r in found
    }
    data = [
        {"arm": arm, "seed": seed, "value": value, "status": ended[arm, seed]}
        for arm in arms
        for seed, value in primary.get(arm, {}).items()
    ]
    with _canvas() as (canvas, axes):
        for seed in sorted({entry["seed"] for entry in data}):
            mine = [(arms.index(e["arm"]), e["value"]) for e in data if e["seed"] == seed]
            axes.plot(*zip(*mine, strict=True), color="#cbd5e1", lw=0.7, zorder=1)
        for i, arm in enumerate(arms):
            color = style_of(i)["color"]
            for status, marker in (("finished", "o"), ("crashed", "X")):
                y = [e["value"] for e in data if (e["arm"], e["status"]) == (arm, status)]
                axes.plot([i] * len(y), y, ls="", marker=marker, ms=4.5, color=color, alpha=0.75)
            if values := list(primary.get(arm, {}).values()):
                mean, low, high = mean_interval(values, confidence)
                axes.vlines(i + 0.22, low, high, color=color, lw=2)
                axes.plot([i + 0.22], [mean], marker="D", ms=5, color=color, mec="white")
        means = np.array([entry["value"] for entry in data])
        axes.set_ylim(*_limits(means, means, zero=False, share=True))
        longest = max(map(len, arms)) * len(arms)
        turned = {"rotation": 30, "ha": "right"} if longest > 60 else {}
        axes.set_xticks(range(len(arms)), [_plain(arm) for arm in arms], **turned)
        axes.set_xlim(-0.5, len(arms) - 0.2)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel(_plain(label))
    counts = [len(primary.get(arm, {})) for arm in arms]
    return {
        "key": "primary",
        "title": "Every run",
        "read": f"The primary endpoint, {label}: a dot for each run, grey lines join runs of one "
        f"seed, a cross is a crashed run; beside them mean and {confidence:.0%} interval; "
        f"{span(counts)} of each arm.",
        "data": data,
        "canvas": canvas,
    }


def _forest(arms: list[str], contrasts: Sequence[Comparison], label: str) -> Drawing:
    with _canvas() as (canvas, axes):
        for row, c in enumerate(contrasts):
            color = style_of(arms.index(c.method))["color"]
            axes.hlines(row, 100 * c.low, 100 * c.high, color=color, lw=2)
            axes.plot([100 * c.difference], [row], marker="D", ms=6, color=color, mec="white")
        axes.axvline(0, color=SOFT, lw=1)
        names = [_plain(f"{c.method} − {c.other}") for c in contrasts]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("difference in points")
        reach = max(abs(x) for c in contrasts for x in (c.low, c.high, c.difference))
        axes.set_xlim(-110 * reach or -1, 110 * reach or 1)
    return {
        "key": "contrasts",
        "title": "Primary contrasts",
        "read": f"{label}: mean difference over paired seeds and its interval, not corrected for "
        f"the number of contrasts; {span([c.seeds for c in contrasts], 'paired seed')}.",
        "data": [
            {"arm": c.method, "other": c.other, "difference": c.difference}
            | {"low": c.low, "high": c.high, "seeds": c.seeds}
            for c in contrasts
        ],
        "canvas": canvas,
    }


def span(counts: Sequence[int], what: str = "run") -> str:
    """'10 runs', '9 to 10 runs'."""
    low, high = min(counts), max(counts)
    return f"{'' if low == high else f'{low} to '}{high} {what}{'s' * (high != 1)}"


def _spacing(steps: Sequence[int]) -> float:
    return float(np.diff(steps).min()) if len(steps) > 1 else 1.0


def _limits(means: np.ndarray, ends: np.ndarray, *, zero: bool, share: bool) -> tuple[float, float]:
    """Axis limits that show all means, and intervals unless they dwarf the means."""
    low, high = float(means.min()), float(means.max())
    around = (high - low) or abs(high) / 5 or 1.0
    ends = ends[np.isfinite(ends)]
    bottom = max(low - around, min(low, ends.min(initial=low))) - 0.05 * around
    top = min(high + around, max(high, ends.max(initial=high))) + 0.05 * around
    if share:
        bottom, top = max(bottom, -0.02), min(top, 1.02)
    if zero and low >= 0:
        bottom = 0.0
    return bottom, top


def _log(axis: Any, scale: Any, limit: Any, drawn: np.ndarray) -> None:
    scale("log", nonpositive="clip")
    limit(drawn.min() / 1.5, drawn.max() * 1.5)
    axis.set_minor_formatter(NullFormatter())


def _arms_legend(canvas: Figure, arms: list[str], *, points: bool) -> None:
    handles = []
    for i in range(len(arms)):
        style = style_of(i) | ({} if points else {"marker": None})
        handles.append(Line2D([], [], ms=4, lw=1.5, **style))
    columns = max(1, min(len(arms), int(64 / (max(map(len, arms)) + 6))))
    names = [_plain(arm) for arm in arms]
    canvas.legend(handles, names, loc="outside upper left", ncols=columns)
    rows = -(-len(arms) // columns)
    canvas.set_size_inches(_SIZE[0], _SIZE[1] + 0.17 * max(0, rows - 1))


def _plain(text: str) -> str:
    """Escape dollar signs, between which matplotlib would set a formula."""
    return text.replace("$", r"\$")


@contextmanager
def _canvas() -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        yield canvas, canvas.subplots()
