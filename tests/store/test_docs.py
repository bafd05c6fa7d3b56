"""The docs' tables are those of the code, and the examples of token-log.md run and agree.

An example runs only where its library (pandas, polars, DuckDB) is installed.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from docs import marked_faults
from docs.sections import filled
from moe_upgrpo.store import TokenLogWriter, overlap_array, read_tokens
from moe_upgrpo.store.questions import rate
from tests.store.rows import EXPERTS, LAYERS, TOP_K, full_columns

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "token-log.md").read_text()


def blocks(heading: str, language: str) -> list[str]:
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]
    found = re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} under {heading}"
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two steps, the first of which has no optional column but the routes."""
    writer = TokenLogWriter(
        tmp_path / "runs/RUN/tokens", rank=0, layer_ids=range(LAYERS), top_k=TOP_K,
        num_experts=EXPERTS,
    )  # fmt: skip
    first = full_columns(60, sequences=6, seed=1)
    del first["gap_update"], first["margin_min"]
    writer.write(1, first)
    writer.write(2, full_columns(60, sequences=6, seed=2))
    monkeypatch.chdir(tmp_path)
    return read_tokens("runs/RUN")


def execute(heading: str, names: dict) -> dict:
    for block in blocks(heading, "python"):
        exec(block, names)
    return names


def test_the_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("make", DOCS / "make_tables.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert len(maker.PAGES) == 14
    for name, sections in maker.PAGES.items():
        page = (DOCS / name).read_text()
        assert filled(page, sections) == page, "run python -m docs.make_tables"
    with pytest.raises(KeyError, match="section columns appears 0 times"):
        filled("# Token log", maker.PAGES["token-log.md"])


def test_the_faults_that_tests_hold(tmp_path):
    """There is a test of every area; a marker that says nothing is named."""
    held = marked_faults.read()
    assert {row[0] for row in held} == {*marked_faults.AREAS}
    assert len(held) > 60
    file = tmp_path / "tests/engines/test_x.py"
    file.parent.mkdir(parents=True)
    mark = "@pytest.mark.fault({})\n@pytest.mark.slow\ndef test_it(): pass\n"
    file.write_text(mark.format("'Numbers', 'a | b', 'c'"))
    row = "| a \\| b | c | [`test_it`](../tests/engines/test_x.py) (`make test-engines`) |"
    assert row in marked_faults.markdown(tmp_path / "tests").splitlines()
    for bad in (
        "",
        "'Numbers', 'a'",
        "'Numbers', '', 'c'",
        "'numbers', 'a', 'c'",
        "AREA, 'a', 'c'",
    ):
        file.write_text(mark.format(bad))
        with pytest.raises(ValueError, match=r"test_x\.py::test_it: fault.AREA, FAULT, WHAT"):
            marked_faults.read(tmp_path / "tests")
    file.write_text("def test_it(): pass")
    with pytest.raises(ValueError, match="no test under"):
        marked_faults.read(tmp_path / "tests")


def test_numpy(run):
    names = execute("numpy", {})
    assert names["table"].equals(run)
    assert names["rollout_experts"].shape == (120, LAYERS, TOP_K)
    assert names["ratio"].shape == (120,)


def test_pandas(run):
    frame = execute("pandas", {"table": run})["frame"]
    assert frame["layers_mismatched"].tolist() == run["layers_mismatched"].to_pylist()
    assert frame["gap_update"].isna().sum() == 60
    assert [list(row) for row in frame["overlap"]] == overlap_array(run).tolist()


def test_polars(run):
    frame = execute("polars", {"table": run})["frame"]
    assert frame["layers_mismatched"].to_list() == run["layers_mismatched"].to_pylist()
    assert frame["gap_update"].null_count() == 60
    assert frame["overlap"].to_list() == overlap_array(run).tolist()


def test_duckdb(run):
    """The first query's sums over signs, and the second's rates, are those of `rate`."""
    import duckdb

    by_sign, by_layer = (duckdb.sql(query).fetchall() for query in blocks("DuckDB", "sql"))
    for question, place in (("clipped", 3), ("gap", 4)):
        for row in rate(run, question, by="own"):
            same = [r for r in by_sign if r[0] == row.group[0]]
            total = sum(r[2] * r[place] for r in same)
            assert sum(r[2] for r in same) == row.denominator
            assert total == pytest.approx(row.numerator, rel=1e-5)
    assert {positive for _, positive, *_ in by_sign} == {True, False}
    expected = [row.rate for row in rate(run, "mismatch", by="layer")]
    assert [r[1] for r in by_layer] == pytest.approx(expected)
    assert [r[0] for r in by_layer] == [0, 1, 2]


def test_questions(run, capsys):
    execute("Questions", {"table": run})
    assert len(capsys.readouterr().out.splitlines()) == len(rate(run, "clipped", by="own"))


def test_writing(run):
    execute("Writing", {"step": 3, "columns": full_columns()})
