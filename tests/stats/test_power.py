"""Power of a comparison: hand-worked numbers, independent references, simulated comparisons.

Not covered: that the spreads assumed in benchmarks/studies/power.py are those of any model.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies import power as command
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import power
from moe_upgrpo.stats.power import Design, Spread
from moe_upgrpo.store import write_evaluation

# w = .5·.5 − (.09 + .01 + .05) = .1
SPREAD = Spread(accuracy=0.5, problems=0.3, gain=0.2, seed=0.1, seed_problem=math.sqrt(0.05))


def test_the_variances_by_hand():
    assert SPREAD.within == pytest.approx(0.1)
    design = Design(problems=10, samples=4, seeds=5)
    found = power.variances(design, SPREAD)
    # 2·.1/(10·4·5), 2·.05/(10·5), 2·.01/5, .04/10
    expected = {"sampling": 0.001, "seed_problem": 0.002, "seeds": 0.004, "problems": 0.004}
    assert found == pytest.approx(expected)
    own = power.variances(design, SPREAD, paired=False)  # (2·.09 + .04)/10
    assert own == pytest.approx(expected | {"problems": 0.022})
    errors = {q: power.standard_error(design, SPREAD, question=q) for q in ("these", "such")}
    assert errors == pytest.approx({"these": 0.007**0.5, "such": 0.011**0.5})
    # These: 5 − 1. Such: .011²/(.007²/4 + .007²/9), the seeds' part .001 + .002 + .004 and the
    # problems' .001 + .002 + .004.
    assert power.degrees_of_freedom(design, SPREAD, question="these") == 4
    expected_df = 0.011**2 / (0.007**2 / 4 + 0.007**2 / 9)
    assert power.degrees_of_freedom(design, SPREAD, question="such") == pytest.approx(expected_df)


def test_power_by_tables():
    """Textbook: z of 1.96 + .8416 for 80%; Cohen's d = .5 with 34 pairs; alpha at no difference."""
    assert power.power(1.959964 + 0.841621, 1.0) == pytest.approx(0.8, abs=1e-5)
    assert power.power(0.5, 1 / math.sqrt(34), df=33) == pytest.approx(0.808, abs=1e-3)
    for df in (1, 7.5, math.inf):
        assert power.power(0, 1, df=df, alpha=0.1) == pytest.approx(0.1)
        assert power.power(-2, 1, df=df) == pytest.approx(power.power(2, 1, df=df))
    assert power.power(100, 1, df=3) == pytest.approx(1)  # far tails stay numbers


def test_power_is_that_of_drawn_t_tests():
    rng = np.random.default_rng(0)
    draws = rng.normal(1.2, 1.0, size=(40_000, 5))
    rejected = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert power.power(1.2, 1 / math.sqrt(5), df=4) == pytest.approx(rejected, abs=0.01)


def test_the_fewest_seeds_and_problems():
    given = {"problems": 30, "samples": 32}
    for spread in command.SPREADS.values():
        seeds = power.seeds_needed(0.03, spread, question="these", **given)
        of = [
            power.power_of(0.03, Design(seeds=s, **given), spread, question="these")
            for s in (seeds - 1, seeds)
        ]
        assert of[0] < 0.8 <= of[1]
    # G*Power's table: a paired t-test at d = .25 needs 128 pairs, at d = .5 34.
    assert power.problems_needed(0.03, 0.12) == 128
    assert power.problems_needed(0.03, 0.06) == 34
    middle = command.SPREADS["middle"]
    for problems, enough in ((127, False), (128, True)):
        given = {"problems": problems, "samples": 10**9, "most": 10**9}
        seeds = power.seeds_needed(0.03, middle, question="such", **given)
        assert (seeds is not None) == enough


def test_the_difference_that_a_design_finds():
    design = Design(problems=30, samples=32, seeds=5)
    for question in ("these", "such"):
        found = power.detectable(design, SPREAD, question=question)
        assert power.power_of(found, design, SPREAD, question=question) == pytest.approx(0.8)
    # One t-test of 34 pairs finds d = .5: see problems_needed.
    many = Design(problems=10**9, samples=10**9, seeds=34)
    only_seeds = Spread(accuracy=0.5, problems=0, gain=0, seed=0.1, seed_problem=0)
    found = power.detectable(many, only_seeds, question="these") / (0.1 * math.sqrt(2))
    assert found == pytest.approx(0.5, abs=0.01)


def test_a_test_over_problems_of_one_run_each_takes_seeds_for_methods():
    design = Design(problems=10, samples=10**9, seeds=1)
    # Seen 2·.05/10 = .01; in truth .01 + 2·.01 = .03: 2Φ(−1.96/√3) = 2Φ(−1.1316) = .2578.
    assert power.false_positives(design, SPREAD) == pytest.approx(0.2578, abs=1e-4)
    assert power.false_positives(design, replace(SPREAD, seed=0)) == pytest.approx(0.05)
    rng = np.random.default_rng(0)
    shape = (20_000, 2)
    runs = 0.1 * rng.normal(size=(*shape, 1)) + math.sqrt(0.05) * rng.normal(size=(*shape, 400))
    # 400 problems: the t-test over them is a z-test. Seen 2·.05/400, in truth + 2·.01.
    difference = runs[:, 1, :10] - runs[:, 0, :10]
    z = difference.mean(axis=1) / math.sqrt(2 * 0.05 / 10)
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.2578, abs=0.015)


def test_the_paired_test_by_hand():
    """Differences 0, .2, .4 and .2, .2, .8: rows .2 and .4, columns .1, .2, .6; mean .3."""
    first = np.full((2, 3), 0.1)
    second = first + np.array([[0.0, 0.2, 0.4], [0.2, 0.2, 0.8]])
    found = power.paired_test(first, second)
    assert (found.seeds, found.problems) == (2, 3)
    assert found.difference == pytest.approx(0.3)
    assert found.se_seeds == pytest.approx(math.sqrt(0.02 / 2))  # variance of .2, .4 is .02
    assert found.se_problems == pytest.approx(math.sqrt(0.07 / 3))  # of .1, .2, .6: .14/2
    # Residuals: 0, .1, −.1 and their negatives: .04/(1·2) = .02, over 6.
    both = 0.02 / 2 + 0.07 / 3 - 0.02 / 6
    assert found.se_both == pytest.approx(math.sqrt(both))
    df = both**2 / ((0.02 / 2) ** 2 / 1 + (0.07 / 3) ** 2 / 2)
    assert found.df_both == pytest.approx(df)
    # Two runs: t = .3/.1 = 3 with one degree of freedom: p = 1 − 2·atan(3)/π.
    assert found.p_these == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    assert found.p_such == pytest.approx(2 * stats.t.sf(0.3 / math.sqrt(both), df))


def test_the_paired_test_with_one_seed_or_no_spread():
    one = power.paired_test(np.array([[0.1, 0.2]]), np.array([[0.1, 0.6]]))
    assert one.difference == pytest.approx(0.2)
    assert one.se_problems == pytest.approx(0.2)  # of 0 and .4: √(.08/2)
    assert all(math.isnan(x) for x in (one.se_seeds, one.se_both, one.p_these, one.p_such))
    same = power.paired_test(np.full((2, 2), 0.5), np.full((2, 2), 0.5))
    assert same.p_these == same.p_such == 1
    moved = power.paired_test(np.full((2, 2), 0.25), np.full((2, 2), 0.5))
    assert moved.p_these == moved.p_such == 0


def test_the_spread_of_drawn_runs():
    """All five parts come back, from normal chances that stay within 0 and 1."""
    rng = np.random.default_rng(0)
    seeds, problems, n = 40, 2000, 8
    true = Spread(accuracy=0.5, problems=0.1, gain=0.05, seed=0.03, seed_problem=0.06)
    base_N = 0.5 + 0.1 * rng.normal(size=problems)
    gain_N = 0.05 * rng.normal(size=problems)

    def runs(chance_SN: np.ndarray) -> np.ndarray:
        of_all = 0.03 * rng.normal(size=(seeds, 1))
        of_one = 0.06 * rng.normal(size=(seeds, problems))
        return rng.binomial(n, np.clip(chance_SN + of_all + of_one, 0, 1))

    arms = [runs(base_N + 0 * gain_N), runs(base_N + gain_N)]
    found = power.spread_of(arms[0], n, arms[1])
    for name, tolerance in {"accuracy": 0.01, "problems": 0.01, "gain": 0.005, "seed": 0.008,
                            "seed_problem": 0.003}.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(true, name), abs=tolerance), name
    assert found.within == pytest.approx(true.within, abs=0.005)
    alone = power.spread_of(arms[0], n)
    assert alone.gain == 0
    for name, tolerance in {"problems": 0.01, "seed": 0.008, "seed_problem": 0.003}.items():
        assert getattr(alone, name) == pytest.approx(getattr(true, name), abs=tolerance), name
    # What both runs of a seed share is in the spread of either, and not in that of the pair.
    shared_SN = 0.1 * rng.normal(size=(seeds, 1))
    arms = [runs(base_N + shared_SN), runs(base_N + gain_N + shared_SN)]
    paired = power.spread_of(arms[0], n, arms[1])
    assert power.spread_of(arms[0], n).seed == pytest.approx(0.104, abs=0.02)
    assert paired.seed == pytest.approx(0.03, abs=0.008)
    assert paired.gain == pytest.approx(0.05, abs=0.005)


def test_the_closed_forms_hold_where_difficulties_have_two_humps():
    """Additions to log-odds, two humps, heavy tails: 1,500 comparisons of each design."""
    rng = np.random.default_rng(0)
    shift = command.WORLD.shift(rng, command.DELTA)
    spread = command.WORLD.spread(rng, shift)
    assert spread.problems > 0.38  # of at most .5
    design = Design(problems=60, samples=32, seeds=5)
    found = command.trials(command.WORLD, shift, design, repetitions=1500, seed=1)
    for question, trial in found.items():
        error = power.standard_error(design, spread, question=question)
        assert trial.error == pytest.approx(error, rel=0.06), question
        expected = power.power_of(command.DELTA, design, spread, question=question)
        assert trial.power == pytest.approx(expected, abs=0.05), question
        assert 0.02 < trial.false < 0.07, question


def test_the_best_of_several_evaluations():
    assert power.expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert power.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert power.expected_maximum(10) == pytest.approx(1.53875, abs=1e-4)  # Harter 1961


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: replace(SPREAD, accuracy=1.0), "accuracy=1.0"),
        (lambda: replace(SPREAD, problems=0.6), "at most 0.500"),
        (lambda: replace(SPREAD, seed=-0.1), "seed=-0.1"),
        (lambda: Design(problems=0, samples=1, seeds=1), "problems=0"),
        (lambda: power.expected_maximum(0), "count=0"),
        (lambda: power.power_of(0.1, Design(problems=9, samples=1, seeds=1), SPREAD,
                                question="these"), "one run of each arm"),
        (lambda: power.paired_test(np.ones((2, 3)), np.ones((3, 2))), "the same of both"),
        (lambda: power.paired_test(np.ones((2, 1)), np.ones((2, 1))), "two problems"),
        (lambda: power.spread_of(np.array([[5, 1], [1, 1]]), 4), "between 0 and 1"),
        (lambda: power.spread_of(np.ones((1, 3)), 4), "seeds=1"),
        (lambda: power.spread_of(np.ones((2, 3)), 1), "samples=1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(UserError, match=re.escape(words)):
        call()


def test_the_page_has_the_commands_tables():
    """Those of the closed forms; the simulated ones depend on the version of numpy."""
    page = (Path(__file__).parents[2] / "docs" / "power.md").read_text()
    for name in command.ON_PAGE:
        section = re.search(rf"<!-- begin {name} -->\n(.*?)\n<!-- end {name} -->", page, re.DOTALL)
        assert section, name
        if name != "metrics":
            made = command.SECTIONS[name]()
            assert section[1].split("\n\n<sub>made by")[0] == made, f"{name}: make results"


def test_the_command_reads_runs(tmp_path, capsys):
    """Two runs of each arm with the differences of the paired test by hand."""
    arms = {"a": [[1, 1, 1], [1, 1, 1]], "b": [[1, 3, 5], [3, 3, 9]]}
    runs = {}
    for arm, counts in arms.items():
        runs[arm] = []
        for seed, correct in enumerate(counts):
            run = tmp_path / f"{arm}{seed}"
            runs[arm].append(run)
            for step in (0, 5):
                columns = {
                    "problem": [0, 1, 2],
                    "prompt": ["x", "y", "z"],
                    "greedy": [True] * 3,
                    "samples": [10] * 3,
                    "correct": correct if step else [0] * 3,
                    "majority": [0.0] * 3,
                }
                write_evaluation(run / "evaluations", step, columns)
    both = {"runs": tuple(runs["a"]), "second": tuple(runs["b"])}
    command.main(command.Arguments(**both, save=tmp_path / "kept.npz"))
    printed = capsys.readouterr().out
    assert "step 5: 2 runs, 3 problems" in printed and "accuracy 0.100" in printed
    # √(.01), p = 1 − 2·atan(3)/π; √(.01 + .02333 − .00333).
    assert "30.0 points; standard error 10.0 for these problems, p = 0.2;" in printed
    assert "17.3 for such problems" in printed
    with np.load(tmp_path / "kept.npz") as kept:
        assert kept["correct"].tolist() == [arms["a"], arms["b"]] and kept["samples"] == 10
    with pytest.raises(UserError, match="as many runs"):
        command.main(command.Arguments(**both | {"second": tuple(runs["b"][:1])}))
    with pytest.raises(UserError, match="go with --runs"):
        command.main(command.Arguments(second=tuple(runs["a"])))
