# SPDX-License-Identifier: Apache-2.0
"""Drawing: a figure's data to an SVG. Matplotlib without pyplot, so no global state or display."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from moe_upgrpo.report.answers import Answers, Clustering
from moe_upgrpo.report.figures import ByLayer, Curves, HeatMap, Histogram, Panels, sentence

# Distinct for colour-blind readers too (Okabe and Ito's set, without its yellow).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# With several runs each also has a mark, a sign on the page, for grey print and any reader.
MARKERS, SIGNS = "os^DvPX", "●■▲◆▼✚✖"
_LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
SOFT, EDGE, GRID = "#475569", "#94a3b8", "#e2e8f0"
_INTERVAL = ("rate", "low", "high")
# Mark and line of each kind of noise floor.
_FLOORS = {
    "trainer_repeat": ("o", ":"),
    "trainer_batch_shape": ("s", "--"),
    "engine_repeat": ("^", "-."),
    "engine_batch_shape": ("D", (0, (6, 2))),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": SOFT,
    "svg.fonttype": "none",  # text can be read, searched and read aloud
    "svg.hashsalt": "moe_upgrpo",  # the same data gives the same file
}
# Wide enough for one column of a desktop page, and legible when a phone shrinks it a little.
_SIZE = (4.2, 2.6)
_LEGEND_ROW = 0.17
_SMOOTHED_FROM = 60  # points


def color_of(run: int) -> str:
    return COLORS[run % len(COLORS)]


def draw(figure: Any, data: list[dict[str, Any]], labels: list[str]) -> list[tuple[str, Figure]]:
    """A figure's drawings with their captions; ``labels`` are all runs', in order of colours."""
    if isinstance(figure, Panels):
        drawn = []
        for part in figure.parts:
            mine = [entry for entry in data if entry["panel"] == part.key]
            for caption, canvas in draw(part, mine, labels):
                drawn.append((", ".join(filter(None, [sentence(part.title), caption])), canvas))
        return drawn
    if not data:
        return []
    if isinstance(figure, HeatMap):
        several = len(labels) > 1
        return [(entry["run"] if several else "", _draw_heat_map(entry)) for entry in data]
    one = {
        Curves: _draw_curves,
        ByLayer: _draw_by_layer,
        Histogram: _draw_histogram,
        Answers: _draw_answers,
        Clustering: _draw_clustering,
    }[type(figure)]
    with _canvas() as (canvas, axes):
        one(figure, data, labels, canvas, axes)
    return [("", canvas)]


def svg(canvas: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        canvas.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    return buffer.getvalue()


@contextmanager
def _canvas(**style: Any) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE | style):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        yield canvas, canvas.subplots()


def _legend(canvas: Figure, handles: list[Any], labels: list[str], *, ncols: int) -> None:
    """Draw it above the axes; more than two rows make the drawing higher, not the axes lower."""
    canvas.legend(handles, labels, loc="outside upper left", ncols=ncols)
    rows = -(-len(labels) // ncols)
    canvas.set_size_inches(_SIZE[0], _SIZE[1] + _LEGEND_ROW * max(0, rows - 2))


def _draw_curves(
    figure: Curves, data: list[dict[str, Any]], labels: list[str], canvas: Figure, axes: Axes
) -> None:
    """Draw curves over steps: a colour for each metric of one run, or for each of several runs."""
    curves = [entry for entry in data if not entry["floor"]]
    floors = [entry for entry in data if entry["floor"]]
    metrics = list(dict.fromkeys(entry["label"] for entry in curves))
    several = len(labels) > 1
    for entry in curves:
        metric = metrics.index(entry["label"])
        run = labels.index(entry["run"])
        color = color_of(run if several else metric)
        style = {"color": color, "ls": _LINES[metric % len(_LINES)], "marker": _marker(run)}
        _draw_line(axes, entry, style, points=figure.points_only, marked=several)
    handles = [_metric_handle(i, several) for i in range(len(metrics))]
    # A curve with zeros has no logarithm; a floor of 0 does not keep the others from one.
    above = [entry["values"] for entry in curves or floors]
    is_log = figure.log_scale and (np.concatenate(above) > 0).all()
    for entry in floors:
        steps, values = np.array(entry["steps"]), np.array(entry["values"])
        if is_log and not values.any():
            continue  # the legend says 0
        color, (marker, line) = _floor_style(entry, labels)
        axes.plot(steps, values, color=color, ls="", marker=marker, mfc="none", markersize=4.5)
        axes.axhline(values.mean(), color=color, ls=line, lw=0.8)
    if floors:
        _two_legends(canvas, handles, metrics, *_floor_legend(floors, "values"))
    elif len(metrics) > 1 or figure.points_only:
        _legend(canvas, handles, metrics, ncols=min(len(metrics), 3))
    values = np.concatenate([entry["values"] for entry in data])
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        drawn = values[values > 0]
        if drawn.max() < 10 * drawn.min():  # whole decades, so that a tick has a label
            low, high = np.floor(np.log10(drawn.min())), np.floor(np.log10(drawn.max())) + 1
            axes.set_ylim(10.0**low, 10.0**high)
    elif figure.from_zero and values.min() >= 0:
        axes.set_ylim(0, 1.08 * values.max() or 1.0)
    if figure.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _label_steps(axes, np.concatenate([entry["steps"] for entry in data]))


def _marker(run: int) -> str:
    return MARKERS[run % len(MARKERS)]


def _metric_handle(i: int, several: bool) -> Line2D:
    color = SOFT if several else color_of(i)
    return Line2D([], [], color=color, ls=_LINES[i % len(_LINES)])


def _two_legends(
    canvas: Figure, handles: list[Any], labels: list[str], floors: list[Any], named: list[str]
) -> None:
    """Draw what was measured on the left, the noise floors on the right."""
    rows = max(len(labels), len(named))
    # Matplotlib fills a legend column by column.
    blank = [Line2D([], [], ls="")] * (rows - len(labels)), [""] * (rows - len(labels))
    _legend(
        canvas,
        [*handles, *blank[0], *floors],
        [*labels, *blank[1], *named],
        ncols=2 if named else 1,
    )


def _kind(entry: dict[str, Any]) -> str:
    """KIND in an entry's noise/KIND/… metric."""
    return entry["metric"].split("/")[1]


def _floor_style(entry: dict[str, Any], labels: list[str]) -> tuple[str, tuple[str, Any]]:
    color = color_of(labels.index(entry["run"])) if len(labels) > 1 else SOFT
    return color, _FLOORS[_kind(entry)]


def _floor_legend(floors: list[dict[str, Any]], key: str) -> tuple[list[Line2D], list[str]]:
    """One handle for each kind; the legend says so if a kind is 0 throughout."""
    handles, names = [], []
    for label in dict.fromkeys(entry["label"] for entry in floors):
        mine = [entry for entry in floors if entry["label"] == label]
        marker, line = _FLOORS[_kind(mine[0])]
        handles.append(Line2D([], [], color=SOFT, ls=line, marker=marker, mfc="none", lw=0.8))
        zero = not any(np.any(entry[key]) for entry in mine)
        names.append(f"{label} (0)" if zero else label)
    return handles, names


def _draw_line(
    axes: Axes, entry: dict[str, Any], style: dict[str, Any], *, points: bool, marked: bool
) -> None:
    """Draw a curve; ``marked`` gives it its run's marks, only some if it has too many points."""
    steps, values = np.array(entry["steps"]), np.array(entry["values"])
    smooth = not points and ("means" in entry or len(values) >= _SMOOTHED_FROM)
    if smooth:
        axes.plot(steps, values, color=style["color"], lw=0.6, alpha=0.35)
        if "means" in entry:
            steps, values = np.array(entry["middles"]), np.array(entry["means"])
        values = moving_average(values)
    few = points or len(values) < 25
    every = 1 if few else max(1, len(values) // 8)
    style = style if few or marked else style | {"marker": None}
    axes.plot(steps, values, markersize=3.5 if few else 4.5, markevery=every, **style)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the points, fewer at the ends."""
    window = np.ones(len(values) // 20 | 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def _draw_heat_map(entry: dict[str, Any]) -> Figure:
    """Draw one run's mismatch, layer × step."""
    with _canvas(**{"axes.grid": False}) as (canvas, axes):
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
    return canvas


def _draw_by_layer(
    figure: ByLayer, data: list[dict[str, Any]], labels: list[str], canvas: Figure, axes: Axes
) -> None:
    """Draw the mismatch of each layer over the whole run, with runs overlaid."""
    for entry in data:
        run = labels.index(entry["run"])
        style = {"color": color_of(run), "marker": _marker(run), "ls": "-"}
        if entry["floor"]:
            color, (marker, line) = _floor_style(entry, labels)
            style = {"color": color, "marker": marker, "ls": line, "mfc": "none", "lw": 0.8}
        axes.plot(entry["layer_ids"], entry["rates"], markersize=3.5, **style)
    _measured_and_floors(data, "rates", canvas)
    axes.set_ylim(0, 1.08 * max(max(entry["rates"]) for entry in data) or 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("MoE layer")


def _draw_histogram(
    figure: Histogram, data: list[dict[str, Any]], labels: list[str], canvas: Figure, axes: Axes
) -> None:
    """Draw the shares above 0 on a log scale, by number of differing layers."""
    shares = [share for entry in data for share in entry["shares"] if share]
    for entry in data:
        run = labels.index(entry["run"])
        style = {"color": color_of(run), "marker": _marker(run), "ls": "-"}
        if entry["floor"]:
            color, (marker, line) = _floor_style(entry, labels)
            style = {"color": color, "marker": marker, "ls": line, "mfc": "none", "lw": 0.8}
        found = np.array(entry["shares"])
        axes.plot(entry["layers"], np.where(found > 0, found, np.nan), ms=4, **style)
    _measured_and_floors(data, "shares", canvas)
    _share_scale(axes, min(shares))
    last = max(m for entry in data for m in np.flatnonzero(entry["shares"]))
    axes.set_xlim(-0.5, max(last, 1) + 0.5)
    axes.set_xlabel("MoE layers of the token that differ")


def _share_scale(axes: Axes, smallest: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(smallest / 3, 2)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _measured_and_floors(data: list[dict[str, Any]], key: str, canvas: Figure) -> None:
    """Draw a legend where several floors have to be told apart."""
    floors = [entry for entry in data if entry["floor"]]
    if floors:
        named = list(dict.fromkeys(entry["label"] for entry in data if not entry["floor"]))
        measured = [Line2D([], [], color=SOFT, marker="o", ms=4) for _ in named]
        _two_legends(canvas, measured, named, *_floor_legend(floors, key))


def _draw_answers(
    figure: Answers, data: list[dict[str, Any]], labels: list[str], canvas: Figure, axes: Axes
) -> None:
    """Draw rates with intervals by group; by sign, the x axis shows the quantities instead."""
    several, answers = len(labels) > 1, [entry for entry in data if not entry["floor"]]
    quantities = list(dict.fromkeys(entry["label"] for entry in answers))
    if figure.by == "sign":
        names, kinds = _draw_signs(axes, answers, quantities, labels)
    else:
        names = quantities
        ids = list(dict.fromkeys(row["group"] for e in answers for row in e["rows"])) * (
            figure.by == "token"
        )
        for entry in answers:
            q = quantities.index(entry["label"])
            run = labels.index(entry["run"])
            color = color_of(run if several else q)
            line = "" if ids else _LINES[q % len(_LINES)]
            x = [ids.index(row["group"]) if ids else _middle(row["group"]) for row in entry["rows"]]
            _draw_rates(axes, x, entry["rows"], color, line, _marker(run if several else q))
        kinds = [_metric_handle(q, several) for q in range(len(names))]
        if ids:
            axes.set_xticks(range(len(ids)), ids, rotation=90, fontsize=7.5)
            axes.grid(axis="x", visible=False)
        else:
            _label_groups(axes, figure.by)
    floors = [entry for entry in data if entry["floor"]]
    for entry in floors:
        color, (_, line) = _floor_style(entry, labels)
        axes.axhline(entry["value"], color=color, ls=line, lw=0.9)
    for label in dict.fromkeys(entry["label"] for entry in floors):
        mine = [entry for entry in floors if entry["label"] == label]
        line = _FLOORS[_kind(mine[0])][1]
        kinds.append(Line2D([], [], color=SOFT, ls=line, lw=0.9))
        names = [*names, label if any(entry["value"] for entry in mine) else f"{label} (0)"]
    if len(names) > 1:
        _legend(canvas, kinds, names, ncols=2 if floors else min(len(names), 4))
    axes.set_ylim(0, axes.get_ylim()[1])
    if figure.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_signs(
    axes: Axes, answers: list[dict[str, Any]], quantities: list[str], labels: list[str]
) -> tuple[list[str], list[Line2D]]:
    names, several = ["positive", "negative", "zero"], len(labels) > 1
    for r, run in enumerate(labels):
        for i, sign in enumerate(names):
            found = [
                (quantities.index(entry["label"]), row)
                for entry in answers
                for row in entry["rows"]
                if entry["run"] == run and row["group"] == sign
            ]
            # Side by side, so that the intervals can be told apart.
            shift = 0.16 * (i - 1) + 0.05 * (r - (len(labels) - 1) / 2)
            x = [at + shift for at, _ in found]
            color = color_of(r if several else i)
            _draw_rates(axes, x, [row for _, row in found], color, "", "os^"[i])
    axes.set_xticks(range(len(quantities)), [q.replace(" ", "\n", 1) for q in quantities])
    axes.grid(axis="x", visible=False)
    return names, [
        Line2D([], [], ls="", marker="os^"[i], color=SOFT if several else color_of(i))
        for i in range(len(names))
    ]


def _middle(group: Any) -> float:
    return sum(group) / 2 if isinstance(group, list | tuple) else group


def _draw_rates(
    axes: Axes, x: list[float], rows: list[dict[str, Any]], color: str, line: str, marker: str
) -> None:
    rate, low, high = (np.array([row[key] for row in rows], float) for key in _INTERVAL)
    many = len(x) > _SMOOTHED_FROM
    axes.plot(x, rate, color=color, ls=line, marker="" if many else marker, markersize=3.5, lw=1.0)
    if many:
        axes.fill_between(x, low, high, color=color, lw=0, alpha=0.25)
    else:
        axes.vlines(x, low, high, color=color, lw=1.0)


_GROUPS = {
    "layer": "MoE layer",
    "step": "step",
    "position": "position",
    "context": "position",
    "margin": "smallest margin s_(K) − s_(K+1)",
    "prefix": "mismatches before the token",
}


def _label_groups(axes: Axes, by: str) -> None:
    if by == "own":
        # 0, 1, 2, 4, 8, …: the bins of a token's mismatched layers double.
        end = max(1.0, axes.dataLim.x1)
        axes.set_xscale("symlog", base=2, linthresh=2)
        axes.set_xlim(-0.3, 1.15 * end)
        ticks = [0, 1, *(2**i for i in range(1, 16) if 2**i <= end)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("MoE layers of the token that differ")
        return
    axes.set_xlabel(_GROUPS[by])
    if axes.dataLim.x0 == axes.dataLim.x1:  # one group alone
        axes.set_xlim(axes.dataLim.x0 - 1, axes.dataLim.x0 + 1)
    if by == "margin":
        if axes.dataLim.x0 > 0:
            axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_clustering(
    figure: Clustering, data: list[dict[str, Any]], labels: list[str], canvas: Figure, axes: Axes
) -> None:
    """Draw tokens by number of mismatched layers: measured (filled) and independent (hollow)."""
    for entry in data:
        run = labels.index(entry["run"])
        color, mark = color_of(run), _marker(run)
        found, free = np.array(entry["shares"]), np.array(entry["independent"])
        axes.plot(
            entry["layers"], np.where(found > 0, found, np.nan), f"{mark}-", color=color, ms=4
        )
        axes.plot(
            entry["layers"], np.where(free > 0, free, np.nan), f"{mark}:", color=color, mfc="none"
        )
    kinds = [
        Line2D([], [], color=SOFT, marker="o", ms=4),
        Line2D([], [], color=SOFT, marker="o", mfc="none", ls=":"),
    ]
    _legend(canvas, kinds, ["found", "if independent"], ncols=2)
    # Independent layers make many mismatches absurdly rare: cut the axis at the measured shares.
    _share_scale(axes, min(share for entry in data for share in entry["shares"] if share))
    axes.set_xlabel("MoE layers of the token that differ")


def _label_steps(axes: Axes, steps: np.ndarray) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    if steps.min() == steps.max():
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _label_layers(axis: Any, layer_ids: list[int]) -> None:
    shown = range(0, len(layer_ids), max(1, -(-len(layer_ids) // 8)))
    axis.set_ticks(list(shown), [str(layer_ids[i]) for i in shown])
