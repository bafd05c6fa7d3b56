"""The figures from the token log: its numbers by hand, what was read, and logs with less in them.

The rates themselves and their intervals are tested with `store.questions`; here, that the page
shows them. Not covered: the drawings.
"""

import json

import pytest

from moe_upgrpo.report import write_report
from moe_upgrpo.report.answers import TOKEN_FIGURES, interval
from moe_upgrpo.report.figures import percent
from moe_upgrpo.report.tokens import read_token_log
from moe_upgrpo.store import RunFolder
from tests.report.synthetic import make_run, write_tokens


@pytest.fixture
def run(tmp_path):
    """A run of one step without tokens."""
    folder = RunFolder.create(tmp_path / "run", {})
    folder.append_metrics({"step": 1, "reward/mean": 0.5})
    return folder.path


def figures(run):
    output = write_report([run], run / "report.html")
    data = json.loads(output.with_suffix(".json").read_text())
    html = output.read_text()
    assert all(f'id="{figure["key"]}"' in html for figure in data["figures"])
    return {figure["key"]: figure for figure in data["figures"]}, data


def says(figure):
    return figure["says"][0]["text"]


# Two layers; own mismatches 2, 1, 0, 0; |gap| 0.4, 0.2, 0.1, 0.1; two sequences of two tokens.
FOUR = {
    "sequence": [0, 0, 1, 1],
    "position": [5, 6, 5, 6],
    "overlap": [[1, 0], [1, 2], [2, 2], [2, 2]],
    "logp_old": [-1.0, -1.0, -1.0, -1.0],
    "logp_rollout": [-1.4, -0.8, -1.1, -0.9],
    "ratio": [1.0, 0.5, 1.0, 1.2],
    "advantage": [1.0, 1.0, -1.0, -1.0],
    "clipped": [False, False, True, False],
}


def test_by_hand(run):
    write_tokens(run, 1, FOUR, 2)
    found, data = figures(run)
    gap = found["gap_by_own"]["data"][0]["rows"]
    assert [row["group"] for row in gap] == [[0, 0], [1, 1], [2, 2]]
    assert [row["rate"] for row in gap] == pytest.approx([0.1, 0.2, 0.4])
    assert says(found["gap_by_own"]) == (
        "Mean |gap| is 0.1 (one sequence, no interval) for the 2 tokens that differ in no layer, "
        "0.2 (one sequence, no interval) for the 1 token that differs in 1, 0.4 (one sequence, no "
        "interval) for the 1 token that differs in 2."
    )
    # Beyond 1.1 is a distance above log 1.1 = 0.095, beyond 1.5 above 0.405.
    tails = {entry["label"]: entry["rows"] for entry in found["gap_tails_by_own"]["data"]}
    assert [row["rate"] for row in tails["> 1.1×"]] == [1, 1, 1]
    assert [row["rate"] for row in tails["> 1.5×"]] == [0, 0, 0]
    # Ratios: 0.5 is 2× from 1 (not beyond), 1.2 beyond 1.1.
    tails = {entry["label"]: entry["rows"] for entry in found["ratio_tails_by_own"]["data"]}
    assert [row["rate"] for row in tails["> 1.1×"]] == [0.5, 1, 0]
    assert [row["rate"] for row in tails["> 2×"]] == [0, 0, 0]
    # Position 5: 2 of 4 routers; position 6: 1 of 4.
    rows = found["mismatch_by_position"]["data"][0]["rows"]
    assert [(row["group"], row["numerator"], row["denominator"]) for row in rows] == [
        ([5, 5], 2, 4),
        ([6, 6], 1, 4),
    ]
    signs = {
        entry["quantity"]: {row["group"]: row["rate"] for row in entry["rows"]}
        for entry in found["by_sign"]["data"]
    }
    assert signs["clipped"] == {"positive": 0, "negative": 0.5}
    assert signs["mismatch_any"] == {"positive": 1, "negative": 0}
    assert data["token_log"] == [{"run": "run", "text": "4 response tokens of step 1."}]


def test_mismatched_layers_against_independence_by_hand(run):
    """Layer rates 1/2 and 1/4: independent, none 3/8, one 1/2·3/4 + 1/2·1/4 = 1/2, both 1/8."""
    write_tokens(run, 1, FOUR, 2)
    figure = figures(run)[0]["clustering"]
    (entry,) = figure["data"]
    assert (entry["layers"], entry["tokens"]) == ([0, 1, 2], [2, 1, 1])
    assert entry["shares"] == [0.5, 0.25, 0.25]
    assert entry["independent"] == pytest.approx([3 / 8, 1 / 2, 1 / 8])
    groups = {row["group"]: row["rate"] for row in entry["clustering"]}
    assert groups["any_layer"] == 0.5
    assert groups["any_layer_independent"] == pytest.approx(5 / 8)
    # Var M = (4 + 1)/4 − (3/4)² = 11/16; independent 1/4 + 3/16 = 7/16.
    assert groups["dispersion"] == pytest.approx(11 / 7)
    assert "50% (" in says(figure) and "62.5% (" in says(figure)


def test_only_the_newest_files_of_a_long_log_are_read(run):
    for step in (1, 2, 3):
        write_tokens(run, step, FOUR, 2)
    log = read_token_log(run, max_rows=5)
    assert log.table["step"].to_pylist() == [2] * 4 + [3] * 4
    assert log.note == "8 response tokens of steps 2 to 3; 1 older file not read."
    assert read_token_log(run).note == "12 response tokens of steps 1 to 3."


def test_good_files_beside_bad_ones_are_read(run):
    write_tokens(run, 1, FOUR, 2)
    write_tokens(run, 2, FOUR | {"overlap": [[2]] * 4}, 1)
    write_tokens(run, 3, FOUR, 2).write_bytes(b"PAR1")
    write_tokens(run, 4, FOUR, 2)
    log = read_token_log(run)
    assert log.table["step"].unique().to_pylist() == [1, 4]
    assert log.note == (
        "8 response tokens of steps 1 to 4. Left out: step-000003-rank-0000.parquet (not "
        "readable), step-000002-rank-0000.parquet (logged otherwise)."
    )


def test_no_file_that_can_be_read(run):
    write_tokens(run, 1, FOUR, 2).write_bytes(b"")
    found, _ = figures(run)
    for figure in TOKEN_FIGURES:
        assert found[figure.key]["data"] == []
        assert says(found[figure.key]).startswith("No token file could be read. Left out: step-")


def test_a_run_without_a_token_log(tmp_path):
    found, data = figures(make_run(tmp_path / "run", steps=1, level="aggregate"))
    assert data["token_log"][0]["text"].startswith("This run has no token log")
    for figure in TOKEN_FIGURES:
        assert found[figure.key]["data"] == []
        assert says(found[figure.key]) == data["token_log"][0]["text"]


def test_a_dense_model(tmp_path):
    found, _ = figures(make_run(tmp_path / "run", steps=2, layers=0))
    assert {entry["quantity"] for entry in found["by_sign"]["data"]} == {
        "gap_tail_1.1",
        "ratio_tail_1.1",
        "clipped",
    }
    for key in ("gap_by_own", "mismatch_by_position", "clustering"):
        assert says(found[key]) == "The model has no MoE layer."


def test_no_mismatch_and_one_sign(run):
    write_tokens(run, 1, {"sequence": [0, 1], "advantage": [1.0, 1.0]}, 3)
    found, _ = figures(run)
    assert says(found["clustering"]) == "No token differs in any layer."
    assert says(found["by_sign"]) == "There are only tokens of positive advantage."
    assert says(found["gap_by_own"]) == (
        "Mean |gap| is 0 (none seen) for the 2 tokens that differ in no layer; there are no others."
    )


def test_a_log_prob_gone_nan_is_shown_as_one(run):
    write_tokens(run, 1, FOUR | {"logp_old": [float("nan"), -1.0, -1.0, -1.0]}, 2)
    found, _ = figures(run)
    rows = found["gap_by_own"]["data"][0]["rows"]
    assert [row["rate"] for row in rows][2] is None
    assert "not a number for the 1 token that differs in 2" in says(found["gap_by_own"])


def test_intervals_in_words():
    row = {"rate": 0.0125, "low": 0.01, "high": 0.015, "numerator": 5}
    assert interval(row, percent) == "1.25% (1% to 1.5%)"
    assert interval(row | {"rate": 0.0, "numerator": 0}, percent) == "0% (none seen)"
