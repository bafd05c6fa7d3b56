"""Each alarm fires on the sign it names, and none on a healthy step."""

import pytest

from moe_upgrpo.record.alarms import ALARMS, raised

HEALTHY = {
    "mismatch/router_rate": 0.004,
    "noise/trainer_repeat/router_rate": 0.0,
    "noise/engine_batch_shape/router_rate": 0.002,
    "logp_gap/k3": 1e-4,
    "mismatch/zero_rows_by_layer": [0.0, 0.3],
    "loss/ratio_effective_sample_size": 890.0,
    "tokens/visited": 905.0,
}


def test_a_healthy_step_raises_none():
    assert raised(HEALTHY) == []


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({"mismatch/router_rate": 0.06}, "mismatch-above-noise"),
        ({"mismatch/zero_rows_by_layer": [0.3, 1.0]}, "zero-filled-routes"),
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


def test_one_update_between_engine_and_trainer_is_no_fault():
    far = HEALTHY | {"mismatch/router_rate": 0.2, "logp_gap/k3": 0.6}
    assert raised(far) == ["mismatch-above-noise", "large-log-prob-gap"]
    assert raised(far | {"staleness/mean": 1.0}) == []


def test_metrics_that_were_not_measured_raise_none():
    assert raised({"step": 1}) == []


def test_mismatch_at_the_noise_floor_or_without_one_raises_none():
    noisy = HEALTHY | {"mismatch/router_rate": 0.1, "noise/engine_batch_shape/router_rate": 0.02}
    assert raised(noisy) == []
    unmeasured = {name: value for name, value in noisy.items() if not name.startswith("noise/")}
    assert raised(unmeasured) == []


def test_every_alarm_says_what_to_do():
    assert all(len(alarm.means) > 80 for alarm in ALARMS.values())
