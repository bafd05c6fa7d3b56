"""The ranks that tests start end when they should: killed, late, in the middle of an answer."""

import os
import signal
import time
from multiprocessing import connection

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed, run_command, run_ranks


def sum_of_ranks() -> list:
    dist.init_process_group("gloo")
    mine = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(mine)
    return [dist.get_rank(), mine]


def test_every_rank_answers_with_its_own():
    assert run_ranks(3, sum_of_ranks) == [[rank, torch.tensor(6.0)] for rank in range(3)]


def killed_before_the_others_have_met() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo")


def killed_in_its_answer() -> str:
    """As where memory runs out while a large result is sent."""

    def send_half(pipe, message):
        os.write(pipe.fileno(), bytes(message)[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        connection.Connection._send = send_half
    return "an answer"


@pytest.mark.parametrize("function", [killed_before_the_others_have_met, killed_in_its_answer])
def test_a_rank_that_is_killed_fails_at_once(function):
    begin = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 2:\nended with exit status -9"):
        run_ranks(2, function)
    assert time.monotonic() - begin < 60


def wait_for_the_other() -> None:
    """Rank 0 in C++, where no Python signal handler would be called."""
    if os.environ["RANK"] == "0":
        dist.init_process_group("gloo")
    else:
        time.sleep(100)


def test_ranks_that_are_late_say_where_they_are():
    for timeout_s in (2, 10, 50):  # until both have come so far
        with pytest.raises(RankFailed, match=r"2 rank\(s\) gave no result in \d+ s") as late:
            run_ranks(2, wait_for_the_other, timeout_s=timeout_s)
        waits, sleeps = str(late.value).split("rank 0:")[1].split("rank 1:")
        if "in init_process_group" in waits and "in wait_for_the_other" in sleeps:
            break
    assert "in init_process_group" in waits and "in init_process_group" not in sleeps
    assert "in wait_for_the_other" in waits and "in wait_for_the_other" in sleeps


def fail_on_rank_1() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("by rank 1")
    dist.barrier()


def test_the_rank_at_fault_is_the_one_that_is_named():
    with pytest.raises(RankFailed, match=r"rank 1 of 2:(?s:.*)ValueError: by rank 1"):
        run_ranks(2, fail_on_rank_1)


def kill_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def test_a_command_of_which_a_rank_is_killed_ends():
    result = run_command("--version", ranks=2, first=kill_rank_1)
    assert result.returncode == -signal.SIGKILL
