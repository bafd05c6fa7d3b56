"""Which runs are made, resumed, kept and counted. The jobs here are stand-ins that leave a run
folder in no time; `test_a_whole_comparison` (slow) trains."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from moe_upgrpo.compare import data, run
from moe_upgrpo.compare.plan import from_values
from moe_upgrpo.errors import UserError
from tests.ranks import run_command

VALUES = {
    "name": "one",
    "question": "?",
    "base": {"steps": 2, "prompts": 8, "model": "/somewhere/model"},
    "arms": {"a": {"loss": "grpo"}, "b": {"loss": "up-grpo"}},
    "seeds": [0, 1],
    "contrasts": [["b", "a"]],
}

# argv: --config FILE --output-dir DIR. pass@1 is seed + step / 10; the arm b with seed 1 may fail.
JOB = """
import json, os, pathlib, signal, sys, time, yaml
options = yaml.safe_load(open(sys.argv[2]))
out = pathlib.Path(sys.argv[4]); out.mkdir(parents=True)
mode = os.environ.get("MODE", "") if (options["loss"], options["seed"]) == ("up-grpo", 1) else ""
lr = options.get("optimizer", {"lr": 1e-4})["lr"]
(out / "config.json").write_text(json.dumps(
    {"model": "/somewhere/model", "steps": options["steps"], "optimizer": {"lr": lr}}))
(out / "env.json").write_text(json.dumps({"argv": ["/a/b"], "python": "3"}))
if mode == "hangs":
    (out.parent / "pid").write_text(str(os.getpid())); time.sleep(60)
steps = {"": 3, "crash": 2, "setup": 1, "killed": 2}[mode]
rows = [{"step": s, "eval/pass@1": options["seed"] + s / 10, "alarms": [], "list": [1.0, 2.0],
         "reward/correct_rate": lr * s}
        for s in range(steps)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(out / "checkpoints").mkdir()
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode:
    print("noise"); print("error: the weights are not finite"); sys.exit(1)
"""


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Starts stand-ins, and says which."""
    script, started = tmp_path / "job.py", []
    script.write_text(JOB)

    def command(nproc, what):
        started.append(Path(what[-1]).name)
        return [sys.executable, str(script), *what]

    monkeypatch.setattr(run, "_command", command)
    return started


def do(folder, values=VALUES):
    said = []
    run.compare(from_values(values), folder, parallel=2, say=said.append)
    return said


def test_runs_are_kept_and_not_repeated(jobs, tmp_path):
    folder = tmp_path / "out"
    do(folder)
    assert sorted(jobs) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    kept = {(r.about.arm, r.about.seed): r for r in data.read_all(folder)}
    assert kept["b", 1].series("eval/pass@1") == ([0, 1, 2], [1.0, 1.1, 1.2])
    assert kept["b", 1].rows[2]["list"] == [1.0, 2.0] and "alarms" not in kept["b", 1].rows[0]
    about = kept["b", 1].about
    assert (about.status, about.steps, about.lr) == ("finished", 2, 1e-4) and about.seconds > 0
    assert about.config["model"] == "model" and "argv" not in about.environment  # no paths
    assert not (folder / "runs/b-seed1/checkpoints").exists()
    jobs.clear()
    (folder / "data/a-seed1.parquet").unlink()
    do(folder)
    assert jobs == ["a-seed1"]


def test_a_crash_counts(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "crash")
    said = do(tmp_path / "out")
    crashed = [r.about for r in data.read_all(tmp_path / "out") if r.about.status == "crashed"]
    assert [(a.arm, a.seed, a.message) for a in crashed] == [
        ("b", 1, "error: the weights are not finite")
    ]
    assert any("CRASHED at step 1" in line for line in said)


def test_a_run_that_cannot_start_stops_everything(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "setup")
    with pytest.raises(UserError, match=r"b-seed1 ended before its first step(?s:.*)not finite"):
        do(tmp_path / "out")
    assert not (tmp_path / "out/data/b-seed1.parquet").exists()


def test_a_killed_run_is_run_again(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "killed")
    with pytest.raises(UserError, match="b-seed1 was stopped"):
        do(tmp_path / "out")
    assert not (tmp_path / "out/data/b-seed1.parquet").exists()
    monkeypatch.setenv("MODE", "")
    do(tmp_path / "out")
    assert len(data.read_all(tmp_path / "out")) == 4


def test_a_run_stopped_before_its_data_were_kept_is_kept_as_finished(jobs, tmp_path):
    """Started again it would say that nothing is left to do, and count as crashed."""
    folder = tmp_path / "out"
    do(folder)
    (folder / "data/b-seed1.parquet").unlink()
    for name in ("state-000002", "step-000002"):
        (folder / "runs/b-seed1/checkpoints" / name).mkdir(parents=True)
    jobs.clear()
    do(folder)
    assert jobs == []
    about = {(r.about.arm, r.about.seed): r.about for r in data.read_all(folder)}["b", 1]
    assert (about.status, about.seconds) == ("finished", None)
    assert not (folder / "runs/b-seed1/checkpoints").exists()


def test_a_sigterm_stops_the_runs_and_the_same_command_goes_on(jobs, tmp_path, monkeypatch):
    """And while the first command is at work, a second is refused."""
    monkeypatch.setenv("MODE", "hangs")
    folder, refused = tmp_path / "out", []

    def meanwhile():
        while not (folder / "runs/pid").exists():
            time.sleep(0.05)
        refused.append(run_command("compare", config, "--output", folder))
        os.kill(os.getpid(), signal.SIGTERM)

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(VALUES))
    other = threading.Thread(target=meanwhile, daemon=True)  # waits for ever where no run starts
    other.start()
    with pytest.raises(KeyboardInterrupt):
        do(folder)
    other.join()
    assert refused[0].returncode == 2 and "Another compare is at work" in refused[0].stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "runs/pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setenv("MODE", "")
    do(folder)
    assert len(data.read_all(folder)) == 4


def test_what_was_written_down_stays(jobs, tmp_path):
    folder = tmp_path / "out"
    do(folder)
    written = (folder / "plan.json").read_text()
    with pytest.raises(UserError, match="whose seeds, confidence differ"):
        do(folder, VALUES | {"seeds": [0, 1, 2], "confidence": 0.9})
    assert (folder / "plan.json").read_text() == written
    assert json.loads(written)["plan"]["contrasts"] == [["b", "a"]]


def test_learning_rates_by_hand(jobs, tmp_path):
    """Reward is lr · step in the stand-ins: the last half of 2 steps is step 2, and 3e-4 wins."""
    rates = {"values": [1e-4, 3e-4, 2e-4], "seeds": [7, 8], "steps": 2}
    do(tmp_path / "out", VALUES | {"learning_rates": rates})
    found = json.loads((tmp_path / "out/learning_rates.json").read_text())
    assert {arm: f["chosen"] for arm, f in found.items()} == {"a": 3e-4, "b": 3e-4}
    scores = {s["lr"]: s["by_seed"] for s in found["a"]["scores"]}
    assert scores[1e-4] == pytest.approx([2e-4, 2e-4])
    assert {r.about.lr for r in data.read_all(tmp_path / "out")} == {3e-4}
    assert len(data.read_all(tmp_path / "out", tuning=True)) == 12


def test_a_metric_that_is_not_measured_chooses_nothing(jobs, tmp_path):
    rates = {"values": [1e-4, 3e-4], "seeds": [7], "steps": 2, "metric": "reward/none"}
    with pytest.raises(UserError, match="'reward/none' is in none of the runs' metrics"):
        do(tmp_path / "out", VALUES | {"learning_rates": rates})
    assert not (tmp_path / "out/learning_rates.json").exists()


def test_foreign_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UserError, match="has no finished run"):
        data.read_all(tmp_path)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"step": [1]}), tmp_path / "data/x.parquet")
    with pytest.raises(UserError, match="is not a run of a comparison"):
        data.read_all(tmp_path)


@pytest.mark.slow
def test_a_whole_comparison(tmp_path):
    """Two arms with two seeds train; at one optimizer step a batch UP-GRPO is GRPO: the kept
    metrics are the same."""
    small = {"digits": 1, "warm_start": {"probe_problems": 64}, "tiny": {"layers": 2, "hidden": 64},
             "steps": 2, "prompts": 8, "group": 4, "minibatches": 1, "eval_every": 1,
             "cache_dir": str(tmp_path / "cache"), "token_log": "aggregate"}  # fmt: skip
    do(tmp_path / "out", VALUES | {"base": small})
    kept = {(r.about.arm, r.about.seed): r for r in data.read_all(tmp_path / "out")}
    for seed in (0, 1):
        a, b = (kept[arm, seed].series("eval/pass@1") for arm in "ab")
        assert a == b and len(a[0]) == 3
    assert kept["a", 0].series("reward/mean") != kept["a", 1].series("reward/mean")
