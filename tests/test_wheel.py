"""The wheel made from the sdist, installed alone into an empty folder and used from another one."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import Qwen3MoeForCausalLM

import moe_upgrpo
from moe_upgrpo import extras
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.train.warm_start import tiny_model_config

ROOT = Path(__file__).parents[1]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
FOLDERS = {"moe_upgrpo": "", "patches": "moe_upgrpo/", "examples": "moe_upgrpo/"}
"""Folder of a checkout -> where the wheel has it."""
SOURCES = (
    *FOLDERS, "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
    "CITATION.cff", "CONTRIBUTING.md", "Makefile",
)  # fmt: skip


def test_one_version_everywhere():
    version = re.escape(moe_upgrpo.__version__)
    assert re.search(rf'^version: "{version}"$', CITATION, re.MULTILINE)
    assert re.search(rf"^## {version}", CHANGELOG, re.MULTILINE)


def run(*command: object, cwd: Path, site: Path | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(site or "")}
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, encoding="utf-8",
        timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made of the sdist alone, which is made of a copy: neither leaves anything in the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / "copy" / name)
    run(sys.executable, "setup.py", "--quiet", "sdist", "-d", folder, cwd=folder / "copy")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    source = folder / sdist.name.removesuffix(".tar.gz")
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source,
        cwd=folder)  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the installed wheel; what it needs is that of this Python."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    run(*pip, "--no-index", "--no-deps", "--no-compile", "--target", target, wheel, cwd=target)
    return target


@pytest.mark.slow
def test_it_holds_every_file_of_the_package_the_patches_and_the_examples(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        f"{inside}{path.relative_to(ROOT)}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted and "moe_upgrpo/py.typed" in held
    assert any(name.endswith("report/template.html") for name in held)
    assert any(name.endswith("examples/configs/dapo.yaml") for name in held)


@pytest.mark.slow
def test_it_asks_for_no_megatron_unless_told_to(site):
    (folder,) = site.glob("*.dist-info")
    requires = [*map(Requirement, PathDistribution(folder).requires)]
    base = {one.name for one in requires if one.marker is None}
    assert base == {"torch", "numpy", "scipy", "pyarrow", "safetensors", "packaging", "pyyaml",
                    "tyro", "rich"}  # fmt: skip

    def brings(extra: str) -> set[str]:
        environment = {"extra": extra, "sys_platform": "linux"}
        return {one.name for one in requires if one.marker and one.marker.evaluate(environment)}

    assert {"megatron-core", "transformers"} == brings("train")
    assert {"matplotlib", "jinja2"} == brings("report")
    assert {"tensorboard", "wandb"} == brings("tracking") and "math-verify" in brings("math")
    assert all(brings(extra) for extra in {*extras.EXTRA_OF.values(), "dev"})


COMPARED = """
import numpy as np, moe_upgrpo
from moe_upgrpo.routing import compare_routes
train = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]])
rollout = train.copy()
rollout[0, 0] = [1, 2]
print(moe_upgrpo.__file__, compare_routes(rollout, train, num_experts=8).router_mismatch_rate)
"""


@pytest.mark.slow
def test_it_compares_routes_trains_a_step_and_reports_from_another_folder(site, tmp_path):
    said = run(sys.executable, "-c", COMPARED, cwd=tmp_path, site=site).split()
    assert Path(said[0]).is_relative_to(site) and float(said[1]) == 1 / 4
    python = (sys.executable, "-m", "moe_upgrpo")
    patches = run(*python, "patch", "list", cwd=tmp_path, site=site)
    assert "megatron-core" in patches and "vllm" in patches

    torch.manual_seed(0)
    model = tmp_path / "model"
    config = tiny_model_config(layers=2, hidden=64, experts=8, top_k=2, expert_intermediate=32)
    Qwen3MoeForCausalLM(config).save_pretrained(model)
    arithmetic.save_tokenizer(model)
    run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 1, "-m", "moe_upgrpo",
        "train", "--model", model, "--digits", 1, "--steps", 1, "--prompts", 4, "--group", 4,
        "--max-new-tokens", 8, "--minibatches", 1, "--no-report", "--output-dir", "one",
        cwd=tmp_path, site=site)  # fmt: skip
    assert (tmp_path / "one/metrics.jsonl").is_file()
    page = run(*python, "report", "one", cwd=tmp_path, site=site).strip()
    assert "</html>" in (tmp_path / page).read_text(encoding="utf-8")
