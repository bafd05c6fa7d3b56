"""Each patch of vLLM on links to the installed release: wrong before, right after.

vllm_behaviour.py says what is checked, without our plugin. docs/patches.md has the command that
runs the rest of tests/engines on a patched copy.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_upgrpo import patching

REPOSITORY = Path(__file__).parents[2]
SERIES = patching.of_stack("vllm")[-1]


def linked_copy(root: Path) -> Path:
    """Links to the installed package's files, and of those that are patched copies."""
    installed = Path(importlib.util.find_spec("vllm").origin).parents[1]
    shutil.copytree(
        installed / "vllm",
        root / "vllm",
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=os.symlink,
    )
    for file in SERIES.files:
        (root / file).unlink()
        shutil.copy2(installed / file, root / file)
    return root


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The error of each check, by copy: before and after the patches."""
    found = []
    for name in ("before", "after"):
        root = linked_copy(tmp_path_factory.mktemp(name))
        checkout = patching.recognise([SERIES], root)
        assert checkout.state == "clean"
        if name == "after":
            checkout.apply()
        path = os.pathsep.join([str(root), str(REPOSITORY)])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.engines.vllm_behaviour", str(root)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["vllm"].startswith(str(root))  # the copy was imported
        found.append(result["checks"])
        if name == "after":
            assert len(checkout.revert()) == len(SERIES.files) and checkout.state == "clean"
    return found


def wrong_before_right_after(checked, name: str, error: str) -> None:
    before, after = checked
    assert before[name] is not None and error in before[name]
    assert after[name] is None, after[name]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_amx_permission(checked):
    wrong_before_right_after(checked, "amx_permission", "without permission")


def test_experts_prepacked_on_reload(checked):
    wrong_before_right_after(checked, "experts_prepacked_on_reload", "Arrays are not equal")


def test_seeded_chunked_prefill(checked):
    wrong_before_right_after(checked, "seeded_chunked_prefill", "set_offset")


def test_routed_experts(checked):
    wrong_before_right_after(checked, "routed_experts", "requires Model Runner V2")
