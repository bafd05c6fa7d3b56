"""Rewards of a user's own in processes: what they give, and what is said where they fail."""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.rewards import Question, Workers
from tests.rewards.test_code import linux

OWN = "tests.rewards.own"


def ask(place, *responses, row=None, timeout_s=1.0, count=2):
    workers = Workers(place, timeout_s=timeout_s, count=count)
    question = Question(prompt="1+1?", answer="2")
    try:
        return workers([(question, response, row or {}, None) for response in responses])
    finally:
        workers.close()


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a reward of one's own that raises, hangs, ends its process or gives no finite number",
    "0 for that response, named and counted; others are judged (--reward-failures end: the run "
    "ends)",
)
def test_every_failure_is_its_own_response_s():
    failing = ("raises", "hangs", "dies", "nan", "infinite", "text", "none", "two", "empty")
    outcomes = ask(f"{OWN}:half", "2", *failing, "nested", "3", row={"bonus": 0.25})
    assert [o.value for o in outcomes] == [0.75, *[None] * 10, 0.25]
    for outcome, said in zip(
        outcomes[1:-1],
        (
            "KeyError: 'no such answer' (own.py, line ",
            "gave no answer in 1 s",
            "ended its process (status 7)",
            "it gave nan; a finite number",
            "it gave inf",
            "it gave '0.5'",
            "it gave None",
            "it gave [0.5, 0.5]",
            "an empty dict",
            "it gave [1.0] for 'score'",
        ),
        strict=True,
    ):
        assert said in outcome.why and f"{OWN}:half" in outcome.why
    assert [o.late for o in outcomes].index(True) == 2 and sum(o.late for o in outcomes) == 1


def test_coroutines_wait_together():
    begin = time.monotonic()
    outcomes = ask(f"{OWN}:later", *["2"] * 20, "hangs", "3", count=1, timeout_s=4)
    assert [o.value for o in outcomes] == [*[1.0] * 20, None, 0.0]
    assert outcomes[20].late and "gave no answer in 4 s" in outcomes[20].why
    assert time.monotonic() - begin < 30  # one after the other: 4 s of waiting, and the imports


@pytest.mark.slow
def test_a_coroutine_that_blocks_fails_alone():
    outcomes = ask(f"{OWN}:blocks", "1", "hangs", "2", count=1)
    assert [o.value for o in outcomes] == [1.0, None, 1.0] and outcomes[1].late


def test_verls_functions_are_taken_as_they_are():
    (outcome,) = ask(f"{OWN}:verl_own", "2", row={"extra_info": {"index": 5}})
    assert outcome.value == {"score": 1.0, "index": 5.0}


def test_a_file_without_a_package(tmp_path):
    (tmp_path / "mine.py").write_text("def one(problem, response, row): return len(response)\n")
    (outcome,) = ask(f"{tmp_path}/mine.py:one", "four")
    assert outcome.value == 4


@linux
def test_nothing_is_left_of_a_program_whose_worker_was_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = Question(prompt="", answer="assert True")
    workers = Workers("moe_upgrpo.rewards.code:code", timeout_s=1.0, count=1)
    try:
        sleeps = "open('begun', 'w').close()\nimport time\ntime.sleep(60)"
        (outcome,) = workers([(runs, sleeps, {}, None)])
        assert outcome.late
        (only,) = tmp_path.iterdir()  # of the worker that was started instead
        assert not list(only.iterdir())
        ends = time.monotonic() + 5
        while (running := programs_in(tmp_path)) and time.monotonic() < ends:
            time.sleep(0.05)
        assert not running
    finally:
        workers.close()
    assert not list(tmp_path.iterdir())


def programs_in(folder):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.readlink(process / "cwd").startswith(str(folder)):
                found.append(process.name)
    return found


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("absent.module:f", "No module named 'absent'"),
        (f"{OWN}:absent", "has no attribute 'absent'"),
        (f"{OWN}:of_two", r"it takes \(problem, response\)"),
    ],
)
def test_functions_that_cannot_be_called(place, said):
    with pytest.raises(UserError, match=said):
        ask(place, "2")
