"""The run folder: what is refused, what survives a kill, what a resumed run keeps."""

import hashlib
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch

from moe_upgrpo import kernels
from moe_upgrpo.errors import UserError
from moe_upgrpo.store import (
    RunFolder,
    TokenLogWriter,
    read_config,
    read_environment,
    read_metrics,
    read_tokens,
    rows_so_far,
)
from moe_upgrpo.store.metrics import METRICS, markdown_table, metric
from tests.ranks import exit_status
from tests.store.rows import full_columns


def test_create_writes_config_and_environment(tmp_path):
    config = {"loss": "up-grpo", "sizes": (1, 2), "path": tmp_path, "dtype": torch.bfloat16}
    run = RunFolder.create(tmp_path / "a" / "run", config)
    assert read_config(run.path) == {
        "loss": "up-grpo",
        "sizes": [1, 2],
        "path": str(tmp_path),
        "dtype": "torch.bfloat16",
    }
    environment = read_environment(run.path)
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert environment["argv"] == sys.argv
    assert environment["cpu_count"] >= 1
    assert environment["cpu"] == kernels.facts() and environment["cpu"]["aten"]


def test_create_refuses_another_run(tmp_path):
    RunFolder.create(tmp_path / "run", {})
    found = r"already holds a run \(config\.json, tokens\): continue it by --resume"
    with pytest.raises(UserError, match=found):
        RunFolder.create(tmp_path / "run", {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "file", {})


def test_create_takes_an_existing_folder_without_a_run(tmp_path):
    (tmp_path / "notes.txt").touch()
    RunFolder.create(tmp_path, {})
    assert (tmp_path / "notes.txt").exists()


def test_metrics_come_back_as_written(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    run.append_metrics({"step": 0, "eval/greedy": 0.25})
    run.append_metrics(
        {
            "step": 1,
            "reward/mean": np.float32(0.5),
            "grad_norm": torch.tensor(2.0),
            "mismatch/by_layer": torch.tensor([0.25, float("nan")]),
            "ratio/max": float("inf"),
        }
    )
    assert read_metrics(run.path) == [
        {"step": 0, "eval/greedy": 0.25},
        {
            "step": 1,
            "reward/mean": 0.5,
            "grad_norm": 2.0,
            "mismatch/by_layer": [0.25, None],
            "ratio/max": None,
        },
    ]


@pytest.mark.parametrize("step", [None, -1, 1.0, True, "1"])
def test_a_row_needs_its_step(tmp_path, step):
    run = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(UserError, match='needs an integer "step"'):
        run.append_metrics({"step": step})


def append_three_rows(path):
    run = RunFolder.create(path, {})
    for step in range(3):
        run.append_metrics({"step": step})
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_appended_survives_a_kill(tmp_path):
    """The child is killed with SIGKILL right after its third append, without any clean-up."""
    assert exit_status(append_three_rows, tmp_path / "run") == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]


def test_only_a_last_line_cut_short_is_forgiven(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_metrics(run.path)
    run.metrics_path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(run.path) == [{"step": 1}]
    run.metrics_path.write_text('{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(run.path)
    run.metrics_path.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(UserError, match='line 2 has no integer "step"'):
        read_metrics(run.path)
    run.metrics_path.write_text('{"st')
    with pytest.raises(UserError, match="is empty: no step"):
        read_metrics(run.path)


def test_config_of_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_config(tmp_path)


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    """Killed in step 4 after the checkpoint of step 2: steps 3 and 4 run again, each once."""
    run = RunFolder.create(tmp_path / "run", {"seed": 1})
    writer = TokenLogWriter(run.tokens, rank=0, layer_ids=(), top_k=1, num_experts=1)
    tokens = {name: np.arange(5) for name in ("sequence", "prompt", "position", "token_id")}
    tokens |= dict.fromkeys(
        ("reward", "advantage", "logp_rollout", "logp_old", "logp_train", "ratio"), np.zeros(5)
    )
    tokens |= {"clipped": np.zeros(5, bool), "layers_mismatched": np.zeros(5, int)}
    for step in (1, 2, 3):
        writer.write(step, tokens)
        run.append_metrics({"step": step, "reward/mean": 0.5})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "rewa')
    (run.tokens / ".step-000004-rank-0000.parquet.tmp").write_bytes(b"PAR1")

    resumed = RunFolder.resume(run.path, step=2)
    for step in (3, 4):
        writer.write(step, tokens)
        resumed.append_metrics({"step": step})
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2, 3, 4]
    assert read_metrics(run.path)[0]["reward/mean"] == 0.5
    assert read_tokens(run.path)["step"].to_pylist() == [s for s in (1, 2, 3, 4) for _ in range(5)]
    assert sorted(p.name for p in run.tokens.iterdir()) == [
        f"step-00000{step}-rank-0000.parquet" for step in (1, 2, 3, 4)
    ]


def test_nothing_is_left_of_what_was_cut_short_in_the_first_row(tmp_path):
    """The row that is written next must not end a line that a killed job began."""
    run = RunFolder.create(tmp_path / "run", {"seed": 1})
    run.metrics_path.write_text('{"step": 0, "rewa')
    for name in ("metrics.jsonl", "env.json", "config.json"):
        (run.path / f".{name}.0a1b2c3d.tmp").write_text("{")
    run.env_path.unlink()
    assert rows_so_far(run.path) == []
    RunFolder.resume(run.path, step=None, config={"seed": 1}).append_metrics({"step": 0})
    assert read_metrics(run.path) == [{"step": 0}]
    assert [start["step"] for start in read_environment(run.path)["resumed"]] == [0]
    left = sorted(path.name for path in run.path.iterdir())
    assert left == ["config.json", "env.json", "metrics.jsonl", "resume.json", "tokens"]


def run_steps(folder, first, last, killed_at, place) -> None:
    resumed = first > 1
    run = RunFolder.resume(folder, step=first - 1) if resumed else RunFolder.create(folder, {})
    log = TokenLogWriter(run.tokens, rank=0, layer_ids=range(3), top_k=2, num_experts=8)

    def maybe_die(here, step):
        if step == killed_at and here == place:
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace
    for step in range(first, last + 1):

        def replace_or_die(part, file, step=step):
            maybe_die("inside the token file", step)
            replace(part, file)

        os.replace = replace_or_die
        columns = full_columns(seed=step)
        del columns["rollout_routes"], columns["train_routes"]
        log.write(step, columns)
        os.replace = replace
        maybe_die("before the metrics row", step)
        if step == killed_at and place == "inside the metrics row":
            with run.metrics_path.open("a") as file:
                file.write('{"step": 3, "rewa')
            os.kill(os.getpid(), signal.SIGKILL)
        run.append_metrics({"step": step, "reward/mean": step / 8})
        maybe_die("before the checkpoint", step)


@pytest.mark.fault(
    "Run folders",
    "a kill between two writes of a run folder",
    "no row is lost or doubled",
)
@pytest.mark.parametrize(
    ("place", "rows_of_step_3", "metrics_of_step_3"),
    [
        ("inside the token file", 0, 0),
        ("before the metrics row", 6, 0),
        ("inside the metrics row", 6, 0),
        ("before the checkpoint", 6, 1),
    ],
)
def test_a_killed_run_resumed_leaves_what_an_unbroken_one_does(
    tmp_path, place, rows_of_step_3, metrics_of_step_3
):
    """Four steps, killed with SIGKILL in step 3 at each place; the checkpoint is that of step 2.

    One writing rank; that the trainer's own steps come in this order is not tested here.
    """

    def steps(folder, first, killed_at=0):
        return exit_status(run_steps, folder, first, 4, killed_at, place)

    assert steps(tmp_path / "whole", 1) == 0
    run = tmp_path / "broken"
    assert steps(run, 1, killed_at=3) == -signal.SIGKILL
    logged = read_tokens(run)["step"].to_pylist()
    assert logged.count(3) == rows_of_step_3 and logged.count(2) == 6
    assert [row["step"] for row in read_metrics(run)] == [1, 2] + [3] * metrics_of_step_3

    assert steps(run, 3) == 0
    assert read_tokens(run).equals(read_tokens(tmp_path / "whole"))
    assert read_metrics(run) == read_metrics(tmp_path / "whole")
    names = sorted(file.name for file in (run / "tokens").iterdir())
    assert names == [f"step-00000{step}-rank-0000.parquet" for step in (1, 2, 3, 4)]


def test_a_checkpoint_ahead_of_the_metrics_is_refused(tmp_path):
    """Resuming there would leave step 3 without a row for ever."""
    run = RunFolder.create(tmp_path / "run", {})
    for step in (1, 2):
        run.append_metrics({"step": step})
    with pytest.raises(UserError, match="ends at step 2, before the checkpoint of step 3"):
        RunFolder.resume(run.path, step=3)
    RunFolder.resume(run.path, step=1)
    with pytest.raises(UserError, match="ends at step 1, before the checkpoint of step 2"):
        RunFolder.resume(run.path, step=2)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.resume(tmp_path, step=1)


def test_glossary():
    assert metric("eval/pass@8") is METRICS["eval/pass@K"]
    assert metric("reward/mean").unit == "reward"
    with pytest.raises(UserError, match="no metric 'eval/pass@x'"):
        metric("eval/pass@x")
    table = markdown_table().splitlines()
    assert len(table) == 2 + len(METRICS)
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)


BROKEN = {
    "not UTF-8": (b'{"step": 2, "a": "\xff"}', "is not JSON (byte 19 is not UTF-8)"),
    "UTF-16": ('{"step": 2}'.encode("utf-16"), "is not JSON (byte 1 is not UTF-8)"),
    "nested": (b"[" * 100_000, "is not JSON (nested too deep)"),
    "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "(nested too deep)"),
    "digits": (b'{"step": ' + b"9" * 5000 + b"}", "is not JSON (a number of 5000 digits)"),
    "fewer digits": (b'{"step": 2, "a": ' + b"9" * 400 + b"}", "(a number of 400 digits)"),
    "NUL": (b"\0" * 50, "is not JSON (Expecting value"),
}


@pytest.mark.fault(
    "Run folders",
    "metrics that are no UTF-8, no JSON, nested too deep, with a huge number",
    "one line that names the row",
)
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("read", [read_metrics, lambda path: RunFolder.resume(path, step=1)])
def test_metrics_that_are_no_json_are_one_line(kind, read, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    text, says = BROKEN[kind]
    run.metrics_path.write_bytes(b'{"step": 1}\n' + text + b"\n")
    with pytest.raises(UserError) as told:
        read(run.path)
    message = str(told.value)
    assert f"{run.metrics_path}, line 2 " in message and says in message
    assert len(message) < 500 and message.isprintable()


@pytest.mark.fault(
    "Run folders",
    "a config.json like that",
    "one line",
)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_config_that_is_no_json_is_one_line(kind, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    text, says = BROKEN[kind]
    for file, read in ((run.config_path, read_config), (run.env_path, read_environment)):
        file.write_bytes(text)
        with pytest.raises(UserError) as told:
            read(run.path)
        message = str(told.value)
        assert str(file) in message and says in message
        assert len(message) < 500 and message.isprintable()
    run.config_path.write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json is no JSON object"):
        read_config(run.path)


@pytest.mark.fault(
    "Run folders",
    "metrics with rows twice or out of order",
    "refused, with the row",
)
@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([1, 2, 2], "line 3 is of step 2, the line before it of step 2"),
        ([1, 2, 3, 1, 2, 3], "line 4 is of step 1, the line before it of step 3"),
        ([2, 1], "line 2 is of step 1, the line before it of step 2"),
        ([0, -1], 'line 2 has no integer "step" ≥ 0'),
        ([True], 'line 1 has no integer "step" ≥ 0'),
    ],
)
def test_metrics_twice_or_out_of_order_are_refused(steps, says, tmp_path):
    """A curve through them would show what no run did, and a resume drop the wrong ones."""
    run = RunFolder.create(tmp_path / "run", {})
    text = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    run.metrics_path.write_text(text)
    for read in (read_metrics, lambda path: RunFolder.resume(path, step=1)):
        with pytest.raises(UserError, match=says):
            read(run.path)
    assert run.metrics_path.read_text() == text


@pytest.mark.fault(
    "Run folders",
    "a run's config.json that was edited",
    "the change is named and recorded",
)
def test_an_edited_config_is_noticed_and_recorded(tmp_path):
    config = {"seed": 0, "optimizer": {"lr": 0.1}, "data": ["a"], "keep": 2}
    run = RunFolder.create(tmp_path / "run", config)
    written = hashlib.sha256(run.config_path.read_bytes()).hexdigest()
    assert json.loads((run.path / "resume.json").read_text())["config_sha256"] == written
    assert run.edits() == {}
    run.config_path.write_text(run.config_path.read_text() + "\n")  # says the same
    assert run.edits() == {}
    edited = config | {"seed": 3, "optimizer": {"lr": 0.5}, "more": 1}
    del edited["keep"]
    run.config_path.write_text(json.dumps(edited))
    expected = {"seed": [0, 3], "optimizer.lr": [0.1, 0.5], "keep": [2, None], "more": [None, 1]}
    assert run.edits() == expected
    RunFolder.resume(run.path, step=None, config=edited, changed={"keep": [2, 5]})
    (start,) = read_environment(run.path)["resumed"]
    assert (start["edited"], start["changed"]) == (expected, {"keep": [2, 5]})
    assert run.edits() == {}  # it is the run's now
    run.memory_path.unlink()  # a run of an older version has none
    run.config_path.write_text("{}")
    assert run.edits() == {}


def test_what_was_logged_last(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    assert run.last_logged() == 0
    run.append_metrics({"step": 0})
    assert run.last_logged() == 0
    run.append_metrics({"step": 4})
    assert run.last_logged() == 4
    writer = TokenLogWriter(run.tokens, rank=0, layer_ids=range(3), top_k=2, num_experts=8)
    writer.write(5, full_columns())
    assert run.last_logged() == 5
