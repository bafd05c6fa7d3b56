"""Each figure of a run by hand."""

import math

import pytest

from moe_upgrpo.compare import measures as m
from moe_upgrpo.errors import UserError
from tests.compare.made import accuracies, run


def steps_of(**columns):
    """Rows of steps 1, 2, …; two underscores stand for the slash of a metric's name."""
    names = [name.replace("__", "/") for name in columns]
    values = zip(*columns.values(), strict=True)
    return [{"step": s} | dict(zip(names, row, strict=True)) for s, row in enumerate(values, 1)]


def rewards(*values, kl=None, **about):
    """A run with these training rewards, and the KL of each step."""
    columns = {"reward__correct_rate": values}
    if kl:
        columns["kl__warm_start"] = kl
    return run(rows=steps_of(**columns), steps=len(values), **about)


def test_summaries_leave_step_0_out():
    one = run(rows=accuracies(0.9, 0.2, 0.6, 0.4), steps=12)
    found = {how: m.summary(one, "eval/pass@1", how) for how in m.SUMMARIES}
    assert found == {"mean": pytest.approx(0.4), "last": 0.4, "best": 0.6}


def test_evaluations_are_due_at_multiples_and_at_the_end():
    assert m.evaluations_due(run(rows=[], steps=10, every=4)) == [4, 8, 10]
    assert m.evaluations_due(run(rows=[], steps=8, every=4)) == [4, 8]
    assert m.evaluations_due(run(rows=[], steps=3, every=20)) == [3]


def test_a_crashed_run_has_accuracy_0_where_it_was_not_evaluated():
    """Evaluated at 0 and 4 of 4, 8, 12: mean (.6 + 0 + 0) / 3, last 0, best .6."""
    one = run(rows=accuracies(0.3, 0.6), steps=12, status="crashed")
    assert m.evaluations(one, "eval/pass@1") == {0: 0.3, 4: 0.6, 8: 0, 12: 0}
    assert m.summary(one, "eval/pass@1", "mean") == pytest.approx(0.2)
    assert m.summary(one, "eval/pass@1", "last") == 0
    assert m.summary(one, "eval/pass@1", "best") == 0.6


def test_a_finished_run_without_an_evaluation_is_an_error():
    with pytest.raises(
        UserError, match="arm a with seed 0 finished, and has no eval/pass@1 at ste"
    ):
        m.evaluations(run(rows=accuracies(0.3, 0.6), steps=12), "eval/pass@1")
    with pytest.raises(UserError, match="no eval_every"):
        m.evaluations_due(run(rows=[], config={}))


def test_metrics_in_order_and_without_their_other_names():
    names = ("pass@16", "pass@1", "avg@16", "best@16", "maj@16", "pass@4", "greedy", "problems")
    rows = [{"step": 0} | {f"eval/{name}": 0.5 for name in names} | {"eval/pass@64": None}]
    assert m.evaluation_metrics([run(rows=rows)]) == [
        "eval/greedy", "eval/pass@1", "eval/pass@4", "eval/pass@16", "eval/maj@16"
    ]  # fmt: skip


def test_curves_hold_a_crashed_runs_zeros_of_reward_alone():
    rows = steps_of(reward__correct_rate=(0.5, 0.25), entropy__mean=(2.0, math.nan))
    one = run(rows=rows, steps=4, status="crashed")
    assert m.curve(one, m.REWARD) == {1: 0.5, 2: 0.25, 3: 0, 4: 0}
    assert m.curve(one, "entropy/mean") == {1: 2.0}  # not finite: left out
    assert m.curve(run(rows=rows, steps=4), m.REWARD) == {1: 0.5, 2: 0.25}


def test_effective_sample_size_is_a_share_of_the_visits():
    rows = steps_of(loss__ratio_effective_sample_size=(90.0, 30.0), tokens__visited=(100, 60))
    assert m.curve(run(rows=rows), m.ESS) == {1: 0.9, 2: 0.5}


def test_matched_reward_is_what_three_quarters_of_the_runs_reach():
    """8 steps: windows of 2. Maxima of the means: .5 (.4, .6), .7, .3, .9: the third largest."""
    runs = [
        rewards(0.0, 0.4, 0.6, 0.4, 0.0, 0.0, 0.0, 0.0),
        rewards(0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        rewards(*[0.3] * 8),
        rewards(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.8, 1.0),
    ]
    assert m.window(runs) == 2
    assert m.matched_reward(runs) == pytest.approx(0.5)
    assert m.matched_reward(runs[::-1]) == pytest.approx(0.5)  # neither order nor arm plays a part
    assert m.matched_reward(runs[:3]) == pytest.approx(0.3)  # ⌈9/4⌉ = 3 of .5, .7, .3
    assert m.matched_reward([*runs, run(rows=[])]) is None


def test_window():
    assert [m.window([run(rows=[], steps=s)]) for s in (1, 4, 11, 20, 300)] == [1, 1, 2, 5, 5]
    assert m.window([run(rows=[], steps=300), run(rows=[], steps=8)]) == 2


def test_kl_at_matched_reward():
    """Means of 2 rewards: .1, .35, .55: the third is the first of .5 or more, of steps 3 and 4."""
    one = rewards(0.0, 0.2, 0.5, 0.6, kl=(1.0, 2.0, 4.0, 10.0))
    assert m.smoothed([0.0, 0.2, 0.5, 0.6], 2) == pytest.approx([0.1, 0.35, 0.55])
    assert m.step_at_reward(one, 0.5, 2) == 4
    assert m.kl_at_reward(one, 0.5, 2) == 7.0
    assert m.kl_at_reward(one, 0.3, 2) == 3.0
    assert m.step_at_reward(one, 0.6, 2) is None and m.kl_at_reward(one, 0.6, 2) is None


def test_ends():
    """Ends are the first and last five of 12 values, the first and last two of 5."""
    assert m.ends(list(range(12))) == (2, 9)
    assert m.ends([1, 2, 30, 4, 6]) == (1.5, 5)
    assert m.ends([1.0]) is None


def test_rates_are_pooled():
    """3 of 300 and 3 of 100 pairs: 6 / 400, not the mean of 1% and 3%."""
    rows = [
        {"step": 1, "mismatch/router_numerator": 3.0, "mismatch/router_denominator": 300.0}
        | {"mismatch/histogram": [150.0, 0.0, 1.0, 2.0], "tokens/sampled": 150.0}
        | {"logp_gap/mean_abs": 0.1},
        {"step": 2, "mismatch/router_numerator": 3.0, "mismatch/router_denominator": 100.0}
        | {"mismatch/histogram": [44.0, 3.0, 0.0, 0.0], "tokens/sampled": 50.0}
        | {"logp_gap/mean_abs": 0.3},
    ]
    assert m.router_rate(run(rows=rows)) == pytest.approx(0.015)
    assert m.token_any_rate(run(rows=rows)) == pytest.approx(6 / 200)
    assert m.by_tokens(run(rows=rows), "logp_gap/mean_abs") == pytest.approx(0.15)
    nothing = run(rows=[{"step": 1}])
    assert m.router_rate(nothing) is m.token_any_rate(nothing) is None
    assert m.by_tokens(nothing, "logp_gap/mean_abs") is None


def test_all_measures_of_a_run():
    """Four steps; ends are of two."""
    rows = steps_of(
        reward__correct_rate=(0.1, 0.3, 0.4, 0.6),
        entropy__mean=(2.0, 1.0, 1.0, 0.0),
        kl__warm_start=(0.0, 0.5, 0.3, 0.1),
        clip__positive=(0.0, 0.1, 0.2, 0.5),
        clip__negative=(0.4, 0.4, 0.4, 0.0),
        loss__gradient_share_positive=(0.5, 0.6, 0.7, 0.8),
        loss__positive_beyond_upper_fraction=(0.0, 0.0, 0.0, 0.2),
        grad_norm=(1.0, 9.0, 2.0, 3.0),
        loss__ratio_effective_sample_size=(10.0, 5.0, 5.0, 10.0),
        tokens__visited=(10.0, 10.0, 10.0, 10.0),
        tokens__sampled=(10.0, 10.0, 10.0, 30.0),
        logp_gap__mean_abs=(0.1, 0.1, 0.1, 0.5),
        logp_gap__k3=(0.01, 0.01, 0.01, 0.03),
    )
    rows = [{"step": 0, "eval/greedy": 0.1}, *rows]
    rows[2]["eval/greedy"], rows[4]["eval/greedy"] = 0.2, 0.6
    one = run(rows=rows, steps=4, every=2, seconds=12.0)
    found = {measure.key: measure.of(one) for measure in m.measures([one])}
    assert found == {
        "eval/greedy/mean": pytest.approx(0.4),
        "eval/greedy/last": 0.6,
        "eval/greedy/best": 0.6,
        "reward_end": pytest.approx(0.5),
        "entropy_change": -1.0,
        "kl_end": pytest.approx(0.2),
        "kl_max": 0.5,
        "kl_at_reward": 0.1,  # windows of 1 step; R* = .6, at step 4
        "clip_positive": pytest.approx(0.2),
        "clip_negative": pytest.approx(0.3),
        "gradient_share_positive": pytest.approx(0.65),
        "positive_beyond_upper": pytest.approx(0.05),
        "grad_norm_median": 2.5,
        "grad_norm_max": 9.0,
        "effective_sample_size": pytest.approx(0.75),
        "logp_gap_abs": pytest.approx(0.3),
        "logp_gap_k3": pytest.approx(0.02),
        "seconds": 12.0,
    }
    assert "R* = 60.0%" in next(x.meaning for x in m.measures([one]) if x.key == "kl_at_reward")


def test_what_no_run_has_is_left_out():
    one = run(rows=accuracies(0.3, 0.6, 0.6), seconds=None)
    assert [x.key for x in m.measures([one])] == [f"eval/pass@1/{how}" for how in m.SUMMARIES]
