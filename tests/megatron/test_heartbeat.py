"""The rank that falls silent has a name, and the others end in time.

That a whole job says so on the screen: tests/train/test_launch.py; two hosts: test_nodes.py.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_upgrpo import ending
from moe_upgrpo.errors import PeerLost
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from tests.ranks import RankFailed, run_ranks


def freeze(seconds: float) -> None:
    """Stop this process, as a debugger or a suspended machine does."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def stopped(folder) -> None:
    os.environ[ending.LAUNCHER] = str(folder)
    with groups.process_groups(Layout(), timeout_s=4):
        dist.barrier()
        time.sleep(1)  # signs of both are seen
        if groups.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a rank's process is stopped",
    "it is named after `--timeout`, and the others end with status 4",
)
def test_a_rank_that_is_stopped_is_named_and_the_others_end(tmp_path):
    begin = time.monotonic()
    with pytest.raises(RankFailed, match="rank 0 of 2:\nended with exit status 4"):
        run_ranks(2, stopped, tmp_path)
    assert time.monotonic() - begin < 50
    told = json.loads((tmp_path / "rank-0.json").read_text())
    assert told["status"] == 4 and not told["lost"]
    assert told["message"].startswith("rank 1 (host ")
    assert "no sign of life for 4 s" in told["message"]


def said_as_it_fails(context, wait) -> str:
    """Wait for another rank until that fails, and give what this one then says of it."""
    try:
        while True:
            wait()
    except RuntimeError as error:
        with pytest.raises(PeerLost) as lost:
            context.__exit__(type(error), error, error.__traceback__)
        return str(lost.value)


def left_alone() -> str:
    context = groups.process_groups(Layout(), timeout_s=8)
    context.__enter__()
    dist.barrier()
    time.sleep(2)
    if groups.rank() == 1:
        return "ends without a word"  # with the groups open, as one that is killed
    return said_as_it_fails(context, dist.barrier)


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a rank ends without a word",
    "the others name it, whatever words the transport uses",
)
def test_a_rank_that_ends_without_a_word_is_named():
    said = run_ranks(2, left_alone)[0]
    assert said.startswith("rank 0 lost rank 1 (host "), said
    assert "which ended or was cut off" in said and said.endswith("start again.")


def fails_with(words: str) -> str:
    raised = pytest.raises((RuntimeError, PeerLost))
    with raised as error, groups.process_groups(Layout(), timeout_s=4):
        dist.barrier()
        time.sleep(1.5)
        raise RuntimeError(words)
    return f"{type(error.value).__name__}: {error.value}"


def test_a_failure_is_not_laid_on_ranks_that_live():
    """A failure of our own stays what it is; one of the transport names no rank."""
    for said in run_ranks(2, fails_with, "shapes do not match"):
        assert said == "RuntimeError: shapes do not match"
    words = "[../gloo/transport/tcp/pair.cc:553] No route to host"
    for rank, said in enumerate(run_ranks(2, fails_with, words)):
        assert said.startswith(f"PeerLost: rank {rank} lost the connection to another rank ([")


def leaves_early(folder) -> list[Path]:
    """One rank is done at once, the other much later than the limit."""
    os.environ[ending.LAUNCHER] = str(folder)
    with groups.process_groups(Layout(), timeout_s=2):
        dist.barrier()
        time.sleep(1)
        if groups.rank() == 0:
            time.sleep(4)
    return list(Path(folder).glob("rank-*"))


def frozen(folder) -> list[Path]:
    """Both are stopped for longer than the limit, as those of a suspended machine, and go on."""
    os.environ[ending.LAUNCHER] = str(folder)
    with groups.process_groups(Layout(), timeout_s=3):
        dist.barrier()
        time.sleep(1)
        freeze(5)
        time.sleep(1)
    return list(Path(folder).glob("rank-*"))


@pytest.mark.parametrize("job", [leaves_early, frozen])
def test_no_alarm_without_a_fault(job, tmp_path):
    assert run_ranks(2, job, tmp_path) == [[], []]


def waits_for_a_rank_that_lives() -> str:
    context = groups.process_groups(Layout(), timeout_s=3)
    context.__enter__()
    if groups.rank() == 1:
        time.sleep(5.5)
        return ""
    return said_as_it_fails(context, dist.barrier)


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a rank is late for longer than `--timeout`",
    "the others say that it lives and name the option",
)
def test_a_wait_for_a_rank_that_lives_names_the_option():
    said = run_ranks(2, waits_for_a_rank_that_lives)[0]
    assert "waited longer than --timeout" in said and "slow or stuck" in said
