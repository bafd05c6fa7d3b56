"""Evaluations problem by problem: written, read, and dropped where a run goes back."""

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import RunFolder, read_evaluations, write_evaluation


def columns(correct: list[int]) -> dict:
    problems = list(range(len(correct)))
    return {
        "problem": problems,
        "prompt": [f"{i}+{i}=" for i in problems],
        "greedy": [c > 1 for c in correct],
        "samples": [4] * len(correct),
        "correct": correct,
        "majority": [0.5] * len(correct),
    }


def test_what_is_written_is_read_in_the_order_of_the_steps(tmp_path):
    for step in (20, 0):
        write_evaluation(tmp_path / "evaluations", step, columns([step // 10, 4]))
    assert read_evaluations(tmp_path).to_pylist()[1:3] == [
        {"step": 0, "problem": 1, "prompt": "1+1=", "greedy": True, "samples": 4, "correct": 4,
         "majority": 0.5},
        {"step": 20, "problem": 0, "prompt": "0+0=", "greedy": True, "samples": 4, "correct": 2,
         "majority": 0.5},
    ]  # fmt: skip
    assert read_evaluations(tmp_path, steps=[20])["correct"].to_pylist() == [2, 4]


def test_what_is_not_there_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no evaluation of steps \[3\]"):
        read_evaluations(tmp_path, steps=[3])
    with pytest.raises(UserError, match="without problems"):
        write_evaluation(tmp_path, 1, columns([]))
    file = write_evaluation(tmp_path / "evaluations", 1, columns([1]))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-000001\.parquet is truncated"):
        read_evaluations(tmp_path)


def test_a_run_that_goes_back_drops_the_evaluations_of_later_steps(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    for step in (0, 2, 4):
        write_evaluation(run.evaluations, step, columns([1]))
        run.append_metrics({"step": step})
    (run.evaluations / ".step-000006.parquet.tmp").touch()
    RunFolder.resume(run.path, step=2)
    assert read_evaluations(run.path)["step"].to_pylist() == [0, 2]
    assert len(list(run.evaluations.iterdir())) == 2
