"""The report's words on comparisons whose outcome is known."""

import html
import json
import math
import re

import pytest
from scipy.stats import t as student_t

from moe_upgrpo.compare import report
from moe_upgrpo.errors import UserError
from tests.compare.made import PLAN, accuracies, folder, run

SPREAD = (0.30, 0.42, 0.35, 0.51)
GAINS = (0.08, 0.10, 0.11, 0.11)
"""Mean .10, s = .0141421 = √(.0006 / 3): t = 14.142, p = .00077; half-width 3.182446 · s / 2."""


def pair(gains, **about):
    """Runs of a and b over four seeds; b is better by `gains` at both evaluations."""
    made = []
    for seed, (base, gain) in enumerate(zip(SPREAD, gains, strict=True)):
        made.append(run("a", seed, rows=accuracies(0.2, base, base), **about))
        made.append(run("b", seed, rows=accuracies(0.2, base + gain, base + gain), **about))
    return made


def numbers(path):
    return report.numbers(report.load(path))


def words(path):
    """The page's text, without tags and pictures."""
    page = re.sub(r"<style>.*?</style>", "", (path / "report.html").read_text(), flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", "", page).split()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report of runs with all there is, a crashed one among them, and its folder."""
    runs = pair(GAINS)
    for one in runs:
        for step in range(1, 9):
            extra = {"reward/correct_rate": 0.1 * step, "kl/warm_start": 0.01 * step}
            row = next((r for r in one.rows if r["step"] == step), None)
            row.update(extra) if row else one.rows.append({"step": step} | extra)
        one.rows.sort(key=lambda row: row["step"])
    runs[-1] = run(
        "b",
        3,
        rows=accuracies(0.2, 0.62),
        status="crashed",
        message="error: the weights are <nan> & gone",
        seconds=None,
    )
    path = folder(tmp_path_factory.mktemp("whole"), runs)
    assert report.write_report(path) == path / "report.html"
    return path


def test_a_planted_difference_is_called_higher(tmp_path):
    (row,) = numbers(folder(tmp_path, pair(GAINS)))["primary"]
    half = 3.182446 * 0.0141421 / 2
    assert row["verdict"] == "higher" and row["seeds"] == 4
    assert row["difference"] == pytest.approx(0.10)
    assert (row["low"], row["high"]) == pytest.approx((0.10 - half, 0.10 + half), abs=1e-6)
    assert row["half_width"] == row["needed"] == pytest.approx(half, abs=1e-6)
    assert row["p"] == row["p_holm"] == pytest.approx(0.00077, abs=1e-5)


def test_the_other_way_round_it_is_lower(tmp_path):
    plan = PLAN | {"contrasts": [["a", "b"]]}
    (row,) = numbers(folder(tmp_path, pair(GAINS), plan))["primary"]
    assert row["verdict"] == "lower" and row["difference"] == pytest.approx(-0.10)


def test_nothing_there_is_not_told_apart(tmp_path):
    """Differences ±.01: mean 0, p 1; the half-width is 3.182446 · √(4e-4 / 3) / 2."""
    path = folder(tmp_path, pair((0.01, -0.01, 0.01, -0.01)))
    (row,) = numbers(path)["primary"]
    assert row["verdict"] == "not told apart" and row["p"] == pytest.approx(1)
    assert row["half_width"] == pytest.approx(3.182446 * math.sqrt(4e-4 / 3) / 2)
    assert report._headline([row], PLAN, True).startswith("A negative result: none of 1 contr")
    assert report._headline([row], PLAN, False) == "So far none of 1 contrast is told apart."
    said = report._sentence(row, 0.95)
    assert said["verdict"] == "not told apart" and "equal" not in said["text"]
    assert "No difference below 1.8 points could have been told from zero" in said["text"]


def test_holm_is_over_the_planned_contrasts(tmp_path):
    """c is b: both p are .00077, doubled. A third of the strictest step needs t at .025 / 3."""
    runs = pair(GAINS)
    runs += [run("c", r.about.seed, rows=r.rows) for r in runs if r.about.arm == "b"]
    contrasts = [["b", "a"], ["c", "a"], ["c", "b"]]
    plan = PLAN | {"arms": {"a": {}, "b": {}, "c": {}}, "contrasts": contrasts}
    first, second, same = numbers(folder(tmp_path, runs, plan))["primary"]
    assert first["p_holm"] == second["p_holm"] == pytest.approx(3 * first["p"])
    assert (same["verdict"], same["difference"], same["p_holm"]) == ("not told apart", 0, 1)
    ratio = student_t.ppf(1 - 0.025 / 3, 3) / student_t.ppf(0.975, 3)
    assert first["needed"] == pytest.approx(first["half_width"] * ratio)


def test_arms_and_exploratory_contrasts_by_hand(tmp_path):
    """seconds: a 10, 20, 30, 40; b the same + 1, +1, +3, +3: mean 2, s = √(4/3)."""
    runs = []
    for seed, (base, more) in enumerate(zip((10, 20, 30, 40), (1, 1, 3, 3), strict=True)):
        runs.append(run("a", seed, rows=accuracies(0.2, 0.5, 0.3), seconds=base))
        runs.append(run("b", seed, rows=accuracies(0.2, 0.4, 0.4), seconds=base + more))
    data = numbers(folder(tmp_path, runs))
    arms = {row["measure"]: row["values"] for row in data["arms"]}
    assert [entry["mean"] for entry in arms["eval/pass@1/best"]] == [0.5, pytest.approx(0.4)]
    assert [entry["mean"] for entry in arms["eval/pass@1/last"]] == [0.3, pytest.approx(0.4)]
    a, b = arms["seconds"]
    half = 3.182446 * math.sqrt(500 / 3) / 2
    assert (a["mean"], a["runs"], b["mean"]) == (25, 4, 27)
    assert (a["low"], a["high"]) == pytest.approx((25 - half, 25 + half), rel=1e-6)
    found = {entry["measure"]: entry["contrasts"] for entry in data["exploratory"]}
    assert "eval/pass@1/mean" not in found  # the primary one
    (row,) = found["seconds"]
    half = 3.182446 * math.sqrt(4 / 3) / 2
    assert (row["low"], row["high"]) == pytest.approx((2 - half, 2 + half), abs=1e-6)


def test_a_crashed_run_stays_in_with_zeros(whole):
    """The evaluation of b with seed 3 was .62 at 4, and is missed at 8: (.62 + 0) / 2."""
    data = json.loads((whole / "report.json").read_text())
    crashed = next(row for row in data["runs"] if row["status"] == "crashed")
    assert (crashed["arm"], crashed["seed"], crashed["primary"]) == ("b", 3, 0.31)
    assert data["progress"] == {
        "done": 8, "planned": 8, "crashed": 1, "missing": [], "full_seeds": [0, 1, 2, 3]
    }  # fmt: skip
    (row,) = data["primary"]
    assert row["seeds"] == 4
    assert row["difference"] == pytest.approx((0.08 + 0.10 + 0.11 + 0.31 - 0.51) / 4)
    text = words(whole)
    assert "8 of 8 runs, of which 1 crashed" in text
    assert "Crashed: b, seed 3. error: the weights are <nan> & gone" in text
    # R*: 6 of 8 runs have to reach it; the crashed one never does.
    assert [x["reach"] for x in data["matched_reward"]["arms"]] == [4, 3]


def test_the_page_holds_its_parts(whole):
    text = words(whole)
    assert "made up: 2 arms, 4 seeds is b < a & <script>? 8 of 8" in text
    assert "written at 2026-01-02 03:04:05 UTC by commit 0123456789ab." in text
    assert "held-out pass@1, mean of the evaluations after step 0: the area under the curve" in text
    assert re.search(r"b against a: not told apart. The difference is \+2\.[23] points \(95%", text)
    assert "with accuracy 0 at every evaluation that it missed" in text
    page = (whole / "report.html").read_text()
    assert "<script" not in page and not re.search(r"(src|href)=\"(?!data:|#)", page)
    names = {file.stem for file in (whole / "figures").glob("*.svg")}
    assert names == {
        "primary", "contrasts", "eval-pass@1", "reward-correct_rate", "kl-warm_start",
        "kl-against-reward",
    }  # fmt: skip
    assert page.count('<svg class="plot"') == len(names)
    for figure in json.loads((whole / "report.json").read_text())["figures"]:
        assert re.search(r"\d+ (runs of each arm|paired seeds)", figure["read"]), figure["key"]


def test_curves_in_the_json_by_hand(whole):
    """Training reward at step 8, mean of two steps: .75 of a's four runs and of three of b's.

    The crashed run counts 0: mean .5625, s = .375.
    """
    data = json.loads((whole / "report.json").read_text())
    figure = next(one for one in data["figures"] if one["key"] == "reward-correct_rate")
    a, b = figure["data"]
    assert (a["steps"][-1], a["mean"][-1], a["runs"][-1]) == (8, pytest.approx(0.75), 4)
    assert (b["mean"][-1], b["runs"][-1]) == (pytest.approx(0.5625), 4)
    assert b["high"][-1] == pytest.approx(0.5625 + 3.182446 * 0.375 / 2, rel=1e-6)


def test_the_json_is_strict(whole):
    def refuse(constant):
        raise AssertionError(constant)

    text = (whole / "report.json").read_text()
    json.loads(text, parse_constant=refuse)
    assert report._finite([math.nan, (math.inf, 1.5)]) == [None, [None, 1.5]]


def test_half_finished(tmp_path):
    """Seeds 0 and 1 of both, seed 2 of a alone: tests of two seeds, arms of the same two."""
    data = numbers(folder(tmp_path, pair(GAINS)[:5]))
    assert data["progress"]["done"] == 5 and data["progress"]["planned"] == 8
    assert data["progress"]["missing"] == ["b, seed 2", "a, seed 3", "b, seed 3"]
    assert data["progress"]["full_seeds"] == [0, 1]
    (row,) = data["primary"]
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(0.09)
    main = next(entry for entry in data["arms"] if entry["measure"] == "eval/pass@1/mean")
    assert [(e["runs"], e["mean"]) for e in main["values"]] == [
        (2, pytest.approx(0.36)),
        (2, pytest.approx(0.45)),
    ]


def test_one_run_alone_makes_a_page(tmp_path):
    """Nothing to test yet, an arm without any run, $ and < in a name; made again, the same."""
    plan = PLAN | {"arms": {"a$x$<b>": {}, "b": {}}, "contrasts": [["b", "a$x$<b>"]]}
    path = folder(tmp_path, [run("a$x$<b>", rows=accuracies(0.2, 0.3, 0.3))], plan)
    report.write_report(path)
    text = words(path)
    assert "1 of 8 runs, none crashed" in text and "Not finished. 7 of 8 runs are missing" in text
    assert "b against a$x$<b>: not tested, fewer than two seeds have both runs." in text
    page = (path / "report.html").read_bytes()
    assert b"<b>a$x$<b>" not in page
    report.write_report(path)
    assert (path / "report.html").read_bytes() == page


def test_what_has_to_be_known_before_the_answer(tmp_path):
    rates = {
        arm: {"chosen": chosen, "scores": [{"lr": lr, "by_seed": [0.5]} for lr in (1e-5, 1e-4)]}
        for arm, chosen in (("a", 1e-5), ("b", 1e-4))
    }
    asked = {"values": [1e-5, 1e-4], "seeds": [9], "steps": 8, "metric": "reward/correct_rate"}
    runs = pair((0.0, 0.0, 0.0, 0.0))
    early = {"started": "2026-01-02T03:00:00+00:00"}
    runs[0] = run("a", 0, rows=accuracies(0.2, 0.1, 0.1), environment=early)
    path = folder(tmp_path, runs, PLAN | {"learning_rates": asked}, rates)
    loaded = report.load(path)
    found = " ".join(report._warnings(loaded, report._gains(loaded)))
    assert "0 of the 0 runs that chose learning rates and 1 of the 8 compared runs started" in found
    assert "a: the chosen learning rate 1e-05 is the lowest that was tried; a lower one" in found
    assert "b: the chosen learning rate 0.0001 is the highest that was tried; a higher" in found
    assert "a: runs used the learning rate 0.0001, chosen was 1e-05." in found
    assert "better than the warm start by the primary endpoint: a." in found


def test_folders_that_hold_no_comparison(tmp_path):
    with pytest.raises(UserError, match=r"plan\.json: No such file"):
        report.load(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        report.load(tmp_path)
    (tmp_path / "plan.json").write_text('{"plan": {"name": 1}}')
    with pytest.raises(UserError, match="it lacks arms, base"):
        report.load(tmp_path)
    with pytest.raises(UserError, match="has no finished run"):
        report.load(folder(tmp_path / "empty", []))
    tuned = [run("a", 9, rows=accuracies(0.2), tuning=True)]
    with pytest.raises(UserError, match="has no finished run"):
        report.load(folder(tmp_path / "tuning", tuned))
    rates = PLAN | {"learning_rates": {"values": [1, 2]}}
    with pytest.raises(UserError, match=r"learning_rates.json: No such file"):
        report.load(folder(tmp_path / "rates", pair(GAINS), rates))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"arm": "z"}, "arm z with seed 0: not planned"),
        ({"seed": 77}, "arm a with seed 77: not planned"),
        ({"lr": 0.5}, "arm a with seed 0 twice"),
    ],
)
def test_runs_that_do_not_belong(tmp_path, extra, message):
    runs = [*pair(GAINS), run(rows=accuracies(0.2, 0.3, 0.3), **extra)]
    with pytest.raises(UserError, match=message):
        report.load(folder(tmp_path, runs))


def test_a_primary_metric_that_was_not_measured(tmp_path):
    plan = PLAN | {"primary": {"metric": "eval/pass@64", "summary": "mean"}}
    with pytest.raises(UserError, match="has no eval/pass@64 at step 4"):
        numbers(folder(tmp_path, pair(GAINS), plan))
