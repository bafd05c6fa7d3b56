"""The base install by itself, and the message where an extra is absent."""

import subprocess
import sys

import pytest

from moe_upgrpo import extras
from moe_upgrpo.errors import UserError

BASE = (
    "losses", "routing", "stats", "record", "store.token_log", "store.questions", "tools.doctor",
    "tools.route_dumps", "integrations.kit.run_log", "train.config",
)  # fmt: skip
# Commands, and the extra that they ask for.
COMMANDS = {
    "patch list": None,
    "--version": None,
    "train": "train",
    "plan": "train",
    "probe --rollout-routes a.npy --train-routes b.npy --num-experts 8": "train",
    "report runs/one": "report",
    "compare a.yaml": "report",
}
# One interpreter in which nothing of an extra can be imported; a fork for each command.
WITHOUT = f"""
import os, sys
sys.modules.update(dict.fromkeys({[*extras.EXTRA_OF]}))
for part in {BASE}:
    __import__("moe_upgrpo." + part)
from moe_upgrpo.cli import main
os.dup2(1, 2)
for part in ("actor", "plan"):
    try:
        __import__("moe_upgrpo.megatron." + part)
    except ModuleNotFoundError as error:
        print("imported:", part, error.name, error)
import moe_upgrpo.megatron.releases, moe_upgrpo.megatron.settings
for command in {[*COMMANDS]}:
    print("command:", command, flush=True)
    if os.fork() == 0:
        sys.argv = ["moe-upgrpo", *command.split()]
        main()
        sys.stdout.flush()
        os._exit(0)
    print("status:", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_the_base_install_does_its_part_and_the_rest_names_its_extra(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    imported, *said = result.stdout.split("command: ")
    line = "Megatron-Core is not installed; it comes with the extra `train`: pip install"
    for part in ("actor", "plan"):
        assert f"imported: {part} megatron.core {line} 'moe_upgrpo[train]'" in imported, imported
    assert len(said) == len(COMMANDS), result.stdout + result.stderr
    for extra, text in zip(COMMANDS.values(), said, strict=True):
        if extra is None:
            assert "status: 0" in text, text
        else:
            assert f"pip install 'moe_upgrpo[{extra}]'" in text and "status: 2" in text, text
            assert "Traceback" not in text and len(text.strip().splitlines()) == 3, text
    assert "megatron-core" in said[0]  # of the patches


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("megatron.core", r"Megatron-Core .* `train`: pip install 'moe_upgrpo\[train\]'"),
        ("math_verify", r"math-verify .* `math`: pip install 'moe_upgrpo\[math\]'"),
        ("wandb.sdk", r"wandb .* `tracking`: pip install 'moe_upgrpo\[tracking\]'"),
    ],
)
def test_a_module_of_an_absent_extra_is_named_with_the_command(monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    error = extras.absent(ModuleNotFoundError("no", name=module))
    assert isinstance(error, UserError)
    with pytest.raises(UserError, match=words):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("no", name="torch_of_somebody"),
        ModuleNotFoundError("no", name="transformers.gone"),  # the package itself is there
        ImportError("cannot import name", name="transformers"),
        ValueError("no import"),
    ],
)
def test_any_other_error_is_left_alone(error):
    assert extras.absent(error) is None
