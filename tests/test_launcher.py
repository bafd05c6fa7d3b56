"""The failure that the launcher speaks of, and its options; with ranks: train/test_launch.py."""

import signal
from types import SimpleNamespace

import pytest

from moe_upgrpo import ending, launch
from moe_upgrpo.errors import MachineFault, UserError, status_of


def told(message: str, *, status: int = 2, lost: bool = False, time: float = 0.0) -> dict:
    return {"message": message, "status": status, "lost": lost, "time": time}


def ended(**exitcodes: int) -> Exception:
    """The agent's report of ranks that ended so."""
    error = RuntimeError("the agent's own words")
    error.failures = {
        int(rank.removeprefix("rank")): SimpleNamespace(exitcode=code)
        for rank, code in exitcodes.items()
    }
    return error


def cause(failure: BaseException, *messages: dict, folder) -> tuple[str, int]:
    error = launch._cause(failure, list(messages), folder)
    assert isinstance(error, UserError)
    return str(error), status_of(error)


def test_a_rank_with_a_cause_of_its_own_comes_before_those_that_lost_it(tmp_path):
    """Even where the others spoke first."""
    lost = told("rank 0 lost rank 1", status=4, lost=True, time=1.0)
    own = told("the log-prob is NaN", status=3, time=2.0)
    assert cause(ended(rank0=4, rank1=3), lost, own, folder=tmp_path) == (own["message"], 3)


def test_of_two_causes_the_first_is_said(tmp_path):
    first, second = told("first", time=1.0), told("second", status=3, time=2.0)
    assert cause(ended(rank0=2, rank1=3), second, first, folder=tmp_path) == ("first", 2)


def test_a_killed_rank_comes_before_those_that_lost_it(tmp_path):
    (tmp_path / "run").write_text("runs/mine")
    lost = told("rank 0 lost rank 1", status=4, lost=True)
    message, status = cause(ended(rank0=4, rank1=-signal.SIGKILL), lost, folder=tmp_path)
    assert status == MachineFault.status
    assert message.startswith("rank 1 was ended by SIGKILL (by hand, or by the kernel for lack")
    assert message.endswith("to go on: --resume runs/mine")


def test_a_rank_that_another_signal_ended_is_not_put_down_to_memory(tmp_path):
    message, status = cause(ended(rank0=-signal.SIGSEGV), folder=tmp_path)
    assert (message.split(".")[0], status) == ("rank 0 was ended by SIGSEGV", 4)


def test_a_loss_alone_is_said_with_its_status(tmp_path):
    """The rank that was lost is another host's."""
    lost = told("host a does not answer", status=4, lost=True)
    assert cause(ended(rank0=4), lost, folder=tmp_path) == (lost["message"], 4)


def test_a_rank_that_ended_before_it_could_speak(tmp_path):
    message, status = cause(ended(rank1=1), folder=tmp_path)
    assert message.startswith("rank 1 ended with status 1, as is said above. No run folder")
    assert status == 1


def test_what_the_agent_itself_refuses(tmp_path):
    assert cause(UserError("options before --: no"), folder=tmp_path) == (
        "options before --: no",
        2,
    )
    message, status = cause(RuntimeError("address in use\nmore"), folder=tmp_path)
    assert "RuntimeError: address in use. " in message and status == 4


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], 1),
        (["--nproc-per-node", "4"], 4),
        (["--nproc_per_node=4", "--nnodes=2"], 8),
        (["--nnodes", "2", "--nproc-per-node", "gpu"], None),
        (["--nnodes", "1:4", "--nproc-per-node", "2"], None),
    ],
)
def test_the_number_of_ranks_that_its_options_name(words, size):
    assert launch.world_size(words) == size


@pytest.mark.parametrize(
    ("words", "backend", "endpoint", "port"),
    [
        ([], "c10d", "localhost:0", 29500),
        (["--nnodes", "1"], "c10d", "localhost:0", 29500),
        (["--master-port", "1234"], "static", "", 1234),
        (["--rdzv-endpoint", "a:1"], "static", "a:1", 29500),
        (["--nnodes", "2", "--node-rank", "1", "--master-addr", "a"], "static", "", 29500),
        (["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "a:1"], "c10d", "a:1",
         29500),
    ],
)  # fmt: skip
def test_where_ranks_meet(words, backend, endpoint, port, monkeypatch):
    """Those of one machine at any free port: another job may have torchrun's 29500."""
    monkeypatch.setenv(ending.LAUNCHER, "/tmp/of-this-job")
    found = launch._arguments([*words, "--nproc-per-node", "2", "-m", "moe_upgrpo", "train"])
    assert (found.rdzv_backend, found.rdzv_endpoint, found.master_port) == (backend, endpoint, port)


def test_options_that_torchrun_does_not_know():
    with pytest.raises(UserError, match=r"options before --: .*--nodes.*torchrun --help lists"):
        launch._arguments(["--nodes", "2", "-m", "x"])


def test_words_are_split_once():
    assert launch.split(["--nnodes", "1", "--", "--a", "--"]) == (["--nnodes", "1"], ["--a", "--"])
    with pytest.raises(UserError, match="no -- was given"):
        launch.split(["--loss", "grpo"])
