"""Drawn curves go through the numbers of the JSON, curve by curve.

Read back from matplotlib's axes, before they become SVG. Not covered: labels, colours, overlaps.
"""

import numpy as np
import pytest

from moe_upgrpo.report import plots
from moe_upgrpo.report.answers import TOKEN_FIGURES
from moe_upgrpo.report.page import FIGURES
from moe_upgrpo.report.runs import load_runs
from tests.report.synthetic import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two, of which one replays; below the number of steps that are smoothed."""
    folder = tmp_path_factory.mktemp("runs")
    return load_runs(
        [
            make_run(folder / "free", steps=20),
            make_run(folder / "held", steps=12, layers=3, replay="R3", seed=1),
        ]
    )


def drawn_points(axes):
    """Every line's points as sorted (x, y), gaps left out."""
    lines = []
    for line in axes.lines:
        x, y = (np.asarray(values, float) for values in line.get_data())
        known = ~np.isnan(y)
        lines.append(sorted(zip(x[known].tolist(), y[known].tolist(), strict=True)))
    return lines


def expected_points(entry):
    """The points of an entry, where x does not depend on the other entries."""
    if "rows" in entry:
        middles = [np.mean(row["group"]) for row in entry["rows"]]
        return middles, [row["rate"] for row in entry["rows"]]
    if "shares" in entry:
        pairs = zip(entry["layers"], entry["shares"], strict=True)
        return list(zip(*[(m, share) for m, share in pairs if share], strict=True))
    if "layer_ids" in entry:
        return entry["layer_ids"], entry["rates"]
    return entry["steps"], entry["values"]


PARTS = [part for f in [*FIGURES, *TOKEN_FIGURES] for part in getattr(f, "parts", [f])]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.key)
def test_every_number_is_drawn(runs, part):
    labels = [run.label for run in runs]
    data = part.data(runs)
    assert data
    drawings = plots.draw(part, data, labels)
    if part.key == "layers":
        for entry, (caption, canvas) in zip(data, drawings, strict=True):
            mesh = canvas.axes[0].collections[0]
            assert caption == entry["run"]
            assert np.array(mesh.get_array()).T.tolist() == entry["rates"]
        return
    ((_, canvas),) = drawings
    lines = drawn_points(canvas.axes[0])
    for entry in data:
        if "value" in entry:  # a floor across the figure
            assert [(0, entry["value"]), (1, entry["value"])] in lines
        elif entry.get("by") in ("sign", "token"):  # x is a place among all entries
            y = sorted(row["rate"] for row in entry["rows"])
            of_lines = sorted(y for line in lines for _, y in line)
            assert set(y) <= set(of_lines)
        elif part.key != "logp_gap" or not entry["floor"] or any(entry["values"]):
            # On a log scale a floor of 0 stands in the legend alone.
            x, y = expected_points(entry)
            assert sorted(zip(map(float, x), y, strict=True)) in lines


MANY = ("routing", "held_out", "depth", "gap_tails_by_own", "seen", "clustering")


@pytest.mark.parametrize("part", [p for p in PARTS if p.key in MANY], ids=lambda part: part.key)
@pytest.mark.parametrize("alone", [True, False])
def test_curves_differ_by_more_than_their_colour(runs, part, alone):
    """In grey, and to whoever sees colours otherwise: by line or mark."""
    shown = runs[:1] if alone else runs
    data = part.data(shown)
    assert data
    ((_, canvas),) = plots.draw(part, data, [run.label for run in shown])
    styles = [
        (line.get_linestyle(), str(line.get_marker()), line.get_markerfacecolor() == "none")
        for line in canvas.axes[0].lines
        if line.get_alpha() is None
    ]
    measured = [e for e in data if not e.get("floor")]
    found = set(styles)
    curves = {(e["run"], e.get("label")) for e in measured}
    assert len(found) >= len(curves)
