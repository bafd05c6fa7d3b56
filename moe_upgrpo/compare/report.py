# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: one HTML page, its data as JSON, and every figure as an SVG file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from moe_upgrpo import __version__
from moe_upgrpo.compare import figures
from moe_upgrpo.compare.data import RunData, read_all
from moe_upgrpo.compare.measures import (
    SAID,
    Measure,
    evaluations,
    matched_reward,
    measures,
    step_at_reward,
    summary,
    window,
)
from moe_upgrpo.errors import UserError
from moe_upgrpo.report.figures import number, plural, sentence
from moe_upgrpo.report.pictures import inline, themed
from moe_upgrpo.report.plots import svg
from moe_upgrpo.report.templates import render
from moe_upgrpo.stats import Comparison, compare_pairs, mean_interval
from moe_upgrpo.store.files import parse_json, write_text
from moe_upgrpo.store.text import printable

Results = dict[str, dict[int, float]]
"""arm → seed → figure."""


def write_report(folder: Path, output_dir: Path | None = None) -> Path:
    """Write report.html, report.json and figures/*.svg of a comparison, by default into its folder.

    They are made only from plan.json, learning_rates.json, not_run.json and data/*.parquet (or
    runs.parquet in a comparison kept for long), and are the same whenever they are made. The JSON
    is strict (null for what is not finite) and holds:

    - ``plan``, ``learning_rates``: as written
    - ``progress``: runs done, planned and crashed; missing ones by name, and whether their
      machine failed
    - ``runs``: arm, seed, status, message, lr, seconds, ``primary`` and all measures of each
    - ``primary``: a row for each planned contrast (`compare_pairs`) with its verdict and half-width
    - ``arms``: mean, low, high (t interval over seeds) and runs for each measure and arm
    - ``exploratory``: the contrasts of every measure but the primary one
    - ``matched_reward``: the level R*, the window, and how many runs of each arm reach it
    - ``figures``: key, title, read and the numbers drawn

    Raises:
        UserError: the folder holds no comparison, no finished run, or a run that is not planned.
    """
    loaded = load(Path(folder))
    folder = Path(output_dir or folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_all(
        loaded.shown,
        all_runs=loaded.by_arm,
        primary=loaded.primary,
        primary_label=f"{loaded.metric.removeprefix('eval/')}, {loaded.how}",
        contrasts=_contrasts(loaded.primary, loaded.plan),
        confidence=loaded.confidence,
        width=window(loaded.runs),
    )
    data = numbers(loaded)
    data["figures"] = [{k: v for k, v in one.items() if k != "canvas"} for one in drawn]
    pictures = {one["key"]: svg(one["canvas"]) for one in drawn}
    for key, picture in pictures.items():
        (folder / "figures").mkdir(exist_ok=True)
        write_text(folder / "figures" / f"{key}.svg", picture)
    write_text(folder / "report.json", json.dumps(_finite(data), allow_nan=False, indent=1) + "\n")
    output = folder / "report.html"
    inlined = {
        one["key"]: inline(
            pictures[one["key"]], key=one["key"], alt=f"{one['title']}. {one['read']}"
        )
        for one in drawn
    }
    write_text(output, _page(data, loaded, inlined))
    return output


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Contents of a comparison's folder. `by_arm`: all runs, in the order of the plan; `shown`:
    those in tables and curves, from the seeds that every arm has."""

    written: dict[str, Any]
    rates: dict[str, Any] | None
    tuning: list[RunData]
    not_run: set[tuple[str, int]]  # arm and seed of the runs that failed because of their machine
    by_arm: dict[str, list[RunData]]
    shown: dict[str, list[RunData]]
    measures: list[Measure]

    @property
    def plan(self) -> dict[str, Any]:
        return self.written["plan"]

    @property
    def runs(self) -> list[RunData]:
        return [run for found in self.by_arm.values() for run in found]

    @property
    def metric(self) -> str:
        return self.plan["primary"]["metric"]

    @property
    def how(self) -> str:
        return self.plan["primary"]["summary"]

    @property
    def confidence(self) -> float:
        return self.plan["confidence"]

    @property
    def primary(self) -> Results:
        return {
            arm: {run.about.seed: summary(run, self.metric, self.how) for run in runs}
            for arm, runs in self.by_arm.items()
        }


def load(folder: Path) -> Loaded:
    """Read the folder. Raises UserError as `write_report` does."""
    written = _read_plan(folder)
    asked = written["plan"]["learning_rates"]
    runs = read_all(folder)
    by_arm = _by_arm(runs, written["plan"], folder)
    seeds = full_seeds(by_arm)
    return Loaded(
        written=written,
        rates=_read_json(folder / "learning_rates.json") if asked else None,
        tuning=read_all(folder, tuning=True),
        not_run=_read_not_run(folder / "not_run.json"),
        by_arm=by_arm,
        # Means over other seeds would not be comparable. Before the first full seed: all runs.
        shown={
            arm: [run for run in found if not seeds or run.about.seed in seeds]
            for arm, found in by_arm.items()
        },
        measures=measures(runs),
    )


def full_seeds(by_arm: Mapping[str, Sequence[RunData]]) -> set[int]:
    """The seeds that every arm has."""
    return set.intersection(*({run.about.seed for run in runs} for runs in by_arm.values()))


def numbers(loaded: Loaded) -> dict[str, Any]:
    """Data that `write_report` puts into the JSON, except the figures."""
    plan, confidence, primary = loaded.plan, loaded.confidence, loaded.primary
    exploratory = []
    for m in loaded.measures:
        if m.key != f"{loaded.metric}/{loaded.how}":
            found = _contrasts(_results(m, loaded.by_arm), plan)
            rows = [_verdict(c, None, confidence) for c in found]
            exploratory += [{"measure": m.key, "contrasts": rows}] if rows else []
    return {
        "moe_upgrpo": __version__,
        "plan": loaded.written,
        "learning_rates": loaded.rates,
        "progress": _progress(loaded),
        "runs": [_run_row(run, primary, loaded.measures) for run in loaded.runs],
        "primary": [
            _verdict(c, len(plan["contrasts"]), confidence) for c in _contrasts(primary, plan)
        ],
        "arms": [_by_arm_row(m, _results(m, loaded.shown), confidence) for m in loaded.measures],
        "exploratory": exploratory,
        "matched_reward": _matched(loaded.by_arm, loaded.runs),
    }


# What is read.


def _read_json(file: Path) -> Any:
    try:
        return printable(parse_json(file.read_bytes(), str(file)))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; is this the folder of a comparison?") from None


def _read_plan(folder: Path) -> dict[str, Any]:
    """plan.json and its plan, not checked again: options of that time may have been removed."""
    written = _read_json(folder / "plan.json")
    needed = {"name", "question", "base", "arms", "seeds", "contrasts", "primary", "confidence"}
    plan = written.get("plan", {}) if isinstance(written, dict) else {}
    if missing := sorted((needed | {"learning_rates"}) - {*plan}):
        raise UserError(f"{folder}/plan.json is not a comparison's: it lacks {', '.join(missing)}.")
    return written


def _read_not_run(file: Path) -> set[tuple[str, int]]:
    kept = _read_json(file) if file.exists() else []
    try:
        return {(one["arm"], one["seed"]) for one in kept if not one["tuning"]}
    except (TypeError, KeyError):
        raise UserError(f"{file} is not a comparison's: delete it.") from None


def _by_arm(
    runs: Sequence[RunData], plan: Mapping[str, Any], folder: Path
) -> dict[str, list[RunData]]:
    """The runs of every arm, in the order of the plan, including arms without a run yet."""
    found: dict[str, list[RunData]] = {arm: [] for arm in plan["arms"]}
    for run in sorted(runs, key=lambda run: run.about.seed):
        arm, seed = run.about.arm, run.about.seed
        if arm not in found or seed not in plan["seeds"]:
            raise UserError(f"{folder}/data has a run of arm {arm} with seed {seed}: not planned.")
        if seed in [other.about.seed for other in found[arm]]:
            raise UserError(f"{folder}/data has the run of arm {arm} with seed {seed} twice.")
        found[arm].append(run)
    return found


# What is computed.


def _results(measure: Measure, by_arm: Mapping[str, Sequence[RunData]]) -> Results:
    return {
        arm: {
            run.about.seed: float(value) for run in runs if (value := measure.of(run)) is not None
        }
        for arm, runs in by_arm.items()
    }


def _contrasts(results: Results, plan: Mapping[str, Any]) -> list[Comparison]:
    """The planned pairs over the seeds that both have; without pairs that have fewer than two."""
    pairs = [(a, b) for a, b in plan["contrasts"] if len({*results[a]} & {*results[b]}) > 1]
    if not pairs:
        return []
    return compare_pairs(results, pairs, confidence=plan["confidence"], common_seeds=True)


def _verdict(c: Comparison, planned: int | None, confidence: float) -> dict[str, Any]:
    """A contrast as a row; with `planned`, `needed`: the difference told apart beside any other."""
    half = (c.high - c.low) / 2
    if c.p_holm < 1 - confidence:
        verdict = "higher" if c.difference > 0 else "lower"
    else:
        verdict = "not told apart"
    row = {
        "arm": c.method,
        "other": c.other,
        "seeds": c.seeds,
        "difference": c.difference,
        "low": c.low,
        "high": c.high,
        "half_width": half,
        "p": c.p_value,
        "p_holm": c.p_holm,
        "verdict": verdict,
    }
    if planned is not None:
        ppf = stats.t(c.seeds - 1).ppf
        row["needed"] = half * ppf(1 - (1 - confidence) / 2 / planned) / ppf((1 + confidence) / 2)
    return row


def _by_arm_row(measure: Measure, results: Results, confidence: float) -> dict[str, Any]:
    values = []
    for arm, by_seed in results.items():
        entry: dict[str, Any] = {"arm": arm, "runs": len(by_seed)}
        if by_seed:
            ends = mean_interval(list(by_seed.values()), confidence)
            entry |= dict(zip(("mean", "low", "high"), ends, strict=True))
        values.append(entry)
    return {"measure": measure.key, "label": measure.label, "values": values}


def _run_row(run: RunData, primary: Results, all_measures: Sequence[Measure]) -> dict[str, Any]:
    about = run.about
    row = {name: getattr(about, name) for name in ("arm", "seed", "status", "message", "lr")}
    row |= {"seconds": about.seconds, "primary": primary[about.arm][about.seed]}
    return row | {"measures": {m.key: m.of(run) for m in all_measures}}


def _progress(loaded: Loaded) -> dict[str, Any]:
    plan, runs = loaded.plan, loaded.runs
    have = {(run.about.arm, run.about.seed) for run in runs}
    asked = [(arm, seed) for seed in plan["seeds"] for arm in plan["arms"]]
    missing = [
        f"{arm}, seed {seed}" + (" (not run: machine)" if (arm, seed) in loaded.not_run else "")
        for arm, seed in asked
        if (arm, seed) not in have
    ]
    return {
        "done": len(runs),
        "planned": len(plan["seeds"]) * len(plan["arms"]),
        "crashed": sum(run.about.status == "crashed" for run in runs),
        "missing": missing,
        "full_seeds": sorted(full_seeds(loaded.by_arm)),
    }


def _matched(
    by_arm: Mapping[str, Sequence[RunData]], runs: Sequence[RunData]
) -> dict[str, Any] | None:
    """Numbers of runs of each arm that reach R*, and that reach it in their first window."""
    level, width = matched_reward(runs), window(runs)
    if level is None:
        return None
    rows = []
    for arm, found in by_arm.items():
        steps = [step for run in found if (step := step_at_reward(run, level, width)) is not None]
        at_once = sum(step == width for step in steps)
        rows.append({"arm": arm, "runs": len(found), "reach": len(steps), "at_once": at_once})
    return {"level": level, "window": width, "arms": rows}


def _finite(value: Any) -> Any:
    """The same value with None for numbers that JSON lacks, and Python's numbers for numpy's."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What is said.


def points(value: float, signed: bool = True) -> str:
    """A difference of shares in points: 0.021 is +2.1; smaller ones get more digits."""
    shown = 100 * value
    digits = 1 if abs(shown) >= 0.1 or shown == 0 else 2
    text = f"{shown:+.{digits}f}" if signed else f"{shown:.{digits}f}"
    return text.replace("-", "−")


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def _sentence(row: Mapping[str, Any], confidence: float) -> dict[str, str]:
    """The verdict on a primary contrast, in words."""
    numbers = (
        f"{confidence:.0%} interval {points(row['low'])} to {points(row['high'])}, "
        f"{plural(row['seeds'], 'paired seed')}, p {_is(row['p'])}, "
        f"Holm-corrected p {_is(row['p_holm'])}"
    )
    needed = (
        f"No difference below {points(row['half_width'], False)} points could have been told from "
        f"zero with these seeds, at the strictest step of Holm's correction none below "
        f"{points(row['needed'], False)}."
    )
    if row["half_width"] == 0:
        needed = "Every seed has the same difference, so that these seeds show no spread."
    if row["verdict"] == "not told apart":
        text = f"the difference is {points(row['difference'])} points ({numbers}). {needed}"
    else:
        size = points(abs(row["difference"]), False)
        text = f"by {size} points ({numbers}). {needed}"
    return {"pair": f"{row['arm']} against {row['other']}", "verdict": row["verdict"], "text": text}


def _headline(rows: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], done: bool) -> str:
    told, planned = sum(r["verdict"] != "not told apart" for r in rows), len(plan["contrasts"])
    if not rows:
        return "No contrast can be tested yet."
    if not told:
        begin = "A negative result:" if done else "So far"
        return f"{begin} none of {plural(planned, 'contrast')} is told apart."
    return f"{'' if done else 'So far '}{told} of {plural(planned, 'contrast')} told apart."


def _is(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _cell_mean(entry: Mapping[str, Any], is_share: bool, full: int) -> str:
    if not entry["runs"]:
        return "–"
    mean, half = entry["mean"], (entry["high"] - entry["low"]) / 2
    if is_share:
        digits = 1 if mean >= 0.01 else 2
        text = f"{100 * mean:.{digits}f}"
        text += f" ± {100 * half:.{digits}f}" if math.isfinite(half) else ""
    elif math.isfinite(half) and half > 0:  # both to the second significant digit of the second
        digits = max(0, 1 - math.floor(math.log10(half)))
        small = digits > 5
        text = f"{mean:.2e} ± {half:.1e}" if small else f"{mean:.{digits}f} ± {half:.{digits}f}"
    else:
        text = number(mean)
    few = f" ({entry['runs']})" if entry["runs"] != full else ""
    return text.replace("-", "−") + ("%" if is_share else "") + few


def _cell_contrast(row: Mapping[str, Any], is_share: bool, full: int) -> dict[str, Any]:
    def show(value: float) -> str:
        return points(value) if is_share else f"{value:+.2g}".replace("-", "−")

    few = f", {row['seeds']} seeds" if row["seeds"] != full else ""
    return {
        "text": f"{show(row['difference'])} [{show(row['low'])}, {show(row['high'])}]",
        "p": f"p {_is(row['p'])}, Holm {p_text(row['p_holm'])}{few}",
        "told": row["verdict"] != "not told apart",
    }


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _commit(git: Mapping[str, Any] | None) -> str:
    if not git or not git.get("commit"):
        return "not known"
    return git["commit"][:12] + (" with uncommitted changes" if git.get("changed") else "")


def _counted(texts: Sequence[str]) -> str:
    """'a' where all are the same, else 'a (3 runs); b (2 runs)'."""
    counts = Counter(texts)
    if len(counts) == 1:
        return texts[0]
    return "; ".join(f"{text} ({plural(n, 'run')})" for text, n in counts.most_common())


def _machine(environment: Mapping[str, Any]) -> str:
    gpu, count = environment.get("gpu"), environment.get("gpu_count")
    parts = [f"{count} × {gpu}" if gpu else "no GPU"]
    if environment.get("cpu_count"):
        parts.insert(0, plural(environment["cpu_count"], "CPU core"))
    return ", ".join(filter(None, [*parts, environment.get("platform")]))


def _versions(environment: Mapping[str, Any]) -> str:
    known = {"python": environment.get("python")} | dict(environment.get("versions") or {})
    return ", ".join(f"{name} {version}" for name, version in known.items() if version)


def _start(run: RunData) -> datetime | None:
    started = run.about.environment.get("started")
    return datetime.fromisoformat(started) if started else None


def _ran(loaded: Loaded) -> list[tuple[str, str]]:
    """Rows (name, text): with what, where and for how long the runs ran."""
    runs, tuning = loaded.runs, loaded.tuning
    seconds = [run.about.seconds for run in runs if run.about.seconds is not None]
    rows = []
    if seconds:
        unknown = len(runs) - len(seconds)
        not_known = f"; of {plural(unknown, 'resumed run')} not known" if unknown else ""
        median = f"median {_hours(float(np.median(seconds)))} each"
        rows.append(
            (
                "Wall-clock of the compared runs",
                f"{_hours(sum(seconds))} added up, {median}{not_known}",
            )
        )
    if spent := [run.about.seconds for run in tuning if run.about.seconds is not None]:
        crashed = sum(run.about.status == "crashed" for run in tuning)
        text = f"{plural(len(tuning), 'run')}, {crashed or 'none'} crashed"
        rows.append(("Choosing learning rates", f"{text}, {_hours(sum(spent))} added up"))
    ends = [
        (start, start + timedelta(seconds=run.about.seconds))
        for run in [*tuning, *runs]
        if (start := _start(run)) and run.about.seconds is not None
    ]
    if ends:
        length = max(e for _, e in ends) - min(s for s, _ in ends)
        begin = f"from {min(ends)[0]:%Y-%m-%d %H:%M} UTC"
        text = f"{_hours(length.total_seconds())}, pauses included, {begin}"
        rows.append(("First start to last end", text))
    environments = [run.about.environment for run in runs]
    rows += [
        ("Machine", _counted([_machine(found) for found in environments])),
        ("Ranks of a run", str(loaded.plan.get("nproc", 1))),
        ("Versions", _counted([_versions(found) for found in environments])),
        ("Commit of the runs", _counted([_commit(found.get("git")) for found in environments])),
    ]
    if problems := {int(x) for run in runs for x in run.series("eval/problems")[1]}:
        rows.append(("Held-out problems", ", ".join(f"{n:,}" for n in sorted(problems))))
    sizes = {run.about.config.get("parameters") for run in runs} - {None}
    if sizes:
        texts = [f"{size / 1e6:,.2f}M parameters" for size in sorted(sizes)]
        rows.append(("Model", ", ".join(texts)))
    return rows


def _warnings(loaded: Loaded, gains: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """Notes that a reader needs before the answer."""
    found, runs, tuning = [], loaded.runs, loaded.tuning
    said = datetime.fromisoformat(loaded.written["written"])
    early = [
        sum((start := _start(run)) is not None and start < said for run in part)
        for part in (tuning, runs)
    ]
    if any(early):
        found.append(
            f"{early[0]} of the {plural(len(tuning), 'run')} that chose learning rates and "
            f"{early[1]} of the {plural(len(runs), 'compared run')} started before plan.json was "
            "written: for them, it was not written beforehand."
        )
    for arm, found_rates in (loaded.rates or {}).items():
        tried = [score["lr"] for score in found_rates["scores"]]
        chosen = found_rates["chosen"]
        if chosen in (min(tried), max(tried)):
            end = "lowest" if chosen == min(tried) else "highest"
            beyond = "lower" if chosen == min(tried) else "higher"
            found.append(
                f"{arm}: the chosen learning rate {chosen:g} is the {end} that was tried; a "
                f"{beyond} one might have done better."
            )
        others = {run.about.lr for run in runs if run.about.arm == arm} - {chosen}
        if others:
            used = ", ".join(f"{lr:g}" for lr in sorted(others))
            found.append(f"{arm}: runs used the learning rate {used}, chosen was {chosen:g}.")
    flat = [arm for arm, (_, low, _) in gains.items() if not low > 0]
    if flat:
        found.append(
            f"Not told to be better than the warm start by the primary endpoint: {', '.join(flat)}."
        )
    return found


def _gains(loaded: Loaded) -> dict[str, tuple[float, float, float]]:
    """arm → mean and interval of the primary figure − the same metric before training."""
    found = {}
    for arm, runs in loaded.shown.items():
        before = {run.about.seed: evaluations(run, loaded.metric).get(0) for run in runs}
        values = [loaded.primary[arm][seed] - x for seed, x in before.items() if x is not None]
        if values:
            found[arm] = mean_interval(values, loaded.confidence)
    return found


def _gain(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "–"
    mean, low, high = found
    interval = f" [{points(low)}, {points(high)}]" if math.isfinite(low) else ""
    return points(mean) + interval


# The page.


def _page(data: Mapping[str, Any], loaded: Loaded, pictures: Mapping[str, str]) -> str:
    plan, confidence, metric, runs = loaded.plan, loaded.confidence, loaded.metric, loaded.runs
    gains = _gains(loaded)
    by_key = {m.key: m for m in loaded.measures}
    full = {arm: len(found) for arm, found in loaded.shown.items()}

    def arm_rows(held_out: bool) -> list[dict[str, Any]]:
        return [
            {
                "name": row["label"],
                "main": row["measure"] == f"{metric}/{loaded.how}",
                "cells": [
                    _cell_mean(entry, by_key[row["measure"]].is_share, full[entry["arm"]])
                    for entry in row["values"]
                ],
            }
            for row in data["arms"]
            if row["measure"].startswith("eval/") == held_out
        ]

    most = {(row["arm"], row["other"]): row["seeds"] for row in data["primary"]}

    def contrast_rows() -> list[dict[str, Any]]:
        rows = []
        for entry in data["exploratory"]:
            measure = by_key[entry["measure"]]
            cells = {(row["arm"], row["other"]): row for row in entry["contrasts"]}
            rows.append(
                {
                    "name": measure.label + (", points" if measure.is_share else ""),
                    "cells": [
                        _cell_contrast(cells[a, b], measure.is_share, most[a, b])
                        if (a, b) in cells
                        else None
                        for a, b in plan["contrasts"]
                    ],
                }
            )
        return rows

    tested = [row["p"] for entry in data["exploratory"] for row in entry["contrasts"]]
    return render(
        Path(__file__).with_name("comparison.html"),
        plan=plan,
        written=data["plan"]["written"].replace("T", " ").replace("+00:00", " UTC"),
        code=_commit(data["plan"].get("code")),
        progress=data["progress"],
        seeds=figures.span(list(full.values())),
        headline=_headline(data["primary"], plan, not data["progress"]["missing"]),
        crashes=[run.about for run in runs if run.about.status == "crashed"],
        warnings=_warnings(loaded, gains),
        answers=[_sentence(row, confidence) for row in data["primary"]],
        untested=[
            f"{a} against {b}"
            for a, b in plan["contrasts"]
            if (a, b) not in [(row["arm"], row["other"]) for row in data["primary"]]
        ],
        metric=metric.removeprefix("eval/"),
        how=SAID[loaded.how],
        arms=[
            {
                "name": arm,
                "color": themed(figures.style_of(i)["color"]),
                "options": _yaml(plan["arms"][arm]),
                "runs": plural(len(found), "run"),
                "crashed": sum(run.about.status == "crashed" for run in found),
                "lr": _counted([f"{run.about.lr:g}" for run in found]) if found else "–",
                "gain": _gain(gains.get(arm)),
            }
            for i, (arm, found) in enumerate(loaded.by_arm.items())
        ],
        base=_yaml(plan["base"]),
        asked=plan["learning_rates"],
        rates=_rates(loaded.rates),
        ran=_ran(loaded),
        held_out=arm_rows(True),
        others=arm_rows(False),
        contrast_heads=[f"{a} − {b}" for a, b in plan["contrasts"]],
        contrast_rows=contrast_rows(),
        tests=len(tested),
        below=sum(p < 1 - confidence for p in tested),
        alpha=1 - confidence,
        by_chance=f"{len(tested) * (1 - confidence):.0f}",
        matched=data["matched_reward"],
        figures=[
            {
                "key": one["key"],
                "title": one["title"],
                "read": one["read"],
                "source": pictures[one["key"]],
            }
            for one in data["figures"]
        ],
        definitions=[{"name": m.label, "text": sentence(m.meaning)} for m in loaded.measures],
        runs=[
            row | {"shown": f"{row['primary']:.1%}", "time": _hours(row["seconds"])}
            if row["seconds"] is not None
            else row | {"shown": f"{row['primary']:.1%}", "time": "–"}
            for row in data["runs"]
        ],
        confidence=f"{confidence:.0%}",
        version=__version__,
    )


def _yaml(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False).strip() if values else "{}"


def _rates(rates: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scores by learning rate and arm, the chosen ones marked."""
    if rates is None:
        return None
    values = sorted({score["lr"] for found in rates.values() for score in found["scores"]})
    rows = []
    for arm, found in rates.items():
        scores = {score["lr"]: score["by_seed"] for score in found["scores"]}
        cells = [
            {
                "mean": f"{np.mean(scores[lr]):.3f}" if lr in scores else "–",
                "seeds": ", ".join(f"{x:.3f}" for x in scores.get(lr, [])),
                "chosen": lr == found["chosen"],
            }
            for lr in values
        ]
        rows.append({"arm": arm, "cells": cells})
    return {"values": [f"{lr:g}" for lr in values], "rows": rows}
