"""Each alarm rings on the sign it names, and none on a healthy step; some need the rows before."""

import math

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment
from moe_upgrpo.record.alarms import ALARMS, Watch, texts
from moe_upgrpo.record.limits import AlarmLimits
from moe_upgrpo.record.weights import changed, fingerprint

HEALTHY = {
    "mismatch/router_rate": 0.004,
    "mismatch/by_layer": [0.002, 0.004, 0.006],
    "mismatch/router_numerator": 40,
    "mismatch/repeated_rows": 0.3,
    "mismatch/repeated_rows_trainer": 0.28,
    "noise/trainer_repeat/router_rate": 0.0,
    "noise/engine_batch_shape/router_rate": 0.002,
    "counterfactual/engine_routing/mean_abs": 1e-6,
    "logp_gap/k3": 1e-4,
    "mismatch/zero_rows_by_layer": [0.0, 0.3],
    "loss/ratio_effective_sample_size": 890.0,
    "tokens/visited": 905.0,
    "tokens/sampled": 905.0,
    "response/length_mean": 4.0,
    "advantage/nonzero_rate": 0.6,
    "grad_norm": 1.0,
    "weights/changed_rate": 1.0,
    "reward/mean": 0.6,
    "reward/std": 0.49,
    "entropy/mean": 0.5,
    "entropy/sampled": 0.5,
}
FLOORLESS = {name: value for name, value in HEALTHY.items() if not name.startswith("noise/")}


def after(rows, *, limits=None, replay=None) -> list[list[str]]:
    """The alarms that ring at each of the rows."""
    watch = Watch(limits, replay=replay)
    return [[one.name for one in watch.look(row)] for row in rows]


def raised(row, limits=None) -> list[str]:
    """The alarms that ring at a row alone, without those before it."""
    return after([row], limits=limits)[0]


def test_a_healthy_run_raises_none():
    assert raised(HEALTHY) == []
    assert not any(after([HEALTHY] * 20, replay="R3"))
    learning = [HEALTHY | {"reward/mean": 0.2 + 0.02 * i} for i in range(30)]
    assert not any(after(learning))


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({"mismatch/router_rate": 0.06}, "mismatch-above-noise"),
        ({"mismatch/by_layer": [0.002, 0.051, 0.006]}, "layer-above-others"),
        ({"mismatch/zero_rows_by_layer": [0.3, 1.0]}, "zero-filled-routes"),
        ({"mismatch/repeated_rows": 0.49}, "repeated-routes"),
        ({"logp_gap/k3": 0.2}, "large-log-prob-gap"),
        ({"loss/ratio_effective_sample_size": 400.0}, "few-effective-tokens"),
    ],
)
def test_each_sign_raises_its_alarm(changes, alarm):
    assert raised(HEALTHY | changes) == [alarm]


@pytest.mark.parametrize(
    ("name", "alarm"),
    [
        ("logp_gap/k3", "large-log-prob-gap"),
        ("loss/ratio_effective_sample_size", "few-effective-tokens"),
    ],
)
def test_what_is_not_a_number_raises_the_alarm(name, alarm):
    assert raised(HEALTHY | {name: float("nan")}) == [alarm]


def test_60_percent_ring_in_every_row():
    """With a floor in the row, behind one of an earlier row, and without any; and with a floor so
    large that ten times it is more than all."""
    far = {"mismatch/router_rate": 0.6}
    noisy = {"noise/engine_batch_shape/router_rate": 0.08}
    for rows in (
        [FLOORLESS | far] * 3,
        [HEALTHY | far, *[FLOORLESS | far] * 3],
        [HEALTHY | noisy | far, *[FLOORLESS | far] * 3],
    ):
        assert after(rows) == [["mismatch-above-noise"]] * len(rows)


def test_the_last_floor_is_carried_forward():
    """Ten times .2% is below the 5% from which it counts; ten times 2% is 20%."""
    above = FLOORLESS | {"mismatch/router_rate": 0.1}
    assert after([above, HEALTHY, above]) == [[], [], ["mismatch-above-noise"]]
    noisy = HEALTHY | {"noise/engine_batch_shape/router_rate": 0.02}
    assert after([noisy, above]) == [[], []]


def test_one_update_between_engine_and_trainer_is_no_fault():
    far = HEALTHY | {"mismatch/router_rate": 0.2, "logp_gap/k3": 0.6}
    assert raised(far) == ["mismatch-above-noise", "large-log-prob-gap"]
    assert raised(far | {"staleness/mean": 1.0}) == []
    others = far | {"staleness/mean": 1.0, "mismatch/router_rate": 1.0}
    assert raised(others) == ["mismatch-above-noise"]


def test_metrics_that_were_not_measured_raise_none():
    assert raised({"step": 1}) == []
    assert after([{"step": i, "eval/greedy": 0.5} for i in range(9)]) == [[]] * 9


def test_a_few_rows_may_repeat_by_chance():
    few = {"mismatch/repeated_rows": 0.9, "tokens/sampled": 30.0}
    assert raised(HEALTHY | few) == []
    assert raised(HEALTHY | few | {"tokens/sampled": 40.0}) == ["repeated-routes"]


def test_layers_that_all_differ_are_no_single_layer():
    assert raised(HEALTHY | {"mismatch/by_layer": [0.1, 0.2, 0.45]}) == []
    assert raised(HEALTHY | {"mismatch/by_layer": [0.9]}) == []


def test_a_replay_without_effect():
    """Ten routers differ, and the log-probs of the held forward are those of the free one."""
    unused = HEALTHY | {"counterfactual/engine_routing/mean_abs": 0.0}
    assert after([unused], replay="R3") == [["replay-not-used"]]
    assert after([unused], replay="none") == [[]]
    assert after([unused | {"mismatch/router_numerator": 9}], replay="R3") == [[]]


@pytest.mark.parametrize("sign", [{"advantage/nonzero_rate": 0.0}, {"grad_norm": 0.0}])
def test_nothing_to_learn_for_five_steps(sign):
    idle = HEALTHY | sign
    assert after([idle] * 4 + [HEALTHY] + [idle] * 6) == [[]] * 9 + [["nothing-to-learn"]] * 2
    soon = AlarmLimits(steps_without_signal=1)
    assert after([idle], limits=soon) == [["nothing-to-learn"]]


def test_which_tensors_an_update_changed():
    model = torch.nn.Linear(2, 3)
    model.empty = torch.nn.Parameter(torch.zeros(0))  # of which another rank holds all
    before = fingerprint([model])
    assert changed(before, fingerprint([model])) == (0, 2)
    model.weight.data[1, 0] += 1e-3
    assert changed(before, fingerprint([model])) == (1, 2)
    model.bias.data[:] = math.nan
    assert changed(before, fingerprint([model])) == (2, 2)
    assert fingerprint([]) == []


def test_weights_that_an_update_leaves_alone():
    stuck = HEALTHY | {"weights/changed_rate": 0.0}
    assert after([stuck] * 3) == [[], ["weights-unchanged"], ["weights-unchanged"]]
    assert after([stuck, HEALTHY, stuck]) == [[]] * 3
    assert after([stuck | {"grad_norm": 0.0}] * 4) == [[]] * 4  # there was nothing to learn


def test_a_reward_that_collapses_by_more_than_chance():
    """.6 over five steps, then .1: at the third bad step the mean is .3, at the fourth .2."""
    fallen = HEALTHY | {"reward/mean": 0.1}
    rang = after([HEALTHY] * 6 + [fallen] * 6)
    assert rang[:9] == [[]] * 9 and rang[9:] == [["reward-collapse"]] * 3
    # Eight responses a step: a mean of 40 is off by .15, and a fall of .4 is within four of it.
    few = {"tokens/sampled": 32.0}
    assert not any(after([HEALTHY | few] * 6 + [HEALTHY | few | {"reward/mean": 0.2}] * 6))
    # Of rewards about 0, half a standard deviation is a collapse, and noise about 0 none.
    signed = [HEALTHY | {"reward/mean": x, "reward/std": 1.0} for x in [0.02] * 6 + [-0.8] * 6]
    assert after(signed)[-1] == ["reward-collapse"]
    small = [HEALTHY | {"reward/mean": x, "reward/std": 1.0} for x in [0.02] * 6 + [-0.02] * 6]
    assert not any(after(small))


@pytest.mark.parametrize("known", ["entropy/mean", "entropy/sampled"])
def test_an_entropy_that_collapses(known):
    row = {name: value for name, value in HEALTHY.items() if not name.startswith("entropy/")}
    rows = [row | {known: 0.5}] * 5 + [row | {known: 0.01}] * 6
    assert after(rows)[-2:] == [["entropy-collapse"]] * 2 and not any(after(rows)[:9])


def test_a_resumed_run_knows_what_was():
    rows = [HEALTHY] * 6 + [HEALTHY | {"reward/mean": 0.1}] * 6
    rows = [dict(row) for row in rows]
    whole, resumed = Watch(), Watch()
    for row in rows:
        whole.add_to(row)
    resumed.catch_up(rows[:8])
    for row in rows[8:]:
        assert [one.name for one in resumed.look(row)] == row["alarms"]


def test_a_row_tells_what_rang_and_what_was_seen():
    row = HEALTHY | {"mismatch/router_rate": 0.06}
    (found,) = Watch().add_to(row)
    assert row["alarms"] == ["mismatch-above-noise"] and row["alarms/raised"] == 1
    assert row["alarms/mismatch-above-noise"] == 0.06
    assert found.short == "mismatch-above-noise (0.06, limit 0.05)"
    quiet = dict(HEALTHY)
    Watch().add_to(quiet)
    assert quiet["alarms"] == [] and quiet["alarms/raised"] == 0


def test_every_alarm_says_what_to_do():
    for alarm in ALARMS.values():
        assert len(alarm.rings) > 40 and len(alarm.cause) > 40
        assert "moe-upgrpo" in alarm.command or "again" in alarm.command
        assert alarm.limits or alarm is ALARMS["replay-not-used"]


def test_limits_that_are_set_are_told_and_hold():
    limits = AlarmLimits(mismatch=0.5, log_prob_gap=0.01)
    said = texts(limits)
    assert "the two). (Set here: mismatch 0.5.) Likely cause" in said["mismatch-above-noise"]
    assert said["zero-filled-routes"] == ALARMS["zero-filled-routes"].means
    assert raised(FLOORLESS | {"mismatch/router_rate": 0.4}, limits) == []
    assert raised(HEALTHY | {"logp_gap/k3": 0.02}, limits) == ["large-log-prob-gap"]


@pytest.mark.parametrize(
    "given", [{"mismatch": -1}, {"window": 0}, {"log_prob_gap": math.nan}, {"window": 2.5}]
)
def test_limits_that_cannot_be(given):
    with pytest.raises(UserError, match=f"alarm.{next(iter(given))}=.* is needed"):
        AlarmLimits(**given)


def test_limits_of_a_stack_come_from_the_environment(monkeypatch):
    monkeypatch.delenv(environment.ALARMS, raising=False)
    assert environment.alarm_limits() == AlarmLimits()
    monkeypatch.setenv(environment.ALARMS, "mismatch=0.2, window=3")
    assert environment.alarm_limits() == AlarmLimits(mismatch=0.2, window=3)
    for given in ("mismatch", "speed=1", "window=x", "mismatch=0.2;window=3"):
        monkeypatch.setenv(environment.ALARMS, given)
        with pytest.raises(UserError, match=r"MOE_UPGRPO_ALARMS: .* given; allowed: NAME=NUMBER"):
            environment.alarm_limits()
    for given in ("mismatch=-1", "mismatch=nan", "log_prob_gap=inf", "window=0"):
        monkeypatch.setenv(environment.ALARMS, given)
        with pytest.raises(UserError, match=r"MOE_UPGRPO_ALARMS: alarm\..* is needed"):
            environment.alarm_limits()
