"""Which runs are made, resumed, kept and counted. The jobs here are stand-ins that leave a run
folder in no time; `test_a_whole_comparison` (slow) trains."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from moe_upgrpo.compare import data, report, run
from moe_upgrpo.compare.outcome import Outcome, outcome
from moe_upgrpo.compare.plan import from_values
from moe_upgrpo.errors import MachineFault, UserError, status_of
from tests.ranks import run_command

VALUES = {
    "name": "one",
    "question": "?",
    "base": {"steps": 2, "prompts": 8, "model": "/somewhere/model"},
    "arms": {"a": {"loss": "grpo"}, "b": {"loss": "up-grpo"}},
    "seeds": [0, 1],
    "contrasts": [["b", "a"]],
}

# argv: --config FILE --output-dir DIR or --resume DIR. pass@1 is seed + step / 10; the arm b with
# seed 1 may fail: MODE has how, of one try after the other.
JOB = """
import json, os, pathlib, signal, sys, time, yaml
out = pathlib.Path(sys.argv[-1]); out.mkdir(parents=True, exist_ok=True)
options = yaml.safe_load((out.parents[1] / "logs" / (out.name + ".yaml")).read_text())
modes = os.environ.get("MODE", "").split(",")
tries = out.parent / (out.name + ".tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
mode = modes[min(len(tries.read_text()), len(modes)) - 1]
mode = mode if (options["loss"], options["seed"]) == ("up-grpo", 1) else ""
lr = options.get("optimizer", {"lr": 1e-4})["lr"]
(out / "config.json").write_text(json.dumps(
    {"model": "/somewhere/model", "steps": options["steps"], "eval_every": 1,
     "optimizer": {"lr": lr}}))
(out / "env.json").write_text(json.dumps({"argv": ["/a/b"], "python": "3"}))
if mode == "hangs":
    (out.parent / "pid").write_text(str(os.getpid())); time.sleep(60)
kind, _, steps = mode.partition("@")
steps = int(steps or 3)
rows = [{"step": s, "eval/pass@1": options["seed"] + s / 10, "alarms": [], "list": [1.0, 2.0],
         "reward/correct_rate": lr * s}
        for s in range(steps)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(out / "checkpoints").mkdir(exist_ok=True)
if steps > 1:
    state = out / "checkpoints" / f"state-{steps - 1:06d}"
    state.mkdir(exist_ok=True)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind.isdigit():     # as the launcher ends, with the status of the rank that failed first
    print("noise"); print("error: the reason"); sys.exit(int(kind))
"""


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Starts stand-ins, and says which."""
    script, started = tmp_path / "job.py", []
    script.write_text(JOB)

    def command(nproc, what):
        started.append(Path(what[-1]).name + (" --resume" if "--resume" in what else ""))
        return [sys.executable, str(script), *what]

    monkeypatch.setattr(run, "_command", command)
    monkeypatch.setattr(run, "PAUSE_S", 0)
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


@pytest.mark.fault(
    "Comparisons",
    "a run's own numbers fail",
    "crashed, which counts",
)
def test_a_numerical_failure_counts(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "3@2")
    said = do(tmp_path / "out")
    crashed = [r.about for r in data.read_all(tmp_path / "out") if r.about.status == "crashed"]
    assert [(a.arm, a.seed, a.message) for a in crashed] == [("b", 1, "error: the reason")]
    assert any("CRASHED at step 1" in line for line in said)
    assert len(jobs) == 4 and not (tmp_path / "out/runs/b-seed1/checkpoints").exists()


@pytest.mark.fault(
    "Comparisons",
    "a run is refused, or fails by a fault of ours",
    "the comparison stops with the message",
)
@pytest.mark.parametrize("mode", ["2@2", "2@1", "1@2", "3@0"])
def test_a_refused_run_stops_everything(mode, jobs, tmp_path, monkeypatch):
    """Wrong use, a fault of ours, and numbers that fail before there is anything to keep."""
    monkeypatch.setenv("MODE", mode)
    with pytest.raises(UserError, match=r"b-seed1 ended (at step|before its first)(?s:.*)reason"):
        do(tmp_path / "out")
    assert not (tmp_path / "out/data/b-seed1.parquet").exists()
    assert jobs.count("b-seed1") == 1


@pytest.mark.fault(
    "Comparisons",
    "a run's machine fails: disk, memory, files, a lost rank, killed without a word, interrupted",
    "run again from its newest checkpoint; it counts as any other",
)
@pytest.mark.parametrize("fault", ["4", "killed", "130", "143"])
def test_what_the_machine_failed_goes_on_from_its_checkpoint(fault, jobs, tmp_path, monkeypatch):
    """And counts as any other: of two arms that train alike the contrast stays what it is."""
    monkeypatch.setenv("MODE", f"{fault}@2,{fault}@3,@3")
    said = do(tmp_path / "out")
    assert jobs.count("b-seed1") == 1 and jobs.count("b-seed1 --resume") == 2 and len(jobs) == 6
    kept = {(r.about.arm, r.about.seed): r for r in data.read_all(tmp_path / "out")}
    assert {r.about.status for r in kept.values()} == {"finished"} and len(kept) == 4
    assert kept["b", 1].series("eval/pass@1") == kept["a", 1].series("eval/pass@1")
    assert any("NOT RUN, its machine failed" in line for line in said)
    assert any("1 again, as their machine failed: try 3 of 3" in line for line in said)
    log = (tmp_path / "out/logs/b-seed1.log").read_text()
    assert log.count("error: the reason") == (2 if fault.isdigit() else 0)  # of all tries


@pytest.mark.fault(
    "Comparisons",
    "it does so three times",
    "“not run: machine”, missing in the report, status 4; the same command goes on",
)
def test_what_the_machine_fails_each_time_is_not_run(jobs, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(VALUES))
    monkeypatch.setenv("MODE", "4@2")
    left = run.compare(from_values(VALUES), folder, parallel=2, say=lambda line: None)
    assert left.startswith("1 of 4 runs not run: machine, 3 tries each: b-seed1.")
    assert "the reason" in left and len(jobs) == 6
    assert len(data.read_all(folder)) == 3 and not (folder / "data/b-seed1.parquet").exists()
    assert list((folder / "runs/b-seed1/checkpoints").iterdir())
    progress = report.numbers(report.load(folder))["progress"]
    assert (progress["crashed"], progress["missing"]) == (0, ["b, seed 1 (not run: machine)"])
    monkeypatch.setenv("MODE", "")
    assert run.compare(from_values(VALUES), folder, parallel=2, say=lambda line: None) is None
    assert jobs[6:] == ["b-seed1 --resume"] and len(data.read_all(folder)) == 4
    assert report.numbers(report.load(folder))["progress"]["missing"] == []
    assert not (folder / "not_run.json").exists()


def test_learning_rates_wait_for_what_was_not_run(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "4@2")
    rates = {"values": [1e-4, 3e-4], "seeds": [1], "steps": 2}
    with pytest.raises(MachineFault, match=r"2 of 4 runs not run(?s:.*)choose the learning rates"):
        do(tmp_path / "out", VALUES | {"seeds": [5, 6], "learning_rates": rates})
    assert not (tmp_path / "out/learning_rates.json").exists()


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


@pytest.mark.fault(
    "Comparisons",
    "SIGTERM to a comparison",
    "its runs end; the same command goes on",
)
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
    with pytest.raises(KeyboardInterrupt) as ended:
        do(folder)
    assert status_of(ended.value) == 143
    other.join()
    assert refused[0].returncode == 2 and "Another compare is at work" in refused[0].stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "runs/pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setenv("MODE", "")
    do(folder)
    assert len(data.read_all(folder)) == 4


@pytest.mark.fault(
    "Comparisons",
    "a comparison is killed (SIGKILL)",
    "its runs end too; the same command goes on",
)
def test_the_runs_of_a_comparison_that_is_killed_end_too(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "hangs")
    folder = tmp_path / "out"
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            do(folder)
        os._exit(1)
    noted = folder / "runs/pid"
    while not noted.exists() or not noted.read_text():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    job, until = Path("/proc", noted.read_text(), "stat"), time.monotonic() + 20
    while job.exists() and ") Z " not in job.read_text():
        assert time.monotonic() < until, "the job goes on"
        time.sleep(0.05)
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


def test_a_job_that_is_refused_says_so_by_its_status(tmp_path):
    """The launcher itself."""
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs/a.log"
    log.write_text("error: of the try before\n")
    what = ["--output-dir", str(tmp_path / "run"), "--prompts", "7", "--minibatches", "2"]
    ended = run._start(2, what, log, None, {})
    assert (ended.status, ended.crashed, ended.of_machine) == (2, False, False)
    assert ended.message.startswith("error: prompts=7") and "\n" not in ended.message


@pytest.mark.parametrize(
    ("status", "said", "kind", "message"),
    [
        (0, "error: of a library", 0, ""),
        (
            3,
            "step 1\nerror: one\nmore\nerror: the last\nof two lines",
            3,
            "error: the last\nof two lines",
        ),
        (-9, "step 1\nstep 2", 4, "step 1\nstep 2"),
        (143, "error: stopped by SIGTERM", 4, "error: stopped by SIGTERM"),
        (77, "", 4, ""),
    ],
)
def test_how_a_job_ended(status, said, kind, message):
    assert outcome(status, said) == Outcome(kind, message)
