"""Every benchmark can be imported, and the quick ones run at a tiny size: none rots unseen.

Not covered: those that start ranks, an engine or another interpreter; what they measure.
"""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.micro import compare_routes, health, recording_scale, route_codec

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if file.stem not in ("__init__", "__main__")
)
# They import verl or TRL, which takes seconds.
HEAVY = {"benchmarks.micro.losses", "benchmarks.micro.trl_step"}


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
    lines = recording_scale.grown("rows", "tokens", [10, 100], [(1.0, 5), (100.0, 50)], [10, 100])
    assert "time grows as tokens^2.00, memory as tokens^1.00" in [*lines][-1]


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
