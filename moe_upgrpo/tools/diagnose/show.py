# SPDX-License-Identifier: Apache-2.0
"""The verdict on a terminal, and as a page that opens offline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_upgrpo import __version__
from moe_upgrpo.errors import UserError
from moe_upgrpo.report.figures import percent, sentence
from moe_upgrpo.report.templates import render
from moe_upgrpo.store.files import write_text
from moe_upgrpo.store.text import printable
from moe_upgrpo.tools.diagnose.causes import CAUSES
from moe_upgrpo.tools.diagnose.evidence import Finding
from moe_upgrpo.tools.diagnose.verdict import Diagnosis, as_text, explains

LAYERS_SHOWN = 12  # on a terminal, those that differ most


def on_terminal(diagnosis: Diagnosis, console: Console) -> None:
    """Print three sentences, the causes and their remedies, the layers, and what was not tested."""

    def say(text: str) -> None:
        console.print(printable(text), soft_wrap=True)

    say(f"Diagnosis of {diagnosis.about}")
    for text in diagnosis.sentences:
        say(text)
    if diagnosis.expected:
        say(f"expected: {diagnosis.expected.source}")
    if diagnosis.since:
        say(diagnosis.since["says"])
    for alarm in diagnosis.alarms:
        say(f"ALARM {alarm}")
    if diagnosis.findings:
        table = Table("cause", "", "explains", "95% interval", "of", box=None)
        for one in diagnosis.findings:
            share = "" if one.share is None else percent(one.share)
            table.add_row(one.cause, one.kind, share, _interval(one), one.measure)
        console.print(table)
    layers = diagnosis.measured.by_layer
    if len(layers) > 1 and any(layers.values()):
        most = sorted(layers, key=lambda layer: -layers[layer])[:LAYERS_SHOWN]
        shown = ", ".join(f"{layer}: {percent(layers[layer])}" for layer in sorted(most))
        say(f"routers that differ, by MoE layer{_of(len(most), len(layers))}: {shown}")
    for table in diagnosis.tables:
        drawn = Table(*table["columns"], box=None, title=table["title"], title_justify="left")
        for row in table["rows"]:
            drawn.add_row(*map(printable, row))
        console.print(drawn)
    for one in _to_mend(diagnosis.findings):
        cause = CAUSES[one.cause]
        command = f" [{cause.command}]" if cause.command else ""
        say(f"what to do, {one.cause}: {cause.remedy}{command}")
    for question, why in diagnosis.not_tried.items():
        say(f"not asked: {question}; {why}")


def _interval(one: Finding) -> str:
    if one.low is None or one.high is None:
        return ""
    return f"{percent(one.low)} to {percent(one.high)}"


def _of(shown: int, all_of_them: int) -> str:
    return "" if shown == all_of_them else f" (the {shown} of {all_of_them} that differ most)"


def _to_mend(findings: list[Finding]) -> list[Finding]:
    """The faults; without any, the finding that explains most of the difference."""
    faults = [one for one in findings if one.kind == "fault"]
    return faults or findings[:1]


def make_folder(folder: Path) -> None:
    """Make the folder of a diagnosis, before minutes of work go into it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder}: {error.strerror or error}; a folder that can be written is "
            "needed."
        ) from None


def write(diagnosis: Diagnosis, folder: Path) -> Path:
    """Write diagnosis.json and diagnosis.html; return the path of the page."""
    make_folder(folder)
    write_text(folder / "diagnosis.json", as_text(diagnosis))
    page = folder / "diagnosis.html"
    write_text(page, printable(_html(diagnosis)))
    return page


def _html(diagnosis: Diagnosis) -> str:
    layers = diagnosis.measured.by_layer
    highest = max(layers.values(), default=0.0)
    return render(
        Path(__file__).with_name("diagnosis.html"),
        about=diagnosis.about,
        sentences=diagnosis.sentences,
        expected=diagnosis.expected.source if diagnosis.expected else None,
        since=diagnosis.since["says"] if diagnosis.since else None,
        alarms=diagnosis.alarms,
        findings=[
            asdict(one)
            | {
                "says": sentence(CAUSES[one.cause].says),
                "explains": sentence(explains(one)),
                "remedy": CAUSES[one.cause].remedy,
                "command": CAUSES[one.cause].command,
            }
            for one in diagnosis.findings
        ],
        by_layer=[
            (layer, percent(rate), rate / highest if highest else 0.0)
            for layer, rate in layers.items()
            if rate == rate
        ],
        tables=diagnosis.tables,
        not_tried=diagnosis.not_tried,
        tried=diagnosis.tried,
        version=__version__,
    )
