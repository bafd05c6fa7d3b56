"""The examples that need no Megatron, run as they are written."""

import ast
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_upgrpo.store import read_tokens
from tests.report.synthetic import make_run

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("compare_dumps", "read_token_log", "loss_in_a_loop")


def run(name, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_they_are_short_and_take_the_parts_without_megatron(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    imported = {
        node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
    }
    ours = {module for module in imported if module.startswith("moe_upgrpo")}
    pure = ("losses", "routing", "store", "tools.route_dumps")
    assert ours and ours <= {f"moe_upgrpo.{part}" for part in pure}
    assert len(text.splitlines()) <= 26


def test_two_dumps_compared(monkeypatch, capsys, tmp_path):
    """Four tokens, two layers: the second token has another set in layer 1; order is no matter."""
    train = np.array([[[0, 1], [2, 3]]] * 4, np.uint8)
    rollout = train.copy()[..., ::-1]
    rollout[1, 1] = [2, 0]
    for side, routes in (("rollout", rollout), ("train", train)):
        np.save(tmp_path / side, routes)
    files = (tmp_path / "rollout.npy", tmp_path / "train.npy")
    assert run("compare_dumps", monkeypatch, capsys, *files, 4) == [
        "routers that differ: 12.50%", "tokens with any: 25.00%",
        "MoE layer 0: 0.00%", "MoE layer 1: 25.00%",
    ]  # fmt: skip


def test_a_token_log_read(monkeypatch, capsys, tmp_path):
    run_dir = make_run(tmp_path / "run", steps=2, layers=2)
    lines = run("read_token_log", monkeypatch, capsys, run_dir)
    rows = read_tokens(run_dir).to_pylist()
    for line in lines:
        layers = int(line.split(" ")[0])
        gaps = [abs(row["logp_old"] - row["logp_rollout"])
                for row in rows if row["layers_mismatched"] == layers]  # fmt: skip
        assert line == f"{layers} layers: {len(gaps)} tokens, mean |gap| {np.mean(gaps):.2e}"
    assert len(lines) == len({row["layers_mismatched"] for row in rows}) > 1


def test_a_loss_in_a_loop(monkeypatch, capsys):
    lines = run("loss_in_a_loop", monkeypatch, capsys)
    said = [float(line.split(" with ")[1].split(",")[0]) for line in lines]
    assert said[0] == pytest.approx(0.12, abs=0.01) and said[-1] > 0.9 and len(said) == 4
