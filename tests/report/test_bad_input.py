"""Runs that lack something: the page says what it cannot say, and why."""

import pyarrow.parquet as pq
import pytest

from moe_upgrpo.report import opening, plots, write_report
from moe_upgrpo.report.runs import load_runs
from moe_upgrpo.store.parquet import write_checked
from tests.report.synthetic import make_run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])


def page_of(run):
    return write_report([run], run / "report.html").read_text()


def newer(run):
    """Every token file as a later version would mark it."""
    for file in (run / "tokens").glob("step-*.parquet"):
        table = pq.read_table(file)
        about = table.schema.metadata[b"moe_upgrpo.token_log"]
        about = about.replace(b'"schema_version": 3', b'"schema_version": 99')
        metadata = table.schema.metadata | {b"moe_upgrpo.token_log": about}
        write_checked(table.replace_schema_metadata(metadata), file)


def one_prompt(run):
    for file in (run / "tokens").glob("step-*.parquet"):
        table = pq.read_table(file)
        assert set(table["prompt"].to_pylist()) == {0}


@pytest.mark.parametrize(
    ("options", "change", "texts"),
    [
        ({"level": "aggregate"}, None, ["No figures by token: this run kept its token log at"]),
        ({"steps": 1}, None, ["A run of one step: nothing here says how anything changes."]),
        ({"steps": 1}, one_prompt, ["(1 prompt: too few for an interval)"]),
        ({"layers": 0}, None, ["A dense model: it has no MoE layer", "<strong>No:</strong> the"]),
        (
            {},
            newer,
            ["No figures by token: no token file could be read. Left out: step-000002-rank-0000"
             ".parquet (schema version 99 is unknown)"],
        ),
    ],
    ids=["no token log", "one step", "one prompt", "dense", "newer schema"],
)  # fmt: skip
def test_what_cannot_be_said_is_said(tmp_path, options, change, texts):
    run = make_run(tmp_path / "run", **({"steps": 2} | options))
    if change:
        change(run)
    page = page_of(run)
    for text in texts:
        assert text in page
    assert [one.question for one in opening(load_runs([run])[0])] == [
        "Is routing to blame?",
        "Where?",
        "Does it matter?",
    ]
