"""Draws docs/img/mismatch.svg, the picture at the top of README.md, from a kept comparison.

    python -m docs.make_picture

Left: how much of the routing differs; right: how far each loss then ends from GRPO. Lines and
marks are means over the seeds with 95% intervals (t), on the right of differences paired by seed.
tests/test_pages.py fails when the picture is not up to date.
"""

import io
import json
from pathlib import Path

import numpy as np

from moe_upgrpo.compare.report import load
from moe_upgrpo.report.plots import COLORS, EDGE, GRID, MARKERS, SOFT, STYLE
from moe_upgrpo.stats import mean_interval

ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "benchmarks/results/compare/fp8"
FIGURE = ROOT / "docs/img/mismatch.svg"
LINES = ("-", "--", ":")
# metric -> meaning of its line
SHARES = {
    "mismatch/token_any_rate": "tokens with any such router",
    "mismatch/router_rate": "routers that choose other experts",
}
# Colours on white -> the same on a page in dark mode.
DARK = {
    "#ffffff": "#0d1117",
    "#000000": "#e6edf3",
    SOFT: "#c9d1d9",
    EDGE: "#6e7681",
    GRID: "#30363d",
    COLORS[0]: "#58a6ff",
    COLORS[1]: "#ff8c42",
    COLORS[2]: "#3fb98a",
}
ACCURACY, BASELINE = "eval/pass@1", "grpo"
ARMS = {
    "up-grpo": "UP-GRPO",
    "grpo-bypass": "GRPO, ratio to the engine's log-probs",
    "up-grpo-bypass": "UP-GRPO, ratio to the engine's log-probs",
}


def curve(runs: list, metric: str) -> dict[int, np.ndarray]:
    """Step -> the metric of each run, where every run has it."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if row.get(metric) is not None:
                by_step.setdefault(row["step"], []).append(row[metric])
    whole = {step: np.array(x) for step, x in sorted(by_step.items()) if len(x) == len(runs)}
    if not whole:
        raise ValueError(f"{COMPARISON} has no step with {metric} of all {len(runs)} runs")
    return whole


def interval(values_by_step: dict[int, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Steps, mean, low and high, in percent or points."""
    found = np.array([mean_interval(values) for values in values_by_step.values()])
    return np.array([*values_by_step]), *(100 * found.T)


def numbers() -> dict[str, list[float]]:
    """The means that are drawn; the picture's file contains them, so that a test can compare."""
    shown = load(COMPARISON).shown
    every = [run for runs in shown.values() for run in runs]
    drawn = {metric: curve(every, metric) for metric in SHARES}
    drawn |= {arm: curve(shown[arm], ACCURACY) for arm in (BASELINE, *ARMS)}
    return {
        name: [round(100 * float(x.mean()), 2) for x in line.values()]
        for name, line in drawn.items()
    }


def svg() -> str:
    """The picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = load(COMPARISON).shown
    by_seed = {arm: sorted(runs, key=lambda run: run.about.seed) for arm, runs in shown.items()}
    style = STYLE | {"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3.7), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        every = [run for runs in by_seed.values() for run in runs]
        for one, (metric, says) in enumerate(SHARES.items()):
            steps, mean, low, high = interval(curve(every, metric))
            left.plot(steps, mean, LINES[one], color=COLORS[one], lw=2, label=says)
            left.fill_between(steps, low, high, color=COLORS[one], alpha=0.2, lw=0)
        base = curve(by_seed[BASELINE], ACCURACY)
        for one, (arm, says) in enumerate(ARMS.items()):
            mine = curve(by_seed[arm], ACCURACY)
            steps, mean, low, high = interval({s: mine[s] - base[s] for s in base if s})
            beside = steps + 0.5 * (one - 1)  # three intervals at one step would hide each other
            style = {"color": COLORS[one], "marker": MARKERS[one], "ls": LINES[one], "capsize": 3}
            right.errorbar(beside, mean, (mean - low, high - mean), label=says, **style)
        right.axhline(0, color="black", lw=0.8)
        left.set(title="Engine and trainer route differently …", ylabel="% that differ")
        left.set(ylim=(0, 45), xlim=(0, 20.5))
        right.set(title="… and the losses end alike", ylim=(-3, 4.5))
        right.set(ylabel="points of accuracy (pass@1) from GRPO", xlim=(3.5, 21.5))
        right.set_xticks([s for s in base if s])
        left.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (left, right):
            axis.set_xlabel("RL step")
            axis.legend(loc="upper left")
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(numbers())}
        figure.savefig(buffer, format="svg", metadata=metadata)
    drawn = buffer.getvalue().replace("</style>", f"{in_dark_mode()}</style>", 1)
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


def in_dark_mode() -> str:
    """Rules that replace the colours which matplotlib wrote into the elements."""
    rules = [
        f'[style*="{what}: {light.lower()}"] {{{what}: {dark} !important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ]
    return "\n@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}\n"


if __name__ == "__main__":
    FIGURE.write_text(svg(), encoding="utf-8")
