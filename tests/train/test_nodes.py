"""Several machines: two agents on this one, and hosts in network namespaces (tests/hosts.py).

Not covered: real networks, their packet loss and their clocks.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo.store import read_config, read_metrics, read_tokens, rows_so_far
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.hosts import Host, NoNamespaces, hosts
from tests.ranks import host_store
from tests.rollout.stand_in_server import LIMIT_S
from tests.train.test_launch import GROUP, OURS, PROMPTS, ROOT, SCRIPT, TORCHRUN, job, options


@pytest.mark.slow
def test_two_agents_make_one_run_in_one_folder(tmp_path, cache):
    agents = []
    words = options(tmp_path / "run", cache, "--steps", "2", "--track", "tensorboard", "wandb")
    store = host_store()  # by the test: a port that the agents open later may be another's by then
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{store.port}")
    rendezvous = (*rendezvous, "--rdzv-conf", "is_host=false")
    for _ in range(2):
        command = (TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *rendezvous, SCRIPT, *words)
        agents.append(
            subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum(output.count("\nstep ") for output in outputs) == 2  # rank 0 alone speaks
    config = read_config(tmp_path / "run")
    assert (config["world_size"], config["layout"]) == (2, "TP2·EP2")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    sequences = read_tokens(tmp_path / "run", steps=[2])["sequence"].to_numpy()
    assert set(sequences) == set(range(PROMPTS * GROUP))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


@pytest.fixture
def some_hosts():
    """`hosts`, or the reason for there being none."""

    @contextmanager
    def start(*given, **named):
        try:
            with hosts(*given, **named) as found:
                yield found
        except NoNamespaces as error:
            pytest.skip(f"no network namespaces here: {error}")

    return start


@contextmanager
def job_on(machines: list[Host], *words: object) -> Iterator[list[subprocess.Popen]]:
    """The same command on each host, one rank each, as bash starts it."""
    common = {"NNODES": str(len(machines)), "MASTER_ADDR": machines[0].address, "NPROC": "1"}
    agents = [
        host.popen(["bash", SCRIPT, *words], **common, NODE_RANK=str(number), MOE_UPGRPO=str(OURS))
        for number, host in enumerate(machines)
    ]
    try:
        yield agents
    finally:
        for host in machines:
            host.kill()


def ends(agents: list[subprocess.Popen], within_s: float) -> list[str]:
    """Wait until all have ended; what each said."""
    deadline = time.monotonic() + within_s
    return [agent.communicate(timeout=max(deadline - time.monotonic(), 1))[1] for agent in agents]


def until_rows(folder: Path, agents: list[subprocess.Popen], rows: int = 3) -> None:
    """Wait until the job has logged so much."""
    deadline = time.monotonic() + 200
    while len(rows_so_far(folder)) < rows:
        assert all(agent.poll() is None for agent in agents) and time.monotonic() < deadline
        time.sleep(0.2)


def saved_model(folder: Path) -> Path:
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(tiny_model_config(layers=1, hidden=32)).save_pretrained(folder)
    arithmetic.save_tokenizer(folder)
    return folder


ENDLESS = ("--steps", "100000", "--eval-every", "100000", "--save-every", "100000")


@pytest.mark.slow
def test_two_hosts_make_the_run_of_one(some_hosts, cache, tmp_path):
    """The same numbers to the last bit, and the same rows, whatever lies between two ranks."""
    words = options(tmp_path / "one", cache, "--steps", "2")
    one = job(2, *words)
    assert one.returncode == 0, one.stderr
    words[1] = str(tmp_path / "two")
    with some_hosts(2) as machines, job_on(machines, *words) as agents:
        said = ends(agents, 120)
    assert [agent.returncode for agent in agents] == [0, 0], said
    runs = tmp_path / "one", tmp_path / "two"
    rows, expected = (
        [
            {k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
            for row in read_metrics(run)
        ]
        for run in runs
    )
    assert rows == expected and [row["step"] for row in rows] == [0, 1, 2]
    first, second = map(read_tokens, runs)
    assert first.equals(second)


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "the link between two hosts is cut",
    "both hosts say which rank is gone and end within 90 s of `--timeout`",
)
@pytest.mark.slow
def test_a_link_that_is_cut_ends_both_hosts_with_names(some_hosts, cache, tmp_path):
    """Every rank ends within 90 s of the limit, here 6 s, and says which host fell silent."""
    folder = tmp_path / "run"
    words = options(folder, cache, *ENDLESS, "--timeout", "0.1")
    with some_hosts(2) as machines, job_on(machines, *words) as agents:
        until_rows(folder, agents)
        machines[1].cut()
        said = ends(agents, 6 + 90)
    assert [agent.returncode for agent in agents] == [4, 4], said
    last = [text.splitlines()[-1] for text in said]
    assert last[0].startswith(f"error: rank 1 (host {machines[1].name}, process "), said
    # The other host misses the store at rank 0's address or rank 0's sign of life, whichever first.
    store = last[1].startswith(f"error: rank 1 (host {machines[1].name})")
    store = store and f"{machines[0].address}:29500" in last[1]
    assert store or last[1].startswith(f"error: rank 0 (host {machines[0].name}, process "), said
    for text, line in zip(said, last, strict=True):
        assert line.endswith(f"--resume {folder}") and text.count("error: ") == 1, said
        assert "Traceback" not in text, said


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a host is gone with all its processes",
    "the other names its rank and ends with status 4, also where it was rank 0's",
)
@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_that_is_gone_is_named(gone, some_hosts, cache, tmp_path):
    folder = tmp_path / "run"
    words = options(folder, cache, *ENDLESS, "--timeout", "0.1")
    with some_hosts(2) as machines, job_on(machines, *words) as agents:
        until_rows(folder, agents)
        machines[gone].kill()
        said = ends(agents, 6 + 90)
    assert agents[gone].returncode == -9 and agents[1 - gone].returncode == 4, said
    last = said[1 - gone].splitlines()[-1]
    assert f"rank {gone} (host {machines[gone].name}, process " in last, said
    assert last.endswith(f"--resume {folder}") and "Traceback" not in said[1 - gone], said
    assert said[1 - gone].count("error: ") == 1, said


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "the link to a host with an engine's server is cut while it generates",
    "each rank that waits ends, and names the server, after the engine's limit (60 s)",
)
@pytest.mark.slow
def test_the_link_to_a_server_on_a_third_host_is_cut(some_hosts, cache, tmp_path):
    """A stand-in for the server, SGLang's client; two ranks' hosts and a limit of 4 s."""
    model = saved_model(tmp_path / "model")
    module = (sys.executable, "-m", "tests.rollout.stand_in_server")
    with some_hosts(3) as machines:
        url = f"http://{machines[2].address}:8000"
        server = machines[2].popen([*module, "serve", 8000])
        assert server.stderr.readline() == "serving\n"
        asking = [host.popen([*module, "ask", url, model]) for host in machines[:2]]
        for _ in asking:
            assert server.stderr.readline() == "asked\n"
        machines[2].cut()
        cut = time.monotonic()
        said = ends(asking, 60)
        assert LIMIT_S <= time.monotonic() - cut < LIMIT_S + 30
    assert [process.returncode for process in asking] == [1, 1]
    gone = f"error: SGLang at {url} has given no sign of life for {LIMIT_S:g} s"
    for text in said:
        assert text.splitlines()[-1].startswith(gone) and "Traceback" not in text, said


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "hosts share no folder",
    "rank 0's host writes, the others send; what needs one is refused, with the host, at the start",
)
@pytest.mark.slow
def test_hosts_without_a_common_folder(some_hosts, cache, tmp_path):
    """Data-parallel, so that each rank has rows. With states it is refused before anything runs."""
    folder, own = tmp_path / "run", [tmp_path / "a", tmp_path / "b"]
    for path in (folder, *own):
        path.mkdir()
    words = options(folder, cache, "--steps", "2", "--tp", "1")
    with some_hosts(2, own=[{folder: mine} for mine in own]) as machines:
        with job_on(machines, *words) as agents:
            refused = ends(agents, 120)
        assert [agent.returncode for agent in agents] == [2, 2], refused
        for said in refused:
            assert f"host {machines[1].name} (rank 1): no such folder as rank 0's {folder}" in said
            assert "--save-every" in said and said.count("error: ") == 1
        assert not any(list(mine.iterdir()) for mine in own)
        with job_on(machines, *words, "--save-every", "0") as agents:
            said = ends(agents, 120)
        assert [agent.returncode for agent in agents] == [0, 0], said
    assert not list(own[1].rglob("*.*")) and not list(folder.iterdir())
    assert [row["step"] for row in read_metrics(own[0])] == [0, 1, 2]
    for row in read_metrics(own[0])[1:]:
        tokens = read_tokens(own[0], steps=[row["step"]])
        assert set(tokens["sequence"].to_numpy()) == set(range(PROMPTS * GROUP))
        assert len(tokens) == row["tokens/sampled"]


def bash(tmp_path, **environment) -> subprocess.CompletedProcess:
    """Show what the script would start: a command of ours that prints its arguments."""
    fake = tmp_path / "bin" / "moe-upgrpo"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    script = tmp_path / "examples" / "train_moe.sh"  # elsewhere: there is no .venv beside it
    script.parent.mkdir(exist_ok=True)
    script.write_text((ROOT / SCRIPT).read_text())
    path = f"{fake.parent}:{os.environ['PATH']}"
    ours = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MOE_UPGRPO")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        ["bash", str(script), "--steps", "3"],
        env=kept | {"PATH": path, "NPROC": "4"} | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ""),
        ({"NNODES": "1", "MASTER_ADDR": "node-1"}, ""),
        (
            {"NNODES": "2", "MASTER_ADDR": "node-1"},
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node-1:29500 --rdzv-id moe_upgrpo ",
        ),
        (
            {"NNODES": "3", "MASTER_ADDR": "node-1", "MASTER_PORT": "7", "NODE_RANK": "2"},
            "--nnodes 3 --node-rank 2 --master-addr node-1 --master-port 7 ",
        ),
    ],
)
def test_bash_passes_the_machines_on(environment, words, tmp_path):
    result = bash(tmp_path, **environment)
    expected = f"launch {words}--nproc-per-node 4 -- --steps 3\n"
    assert result.stdout == expected, result.stderr


def test_bash_without_an_address_says_what_is_missing(tmp_path):
    result = bash(tmp_path, NNODES="2")
    assert result.returncode == 1 and "needs MASTER_ADDR" in result.stderr
