"""Checks that go wrong, each in its way, for test_gpu.py."""

import os
import signal
import sys
import time

from benchmarks.gpu.checks import Outcome


def good(job) -> Outcome:
    return Outcome(line="fine", figures={"there": (job.scratch / "left").exists()})


def leaves_a_file(job) -> Outcome:
    (job.scratch / "left").touch()
    return Outcome(line="left")


def raises(job) -> Outcome:
    print("said before", file=sys.stderr)
    raise ValueError("no such kernel")


def finds_a_fault(job) -> Outcome:
    return Outcome(line="1.5 apart", figures={"apart": 1.5}, faults=("more than .5",))


def hangs(job) -> Outcome:
    time.sleep(60)


def dies(job) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)


def is_no_json(job) -> Outcome:
    return Outcome(line="", figures={"array": object()})


def exits(job) -> Outcome:
    sys.exit(3)


def sees_a_gpu(job) -> Outcome:
    return Outcome(line=os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
