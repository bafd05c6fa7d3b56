"""Each patch of Megatron-Core on copies of the installed release: wrong before, right after.

behaviour.py says what is checked. Not covered: Transformer Engine's layers, grouped experts, CUDA,
NCCL; there the same lines are changed as in the layers that run here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_upgrpo import patching

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checked(tmp_path_factory, megatron_root, megatron_series):
    """The error of each check, by copy: "before" and "after" the patches."""
    running = {}
    for name in ("before", "after"):
        root = tmp_path_factory.mktemp(name)
        # The rest by links: it is imported from where it is installed.
        shutil.copytree(
            megatron_root / "megatron/core",
            root / "megatron/core",
            ignore=shutil.ignore_patterns("__pycache__"),
            copy_function=os.symlink,
        )
        for file in megatron_series.files:
            (root / file).unlink()
            shutil.copy2(megatron_root / file, root / file)
        if name == "after":
            patching.Checkout(megatron_series, root).apply()
        command = [sys.executable, "-W", "ignore", "-m", "tests.patches.behaviour", str(root)]
        path = os.pathsep.join([str(root), str(REPOSITORY)])
        running[root] = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    found = []
    for root, process in running.items():
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        result = json.loads(out.splitlines()[-1])
        assert result["megatron"].startswith(str(root))  # the copy was imported
        found.append(result["checks"])
    return found


def wrong_before_right_after(checked, name: str, error: str) -> None:
    before, after = checked
    assert before[name] is not None and error in before[name]
    assert after[name] is None, after[name]


def test_router_without_transformer_engine(checked):
    wrong_before_right_after(
        checked,
        "router_without_transformer_engine",
        "NameError: name 'te_general_gemm' is not defined",
    )


def test_mla_without_transformer_engine(checked):
    wrong_before_right_after(
        checked, "mla_without_transformer_engine", "TypeError: isinstance() arg 2 must be a type"
    )


def test_splits_on_cpu(checked):
    wrong_before_right_after(checked, "splits_on_cpu", "AssertionError")


def test_replay_with_router_fusion(checked):
    wrong_before_right_after(checked, "replay_with_router_fusion", "AssertionError")


def test_expert_gradients_with_etp(checked):
    """Half of the gradients are wrong: those of the experts, by as much as they are large."""
    wrong_before_right_after(checked, "expert_gradients_with_etp", "gradients are wrong")


def test_two_interleaved_stages(checked):
    wrong_before_right_after(checked, "two_interleaved_stages", "135 of 135 gradients are wrong")


def test_rotary_key_gradient(checked):
    """Of the local layer spec's latent attention, which the package itself does without."""
    wrong_before_right_after(checked, "rotary_key_gradient", "gradients are wrong")


def test_outputs_in_flight(checked):
    wrong_before_right_after(checked, "outputs_in_flight", "freed and still to be sent")
