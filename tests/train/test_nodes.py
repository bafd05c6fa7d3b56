"""Several machines: two torchrun agents on this one, which meet as machines would.

Not covered: a network between them, and folders that they do not share.
"""

import os
import subprocess

import pytest

from moe_upgrpo.store import read_config, read_metrics, read_tokens
from tests.ranks import host_store
from tests.train.test_launch import GROUP, PROMPTS, ROOT, SCRIPT, TORCHRUN, options


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


def bash(tmp_path, **environment) -> subprocess.CompletedProcess:
    """What the script would start: a command of ours that prints its arguments."""
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
