# SPDX-License-Identifier: Apache-2.0
"""Notes on a run's peculiarities, and its alarms, shown before any figure."""

from typing import Any

from moe_upgrpo.report.figures import number, percent, plural, sentence
from moe_upgrpo.report.routing import FLOOR_SIDES, stale
from moe_upgrpo.report.runs import Run
from moe_upgrpo.report.tokens import spans


def notes(run: Run) -> list[str]:
    """Notes on a run that a reader needs before its figures."""
    found = []
    if run.is_probe:
        found.append("A probe: engine and trainer are compared and nothing is trained.")
    elif sum(row["step"] > 0 for row in run.rows) == 1:
        found.append("A run of one step: nothing here says how anything changes.")
    if run.stale_steps:
        found.append(f"Generation overlaps with training: {stale(run)}")
    if text := unfinished(run):
        found.append(f"{sentence(text)}.")
    if run.is_dense:
        found.append("A dense model: it has no MoE layer and so no routing figures.")
    if run.pooled("mismatch/router_rate") == 0:
        compared = sum(row.get("mismatch/router_denominator") or 0 for row in run.rows)
        found.append(f"No mismatch at all: 0 of {compared:,.0f} (token, layer) pairs differ.")
    share = run.config.get("token_log_share")
    if run.config.get("token_log") == "sampled" and share:
        found.append(f"Figures by token are of a sample: {percent(share)} of the sequences.")
    if run.tokens.layout is None:
        found.append(f"No figures by token: {run.tokens.note}")
    return found


def unfinished(run: Run) -> str:
    """Describe a run that has no training step yet; empty for any other run."""
    if any(row["step"] > 0 for row in run.rows):
        return ""
    held = f"the token log has {spans(run.tokens.steps)}" if run.tokens.steps else ""
    return "; ".join(filter(None, ["no step finished", held]))


def has_floor(run: Run, side: str) -> bool:
    return any(run.series(f"noise/{kind}/router_rate")[1] for kind in FLOOR_SIDES[side])


def alarms(run: Run) -> list[dict[str, Any]]:
    """Each alarm that the run raised: its steps, its value at the last of them, what to run next.

    Its meaning is in the run's config.
    """
    steps: dict[str, list[int]] = {}
    for row in run.rows:
        for name in row.get("alarms") or ():
            steps.setdefault(name, []).append(row["step"])
    meanings = run.config.get("alarms") or {}
    found = []
    for name, at in steps.items():
        meaning, _, command = (meanings.get(name) or "").partition(" Next: ")
        _, values = run.series(f"alarms/{name}")
        about = {"run": run.label, "name": name, "steps": at, "count": len(at)}
        about |= {"value": values[-1] if values else None}
        found.append(about | {"meaning": meaning or None, "next": command or None})
    return found


def last_seen(alarm: dict[str, Any]) -> str:
    """The value at which an alarm last rang, where its run noted it."""
    return "" if alarm["value"] is None else f" ({number(alarm['value'])} at the last)"


def alarm_lines(run: Run) -> dict[str, Any]:
    """A run's alarms in words, or why there are none."""
    if any("alarms" in row for row in run.rows):
        none = "no alarm was raised."
    else:
        none = f"{unfinished(run) or 'the run did not look for alarms'}."
    lines = [
        {
            "name": alarm["name"],
            "at": f"{plural(alarm['count'], 'time')}, at {spans(alarm['steps'])}"
            + last_seen(alarm),
            "meaning": sentence(alarm["meaning"]) if alarm["meaning"] else "",
            "next": alarm["next"] or "",
        }
        for alarm in alarms(run)
    ]
    return {"run": run.label, "lines": lines, "none": sentence(none)}
