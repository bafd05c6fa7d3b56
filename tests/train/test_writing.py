"""The token log's thread: what it has written when, and where its failures are raised."""

import subprocess
import sys
import threading
import time

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.train.writing import TokenLogThread


class Slow:
    """A writer that waits to be let go on, and fails where it is told to."""

    def __init__(self, fails: tuple[int, ...] = ()):
        self.written: list[int] = []
        self.fails, self.go_on = fails, threading.Event()

    def write_prompts(self, step, prompts) -> None:
        assert self.go_on.wait(20)

    def write(self, step, columns) -> None:
        if step in self.fails:
            raise UserError(f"step {step}: no rows")
        self.written.append(step)


def test_a_step_goes_on_while_its_rows_are_written_and_settling_waits():
    slow = Slow()
    log = TokenLogThread(slow)
    log.write(1, {}, {})
    assert slow.written == []  # and yet we are here
    slow.go_on.set()
    log.settle()
    assert slow.written == [1]
    log.write(2, {}, {})
    log.write(3, {}, {})  # waits: one step's rows are held at most
    assert slow.written[:2] == [1, 2]
    log.settle()
    assert slow.written == [1, 2, 3]


@pytest.mark.parametrize("meet", [lambda log: log.settle(), lambda log: log.write(2, {}, {})])
def test_a_failure_is_raised_once_at_the_next_meeting(meet):
    slow = Slow(fails=(1,))
    slow.go_on.set()
    log = TokenLogThread(slow)
    log.write(1, {}, {})
    with pytest.raises(UserError, match="step 1: no rows"):
        meet(log)
    log.settle()
    assert slow.written == []


def test_looking_raises_a_failure_and_waits_for_nothing():
    slow = Slow(fails=(1,))
    log = TokenLogThread(slow)
    log.look()
    log.write(1, {}, {})
    log.look()  # at work: nothing to tell
    slow.go_on.set()
    while not log._last.done():
        time.sleep(0.01)
    with pytest.raises(UserError, match="step 1: no rows"):
        log.look()


def test_a_run_that_fails_waits_for_the_rows_of_its_last_step():
    slow = Slow()
    with pytest.raises(ZeroDivisionError), TokenLogThread(slow) as log:
        log.write(1, {}, {})
        threading.Timer(0.2, slow.go_on.set).start()
        raise ZeroDivisionError
    assert slow.written == [1]


def test_a_failure_of_the_rows_is_said_beside_that_of_the_run(capsys):
    slow = Slow(fails=(1,))
    slow.go_on.set()
    with pytest.raises(ZeroDivisionError), TokenLogThread(slow) as log:
        log.write(1, {}, {})
        raise ZeroDivisionError
    assert "rows of the last step were not written: step 1: no rows" in capsys.readouterr().err
    with pytest.raises(UserError, match="step 1: no rows"), TokenLogThread(slow) as log:
        log.write(1, {}, {})


ENDED_BY_A_THREAD = """
import sys, threading, time
from moe_upgrpo import ending
from moe_upgrpo.train.writing import TokenLogThread

class Slow:
    def write_prompts(self, step, prompts):
        time.sleep(0.3)

    def write(self, step, columns):
        print("written", step, flush=True)

with TokenLogThread(Slow()) as log:
    log.write(1, {}, {})
    threading.Thread(target=ending.fail, args=("the other rank failed.", 4)).start()
    time.sleep(60)
"""


def test_a_process_that_another_thread_ends_waits_for_them_too():
    command = [sys.executable, "-c", ENDED_BY_A_THREAD]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (4, "written 1\n")
    assert ended.stderr == "error: the other rank failed.\n"
