"""Drawing: a figure's data to an SVG. Matplotlib without pyplot, so no global state or display."""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_upgrpo.report.answers import Answers
from moe_upgrpo.report.figures import Curves

# Distinct also for colour-blind readers (Okabe and Ito's set, its yellow left out).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_SOFT = "#475569"
_INTERVAL = ("rate", "low", "high")
# Mark and line of each kind of noise floor.
_FLOORS = (("o", ":"), ("s", "--"))
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "moe_upgrpo",  # the same data gives the same file
}
# Wide enough for one column of a desktop page, and legible when a phone shrinks it a little.
_SIZE = (4.2, 2.6)
_SMOOTHED_FROM = 60  # points


def color_of(run: int) -> str:
    return COLORS[run % len(COLORS)]


def draw_curves(figure: Curves, data: list[dict[str, Any]], labels: list[str]) -> str:
    """Curves over steps: with one run a colour for each metric, with several one for each run."""
    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.subplots()
        curves = [entry for entry in data if not entry["floor"]]
        floors = [entry for entry in data if entry["floor"]]
        metrics = list(dict.fromkeys(entry["label"] for entry in curves))
        several = len(labels) > 1
        for entry in curves:
            metric = metrics.index(entry["label"])
            color = color_of(labels.index(entry["run"]) if several else metric)
            line = _LINES[metric % len(_LINES)] if several else "-"
            _draw_line(axes, entry, color, line, points=figure.points_only)
        handles = [
            Line2D([], [], color=_SOFT, ls=_LINES[i % len(_LINES)])
            if several
            else Line2D([], [], color=color_of(i))
            for i in range(len(metrics))
        ]
        # A curve with zeros has no logarithm; a floor of 0 does not take it from the others.
        above = [entry["values"] for entry in curves or floors]
        is_log = figure.log_scale and (np.concatenate(above) > 0).all()
        kinds = list(dict.fromkeys(entry["label"] for entry in floors))
        for entry in floors:
            color = color_of(labels.index(entry["run"])) if several else _SOFT
            marker, line = _FLOORS[kinds.index(entry["label"])]
            _draw_floor(axes, entry, color, marker, line, is_log=is_log)
        for kind, (marker, line) in zip(kinds, _FLOORS, strict=False):
            handles.append(Line2D([], [], color=_SOFT, ls=line, marker=marker, mfc="none", lw=0.8))
            zero = not any(v for e in floors if e["label"] == kind for v in e["values"])
            metrics.append(f"{kind} (0)" if zero else kind)
        if len(metrics) > 1:
            canvas.legend(
                handles,
                metrics,
                loc="outside upper left",
                ncols=2 if floors else min(len(metrics), 3),
            )
        values = np.concatenate([entry["values"] for entry in data])
        if is_log:
            axes.set_yscale("log")
        elif figure.from_zero and values.min() >= 0:
            axes.set_ylim(0, 1.08 * values.max() or 1.0)
        if figure.is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _label_steps(axes, np.concatenate([entry["steps"] for entry in data]))
        return _svg(canvas)


def _draw_floor(
    axes: Axes, entry: dict[str, Any], color: str, marker: str, line: str, *, is_log: bool
) -> None:
    steps, values = np.array(entry["steps"]), np.array(entry["values"])
    if is_log and not values.any():
        return  # the legend says 0
    axes.plot(steps, values, color=color, ls="", marker=marker, mfc="none", markersize=4.5)
    axes.axhline(values.mean(), color=color, ls=line, lw=0.8)


def _draw_line(axes: Axes, entry: dict[str, Any], color: str, line: str, *, points: bool) -> None:
    steps, values = np.array(entry["steps"]), np.array(entry["values"])
    if len(values) >= _SMOOTHED_FROM and not points:
        axes.plot(steps, values, color=color, lw=0.6, alpha=0.35)
        values = moving_average(values)
    marker = "o" if points or len(values) < 25 else None
    axes.plot(steps, values, color=color, ls=line, marker=marker, markersize=3.5)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the points; at the ends over those there are."""
    window = np.ones(len(values) // 20 | 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def draw_heat_map(entry: dict[str, Any]) -> str:
    """One run's mismatch, layer × step."""
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.subplots()
        steps, rates = entry["steps"], np.array(entry["rates"], dtype=float)
        # A cell reaches half way to the neighbouring steps: steps need not be evenly spaced.
        middles = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
        edges = np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])
        mesh = axes.pcolormesh(
            edges,
            np.arange(rates.shape[1] + 1) - 0.5,
            rates.T,
            cmap="viridis",
            vmin=0,
            vmax=np.nanmax(rates, initial=0) or 1.0,
            rasterized=True,
        )
        bar = canvas.colorbar(mesh, ax=axes, format=PercentFormatter(1.0), pad=0.02)
        bar.outline.set_visible(False)
        _label_layers(axes.yaxis, entry["layer_ids"])
        axes.set_ylabel("MoE layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(steps) == 1:
            axes.set_xticks(steps)
        axes.set_xlabel("step")
        return _svg(canvas)


def draw_depth(data: list[dict[str, Any]], labels: list[str]) -> str:
    """Mismatch of each layer over the whole run, runs overlaid."""
    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.subplots()
        for entry in data:
            color = color_of(labels.index(entry["run"]))
            axes.plot(entry["layer_ids"], entry["rates"], color=color, marker="o", markersize=3.5)
        axes.set_ylim(0, 1.08 * max(max(entry["rates"]) for entry in data) or 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("MoE layer")
        return _svg(canvas)


def draw_answers(figure: Answers, data: list[dict[str, Any]], labels: list[str]) -> str:
    """Rates with intervals by group; by sign, the quantities stand on the x axis instead."""
    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.subplots()
        several, quantities = len(labels) > 1, list(dict.fromkeys(e["label"] for e in data))
        if figure.by == "sign":
            names = ["positive", "negative", "zero"]
            for r, run in enumerate(labels):
                for i, sign in enumerate(names):
                    found = [
                        (quantities.index(entry["label"]), row)
                        for entry in data
                        for row in entry["rows"]
                        if entry["run"] == run and row["group"] == sign
                    ]
                    # Side by side, so that the intervals can be told apart.
                    shift = 0.16 * (i - 1) + 0.05 * (r - (len(labels) - 1) / 2)
                    color = color_of(r if several else i)
                    x = [at + shift for at, _ in found]
                    _draw_rates(axes, x, [row for _, row in found], color, "", "os^"[i])
            axes.set_xticks(range(len(quantities)), [q.replace(" ", "\n", 1) for q in quantities])
            axes.grid(axis="x", visible=False)
            kinds = [
                Line2D([], [], ls="", marker="os^"[i], color=_SOFT if several else color_of(i))
                for i in range(len(names))
            ]
        else:
            names = quantities
            for entry in data:
                q = quantities.index(entry["label"])
                color = color_of(labels.index(entry["run"]) if several else q)
                x = [sum(row["group"]) / 2 for row in entry["rows"]]
                _draw_rates(axes, x, entry["rows"], color, _LINES[q] if several else "-", "o")
            kinds = [
                Line2D([], [], ls=_LINES[q], color=_SOFT)
                if several
                else Line2D([], [], color=color_of(q))
                for q in range(len(names))
            ]
            if figure.by == "own":
                _label_numbers_of_layers(axes)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_xlabel(figure.by)
        if len(names) > 1:
            canvas.legend(kinds, names, loc="outside upper left", ncols=min(len(names), 4))
        axes.set_ylim(0, axes.get_ylim()[1])
        if figure.is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return _svg(canvas)


def _draw_rates(
    axes: Axes, x: list[float], rows: list[dict[str, Any]], color: str, line: str, marker: str
) -> None:
    rate, low, high = (np.array([row[key] for row in rows], float) for key in _INTERVAL)
    axes.plot(x, rate, color=color, ls=line, marker=marker, markersize=3.5, lw=1.0)
    axes.vlines(x, low, high, color=color, lw=1.0)


def _label_numbers_of_layers(axes: Axes) -> None:
    """0, 1, 2, 4, 8, …: the bins of a token's mismatched layers double."""
    end = max(1.0, axes.dataLim.x1)
    axes.set_xscale("symlog", base=2, linthresh=2)
    axes.set_xlim(-0.3, 1.15 * end)
    ticks = [0, 1, *(2**i for i in range(1, 16) if 2**i <= end)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("MoE layers of the token that differ")


def draw_clustering(data: list[dict[str, Any]], labels: list[str]) -> str:
    """Tokens by number of mismatched layers: found (filled) and independent (hollow)."""
    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.subplots()
        for entry in data:
            color = color_of(labels.index(entry["run"]))
            found, free = np.array(entry["shares"]), np.array(entry["independent"])
            axes.plot(entry["layers"], np.where(found > 0, found, np.nan), "o-", color=color, ms=4)
            axes.plot(
                entry["layers"], np.where(free > 0, free, np.nan), "o:", color=color, mfc="none"
            )
        kinds = [
            Line2D([], [], color=_SOFT, marker="o", ms=4),
            Line2D([], [], color=_SOFT, marker="o", mfc="none", ls=":"),
        ]
        canvas.legend(kinds, ["found", "if independent"], loc="outside upper left", ncols=2)
        axes.set_yscale("log")
        # Independent layers would make many mismatches absurdly rare: down to what was found.
        found = [share for entry in data for share in entry["shares"] if share]
        axes.set_ylim(min(found) / 3, 2)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("MoE layers of the token that differ")
        return _svg(canvas)


def _label_steps(axes: Axes, steps: np.ndarray) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    if steps.min() == steps.max():
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _label_layers(axis: Any, layer_ids: list[int]) -> None:
    shown = range(0, len(layer_ids), max(1, -(-len(layer_ids) // 8)))
    axis.set_ticks(list(shown), [str(layer_ids[i]) for i in shown])


def _svg(canvas: Figure) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    return buffer.getvalue()
