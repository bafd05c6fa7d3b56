"""The figures from the token log: its numbers by hand, what was read, and logs with less in them.

The rates themselves and their intervals are tested with `store.questions`; here, that the page
shows them. Not covered: the drawings.
"""

import json

import pytest

from moe_upgrpo.report import plots, write_report
from moe_upgrpo.report.answers import TOKEN_FIGURES, interval
from moe_upgrpo.report.figures import percent
from moe_upgrpo.report.tokens import read_token_log
from moe_upgrpo.store import RunFolder
from tests.report.synthetic import FLOORS, make_run, write_tokens


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing takes most of a report's time, and nothing here looks at it."""
    monkeypatch.setattr(plots, "draw", lambda figure, data, labels: [])


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


def panel(found, name, *, floor=False):
    """The entries of one panel, by their labels."""
    entries = [e for f in found.values() for e in f["data"] if e.get("panel") == name]
    return {entry["label"]: entry for entry in entries if entry["floor"] == floor}


def rates(found, name, label):
    return [row["rate"] for row in panel(found, name)[label]["rows"]]


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
    "token_id": [7, 3, 7, 7],
    "margin_min": [0.125, 0.25, 0.5, 1.0],
    "prefix_mismatched": [0, 2, 0, 0],
    "gradient_weight": [3.0, 1.0, 2.0, 4.0],
}


def test_by_hand(run):
    write_tokens(run, 1, FOUR, 2)
    found, data = figures(run)
    gap = panel(found, "gap_by_own")["mean |gap|"]["rows"]
    assert [row["group"] for row in gap] == [[0, 0], [1, 1], [2, 2]]
    assert [row["rate"] for row in gap] == pytest.approx([0.1, 0.2, 0.4])
    # Beyond 1.1 is a distance above log 1.1 = 0.095, beyond 1.5 above 0.405.
    assert rates(found, "gap_tails_by_own", "> 1.1×") == [1, 1, 1]
    assert rates(found, "gap_tails_by_own", "> 1.5×") == [0, 0, 0]
    # Ratios: 0.5 is 2× from 1 (not beyond), 1.2 beyond 1.1.
    assert rates(found, "ratio_tails_by_own", "> 1.1×") == [0.5, 1, 0]
    assert rates(found, "ratio_tails_by_own", "> 2×") == [0, 0, 0]
    assert rates(found, "clipped_by_own", "clipped") == [0.5, 0, 0]
    # Weights 3, 1 with A > 0 and own 2, 1; 2, 4 with A < 0 and own 0.
    assert rates(found, "gradient_weight_by_own", "advantage > 0") == [1, 3]
    assert rates(found, "gradient_weight_by_own", "advantage < 0") == [3]
    assert says(found["by_own"]).startswith(
        "2 tokens that agree → 1 tokens that differ in 2 layers: mean |gap| 0.1 (1 prompt: too few "
        "for an interval) → 0.4 (1 prompt: too few for an interval); gap beyond 1.1× 100% (1"
    )
    assert says(found["by_own"]).endswith(
        "gradient weight of A > 0 no such token → 3 (1 prompt: too few for an interval); "
        "gradient weight of A < 0 3 (1 prompt: too few for an interval) → no such token."
    )
    # Prefix 0, 2 in one sequence and 0, 0 in the other.
    assert rates(found, "gap_by_prefix", "mean |gap|") == pytest.approx([0.2, 0.2])
    assert rates(found, "clipped_by_prefix", "clipped") == pytest.approx([1 / 3, 0])
    # Position 5: 2 of 4 routers; position 6: 1 of 4. Margins ascend with the rows.
    for name, expected in (
        ("mismatch_by_position", [([5, 5], 2, 4), ([6, 6], 1, 4)]),
        ("mismatch_by_layer", [(1, 2, 4), (2, 1, 4)]),
        ("mismatch_by_step", [(1, 3, 8)]),
        ("mismatch_by_token", [(7, 2, 6), (3, 1, 2)]),
        ("mismatch_by_prefix", [([0, 0], 2, 6), ([2, 2], 1, 2)]),
        (
            "mismatch_by_margin",
            [([0.125, 0.125], 2, 2), ([0.25, 0.25], 1, 2), ([0.5, 0.5], 0, 2), ([1, 1], 0, 2)],
        ),
    ):
        rows = panel(found, name)["routers"]["rows"]
        assert [(row["group"], row["numerator"], row["denominator"]) for row in rows] == expected
    assert says(found["mismatch_where"]).startswith(
        "3 of 8 (token, layer) pairs differ, 37.5%; by layer from 25% ("
    )
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
    assert says(figure).endswith("; too few (2) to say whether they come together.")


def test_of_a_very_long_log_steps_at_even_distances_are_read(run):
    for step in (1, 2, 3):
        write_tokens(run, step, FOUR, 2)
    log = read_token_log(run, max_files=2)
    assert log.steps == (1, 3) and log.num_rows == 8
    assert log.note == (
        "8 response tokens of steps 1 and 3; of 3 steps with rows 2 at even distances are read."
    )
    assert read_token_log(run).note == "12 response tokens of steps 1 to 3."


def test_a_missing_step_and_missing_rows_are_named(run):
    folder = RunFolder.create(run / "more", {})
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "tokens/sampled": 4 + step // 3})
        if step != 2:
            write_tokens(folder.path, step, FOUR, 2)
    (text,) = (entry["text"] for entry in figures(folder.path)[1]["token_log"])
    assert text == (
        "8 response tokens of steps 1 and 3; step 2 is missing; step 3 has 4 rows for 5 tokens."
    )
    rows = [{"step": step, "tokens/sampled": 4} for step in (1, 2, 3)]
    note = read_token_log(folder.path, rows=rows, max_files=1).note
    assert note == (
        "4 response tokens of step 3; of 2 steps with rows 1 at even distances are read; step 2 is "
        "missing."
    )
    note = read_token_log(folder.path, rows=rows[:2]).note
    assert note == "8 response tokens of steps 1 and 3; step 2 is missing; step 3 not finished."


def test_a_step_that_a_sample_does_not_hold_is_not_missing(tmp_path):
    path = make_run(tmp_path / "run", steps=3, level="sampled", share=0.5)
    (path / "tokens" / "step-000002-rank-0000.parquet").unlink()
    assert "of steps 1 and 3; step 2 is not in it. A" in figures(path)[1]["token_log"][0]["text"]


def test_a_log_of_another_model_is_not_drawn(tmp_path):
    path = RunFolder.create(
        tmp_path / "run", {"moe_layers": [1, 2, 3], "top_k": 2, "num_experts": 8}
    )
    path.append_metrics({"step": 1})
    write_tokens(path.path, 1, FOUR, 2)
    found, data = figures(path.path)
    text = (
        "The token log is of another model: its MoE layers are [1, 2], top-2 of 8, those of "
        "config.json [1, 2, 3], top-2 of 8."
    )
    assert data["token_log"][0]["text"] == text and data["sequences"] == []
    assert {says(found[figure.key]) for figure in TOKEN_FIGURES} == {text}
    same = {"moe_layers": [1, 2], "top_k": 2, "num_experts": 8}
    assert read_token_log(path.path, config=same).num_rows == 4


def test_good_files_beside_bad_ones_are_read(run):
    write_tokens(run, 1, FOUR, 2)
    write_tokens(run, 2, FOUR | {"overlap": [[2]] * 4}, 1)
    write_tokens(run, 3, FOUR, 2).write_bytes(b"PAR1")
    write_tokens(run, 4, FOUR, 2)
    log = read_token_log(run)
    assert log.steps == (1, 4)
    assert log.note == (
        "8 response tokens of steps 1 and 4. Left out: step-000003-rank-0000.parquet (not "
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
    assert "kept its token log at level aggregate" in data["token_log"][0]["text"]
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
    for key in ("by_own", "by_prefix", "clustering"):
        assert says(found[key]) == "The model has no MoE layer."


def test_no_mismatch_and_one_sign(run):
    write_tokens(run, 1, {"sequence": [0, 1], "advantage": [1.0, 1.0]}, 3)
    found, _ = figures(run)
    assert says(found["clustering"]) == "0 of 2 tokens compared differ in any layer."
    assert says(found["by_sign"]) == "There are only tokens of positive advantage."
    assert says(found["mismatch_where"]) == "0 of 6 (token, layer) pairs compared differ."
    assert says(found["by_own"]) == (
        "2 tokens that agree, and no others: mean |gap| 0 (none seen); gap beyond 1.1× 0% (none "
        "seen); ratio beyond 1.1× 0% (none seen); clipped 0% (none seen)."
    )
    assert says(found["by_prefix"]) == "The token log has no column prefix_mismatched."
    text = "The token log has no column gradient_weight."
    assert found["by_own"]["missing"] == [
        {"run": "run", "panel": "mean gradient weight of each branch", "text": text}
    ]


def test_a_branch_without_tokens_is_named_and_the_other_drawn(run):
    write_tokens(run, 1, FOUR | {"advantage": [1.0, 1.0, 0.0, 0.0]}, 2)
    found, _ = figures(run)
    assert list(panel(found, "gradient_weight_by_own")) == ["advantage > 0"]
    (missing,) = found["by_own"]["missing"]
    assert missing["text"].startswith("No token to count for gradient_weight_negative")


def test_the_floor_of_each_side_beside_the_figures(tmp_path):
    """The larger of each side's two, as planted; log-probs have the trainer's alone."""
    found, _ = figures(make_run(tmp_path / "run", steps=2))
    for name in ("layer", "step", "position", "margin", "token", "prefix"):
        floors = panel(found, f"mismatch_by_{name}", floor=True)
        assert {label: entry["value"] for label, entry in floors.items()} == {
            "floor: trainer": FLOORS["trainer_batch_shape"],
            "floor: engine": FLOORS["engine_batch_shape"],
        }
    (floor,) = panel(found, "gap_by_own", floor=True).values()
    assert floor["metric"] == "noise/trainer_batch_shape/logp_mean_abs"
    assert floor["value"] == FLOORS["trainer_batch_shape"] / 10


def test_planted_dependences_are_seen(tmp_path):
    """As `random_tokens` plants them: weight 1 for A > 0, 1 + prefix / 100 for A < 0."""
    found, _ = figures(make_run(tmp_path / "run", steps=40))
    weights = panel(found, "gradient_weight_by_prefix")
    assert {row["rate"] for row in weights["advantage > 0"]["rows"]} == {1}
    for row in weights["advantage < 0"]["rows"]:
        low, high = row["group"]
        assert 1 + low / 100 - 1e-6 <= row["rate"] <= 1 + high / 100 + 1e-6
    first, *_, last = panel(found, "gap_by_own")["mean |gap|"]["rows"]
    assert first["rate"] == pytest.approx(0, abs=1e-7) and last["low"] > 0.05


def test_a_sampled_log_says_its_share(tmp_path):
    path = make_run(tmp_path / "run", steps=3, level="sampled", share=0.5)
    _, data = figures(path)
    assert data["token_log"][0]["text"].endswith(
        " A sample: whole sequences, drawn with a share of 50%."
    )


def test_files_with_and_without_optional_columns(run):
    """Rows of the older file have no margin: they are left out there, and count elsewhere."""
    optional = ("margin_min", "prefix_mismatched", "gradient_weight")
    write_tokens(run, 1, {k: v for k, v in FOUR.items() if k not in optional}, 2)
    write_tokens(run, 2, FOUR, 2)
    found, _ = figures(run)
    for name, pairs in (("mismatch_by_margin", 8), ("mismatch_by_position", 16)):
        rows = panel(found, name)["routers"]["rows"]
        assert sum(row["denominator"] for row in rows) == pairs


def test_a_log_prob_gone_nan_is_shown_as_one(run):
    write_tokens(run, 1, FOUR | {"logp_old": [float("nan"), -1.0, -1.0, -1.0]}, 2)
    found, _ = figures(run)
    assert rates(found, "gap_by_own", "mean |gap|")[2] is None
    assert "interval) → not a number; gap beyond 1.1×" in says(found["by_own"])


def test_intervals_in_words():
    row = {"rate": 0.0125, "low": 0.01, "high": 0.015, "numerator": 5, "prompts": 9}
    assert interval(row, percent) == "1.25% (1% to 1.5%)"
    assert interval(row | {"rate": 0.0, "numerator": 0}, percent) == "0% (none seen)"
