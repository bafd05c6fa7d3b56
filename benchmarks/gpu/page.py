"""The results of docs/gpu.md, from the files of benchmarks/results/gpu/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.studies.exact.report import table
from moe_upgrpo.errors import UserError

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
NOT_RUN = "Not run: no file with a card's name lies in `benchmarks/results/gpu/` yet."


def section(folder: Path = RESULTS) -> str:
    """A table for each file, or a line saying that nothing was run."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return NOT_RUN
    return "\n\n".join(_of_file(file) for file in files)


def _of_file(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        card, results = found["card"], found["checks"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a file of `make gpu-check` ({type(error).__name__}: {error}). Run it "
            "again, or take the file away."
        ) from None
    if not card or found["size"] != "card":
        raise UserError(
            f"{file} is of {card or 'no GPU'} with the sizes {found['size']!r}: a page is made of "
            "what a GPU said at full size. Take the file away."
        )
    if not results:
        raise UserError(f"{file} holds no check. Run make gpu-check again.")
    packages = found["machine"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "megatron-core"))
    good = sum(one["state"] == "ok" for one in results.values())
    rows = [
        [name, one["state"], f"{one['seconds']:.0f}", _gb(one), _said(one)]
        for name, one in results.items()
    ]
    return (
        f"**{card}**: {good} of {len(results)} checks passed in {found['seconds']:.0f} s; Python "
        f"{found['machine']['python']}, {versions}.\n\n"
        + table(["check", "", "s", "GB taken", "what it found"], rows)
    )


def _gb(one: dict[str, Any]) -> str:
    return f"{one['taken_GB']:.2f}" if "taken_GB" in one else ""


def _said(one: dict[str, Any]) -> str:
    text = ". ".join([one["line"], *one.get("faults", ())])
    return text.replace("\n", " ")
