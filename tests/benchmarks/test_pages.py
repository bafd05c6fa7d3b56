"""The studies' pages: their tables are what the kept data give, and say by which command.

Not covered: the figures, whose bytes differ between versions of matplotlib.
"""

import re
from pathlib import Path

import pytest

from benchmarks import kept
from benchmarks.studies.exact import report as exact
from benchmarks.studies.made import marked, smaller
from benchmarks.studies.routing_mismatch import MODULE
from benchmarks.studies.routing_mismatch_report import SECTIONS
from benchmarks.studies.stress import report as stress
from docs.sections import filled

DOCS = Path(__file__).parents[2] / "docs"
# `finding` and `published` of routing mismatch take seconds: make results makes them too.
PAGES = {
    "exact": (exact.COMMAND, exact.ON_PAGE),
    "stress": (stress.COMMAND, stress.ON_PAGE),
    "routing-mismatch": (f"python -m {MODULE}", ("engines", "staleness", "runs")),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_kept_data_give(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    command, on_page = PAGES[name]
    every = kept.STUDIES[name].read(kept.RESULTS / name).sections()
    made = marked({section: every[section] for section in on_page}, command)
    assert filled(page, made) == page
    assert all(f"made by `{command}`</sub>" in text for text in made.values())
    with pytest.raises(KeyError, match=f"section {on_page[0]} appears 0 times"):
        filled("# Another page", made)


@pytest.mark.parametrize("name", [*PAGES, "power"])
def test_every_section_is_marked_and_every_figure_there(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    sections = re.findall(r"<!-- begin .*?<!-- end", page, re.DOTALL)
    assert sections and all("<sub>made by `python -m " in text for text in sections)
    figures = re.findall(r"\]\((img/[^)]*)\)", page)
    assert all((DOCS / figure).exists() for figure in figures)
    assert name == "power" or len(figures) > 1


def test_sections_that_are_not_on_a_page_are_named_there():
    """So that a reader finds what left it."""
    for name, (every, on_page) in {
        "exact": (exact.SECTIONS, exact.ON_PAGE),
        "stress": (stress.SECTIONS, stress.ON_PAGE),
        "routing-mismatch": (SECTIONS, ("finding", "published", *PAGES["routing-mismatch"][1])),
    }.items():
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        left = [section for section in every if section not in on_page]
        assert left and f"make results ARGS='--only {name}'" in page
        assert not [section for section in left if f"`{section}`" not in page], name


def test_a_drawing_loses_nothing_that_is_seen():
    svg = (
        '<svg>\n <metadata>\n <a/>\n </metadata>\n  <!-- x -->\n  <path d="M 1.23456 -0.00012 \n'
        'L 10 2.5" style="stroke-width: 0.8; fill: #1f77b4"/>\n <text>0.125%</text>\n</svg>\n'
    )
    assert smaller(svg) == (
        '<svg>\n<path d="M 1.23 -0\nL 10 2.5" style="stroke-width: 0.8; fill: #1f77b4"/>\n'
        "<text>0.125%</text>\n</svg>\n"
    )
