"""Each alarm fires on the sign it names, and none on a healthy step."""

import pytest

from moe_upgrpo.train.alarms import ALARMS, raised

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


def test_mismatch_at_the_noise_floor_or_without_one_raises_none():
    noisy = HEALTHY | {"mismatch/router_rate": 0.1, "noise/engine_batch_shape/router_rate": 0.02}
    assert raised(noisy) == []
    unmeasured = {name: value for name, value in noisy.items() if not name.startswith("noise/")}
    assert raised(unmeasured) == []


def test_every_alarm_says_what_to_do():
    assert all(len(alarm.means) > 80 for alarm in ALARMS.values())
