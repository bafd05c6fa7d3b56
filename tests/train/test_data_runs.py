"""Whole runs on problems of files, as a user starts them: real torchrun, two ranks, DAPO's recipe.

Not covered: that a model learns from a file what it learns from the arithmetic task (it cannot in
two steps); verl's own data files, whose layout test_files.py has.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from moe_upgrpo.rollout.cache import load_rollouts
from moe_upgrpo.store import read_config, read_evaluations, read_metrics, read_tokens
from moe_upgrpo.store.metrics import metric
from moe_upgrpo.tasks import MathTask, arithmetic
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.options import changes, run_arguments
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.train.test_launch import job

PROMPTS, GROUP = 4, 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random model of the arithmetic characters, and sums that it gets right by chance."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(tiny_model_config(layers=2, hidden=64))
    model.save_pretrained(folder / "model")
    arithmetic.save_tokenizer(folder / "model")
    # As the hub and other tools leave model folders; consolidated.* is of another model.
    for name in (".cache/huggingface/x.lock", "figures/accuracy.png", "pytorch_model.bin"):
        (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model" / name).touch()
    save_file({"tok_embeddings.weight": torch.ones(4)}, folder / "model/consolidated.safetensors")
    rows = [{"question": f"{a}-{b}=", "answer": 1} for a in range(6) for b in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text('{"prompt": "9-8=", "answer": "1"}\n')
    return folder


def options(files, run, *more):
    return (
        *("--config", "examples/configs/dapo.yaml", "--model", str(files / "model")),
        *("--data", str(files / "train.jsonl"), "--output-dir", str(run)),
        *("--max-new-tokens", "4", "--overlong-buffer", "2", "--steps", "2"),
        *("--prompts", str(PROMPTS), "--group", str(GROUP), "--minibatches", "2"),
        *("--dtype", "float32", "--micro-batch", "64", "--save-every", "0"),
        *("--token-log", "full", "--token-log-share", "1", *more),
    )


@pytest.fixture(scope="module")
def run(files):
    folder, rollouts = files / "run", files / "rollouts"
    more = ("--eval-data", str(files / "eval.jsonl"), "--save-rollouts", str(rollouts))
    more = (*more, "--trust-remote-code")
    result = job(2, *options(files, folder, *more), timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_a_run_of_the_dapo_recipe_on_a_file(run, files):
    folder, output = run
    assert "60 problems (prompt from 'question', answer from 'answer')" in output
    assert "1 problems (prompt from 'prompt', answer from 'answer')" in output
    assert read_config(folder)["policy_loss"]["clip_high"] == 0.28
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "eval/maj@32" in row] == [0, 2]
    evaluated = read_evaluations(folder).to_pylist()
    assert [(row["step"], row["prompt"], row["samples"]) for row in evaluated] == [
        (step, "9-8=", 32) for step in (0, 2)
    ]
    for row, of_problem in zip((rows[0], rows[2]), evaluated, strict=True):
        assert row["eval/avg@32"] == of_problem["correct"] / 32
        assert row["eval/maj@32"] == pytest.approx(of_problem["majority"])
    task = MathTask([files / "train.jsonl"], model_dir=files / "model")
    for row in rows[1:]:
        rollouts = load_rollouts(files / "rollouts", row["step"])
        texts = [arithmetic.decode(r.response_ids).removesuffix("<eos>") for r in rollouts]
        problem = task.training_problems(1, seed=0, step=1)[0]  # all have the same answer
        right = np.array([task.reward(problem, r.response_ids) for r in rollouts])
        groups = right.reshape(PROMPTS, GROUP)
        assert (groups.max(axis=1) == 1).all() and (groups.min(axis=1) == 0).all(), texts
        # 1 or -1, less half of the penalty at 3 tokens and all of it at 4.
        lengths = np.array([len(r.response_ids) for r in rollouts])
        expected = np.where(right == 1, 1, -1) - np.clip((lengths - 2) / 2, 0, None)
        table = read_tokens(folder, steps=[row["step"]]).to_pandas()
        logged = table.groupby("sequence").reward.first()
        np.testing.assert_allclose(logged, expected, rtol=1e-6)
        assert row["reward/mean"] == pytest.approx(expected.mean(), rel=1e-5)
        assert row["groups/kept"] == PROMPTS
        assert row["groups/sampled"] % PROMPTS == 0
        # A share of groups that are mixed near one in three: refills were needed.
        assert PROMPTS < row["groups/sampled"] <= 10 * PROMPTS
        assert row["groups/mixed_rate"] * row["groups/sampled"] >= PROMPTS
        assert row["reward/correct_rate"] < right.mean()
        assert row["verifier/killed_rate"] == 0
        for name in row.keys() - {"step"}:
            assert metric(name).meaning
    task.close()


def test_of_the_model_folder_its_own_weights_are_trained_and_the_tokenizer_is_kept(run, files):
    folder, output = run
    assert "the weights are model.safetensors; ignored: consolidated.safetensors" in output
    (trained,) = (folder / "checkpoints").iterdir()
    assert trained.name == "step-000002"
    assert {str(path.relative_to(trained)) for path in trained.rglob("*")} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer("9-8=").input_ids == arithmetic.encode("9-8=").tolist()


def test_that_code_may_be_run_is_said_and_not_inherited(run):
    """Whoever resumes a folder of somebody else's has to ask for it again."""
    folder, output = run
    assert "--trust-remote-code: code of " in output
    assert read_config(folder)["trust_remote_code"] is True
    assert not any("trust-remote-code" in word for word in run_arguments(folder))
    again = TrainConfig.of(resume=folder)
    assert "trust_remote_code" not in changes({"trust_remote_code": True}, again)


@pytest.mark.slow
def test_saved_rollouts_of_refilled_steps_are_trained_on_again(run, files):
    again = files / "again"
    more = ("--load-rollouts", str(files / "rollouts"))
    result = job(2, *options(files, again, *more), timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (
        [row for row in read_metrics(folder) if "reward/mean" in row] for folder in (run[0], again)
    )
    for name in ("reward/mean", "loss/policy", "grad_norm", "ratio/max", "tokens/sampled"):
        assert [row[name] for row in second] == pytest.approx([row[name] for row in first]), name
    assert [row["groups/sampled"] for row in second] == [PROMPTS, PROMPTS]
