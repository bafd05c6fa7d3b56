"""The table of runs on several CPUs, by hand."""

import json

import pytest

from benchmarks.micro.cpus import make_table
from moe_upgrpo.errors import UserError

NEW = {"model": "New", "mkl": "AVX512,STRICT", "aten": "AVX512", "limits": {}}
OLD = {"model": "Old", "mkl": "AVX2", "aten": "AVX2", "limits": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}


def made(folder, seed, cpu, before, after, steps=2):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": seed, "steps": 2}))
    (folder / "env.json").write_text(json.dumps({"cpu": cpu} if cpu else {}))
    rows = [
        {"step": step} | {f"eval/{name}": value for name in ("greedy", "pass@1", "pass@4")}
        for step, value in ((0, before), (steps, after))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_ranges_over_cpus(tmp_path):
    runs = [
        made(tmp_path / "a", 1, NEW, 0.5, 0.75),
        made(tmp_path / "b", 0, NEW, 0.5, 0.7),
        made(tmp_path / "c", 0, OLD, 0.4, 0.9),
        made(tmp_path / "d", 0, None, 0.6, 0.8),  # as runs of before this was recorded
    ]
    lines = make_table(runs).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| New: MKL AVX512,STRICT, ATen AVX512", "0, 1", ".500 → .700, .750"],
        ["| Old: MKL AVX2, ATen AVX2, ONEDNN_MAX_CPU_ISA=AVX2", "0", ".400 → .900"],
        ["| not recorded", "0", ".600 → .800"],
        ["| all 3", "4 runs", ".400 to .600 → .700 to .900"],
    ]


def test_no_run_and_an_unfinished_run_are_errors(tmp_path):
    with pytest.raises(UserError, match="no run given"):
        make_table([])
    with pytest.raises(UserError, match="ends at step 1 of 2"):
        make_table([made(tmp_path / "a", 0, NEW, 0.5, 0.6, steps=1)])
