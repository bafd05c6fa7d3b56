"""The comparisons in benchmarks/results/compare: what they say is what their data give.

Not covered: the figures, whose bytes differ between versions of matplotlib.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moe_upgrpo.compare import report

RESULTS = Path("benchmarks/results/compare")
NAMES = ("small", "many-experts", "fp8", "stress", "relatives")


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_the_report_are_those_of_the_data(name):
    folder = RESULTS / name
    made = json.loads(json.dumps(report._finite(report.numbers(report.load(folder)))))
    kept = json.loads((folder / "report.json").read_text())
    assert len(made["runs"]) == made["progress"]["planned"] > 30
    for part in ("progress", "runs", "primary", "arms", "exploratory", "matched_reward"):
        assert made[part] == kept[part], part


@pytest.mark.parametrize("arm", ["grpo", "up-grpo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_runs_that_two_comparisons_share_are_the_same_to_the_last_digit(arm, seed):
    """Made hours apart by two commits: docs/compare.md says so."""
    a, b = (
        pq.read_table(RESULTS / name / "data" / f"{arm}-seed{seed}.parquet")
        for name in ("many-experts", "relatives")
    )
    assert a.column_names == b.column_names and len(a) == len(b) == 21
    other = {n for n in a.column_names if repr(a[n].to_pylist()) != repr(b[n].to_pylist())}
    times = {n for n in a.column_names if n.startswith("time/")} | {"tokens_per_second"}
    assert other <= times and len(a.column_names) > len(times) + 40
