"""The comparisons in benchmarks/results/compare: their data give the figures that were reported."""

import json

import pytest

from benchmarks import kept
from moe_upgrpo.compare import data, report
from moe_upgrpo.errors import UserError
from tests.compare.made import PLAN, accuracies, folder, run

COMPARE = kept.RESULTS / "compare"


def test_every_comparison_has_its_figures():
    summary = json.loads(kept.SUMMARY.read_text())
    assert sorted(summary) == kept.comparisons() and len(summary) == 5


@pytest.mark.parametrize("name", kept.comparisons())
def test_the_numbers_are_those_that_were_reported(name):
    """summary.json was taken from the runs' own files, with all that they held."""
    summary = json.loads(kept.SUMMARY.read_text())[name]
    assert kept.summary(name) == summary
    assert summary["progress"]["done"] == summary["progress"]["planned"] > 30


def test_a_comparison_is_kept_with_what_its_report_reads(tmp_path):
    """Byte for byte the same report; what no report reads, and a run without a row, in passing."""
    rows = [row | {"time/total": 3.0, "clip/positive": 0.1 * row["step"]} for row in accuracies(1)]
    runs = [run(arm, seed, rows=rows + accuracies(0.2, 0.5 + seed / 9, 0.6)[1:])
            for arm in "ab" for seed in range(4)]  # fmt: skip
    runs[5] = run("b", 1, rows=[], status="crashed", message="error: at once", seconds=None)
    tuning = run("a", 9, rows=[*rows, {"step": 1, "clip/positive": 0.5}], tuning=True)
    source = folder(tmp_path / "source", [*runs, tuning], rates={}, plan=PLAN)
    kept.keep(source, tmp_path / "kept")
    assert not (tmp_path / "kept/data").exists()
    (was,), (now,) = (data.read_all(at, tuning=True) for at in (source, tmp_path / "kept"))
    assert now.about == was.about
    assert [row["step"] for row in now.rows] == [0] and now.rows[0]["eval/pass@1"] == 1
    found = data.read_all(tmp_path / "kept")
    assert "time/total" not in found[0].rows[0] and found[0].rows[0]["clip/positive"] == 0
    assert [len(one.rows) for one in found] == [3, 3, 3, 3, 3, 0, 3, 3]
    pages = [
        report.write_report(at, tmp_path / at.name / "made") for at in (source, tmp_path / "kept")
    ]
    for name in ("report.html", "report.json", "figures/primary.svg"):
        first, second = ((page.parent / name).read_bytes() for page in pages)
        assert first == second, name


def test_a_column_that_a_report_reads_is_missed(tmp_path, monkeypatch):
    runs = [run(arm, seed, rows=accuracies(0.2, 0.3, 0.4)) for arm in "ab" for seed in range(4)]
    source = folder(tmp_path / "source", runs)
    monkeypatch.setattr(kept, "COLUMNS", kept.COLUMNS - {"eval/pass@1"})
    with pytest.raises(UserError, match="eval/pass@1"):
        kept.keep(source, tmp_path / "kept")


def test_other_parquet_is_refused(tmp_path):
    data.write(tmp_path / "one.parquet", run(rows=accuracies(0.2)))
    with pytest.raises(UserError, match="it has no column 'about'"):
        data.read_together(tmp_path / "one.parquet")


@pytest.mark.parametrize("arm", ["grpo", "up-grpo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_runs_that_two_comparisons_share_are_the_same_to_the_last_digit(arm, seed):
    """Made hours apart by two commits: docs/compare.md says so."""
    a, b = (
        next(
            one.rows
            for one in data.read_all(COMPARE / name)
            if (one.about.arm, one.about.seed) == (arm, seed)
        )
        for name in ("many-experts", "relatives")
    )
    assert len(a) == 21 and repr(a) == repr(b)


def test_only_what_there_is_can_be_made():
    with pytest.raises(UserError, match="--only nothing: allowed are compare/fp8, compare/many"):
        kept.main(kept.Arguments(only=("nothing",)))


@pytest.mark.slow
def test_make_results_writes_a_report(tmp_path):
    kept.main(kept.Arguments(only=("compare/stress",), output_dir=tmp_path))
    made = json.loads((tmp_path / "compare/stress/report.json").read_text())
    assert made["primary"] == kept.summary("compare/stress")["primary"]
    assert (tmp_path / "compare/stress/report.html").exists()
    assert not (COMPARE / "stress/report.html").exists()
