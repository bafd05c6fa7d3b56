"""The status of an error by its kind: errors that the system, torch and gloo raise themselves."""

import errno
import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from moe_upgrpo.errors import (
    MachineFault,
    NumericalFailure,
    UserError,
    as_user_error,
    machine_fault,
    status_of,
)
from tests.ranks import run_ranks


def raised(function) -> BaseException:
    with pytest.raises(BaseException) as info:
        function()
    return info.value


def too_many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        while True:
            opened.append(open(os.devnull))  # noqa: SIM115
    finally:
        for file in opened:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def full_disk():
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def refused_for(fault):
    """As readers do: the system's error becomes one line, and is hidden."""
    try:
        fault()
    except OSError as error:
        raise UserError(f"cannot be read: {error}") from None


def of_a_damaged_file():
    try:
        raise MemoryError
    except MemoryError:
        raise UserError("it is damaged") from None


def of_a_lock():
    try:
        raise BlockingIOError(errno.EAGAIN, "locked")
    except BlockingIOError:
        raise UserError("another job is writing") from None


FAULTS = [
    (full_disk, 4, "no space"),
    (too_many_files, 4, "too many files"),
    (lambda: refused_for(full_disk), 4, "no space"),
    (lambda: refused_for(too_many_files), 4, "too many files"),
    (lambda: torch.empty(1 << 55, dtype=torch.uint8), 4, "out of memory"),
    (lambda: bytearray(1 << 62), 4, "out of memory"),
    (lambda: refused_for(Path("/nowhere/at/all").read_text), 2, None),
    (of_a_damaged_file, 2, None),
    (of_a_lock, 2, None),
    (Path("/nowhere/at/all").read_text, 1, None),
    (lambda: {}["x"], 1, None),
    (lambda: torch.zeros(2) @ torch.zeros(3), 1, None),
]


@pytest.mark.fault(
    "How a command ends",
    "a fault of the machine inside of another error",
    "status 4, whatever it was turned into on the way",
)
@pytest.mark.parametrize(("function", "status", "what"), FAULTS)
def test_status_of_what_is_raised(function, status, what):
    error = raised(function)
    assert status_of(error) == status, repr(error)
    assert (what is None) == (machine_fault(error) is None)
    assert what is None or what in machine_fault(error)


class OutOfMemoryError(RuntimeError):
    """By its name as torch's, which a machine without GPU does not raise."""


class DistNetworkError(RuntimeError):
    pass


MADE = [
    (OSError(errno.EDQUOT, "x"), 4),
    (OSError(errno.EFBIG, "x"), 4),
    (OSError(errno.ENFILE, "x"), 4),
    (OSError(errno.ENOMEM, "x"), 4),
    (OSError(errno.EACCES, "x"), 1),
    (OutOfMemoryError("no room"), 4),
    (torch.OutOfMemoryError("no room"), 4),
    (RuntimeError("CUDA error: out of memory"), 4),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 4),
    (RuntimeError("can't start new thread"), 4),
    (SafetensorError('IoError(Os { code: 28, message: "No space left on device" })'), 4),
    (BrokenProcessPool("A process in the process pool was terminated abruptly"), 4),
    (DistNetworkError("The client socket has timed out"), 4),
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error: reset"), 4),
    (RuntimeError("NCCL error: remote process exited or there was a network error"), 4),
    (RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] length <= nbytes. 8 vs 4"), 1),
    (ConnectionResetError(errno.ECONNRESET, "reset"), 4),
    (OSError(errno.EHOSTUNREACH, "no route"), 4),
    (BrokenPipeError(errno.EPIPE, "broken pipe"), 1),  # of `| head`
    (KeyboardInterrupt(), 130),
    (UserError("no"), 2),
    (NumericalFailure("nan"), 3),
    (MachineFault("gone"), 4),
]


@pytest.mark.parametrize(("error", "status"), MADE, ids=[repr(e)[:50] for e, _ in MADE])
def test_status_by_class_number_and_words(error, status):
    assert status_of(error) == status


def of_lost_ranks(seconds: float):
    """Rank 1 goes without a word; rank 0's errors in a collective, a waited one, one of objects."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    dist.all_reduce(torch.zeros(1))
    if dist.get_rank() == 1:
        return []
    found = []
    for call in (
        lambda: dist.all_reduce(torch.zeros(1)),
        lambda: dist.all_reduce(torch.zeros(1), async_op=True).wait(),
        lambda: dist.all_gather_object([None, None], {"a": 1}),
    ):
        try:
            call()
        except RuntimeError as error:
            found.append((status_of(error), machine_fault(error), str(error)))
    return found


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a rank goes without a word, whatever the transport says of it",
    "the others end with status 4",
)
def test_a_lost_rank_by_gloos_own_words():
    lost, _ = run_ranks(2, of_lost_ranks, 5.0)
    assert len(lost) == 3
    for status, what, said in lost:
        assert (status, what) == (4, "lost another rank or host"), said


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "rank 0's machine fails while it acts for all ranks",
    "every rank ends with the kind of its error",
)
def test_the_kind_survives_the_way_to_other_ranks():
    """Told by pickle, an error loses what it was raised for."""
    for function in (full_disk, lambda: refused_for(too_many_files)):
        told = pickle.loads(pickle.dumps(as_user_error(raised(function))))
        assert (type(told), told.status) == (MachineFault, 4)
    for given in (NumericalFailure("nan"), UserError("no")):
        told = pickle.loads(pickle.dumps(as_user_error(given)))
        assert (type(told), str(told)) == (type(given), str(given))
    assert type(as_user_error(KeyError("x"))) is UserError


def test_it_needs_no_torch():
    code = "import sys, moe_upgrpo.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", code]).returncode == 0
