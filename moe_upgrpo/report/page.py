"""Put the report together: the store's data, the figures, one HTML file and one JSON file."""

import base64
import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from moe_upgrpo import __version__
from moe_upgrpo.report import plots, sequences
from moe_upgrpo.report.answers import TOKEN_FIGURES, Answers
from moe_upgrpo.report.figures import Panels, number, percent, plural, sentence
from moe_upgrpo.report.routing import FLOOR_SIDES, ROUTING, stale
from moe_upgrpo.report.runs import Run, load_runs
from moe_upgrpo.report.tokens import spans
from moe_upgrpo.report.training import OUTCOME, UPDATES, accuracy
from moe_upgrpo.store.text import printable

FIGURES = [*OUTCOME, *ROUTING, *UPDATES]
_MISSING = "–"


def write_report(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write a self-contained HTML report of one run or several, and its data beside it.

    The JSON is strict and holds what the page shows:

    - ``runs``: label, path, config and environment of each
    - ``summary``: rows of {name, values}, one value for each run
    - ``notes``: {run, text}: what is special about a run, such as a single step
    - ``alarms``: {run, name, steps, count, meaning (or null)}
    - ``token_log``: {run, text}: what was read of the token log
    - ``figures``: {key, title, read, says (a text for each run), data, missing}. ``data`` are the
      points drawn, an entry for each curve: its run, what it is (metric or quantity, label),
      ``floor`` (whether it is a noise floor), the ``panel`` in figures of several, and the numbers:
      steps and values, layer_ids and rates, layers and shares, or rows of groups with rate,
      interval (low, high), numerator, denominator and sequences. ``missing`` are panels that a run
      has no data for, and why
    - ``sequences``: the responses shown, token by token

    null stands for a value that was not finite, or that is not known.

    Args:
        run_folders: the folders that runs left; nothing else is read.
        output: the HTML file; the figures' data go to the same name ending in ``.json``.

    Returns:
        The HTML file.

    Raises:
        UserError: a folder holds no run, or a run without any metrics.
    """
    runs = load_runs(run_folders)
    output = Path(output)
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
        "summary": _summary(runs),
        "notes": [{"run": run.label, "text": text} for run in runs for text in _notes(run)],
        "alarms": [alarm for run in runs for alarm in _alarms(run)],
        "token_log": [{"run": run.label, "text": sentence(run.tokens.note)} for run in runs],
        "figures": [
            {k: v for k, v in figure.items() if k != "images"}
            for figure in [*figures, *token_figures]
        ],
        "sequences": [sequence for found in shown.values() for sequence in found],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("template.html").render(
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=[
            {
                "label": run.label,
                "color": plots.color_of(i),
                "config": json.dumps(run.config, indent=2),
                "environment": json.dumps(run.environment, indent=2),
            }
            for i, run in enumerate(runs)
        ],
        notes=data["notes"],
        about=_about(runs),
        summary=data["summary"],
        alarms=[_alarm_lines(run) for run in runs],
        figures=[figure for figure in figures if figure["data"]],
        left_out=_left_out(figures),
        token_figures=[figure for figure in token_figures if figure["data"]],
        token_left_out=_left_out(token_figures),
        token_log=data["token_log"],
        sequences={
            "read": sequences.READ,
            "runs": [
                {
                    "label": run.label,
                    "says": sentence(sequences.says(run, shown[run.label])),
                    "sequences": [
                        found
                        | {
                            "drawn": [
                                sequences.drawn(t, found["num_layers"]) for t in found["tokens"]
                            ]
                        }
                        for found in shown[run.label]
                    ],
                }
                for run in runs
            ],
        },
        without_floor={
            side: [run.label for run in runs if not run.is_dense and not _has_floor(run, side)]
            for side in FLOOR_SIDES
        },
        version=__version__,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    _replace(output.with_suffix(".json"), json.dumps(printable(data), allow_nan=False))
    _replace(output, printable(html))
    return output


def _notes(run: Run) -> list[str]:
    """Notes that a reader must have of a run before its figures."""
    notes = []
    if run.is_probe:
        notes.append("A probe: engine and trainer are compared and nothing is trained.")
    elif sum(row["step"] > 0 for row in run.rows) == 1:
        notes.append("A run of one step: nothing here says how anything changes.")
    if run.stale_steps:
        notes.append(f"Generation overlaps with training: {stale(run)}")
    if text := _unfinished(run):
        notes.append(f"{sentence(text)}.")
    if run.is_dense:
        notes.append("A dense model: it has no MoE layer and so no routing figures.")
    if run.pooled("mismatch/router_rate") == 0:
        compared = sum(row.get("mismatch/router_denominator") or 0 for row in run.rows)
        notes.append(f"No mismatch at all: 0 of {compared:,.0f} (token, layer) pairs differ.")
    share = run.config.get("token_log_share")
    if run.config.get("token_log") == "sampled" and share:
        notes.append(f"Figures by token are of a sample: {percent(share)} of the sequences.")
    if run.tokens.table is None:
        notes.append(f"No figures by token: {run.tokens.note}")
    return notes


def _unfinished(run: Run) -> str:
    """Say what is there of a run without a row of a training step, else nothing."""
    if any(row["step"] > 0 for row in run.rows):
        return ""
    table = run.tokens.table
    held = f"the token log has {spans(table['step'].unique().to_pylist())}" if table else ""
    return "; ".join(filter(None, ["no step finished", held]))


def _has_floor(run: Run, side: str) -> bool:
    return any(run.series(f"noise/{kind}/router_rate")[1] for kind in FLOOR_SIDES[side])


def _alarms(run: Run) -> list[dict[str, Any]]:
    """Each alarm that the run raised, with its steps; what it means is in the run's config."""
    steps: dict[str, list[int]] = {}
    for row in run.rows:
        for name in row.get("alarms") or ():
            steps.setdefault(name, []).append(row["step"])
    meanings = run.config.get("alarms") or {}
    return [
        {"run": run.label, "name": name, "steps": at, "count": len(at)}
        | {"meaning": meanings.get(name)}
        for name, at in steps.items()
    ]


def _alarm_lines(run: Run) -> dict[str, Any]:
    """A run's alarms in words, or why there are none."""
    if any("alarms" in row for row in run.rows):
        none = "no alarm was raised."
    else:
        none = f"{_unfinished(run) or 'the run did not look for alarms'}."
    lines = [
        {
            "name": alarm["name"],
            "at": f"{plural(alarm['count'], 'time')}, at {spans(alarm['steps'])}"
            + _last_seen(run, alarm["name"]),
            "meaning": sentence(alarm["meaning"]) if alarm["meaning"] else "",
        }
        for alarm in _alarms(run)
    ]
    return {"run": run.label, "lines": lines, "none": sentence(none)}


def _last_seen(run: Run, name: str) -> str:
    """The value that an alarm rang at last, where its run noted it."""
    _, values = run.series(f"alarms/{name}")
    return f" ({number(values[-1])} at the last)" if values else ""


def _left_out(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that no run has data for, by the reason."""
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


def _replace(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _figure(figure: Any, runs: list[Run]) -> dict[str, Any]:
    """Key, texts, data and drawn images (SVG as data URIs) of one figure."""
    data, labels = figure.data(runs), [run.label for run in runs]

    def says(run: Run) -> str:
        return sentence(figure.finding(run, [entry for entry in data if entry["run"] == run.label]))

    return {
        "key": figure.key,
        "title": figure.title,
        "read": figure.read,
        "says": [{"run": run.label, "text": says(run)} for run in runs],
        "data": data,
        "missing": _missing(figure, data, runs) if data else [],
        "images": [
            {"caption": caption, "source": _data_uri(canvas)}
            for caption, canvas in plots.draw(figure, data, labels)
        ],
    }


def _data_uri(canvas: Any) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(plots.svg(canvas).encode()).decode()


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


def _about(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of the page's first table: what each run is."""

    def versions(run: Run) -> str:
        known = run.environment.get("versions", {})
        shown = ("moe_upgrpo", "torch", "megatron-core", "transformers")
        return ", ".join(f"{name} {known[name]}" for name in shown if known.get(name))

    def moe(run: Run) -> str | None:
        layers = run.config.get("moe_layers")
        if layers is None:
            return None
        if not layers:
            return "dense"
        experts, top_k = (run.config.get(key, "?") for key in ("num_experts", "top_k"))
        return f"{len(layers)} MoE layers, top-{top_k} of {experts} experts"

    def model(run: Run) -> str | None:
        name, parameters = run.config.get("model"), run.config.get("parameters")
        size = f" ({parameters / 1e6:,.2f}M parameters)" if parameters else ""
        return f"{name}{size}" if name else None

    def layout(run: Run) -> str | None:
        name, ranks = run.config.get("layout"), run.config.get("world_size")
        return f"{name} on {ranks} rank{'s' * (ranks != 1)}" if name and ranks else name

    def engine(run: Run) -> str | None:
        parts = [run.config.get(key) for key in ("engine", "engine_dtype")]
        return " ".join(part for part in parts if part) or None

    def started(run: Run) -> str | None:
        time = run.environment.get("started")
        return time and f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M} UTC"

    def device(run: Run) -> str:
        cpu = run.environment.get("cpu", {})  # older runs have none
        return run.environment.get("gpu") or cpu.get("model") or "CPU"

    def commit(run: Run) -> str | None:
        git = run.environment.get("git")
        return git and git["commit"][:12] + (" with changes" if git["changed"] else "")

    rows: list[tuple[str, Callable[[Run], Any]]] = [
        ("Loss", lambda run: run.config.get("loss")),
        ("Model", model),
        ("Routing", moe),
        ("Layout", layout),
        ("Engine", engine),
        ("Replay", lambda run: run.config.get("replay")),
        ("Staleness", lambda run: run.config.get("staleness")),
        ("Seed", lambda run: run.config.get("seed")),
        ("Started", started),
        ("Device", device),
        ("Versions", versions),
        ("Commit", commit),
    ]
    return _table(rows, runs)


def _summary(runs: list[Run]) -> list[dict[str, Any]]:
    """The run in numbers: rows of the page's second table and of the JSON."""

    def of_steps(run: Run, name: str) -> str:
        """' (1 of 3 steps)' where a metric was not logged at every training step."""
        total = sum(row["step"] > 0 for row in run.rows)
        logged = sum(step > 0 for step in run.series(name)[0])
        return f" ({logged} of {plural(total, 'step')})" if 0 < logged < total else ""

    def ends(name: str, form: Callable[[float], str] = number) -> Callable[[Run], str | None]:
        def cell(run: Run) -> str | None:
            found = run.ends(name)
            if found is None:
                return None
            first, last, _ = found
            both = len(run.series(name)[1]) > 1
            return (f"{form(first)} → {form(last)}" if both else form(first)) + of_steps(run, name)

        return cell

    def end(name: str) -> Callable[[Run], str | None]:
        def cell(run: Run) -> str | None:
            found = run.ends(name)
            return number(found[1]) + of_steps(run, name) if found else None

        return cell

    def pooled(name: str, form: Callable[[float], str] = percent) -> Callable[[Run], str | None]:
        def cell(run: Run) -> str | None:
            value = run.pooled(name)
            return None if value is None else form(value) + of_steps(run, name)

        return cell

    def mean(name: str, form: Callable[[float], str] = number) -> Callable[[Run], str | None]:
        def cell(run: Run) -> str | None:
            values = run.series(name)[1]
            return form(float(np.mean(values))) + of_steps(run, name) if values else None

        return cell

    def training_steps(run: Run) -> str:
        return _unfinished(run) or f"{sum(row['step'] > 0 for row in run.rows)}"

    def problems(run: Run) -> str | None:
        values = run.series("eval/problems")[1]
        return f"{values[-1]:,.0f}" if values else None

    def floor(side: str) -> Callable[[Run], str | None]:
        def cell(run: Run) -> str | None:
            names = [f"noise/{kind}/router_rate" for kind in FLOOR_SIDES[side]]
            found = {name: value for name in names if (value := run.pooled(name)) is not None}
            largest = max(found, key=found.get, default="")
            return percent(found[largest]) + of_steps(run, largest) if found else None

        return cell

    def staleness(run: Run) -> str | None:
        steps = run.pooled("staleness/mean")
        return number(steps) + of_steps(run, "staleness/mean") if steps else None

    def decomposition(run: Run) -> str | None:
        rows = [row for row in run.rows if row.get("time/decomposition") and row.get("time/total")]
        if not rows:
            return None
        share = sum(r["time/decomposition"] for r in rows) / sum(r["time/total"] for r in rows)
        return f"{share:.1%} of {plural(len(rows), 'step')}"

    def alarms(run: Run) -> str | None:
        found = _alarms(run)
        if not found:
            return "none" if any("alarms" in row for row in run.rows) else None
        return ", ".join(f"{alarm['name']} ({alarm['count']}×)" for alarm in found)

    def throughput(run: Run) -> str | None:
        seconds = sum(run.series("time/total")[1])
        tokens = sum(run.series("tokens/sampled")[1])
        return f"{tokens / seconds:,.0f}" if seconds and tokens else None

    def time_split(run: Run) -> str | None:
        total = sum(run.series("time/total")[1])
        if not total:
            return None
        phases = {"generate": "generation", "old_log_probs": "old log-probs"}
        phases |= {"analysis": "analysis", "update": "update", "logging": "logging"}
        sums = {text: sum(run.series(f"time/{name}")[1]) for name, text in phases.items()}
        return ", ".join(f"{text} {value / total:.0%}" for text, value in sums.items())

    passes = sorted(
        {name for run in runs for name in run.pass_at_k()},
        key=lambda name: int(name.removeprefix("eval/pass@")),
    )
    rows: list[tuple[str, Callable[[Run], Any]]] = [
        ("Training steps", training_steps),
        ("Reward, beginning → end", ends("reward/mean")),
        ("Held-out greedy, before → after", lambda run: accuracy(run, "eval/greedy")),
        *(
            (f"Held-out {name.removeprefix('eval/')}", lambda run, name=name: accuracy(run, name))
            for name in passes
        ),
        ("Held-out problems", problems),
        ("Entropy, beginning → end", ends("entropy/mean")),
        ("KL to the warm start, end", end("kl/warm_start")),
        ("Routers that differ", pooled("mismatch/router_rate")),
        ("Expert slots that differ", pooled("mismatch/slot_rate")),
        ("Tokens that differ in any layer", pooled("mismatch/token_any_rate")),
        ("Differing routers per token", pooled("mismatch/routers_per_token", number)),
        ("Noise floor, routers, trainer", floor("trainer")),
        ("Noise floor, routers, engine", floor("engine")),
        ("Conditional flips, routers", pooled("conditional/router_rate")),
        ("Staleness of the samples, steps", staleness),
        ("Log-prob gap, mean |gap|", pooled("logp_gap/mean_abs", number)),
        ("Clipped, advantage > 0", mean("clip/positive", percent)),
        ("Clipped, advantage < 0", mean("clip/negative", percent)),
        ("Sampled tokens per second", throughput),
        ("Time of a step", time_split),
        ("Decomposition, share of analysed steps' time", decomposition),
        ("Alarms", alarms),
    ]
    return _table(rows, runs)


def _table(rows: list[tuple[str, Callable[[Run], Any]]], runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of {name, values by run}; a row that no run fills is left out."""
    table = [(name, [cell(run) for run in runs]) for name, cell in rows]
    return [
        {"name": name, "values": [_MISSING if v in (None, "") else str(v) for v in values]}
        for name, values in table
        if any(v not in (None, "") for v in values)
    ]
