# SPDX-License-Identifier: Apache-2.0
"""Put the report together: the store's data, the figures, one HTML file and one JSON file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_upgrpo import __version__
from moe_upgrpo.report import plots, sequences
from moe_upgrpo.report.alt import alt
from moe_upgrpo.report.answers import ASKED, TOKEN_FIGURES, Answers
from moe_upgrpo.report.figures import Curves, HeatMap, Panels, brief, sentence
from moe_upgrpo.report.notes import alarm_lines, alarms, has_floor, notes
from moe_upgrpo.report.opening import ASKED as ASKED_FIRST
from moe_upgrpo.report.opening import READ, opening
from moe_upgrpo.report.pictures import inline
from moe_upgrpo.report.routing import FLOOR_SIDES, ROUTING
from moe_upgrpo.report.runs import Run, load_runs
from moe_upgrpo.report.tables import about, summary
from moe_upgrpo.report.templates import render
from moe_upgrpo.report.training import OUTCOME, UPDATES
from moe_upgrpo.store.files import write_text
from moe_upgrpo.store.text import printable

_GROUPS = {"learning": OUTCOME, "routing_figures": ROUTING, "updates": UPDATES}
_TITLES = {"learning": "Learning", "routing_figures": "Routing", "updates": "Updates"}
FIGURES = [figure for group in _GROUPS.values() for figure in group]
# Figure, panel and title; the first of these that has data is placed beside the answer.
_PICTURES = (
    ("mismatch_where", "By MoE layer", "Routers that differ, by MoE layer, and noise floors"),
    ("depth", "", "Routers that differ, by MoE layer, and noise floors"),
    ("routing", "", "Routing mismatch by step"),
    ("logp_gap", "", "Log-prob gap by step"),
    ("reward", "", "Mean reward by step"),
)


def write_report(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write a self-contained HTML report of one run or several, and its data beside it.

    The JSON is strict and holds what the page shows:

    - ``runs``: each run's label, path, config and environment
    - ``opening``: {run, question, verdict, text}: the three sentences of each run
    - ``summary``: rows of {name, values}, one value for each run
    - ``notes``: {run, text}: what is special about a run, such as having a single step
    - ``alarms``: {run, name, steps, count, value (at the last of them), meaning (when it rings and
      its likely cause), next (what to run)}; the last three are null where the run lacks them
    - ``token_log``: {run, text}: which part of the token log was read
    - ``figures``: {key, title, read, says (a text for each run), data, missing}. ``data`` are the
      points drawn, an entry for each curve: its run, what it shows (metric or quantity, label),
      ``floor`` (whether it is a noise floor), the ``panel`` in figures of several, and the numbers:
      steps and values, layer_ids and rates, layers and shares, or rows of groups with rate,
      interval (low, high), numerator, denominator and sequences. ``missing`` are panels that a run
      has no data for, and why
    - ``sequences``: the responses shown, token by token

    null marks a value that was not finite or is not known.

    Args:
        run_folders: the folders that runs left; nothing else is read.
        output: the HTML file; the figures' data go to the same name ending in ``.json``.

    Returns:
        The HTML file.

    Raises:
        UserError: a folder holds no run, or a run without any metrics.
    """
    return write_page(load_runs(run_folders), Path(output))


def write_page(runs: list[Run], output: Path) -> Path:
    """Write the report of runs that are already loaded."""
    for run in runs:
        run.tokens.answer_all([*ASKED, *ASKED_FIRST], summed=True)
    answered = {run.label: opening(run) for run in runs}
    figures = [_figure(figure, runs) for figure in FIGURES]
    token_figures = [_figure(figure, runs) for figure in TOKEN_FIGURES]
    shown = {run.label: sequences.sequences(run) for run in runs}
    data = {
        "moe_upgrpo": __version__,
        "runs": [
            {
                "label": run.label,
                "path": printable(str(run.path)),
                "config": run.config,
                "environment": run.environment,
            }
            for run in runs
        ],
        "opening": [
            {"run": run.label} | asdict(one) for run in runs for one in answered[run.label]
        ],
        "summary": summary(runs),
        "notes": [{"run": run.label, "text": text} for run in runs for text in notes(run)],
        "alarms": [alarm for run in runs for alarm in alarms(run)],
        "token_log": [{"run": run.label, "text": sentence(run.tokens.note)} for run in runs],
        "figures": [
            {k: v for k, v in figure.items() if k not in ("images", "more")}
            for figure in [*figures, *token_figures]
        ],
        "sequences": [sequence for found in shown.values() for sequence in found],
    }
    html = render(
        Path(__file__).with_name("template.html"),
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=[
            {
                "label": run.label,
                "color": _color(i),
                "sign": plots.SIGNS[i % len(plots.SIGNS)],
                "config": json.dumps(run.config, indent=2),
                "environment": json.dumps(run.environment, indent=2),
            }
            for i, run in enumerate(runs)
        ],
        notes=data["notes"],
        openings=[
            {
                "label": run.label,
                "color": _color(i),
                "sign": plots.SIGNS[i % len(plots.SIGNS)],
                "sentences": answered[run.label],
                "alarms": alarm_lines(run),
            }
            for i, run in enumerate(runs)
        ],
        picture=_picture([*token_figures, *figures]),
        judged=READ,
        about=about(runs),
        summary=data["summary"],
        groups=[_group(key, figures) for key in _GROUPS],
        token_figures=[figure for figure in token_figures if figure["data"]],
        token_left_out=_left_out(token_figures),
        token_log=data["token_log"],
        sequences={
            "read": sequences.READ,
            "choices": sequences.CHOICES,
            "runs": [
                {
                    "label": run.label,
                    "says": sentence(sequences.says(run, shown[run.label])),
                    "ids_alone": any(
                        "text" not in t for s in shown[run.label] for t in s["tokens"]
                    ),
                    "sequences": [_sequence(run, found) for found in shown[run.label]],
                }
                for run in runs
            ],
        },
        unbounded=sorted({run.loss for run in runs if run.loss.startswith(("up-", "pro-"))}),
        without_floor={
            side: [run.label for run in runs if not run.is_dense and not has_floor(run, side)]
            for side in FLOOR_SIDES
        },
        version=__version__,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output.with_suffix(".json"), json.dumps(printable(data), allow_nan=False))
    write_text(output, printable(html))
    return output


def _sequence(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """A sequence with what the page draws for it."""
    drawn = [sequences.drawn(token, found["num_layers"]) for token in found["tokens"]]
    differ = sum(bool(token["layers"]) for token in found["tokens"])
    return found | {
        "drawn": drawn,
        "differ": differ,
        "strip": sequences.strip(found, run.tokens.layout.layer_ids),
    }


def _left_out(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that no run has data for, grouped by the reason."""
    reasons: dict[str, list[dict[str, str]]] = {}
    for figure in figures:
        if figure["data"]:
            continue
        texts = {finding["text"] for finding in figure["says"]}
        if len(texts) == 1:
            reason = texts.pop()
        else:
            reason = " ".join(f"{finding['run']}: {finding['text']}" for finding in figure["says"])
        reasons.setdefault(reason, []).append({"key": figure["key"], "title": figure["title"]})
    return [{"reason": reason, "figures": found} for reason, found in reasons.items()]


def _color(run: int) -> str:
    return f"var(--c{run % len(plots.COLORS)})"


def _group(key: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """A part of the page: its figures, and those that no run has data for."""
    keys = {figure.key for figure in _GROUPS[key]}
    mine = [figure for figure in figures if figure["key"] in keys]
    shown = [figure for figure in mine if figure["data"]]
    return {"key": key, "title": _TITLES[key], "figures": shown, "left_out": _left_out(mine)}


def _figure(figure: Any, runs: list[Run]) -> dict[str, Any]:
    """Key, texts, data and drawings of one figure."""
    data, labels = figure.data(runs), [run.label for run in runs]
    says = []
    for run in runs:
        mine = [entry for entry in data if entry["run"] == run.label]
        text = sentence(figure.finding(run, mine))
        says.append({"run": run.label, "brief": brief(text), "text": text})
    return {
        "key": figure.key,
        "title": figure.title,
        "read": figure.read,
        "says": says,
        "more": any(finding["text"] != finding["brief"] for finding in says),
        "data": data,
        "missing": _missing(figure, data, runs) if data else [],
        "images": [
            {
                "caption": caption,
                "source": inline(
                    plots.svg(canvas),
                    key=f"{figure.key}{i}",
                    alt=alt(
                        ", ".join(filter(None, [figure.title, caption])),
                        mine,
                        is_share=getattr(part, "is_share", not isinstance(part, Curves)),
                        several=len(runs) > 1,
                    ),
                ),
            }
            for i, ((caption, canvas), (part, mine)) in enumerate(
                zip(plots.draw(figure, data, labels), _drawn(figure, data), strict=False)
            )
        ],
    }


def _drawn(figure: Any, data: list[dict[str, Any]]) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Pair each drawing of a figure, in the order of `plots.draw`, with what it shows."""
    if isinstance(figure, Panels):
        parts = [(part, [e for e in data if e["panel"] == part.key]) for part in figure.parts]
        return [(part, mine) for part, mine in parts if mine]
    if isinstance(figure, HeatMap):
        return [(figure, [entry]) for entry in data]
    return [(figure, data)]


def _picture(figures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The picture beside the answer: the most informative of those available."""
    for key, caption, title in _PICTURES:
        images = next(figure["images"] for figure in figures if figure["key"] == key)
        for image in images:
            if image["caption"] == caption:
                # It appears twice on the page, so here it has ids of its own.
                source = image["source"].replace(f"{key}0-", "opening-")
                return {"caption": title, "source": Markup(source)}
    return None


def _missing(figure: Any, data: list[dict[str, Any]], runs: list[Run]) -> list[dict[str, str]]:
    """Which panels a run has no data for, or not all of it, and why."""
    missing = []
    for part in figure.parts if isinstance(figure, Panels) else [figure]:
        if not isinstance(part, Answers):
            continue
        for run in runs:
            found = {e["quantity"] for e in data if _is_answer(e, part, run)}
            if len(found) < len(part.quantities) and (reason := part.why_not(run)):
                about = {"run": run.label, "panel": part.title, "text": sentence(reason)}
                missing.append(about)
    return missing


def _is_answer(entry: dict[str, Any], part: Answers, run: Run) -> bool:
    mine = entry["run"] == run.label and entry.get("panel", part.key) == part.key
    return mine and "quantity" in entry
