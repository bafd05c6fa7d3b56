"""The exit status of a training job by what ended it; a killed rank's is in test_launch.py."""

import resource
from functools import partial

import pytest

from moe_upgrpo.store import read_metrics
from tests.ranks import run_command
from tests.train.test_launch import options


def few_files(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


@pytest.mark.fault(
    "How a command ends",
    "wrong use, numbers that are not finite, too many open files",
    "status 2, 3 and 4, and one message",
)
@pytest.mark.parametrize(
    ("more", "first", "status", "words"),
    [
        (("--model", "/nowhere/model"), None, 2, "does not exist"),
        # The first optimizer steps send the weights to infinity; the second batch is not finite.
        (
            ("--optimizer.lr", "1e30", "--optimizer.clip-grad", "0"),
            None,
            3,
            "the weights have diverged",
        ),
        ((), partial(few_files, 24), 4, "too many files are open"),
    ],
    ids=["refused", "numbers", "files"],
)
def test_status(more, first, status, words, cache, tmp_path):
    result = run_command("train", *options(tmp_path / "r", cache, *more), first=first)
    assert result.returncode == status, result.stderr[-3000:]
    assert words in result.stderr
    assert result.stderr.count("error:") == 1


@pytest.mark.fault(
    "How a command ends",
    "a run's numbers fail",
    "what was logged before stays",
)
def test_what_was_logged_before_the_numbers_failed_stays(cache, tmp_path):
    """A comparison counts the run by it."""
    more = ("--optimizer.lr", "1e30", "--optimizer.clip-grad", "0", "--minibatches", "1")
    result = run_command("train", *options(tmp_path / "r", cache, *more))
    assert result.returncode == 3 and "weight" in result.stderr
    assert read_metrics(tmp_path / "r")[0]["step"] == 0
