"""The checks for a GPU, with small sizes on a CPU; what goes wrong among them; page and folder.

Not covered: a GPU.
"""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import carry, found, layers, page, parity, replay
from benchmarks.gpu.checks import CHECKS, Check
from benchmarks.gpu.runner import Job, run_checks
from benchmarks.gpu.sizes import CARD, TINY
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import tap
from tests.ranks import exit_status

FAULTS = "tests.benchmarks.gpu_faults"


def run(scratch: Path, file: Path, checks, total_s: float = 250) -> None:
    """In a process of its own: it forks."""
    job = Job(sizes=TINY, scratch=scratch, carried=scratch / "carried", on_card=False)
    said = []
    results = run_checks(
        checks,
        job,
        total_s=total_s,
        say=said.append,
        save=lambda results: file.write_text(json.dumps({"checks": results})),
    )
    file.write_text(json.dumps({"checks": results, "said": said}))


def results_of(tmp_path: Path, checks, total_s: float = 250) -> dict:
    scratch, file = tmp_path / "scratch", tmp_path / "file"
    scratch.mkdir()
    assert exit_status(run, scratch, file, checks, total_s) == 0
    return json.loads(file.read_text())


def test_all_checks_pass_on_a_cpu(tmp_path):
    """Half of them compare with something computed otherwise; what those found is looked at."""
    patient = [replace(check, budget_s=200) for check in CHECKS]  # other tests run beside
    found = results_of(tmp_path, patient)
    results = found["checks"]
    assert results.keys() == {check.name for check in CHECKS}
    wrong = {name: one for name, one in results.items() if one["state"] != "ok"}
    assert not wrong, json.dumps(wrong, indent=1)
    assert all(one["line"] and one["figures"] for one in results.values())
    assert len(found["said"]) == len(CHECKS)
    # The same device: the reference is met to the last bit.
    parity = results["against the CPU's fp32"]["figures"]
    assert parity["log-probs"] == parity["gradient"] == parity["step"] == 0
    assert 0 < parity["bf16 mean log-prob difference"] < 0.05
    for dtype in ("float32", "bfloat16"):
        replayed = results["replay"]["figures"][dtype]
        assert replayed["own routes"] == 0 < replayed["planted routes"]
    assert 0 < results["mismatch by layer"]["figures"]["fp8"]["routers"] < 1
    attention = results["core attention"]["figures"]["128"]
    assert 0 < attention["ours"]["peak_MB"] < attention["plain"]["peak_MB"]
    assert 0 < attention["relative difference"] < 0.02
    layers = results["large layers against plan"]["figures"]["update 128"]
    assert layers["tokens/s"] > 0 and layers["on top, GB"] > 0
    assert results["training run"]["figures"]["tokens_per_second"] > 0


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """In this process, with a reference to compare with."""
    scratch = tmp_path_factory.mktemp("job")
    made = Job(sizes=TINY, scratch=scratch, carried=scratch / "none", on_card=False)
    assert not parity.reference(made).faults
    return made


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("log_probs", "log-probs in fp32: 0.001 from the CPU's"),
        ("gradient/lm_head.weight", "gradient in fp32: "),
        ("step/model.layers.1.mlp.gate.weight", "step in fp32: "),
    ],
)
def test_a_value_other_than_the_reference_s_is_a_fault(name, words, job, tmp_path):
    expected = dict(np.load(job.scratch / "reference.npz"))
    expected[name] = expected[name] * 1.002 if "/" in name else expected[name] + 0.001
    np.savez(tmp_path / "reference.npz", **expected)
    (tmp_path / "model").symlink_to(job.scratch / "model")
    (fault,) = parity.against_reference(replace(job, scratch=tmp_path)).faults
    assert fault.startswith(words)


def test_without_a_reference_nothing_is_compared(job, tmp_path):
    outcome = parity.against_reference(replace(job, scratch=tmp_path))
    assert outcome.faults == ("the reference was not made",)


def test_attention_that_computes_something_else_is_a_fault(job, monkeypatch):
    right = layers.CausalAttention.forward
    monkeypatch.setattr(layers.CausalAttention, "forward", lambda *given: 1.05 * right(*given))
    assert "from Megatron's" in layers.attention(job).faults[0]


def test_routes_that_are_not_replayed_are_a_fault(job, monkeypatch):
    """The tap is given none, and the routers choose for themselves."""
    visit = tap.RouterTap.visit
    monkeypatch.setattr(
        tap.RouterTap,
        "visit",
        lambda self, chunk, batch, routes, record: visit(self, chunk, batch, None, record),
    )
    faults = replay.replay(job).faults
    for dtype in replay.DTYPES:
        assert f"{dtype}: planted experts were not used" in faults


def faulty(*functions: str, budget_s: float = 60) -> list[Check]:
    return [Check(name, FAULTS, name, budget_s, "") for name in functions]


def test_what_goes_wrong_takes_nothing_with_it(tmp_path):
    checks = faulty("leaves_a_file", "raises", "finds_a_fault", "dies", "is_no_json", "exits")
    checks += [Check("not there", "benchmarks.gpu.nothing", "f", 60, "")]
    checks += [*faulty("hangs", budget_s=2), *faulty("good")]
    checks += [Check("hidden", FAULTS, "sees_a_gpu", 60, "", on_cpu=True)]
    results = results_of(tmp_path, checks)["checks"]
    assert {name: one["state"] for name, one in results.items()} == {
        "leaves_a_file": "ok",
        "raises": "failed",
        "finds_a_fault": "failed",
        "dies": "failed",
        "is_no_json": "failed",
        "exits": "failed",
        "not there": "cannot run",
        "hangs": "out of time",
        "good": "ok",
        "hidden": "ok",
    }
    assert results["raises"]["line"] == "ValueError: no such kernel"
    assert "said before" in results["raises"]["log"] and "Traceback" in results["raises"]["log"]
    assert results["finds_a_fault"]["figures"] == {"apart": 1.5}
    assert results["finds_a_fault"]["faults"] == ["more than .5"]
    assert results["dies"]["line"] == "ended with status -11"
    assert "benchmarks.gpu.nothing" in results["not there"]["line"]
    assert 2 <= results["hangs"]["seconds"] < 30
    assert results["good"]["figures"] == {"there": True}
    assert results["hidden"]["line"] == ""


def test_no_check_begins_after_the_end(tmp_path):
    results = results_of(tmp_path, faulty("good", "raises"), total_s=1)["checks"]
    assert {one["state"] for one in results.values()} == {"no time left"}


def test_sizes_of_the_card_are_those_of_the_model_that_the_page_names():
    file = Path(__file__).parents[2] / "examples/configs/models/qwen3-30b-a3b/config.json"
    model = json.loads(file.read_text())
    assert CARD.layer == {name: model[name] for name in CARD.layer} | {"num_hidden_layers": 2}
    assert CARD.layer.keys() == TINY.layer.keys() == TINY.model.keys()


MACHINE = {"python": "3.12.3", "packages": {"torch": "2.11.0", "megatron-core": "0.16.1"}}


def written(folder: Path, **changes) -> Path:
    checks = {
        "doctor": {"state": "ok", "seconds": 2.0, "line": "a | b", "taken_GB": 1.234},
        "loss": {"state": "failed", "seconds": 3.4, "line": "off", "faults": ["too far"]},
    }
    document = {"card": "Some Card", "size": "card", "seconds": 61.0, "machine": MACHINE}
    folder.mkdir(exist_ok=True)
    file = folder / "card.json"
    file.write_text(json.dumps(document | {"checks": checks} | changes))
    return file


def test_the_page_says_what_ran_or_that_nothing_did(tmp_path):
    assert page.section(tmp_path) == page.NOT_RUN
    written(tmp_path / "results")
    lines = page.section(tmp_path / "results").splitlines()
    assert lines[0] == (
        "**Some Card**: 1 of 2 checks passed in 61 s; Python 3.12.3, torch 2.11.0, "
        "megatron-core 0.16.1."
    )
    assert lines[4:] == [
        "| doctor | ok | 2 | 1.23 | a \\| b |",
        "| loss | failed | 3 |  | off. too far |",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"card": None}, "is of no GPU"),
        ({"size": "tiny"}, "sizes 'tiny'"),
        ({"checks": {}}, "holds no check"),
        ({"checks": None}, "holds no check"),
    ],
)
def test_the_page_takes_a_whole_run_on_a_card_alone(changes, words, tmp_path):
    written(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        page.section(tmp_path)
    (tmp_path / "card.json").write_text("[]")
    with pytest.raises(UserError, match=r"not a file of `make gpu-check`"):
        page.section(tmp_path)


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> tuple[Path, dict[str, carry.Part]]:
    folder = tmp_path_factory.mktemp("carried") / "folder"
    parts = carry.parts(40.0)
    assert carry.build(folder, parts) <= 40.0
    return folder, {part.name: part for part in parts}


def test_the_folder_has_what_a_bare_machine_lacks(carried):
    folder, parts = carried
    site = folder / "site"
    assert (site / "megatron/core/__init__.py").is_file() and (site / "tyro").is_dir()
    assert not [file for file in site.rglob("*") if carry._BINARY.search(file.name)]
    names = {d.name for d in importlib.metadata.distributions(path=[str(site)])}
    assert {"megatron-core", "tyro", "moe_upgrpo", "typeguard"} <= names
    for name in ("torch", "numpy", "pyarrow", "safetensors"):
        assert not parts[name].carried and parts[name].why.startswith("compiled")
    assert parts["transformers"].why == "over the limit of 40 MB: has to be there"
    # Nothing of this machine's places.
    assert not list(site.rglob("direct_url.json")) and not list(site.rglob("*.pth"))


def test_a_limit_that_is_too_small_is_said():
    parts = {part.name: part for part in carry.parts(1.0)}
    assert not parts["megatron-core"].carried
    assert sum(part.mb for part in parts.values() if part.carried) <= 1.0


def test_a_warm_start_is_taken_along_if_there_is_one(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "folder"
    assert carry.take_warm_start(folder, cache, 1.0).startswith("no warm start in")
    for name in ("warm-start-a", "warm-start-b"):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors").write_bytes(bytes(10_000))
    assert "not carried" in carry.take_warm_start(folder, cache, 0.005)
    assert carry.take_warm_start(folder, cache, 1.0).endswith("0.0 MB: carried")
    assert len(list(folder.glob("cache/warm-start-*/model.safetensors"))) == 1


def test_what_is_missing_is_named_with_what_helps(monkeypatch, capsys):
    packages = dict.fromkeys((found.NEEDED | found.USED).values(), "1") | {
        "torch": None,
        "megatron-core": None,
    }
    said = found.advice({"packages": packages, "gpus": ["Some Card"]})
    assert len(said) == 2
    assert said[0].startswith("torch is not there, and nothing goes without it")
    assert said[1].startswith("megatron-core is not there") and "--carry" in said[1]
    monkeypatch.setattr(found, "_version", lambda module, name: None)
    assert command.main(["--only", "loss"]) == 1
    assert "torch —" in capsys.readouterr().out


# As on a machine that has torch and numpy alone of what is needed.
BARE = """
import sys
sys.modules |= dict.fromkeys(["megatron", "transformers", "tyro", "rich", "pyarrow", "yaml"])
from benchmarks.gpu.__main__ import main
sys.exit(main(["--only", "loss", "route comparison", "log-probs", "grouped experts", "--out", %r]))
"""


def test_a_machine_without_megatron_core_runs_the_rest(tmp_path):
    """An interpreter of its own: what others have imported would be there."""
    out = tmp_path / "out.json"
    result = subprocess.run(
        [sys.executable, "-c", BARE % str(out)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 1, result.stderr
    assert "megatron-core —" in result.stdout and "! megatron-core is not there" in result.stdout
    written = json.loads(out.read_text())
    assert written["card"] is None and written["size"] == "tiny"
    states = {name: one["state"] for name, one in written["checks"].items()}
    assert states.pop("grouped experts") == "cannot run"
    assert states == dict.fromkeys(["log-probs", "route comparison", "loss"], "ok")


def test_a_gpu_that_torch_is_not_built_for_is_no_card(monkeypatch):
    import torch

    machine = {"gpus": ["Some Card, 80 GB, 580.1"]}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert found.card(machine) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert found.card(machine) == "Some Card"
    assert found.card({"gpus": []}) is None


def test_what_this_machine_has(capsys):
    assert command.main(["--found"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "megatron-core"):
        assert f"{name} {importlib.metadata.version(name)}" in printed
