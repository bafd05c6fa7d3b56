"""Settings of one published replay script of slime and of miles, as data, and what becomes of each.

`slime_scripts.json` has the flags in the script's order, at a revision, whether our init hook takes
each (with the routing log and the loss up-grpo, on one rank), and what is done with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOUND = Path(__file__).with_suffix(".json")


def read() -> dict[str, dict[str, Any]]:
    """Stack → script, revision, how it is called, settings."""
    return json.loads(FOUND.read_text(encoding="utf-8"))


def markdown() -> str:
    """The settings that concern the log or a loss, in a table; the others by name."""
    rows = ["| setting | slime | miles | |", "| --- | --- | --- | --- |"]
    scripts = read()
    of = {
        stack: {one["flag"]: one for one in script["settings"]} for stack, script in scripts.items()
    }
    flags = list(dict.fromkeys(flag for stack in of for flag in of[stack]))
    others = []
    for flag in flags:
        found = [of[stack].get(flag) for stack in ("slime", "miles")]
        note = next(one["note"] for one in found if one)
        if not note and all(one["accepted"] for one in found if one):
            others.append(f"`{flag}`")
            continue
        rows.append(f"| `{flag}` | {' | '.join(map(_cell, found))} | {note} |")
    heads = [
        f"{stack} {script['revision']}: `{script['script']}`, {script['how']}"
        for stack, script in scripts.items()
    ]
    return "\n".join(
        [
            f"{'; '.join(heads)}.",
            "",
            *rows,
            "",
            f"Accepted and not read by us: {', '.join(others)}.",
        ]
    )


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    value = "set" if one["value"] is True else f"`{one['value']}`"
    return value if one["accepted"] else f"{value}, refused"
