"""Several machines: two agents on this one, which meet as machines would.

Not covered: folders that they do not share.
"""

import os
import subprocess
import time

import pytest

from moe_upgrpo.store import read_config, read_metrics, read_tokens, rows_so_far
from tests.ranks import host_store
from tests.train.test_launch import GROUP, OURS, PROMPTS, ROOT, SCRIPT, TORCHRUN, options


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


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


@pytest.fixture
def two_hosts():
    """Two network namespaces with a link between them; their names, and that of the link's ends."""
    me = f"moe{os.getpid()}"
    names, ends = [f"{me}a", f"{me}b"], [f"v{os.getpid()}a", f"v{os.getpid()}b"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
        yield names, ends
    except OSError as error:
        pytest.skip(f"this machine allows no network namespaces: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "the link between two hosts is cut",
    "both hosts say which rank is gone and end within 90 s of `--timeout`",
)
@pytest.mark.slow
def test_a_link_that_is_cut_ends_both_hosts_with_names(two_hosts, cache, tmp_path):
    """Every rank ends within 90 s of the limit, here 6 s, and says which host fell silent."""
    names, ends = two_hosts
    folder = tmp_path / "run"
    words = options(folder, cache, "--steps", "100000", "--eval-every", "100000")
    words = [*words, "--timeout", "0.1", "--save-every", "100000"]
    jobs = []
    for number, (name, end) in enumerate(zip(names, ends, strict=True)):
        environment = {
            **{"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "10.77.0.1", "NPROC": "1"},
            **{"GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1", "MOE_UPGRPO": str(OURS)},
        }
        jobs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, "bash", SCRIPT, *words],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        deadline = time.monotonic() + 200
        while len(rows_so_far(folder)) < 3:
            assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline
            time.sleep(0.2)
        ip("-n", names[0], "link", "set", ends[0], "down")
        cut = time.monotonic()
        said = [job.communicate(timeout=150)[1] for job in jobs]
        assert time.monotonic() - cut < 6 + 90
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [4, 4], said
    last = [text.splitlines()[-1] for text in said]
    assert last[0].startswith("error: rank 1 (host "), said
    # The other host misses the store at rank 0's address or rank 0's sign of life, whichever first.
    store = last[1].startswith("error: rank 1 (host ") and "10.77.0.1:29500" in last[1]
    assert store or last[1].startswith("error: rank 0 (host "), said
    for text, line in zip(said, last, strict=True):
        assert line.endswith(f"--resume {folder}") and "Traceback" not in text, said


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
