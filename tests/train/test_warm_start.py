"""The warm start on one-digit sums and a smaller model; two digits take half a minute a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import SamplingConfig
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.tasks import ArithmeticTask
from moe_upgrpo.train.evaluate import evaluate
from moe_upgrpo.train.warm_start import (
    WarmStartConfig,
    expected_accuracy,
    tiny_model_config,
    warm_start,
)

TASK = ArithmeticTask(digits=1)
MODEL = tiny_model_config(
    layers=2, hidden=64, heads=2, kv_heads=1, experts=4, expert_intermediate=32
)
SETTINGS = WarmStartConfig(target_pass_at_1=0.3, probe_problems=64, batch_size=32, max_steps=500)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    lines = []
    cache = tmp_path_factory.mktemp("cache")
    state = torch.get_rng_state()
    folder = warm_start(TASK, MODEL, settings=SETTINGS, cache_dir=cache, progress=lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    return folder, lines


def test_it_stops_at_the_target_on_training_problems(made):
    folder, lines = made
    reached = json.loads((folder / "warm_start.json").read_text())["reached"]
    assert reached["pass@1"] >= 0.3
    assert reached["step"] < 500
    assert len(lines) == 1 + -(-reached["step"] // 50)  # what comes; every 50 steps and the last
    assert f"step {reached['step']}, " in lines[-1]
    assert f"pass@1 {reached['pass@1']:.3f}" in lines[-1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    probe = TASK.training_problems(64, seed=0, step=0)
    assert expected_accuracy(model, TASK, probe)["pass@1"] == pytest.approx(
        reached["pass@1"], abs=1e-5
    )


def test_the_expected_accuracy_is_the_sampled_one(made):
    """Teacher forcing against sampling and verifying, which share no code."""
    folder, _ = made
    problems = TASK.training_problems(64, seed=0, step=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = expected_accuracy(model, TASK, problems)
    sampled = evaluate(
        HFEngine(folder, "float32", "cpu"),
        problems,
        TASK,
        sampling=SamplingConfig(max_new_tokens=TASK.max_response_tokens),
        samples=64,
        seed=1,
    )
    assert sampled["eval/greedy"] == pytest.approx(expected["greedy"])
    # 4,096 samples: a standard error below .008.
    assert sampled["eval/pass@1"] == pytest.approx(expected["pass@1"], abs=0.03)


def test_the_folder_is_a_hugging_face_checkpoint(made):
    folder, _ = made
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        for expert in range(4):
            for name, shape in [
                ("gate_proj", (32, 64)),
                ("up_proj", (32, 64)),
                ("down_proj", (64, 32)),
            ]:
                weight = weights[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"]
                assert weight.shape == shape and weight.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problem = TASK.problem(3, 4)
    np.testing.assert_array_equal(tokenizer(problem.prompt).input_ids, problem.prompt_ids)
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == 1


def test_a_second_call_makes_nothing(made):
    folder, _ = made
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    lines = []
    again = warm_start(
        TASK, MODEL, settings=SETTINGS, cache_dir=folder.parent, progress=lines.append
    )
    assert again == folder and not lines
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize("changed", ["seed", "target", "model", "task"])
def test_whatever_makes_it_changes_its_name(made, changed, monkeypatch):
    folder, _ = made
    settings, model, task = SETTINGS, MODEL, TASK
    if changed == "seed":
        settings = replace(SETTINGS, seed=1)
    if changed == "target":
        settings = replace(SETTINGS, target_pass_at_1=0.31)
    if changed == "model":
        model = tiny_model_config(layers=1)
    if changed == "task":
        task = ArithmeticTask(digits=2)
    trained = []

    def training(*arguments):
        trained.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_upgrpo.train.warm_start._train", training)
    with pytest.raises(KeyboardInterrupt):
        warm_start(task, model, settings=settings, cache_dir=folder.parent)
    assert len(trained) == 1


@pytest.mark.parametrize(("max_steps", "probe_every"), [(20, 10), (3, 10), (51, 40)])
def test_a_target_out_of_reach_is_an_error_and_leaves_nothing(tmp_path, max_steps, probe_every):
    lines = []
    with pytest.raises(UserError, match=rf"pass@1 0.99 in {max_steps} steps \(seed 0\)"):
        warm_start(
            TASK,
            MODEL,
            settings=replace(
                SETTINGS, target_pass_at_1=0.99, max_steps=max_steps, probe_every=probe_every
            ),
            cache_dir=tmp_path,
            progress=lines.append,
        )
    assert not list(tmp_path.iterdir())
    before, *steps = lines
    assert f": {max_steps} steps at most" in before and str(tmp_path) in before
    assert [line.split(",")[0] for line in steps] == ["warm start: step 50"] * (max_steps > 50)


def test_the_default_model_has_a_million_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model_config())
    assert sum(weight.numel() for weight in model.parameters()) == 996_736
    with pytest.raises(UserError, match="top_k is 9; 1 to 8"):
        tiny_model_config(top_k=9)


def test_without_experts_the_model_is_dense_and_as_wide_as_the_chosen_experts():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model_config(experts=0, layers=1))
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.model.layers[0].mlp.up_proj.weight.shape == (2 * 64, 128)


def test_bad_settings_are_refused():
    for bad, message in [
        ({"target_pass_at_1": 1.0}, "target_pass_at_1 is 1.0"),
        ({"max_steps": 0}, "max_steps is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            WarmStartConfig(**bad)
