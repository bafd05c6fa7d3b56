"""The wheel made from the sdist, installed alone into an empty folder and used from another one."""

import json
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
from moe_upgrpo.store import read_config, read_metrics, read_tokens
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.plugin import project

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


def run(*command: object, cwd: Path, site: Path | None = None, plugin: Path | None = None) -> str:
    """Give what a command prints with these folders of packages before this Python's own."""
    path = os.pathsep.join(str(folder) for folder in (site, plugin) if folder)
    environment = os.environ | {"PYTHONPATH": path}
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


def installed(package: Path, target: Path) -> Path:
    """A folder with nothing but an installed package; what it needs is that of this Python."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    alone = ("--no-index", "--no-deps", "--no-build-isolation", "--no-compile")
    run(*pip, *alone, "--target", target, package, cwd=target)
    return target


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """The package of docs/extending.md, by pip from its own folder."""
    source = project(tmp_path_factory.mktemp("project") / "my_moe")
    return installed(source, tmp_path_factory.mktemp("plugin"))


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


@pytest.mark.slow
def test_a_plugin_package_trains_from_another_folder(site, plugin, tmp_path):
    """Its reward, its task of two turns with a tool, its loss under UP's positive branch, its
    advantage and its engine: what they did is read in the run's token log and report."""
    run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 1, "-m", "moe_upgrpo",
        "train", "--output-dir", "one", "--cache-dir", "cache", "--tiny.layers", 2,
        "--tiny.hidden", 64, "--warm-start.probe-problems", 64, "--steps", 3, "--prompts", 8,
        "--group", 4, "--minibatches", 2, "--eval-every", 3, "--analyse-every", 3,
        "--task", "second-try", "--task-options", '{"digits": 1}',
        "--reward", "close", "0.1*length:64", "--loss", "up-capped",
        "--advantage", "centred-ranks", "--engine", "timed", "--engine-dtype", "float32",
        cwd=tmp_path, site=site, plugin=plugin)  # fmt: skip
    config, rows = read_config(tmp_path / "one"), read_metrics(tmp_path / "one")
    assert [name.replace("-", "_") for name in config["plugins"]] == ["my_moe (my_moe 1.2)"]
    loss = config["policy_loss"]
    assert (loss["positive"], loss["negative"]) == ("log-likelihood", "capped")
    steps = [row for row in rows if "reward/of/close" in row]
    assert len(steps) == 3 and all(row["reward/failed_rate"] == 0 for row in steps)
    tokens = read_tokens(tmp_path / "one").to_pandas()
    assert {*tokens.step} == {1, 2, 3} and set(tokens.advantage) <= {-1.5, -0.5, 0, 0.5, 1.5}
    for step, of_step in tokens.groupby("step"):  # |A|·c·w: c = 1, or min(r, 2) below 0
        c = of_step.ratio.clip(upper=2).where(of_step.advantage < 0, 1)
        weighed = (of_step.advantage.abs() * c).where(of_step.advantage != 0)
        w = (of_step.gradient_weight / weighed).dropna()
        w = w.sort_values()
        # One w for each of two minibatches.
        assert len(w) > 20 and (w / w.shift() > 1.001).sum() <= 1, step
    assert {*tokens.advantage} > {0} and (tokens.ratio != 1).any()
    # Of conversations of two turns the tool's token has no row.
    of_sequence = tokens.groupby(["step", "sequence"]).position
    assert {*of_sequence.agg(lambda p: int((p.sort_values().diff() > 1).sum()))} == {0, 1}
    assert (tokens.logp_old - tokens.logp_rollout).abs().max() < 1e-4
    page = (tmp_path / "one/report.html").read_text(encoding="utf-8")
    assert "up-capped" in page and "</html>" in page


IN_VERL = """
import json, torch, verl, moe_upgrpo
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig
from moe_upgrpo.integrations.verl import LossConfig
log_probs = torch.tensor([[-1.0, -2.0]] * 2, requires_grad=True)
name = "moe_upgrpo/up-capped"
config = ActorConfig(strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
                     policy_loss=LossConfig(loss_mode=name, settings={"ratio_cap": 2.5}))
loss, _ = get_policy_loss_fn(name)(
    old_log_prob=log_probs.detach() - torch.tensor([[0.5, 1.0]]), log_prob=log_probs,
    advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), response_mask=torch.ones(2, 2),
    loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
loss.backward()
print(json.dumps([moe_upgrpo.__file__, log_probs.grad.tolist()]))
"""


@pytest.mark.slow
def test_the_plugin_s_loss_inside_verl(site, plugin, tmp_path):
    """By verl's own look-up, as its actor calls it; verl's `import` has loaded both packages."""
    pytest.importorskip("verl")
    said = run(sys.executable, "-c", IN_VERL, cwd=tmp_path, site=site, plugin=plugin)
    file, gradient = json.loads(said.splitlines()[-1])
    assert Path(file).is_relative_to(site)
    # −A·c/4: c = 1 for the positive sequence, min(r, 2.5) for the negative one; r = e^½ and e.
    by_hand = torch.tensor([[-1, -1], [1.6487213, 2.5]]) / 4
    torch.testing.assert_close(torch.tensor(gradient), by_hand)
