"""Seconds by phase, and what of them is waiting."""

import time

import pytest

from moe_upgrpo.store.phases import waiting_share
from moe_upgrpo.train import clock as clocks
from moe_upgrpo.train.clock import Clock


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_is_computed_is_not_waited_and_what_is_slept_is():
    clock = Clock()
    with clock("update"):
        busy(0.15)
        time.sleep(0.3)
    assert clock.seconds["update"] >= 0.45
    # The queue for a core counts as neither, so a loaded machine changes nothing here.
    assert clock.waited["update"] == pytest.approx(0.3, abs=0.08)


def test_a_phase_in_two_parts_is_added_up_also_where_one_fails():
    clock = Clock()
    with clock("logging"):
        time.sleep(0.05)
    with pytest.raises(KeyError), clock("logging"):
        time.sleep(0.05)
        raise KeyError
    assert 0.1 <= clock.seconds["logging"] <= clock.total()
    assert clock.waited["logging"] >= 0.08


@pytest.mark.parametrize("missing", ["file", "meaning"])
def test_where_it_cannot_be_measured_there_is_none(missing, monkeypatch):
    """The second: on CUDA."""
    if missing == "file":
        monkeypatch.setattr(clocks, "_occupied", lambda: None)
    clock = Clock(busy_waits=missing == "meaning")
    with clock("update"):
        time.sleep(0.01)
    assert clock.seconds["update"] >= 0.01 and not clock.waited


def test_steps_weigh_what_they_took():
    rows = [
        {"time/update": 1.0, "time/waiting/update": 0.5},
        {"time/update": 3.0, "time/waiting/update": 0.1},
        {"time/update": 9.0},  # not measured: another machine's
    ]
    assert waiting_share(rows, "update") == pytest.approx(0.8 / 4)
    assert waiting_share(rows, "generate") is None and waiting_share([], "update") is None
