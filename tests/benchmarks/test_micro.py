"""Every benchmark can be imported, and runs at a tiny size: none rots unseen.

Not covered: those that need an engine, another checkout (beside) or a run of `make train`
(recording, cpus); what they measure.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.micro import (
    balance,
    compare_routes,
    health,
    packing,
    recording_scale,
    route_codec,
    staleness,
    step_against_peers,
)
from benchmarks.micro.peers import Work, plain, read_steps
from moe_upgrpo.errors import UserError

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if file.stem not in ("__init__", "__main__")
)
# It imports verl, which takes seconds.
HEAVY = {"benchmarks.micro.losses"}


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow) if m in HEAVY else m for m in MODULES]
)
def test_every_benchmark_can_be_imported(name):
    module = importlib.import_module(name)
    assert module.__doc__


def test_they_were_found():
    assert len(MODULES) > 50 and set(MODULES) > HEAVY
    assert {name.split(".")[1] for name in MODULES} >= {"micro", "studies", "gpu", "diagnose"}


def test_comparing_routes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_routes", "--tokens", "64", "--rounds", "1"])
    compare_routes.main()
    said = capsys.readouterr().out
    assert "64 tokens x 48 x 8 int32" in said and "naive" in said


def test_the_codec(monkeypatch, capsys):
    words = "route_codec --tokens 200 --layers 3 --top-k 2 --experts 8 --rounds 1"
    monkeypatch.setattr(sys, "argv", words.split())
    assert route_codec.main() == 0
    assert "200 tokens x 3 layers, top-2 of 8" in capsys.readouterr().out


def test_recording_at_scale():
    """Its stages in this process, and the growth of what they took."""
    model, clock = argparse.Namespace(layers=3, top_k=2, experts=8), recording_scale.Clock()
    recording_scale.record_stage(2048, model, clock)
    recording_scale.codec_stage(2048, model, clock)
    assert {*clock.found} == {*recording_scale.STAGES} - {*recording_scale.TAP}
    assert all(seconds > 0 for seconds, _ in clock.found.values())
    lines = recording_scale.grown("rows", "tokens", [10, 100], [(1.0, 50), (100.0, 500)], [10, 100])
    *_, growth, further = lines
    assert "time grows as tokens^2.00, memory as tokens^1.00" in growth
    assert further.endswith(" 5 extra bytes for each further token")


def test_health_figures(capsys):
    """Its status says whether counting was cheap, which it is not in a layer of this size."""
    assert health.main(tokens=16, hidden=32, width=16, experts=8, top_k=2, runs=2) in (0, 1)
    assert "16 tokens, hidden 32, 8 experts of 16, top-2" in capsys.readouterr().out


@pytest.mark.slow
def test_losses(capsys):
    losses = importlib.import_module("benchmarks.micro.losses")
    few = losses.Arguments(sequences=8, tokens=4, rounds=1, only=("grpo", "up-grpo"))
    assert losses.main(few) in (0, 1)
    assert "8x4 float32" in capsys.readouterr().out


def test_packing(capsys):
    packing.main(rounds=1, sequences=4, micro_batch=2, tokens=512)
    said = capsys.readouterr().out
    assert "4 sequences of" in said and "| packed | 1.00 |" in said


def test_balance(capsys):
    balance.main(["--seeds", "1", "--sequences", "4"])
    said = capsys.readouterr().out
    assert "4 sequences a rank, 1 seeds" in said and "DP32" in said


def test_throughput_against_staleness(tmp_path, capsys):
    few = staleness.Setting(
        staleness=(0, 2), steps=6, generate=0.002, update=0.002, figure=tmp_path / "figure.svg"
    )
    staleness.main(few)
    said = capsys.readouterr().out
    assert said.startswith("simulated: 6 steps")
    # Batches 1 to 6 are 0, 1, 2, 2, 2, 2 steps behind.
    behind = [line.split("|")[5].strip() for line in said.splitlines()[3:]]
    assert behind == ["0.00", "1.50"]
    assert "staleness, steps" in few.figure.read_text()


# Words after `python -m`, and what the last line says.
TINY = {
    "head": ("benchmarks.micro.head --tokens 256 --vocabulary 512", "| ours, 256 tokens | 2 |"),
    "recording_scale": (
        "benchmarks.micro.recording_scale --tokens 1024 2048 --layers 4 --top-k 2 --experts 8",
        "extra bytes for each further token",
    ),
    "report_scale": ("benchmarks.micro.report_scale rows 10000", "10,000"),
    "checkpoint": (
        "benchmarks.micro.checkpoint --megabytes 4 --repeats 1",
        "of the processors: ",
    ),
    "weights": (
        "benchmarks.micro.weights --mib 4 --layers 2 --rounds 1",
        "| into the hf engine |",
    ),
    "starts": ("benchmarks.micro.starts --starts 1 --busy 0 --pauses 0", "none hung"),
    "cpu_kernels": ("benchmarks.micro.cpu_kernels --rounds 1", "| AVX512,STRICT | "),
    "collectives": (
        "torch.distributed.run --nproc-per-node 2 benchmarks/micro/collectives.py",
        "waiting ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "says"), TINY.values(), ids=TINY)
def test_a_tiny_run(words, says):
    result = subprocess.run(
        [sys.executable, "-m", *words.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert says in result.stdout.splitlines()[-1]


def test_a_step_in_plain_pytorch(tmp_path):
    """Lengths of 1 to 4 tokens, of 2 optimizer steps on sorted micro-batches."""
    step_against_peers.save_model(step_against_peers.ROWS["small"], tmp_path / "model")
    work = Work(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "steps.json"),
        steps=2,
        prompts=4,
        group=2,
        new_tokens=4,
        minibatches=2,
        micro_batch=2,
        sort=True,
    )
    plain.run(Work(**json.loads(work.as_json())))
    steps = read_steps(tmp_path / "steps.json")
    assert len(steps) == 2
    for tokens, cpu, seconds in steps:
        assert 8 <= tokens <= 32 and cpu > 0 and seconds > 0


def test_ratios_are_those_of_one_round():
    """Medians 200 and 200, but ours is at .5, 1 and 2 of TRL's run beside it."""
    rounds = [{"ours": o, "TRL": t} for o, t in ((100, 200), (200, 200), (400, 200))]
    ours, trl = step_against_peers.lines(rounds)
    said = " ".join(ours.split())
    assert said == "ours 200 µs a token (150 to 300); 1.00 of TRL (0.75 to 1.50)"
    assert " ".join(trl.split()) == "TRL 200 µs a token (200 to 200)"


def test_steps_that_warm_up_do_not_count():
    steps = [(1, 9, 9), (1, 9, 9), (10, 2e-5, 1), (10, 4e-5, 1)]
    assert step_against_peers.cpu_per_token(steps) == pytest.approx(3)


def test_a_busy_machine_gets_no_figures(monkeypatch):
    monkeypatch.setattr(step_against_peers.psutil, "cpu_percent", lambda interval: 50.0)
    with pytest.raises(UserError, match="busy: 50% of its cores are used by others, 15%"):
        step_against_peers.main(step_against_peers.Arguments())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"only": ("big",)}, "'big' is none of small, four-steps"),
        ({"sides": ("verl",)}, "'verl' is none of ours"),
        ({"steps": 2}, "4 steps are needed"),
    ],
)
def test_a_table_that_is_not_there(arguments, says):
    with pytest.raises(UserError, match=says):
        step_against_peers.Arguments(**arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_against_peers(tmp_path):
    row = step_against_peers.Row(prompts=4, group=2, new_tokens=4, minibatches=2)
    step_against_peers.save_model(row, tmp_path / "model")
    sides = ("ours, DP2", *step_against_peers.PEERS)
    found = step_against_peers.one_round(row, tmp_path / "model", tmp_path, sides, steps=4)
    assert set(found) == set(sides) and all(value > 0 for value in found.values())
