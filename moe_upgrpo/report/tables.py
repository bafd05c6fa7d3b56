# SPDX-License-Identifier: Apache-2.0
"""The long tables at the end of the page: what was run, and the run in numbers."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moe_upgrpo.report.figures import number, percent, plural
from moe_upgrpo.report.notes import alarms, unfinished
from moe_upgrpo.report.routing import FLOOR_SIDES
from moe_upgrpo.report.runs import Run
from moe_upgrpo.report.training import accuracy
from moe_upgrpo.store.phases import PHASES, waiting_share

_MISSING = "–"


def about(runs: list[Run]) -> list[dict[str, Any]]:
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
        # Older runs, and those of other trainers, have only the preset's name.
        ("Loss", lambda run: run.config.get("loss_in_words") or run.config.get("loss")),
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


def summary(runs: list[Run]) -> list[dict[str, Any]]:
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
        return unfinished(run) or f"{sum(row['step'] > 0 for row in run.rows)}"

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

    def alarm_names(run: Run) -> str | None:
        found = alarms(run)
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
        sums = {text: sum(run.series(f"time/{name}")[1]) for name, text in PHASES.items()}
        return ", ".join(f"{text} {value / total:.0%}" for text, value in sums.items())

    def waiting(run: Run) -> str | None:
        shares = {text: waiting_share(run.rows, name) for name, text in PHASES.items()}
        parts = [f"{share:.0%} of {text}" for text, share in shares.items() if share is not None]
        return ", ".join(parts) or None

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
        ("Ranks waited", waiting),
        ("Decomposition, share of analysed steps' time", decomposition),
        ("Alarms", alarm_names),
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
