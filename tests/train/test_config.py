"""Options that the command line and the config file accept, and their words where they do not."""

import sys
from pathlib import Path

import pytest
import tyro

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig, RolloutCorrection
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.config import (
    TinyModel,
    TrainConfig,
    check_supported,
    file_arguments,
    named,
)


def test_a_file_says_what_the_command_line_says_and_the_command_line_wins(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "loss: up-gspo\nsteps: 7\nreference_kl: false\noptimizer:\n  lr: 3.0e-4\n  clip-grad: 0\n"
    )
    config = tyro.cli(TrainConfig, args=[*file_arguments(file), "--steps", "9"])
    assert (config.loss, config.steps, config.reference_kl) == ("up-gspo", 9, False)
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (3e-4, 0)
    assert config.group == TrainConfig().group


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        ([], []),
        (["--steps", "3"], []),
        (["--config", "a.yaml", "--steps", "3"], ["a.yaml"]),
        (["--config=a.yaml", "--config", "b.yaml"], ["a.yaml", "b.yaml"]),
        (["--config"], []),  # tyro says what is missing
    ],
)
def test_files_named_on_the_command_line(arguments, files):
    assert named("--config", arguments) == [Path(file) for file in files]


def test_no_option_at_all_starts_a_run(monkeypatch):
    """Words that `make train` types; the run itself is test_launch.py's."""
    from moe_upgrpo import cli
    from moe_upgrpo.train import loop

    started = []
    monkeypatch.setattr(sys, "argv", ["train_moe.sh"])
    monkeypatch.setattr(loop, "train", started.append)
    cli.main(["train"])
    assert started == [TrainConfig()]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not YAML"), ("- 1\n", "lines of `option: value`"), (None, "No such file")],
)
def test_a_file_that_cannot_be_read(text, words, tmp_path):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=words):
        file_arguments(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps: 3", "'stepps' is not a field; 'steps' is"),
        ("max-refils: 3", "'max_refils' is not a field; 'max_refills' is"),
        ("optimizer: {lrr: 1}", "'optimizer.lrr' is not a field; 'optimizer.lr' is"),
        ("lr: 1", "'lr' is not a field; 'optimizer.lr' is"),
        ("optimiser: {lr: 1}", "'optimiser' is not a field; 'optimizer' is"),
        ("zzzzzz: 1", r"'zzzzzz' is not a field\.$"),
        ("cp: 2", "cp: context parallelism is not supported"),
        ("optimizer: 3", "optimizer is 3; it is a group of the fields algorithm, lr"),
        ("steps: 1\nloss: grpo\nsteps: 2", "'steps' stands in line 1 and in line 3"),
        ("eval_every: 1\neval-every: 2", "'eval_every' stands in line 1 and in line 2"),
        ("config: other.yaml", "config is an option of the command line only"),
    ],
)
def test_a_field_that_cannot_be_names_the_file_and_the_nearest(text, words, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^--config .*config.yaml: {words}"):
        file_arguments(file)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--cp", "--cp: context parallelism is not supported.* tp "),
        ("--context-parallel-size=2", "--context-parallel-size=2: context parallelism"),
        ("--use-remove-padding", "packed sequences are not supported.* micro_batch"),
    ],
)
def test_what_other_stacks_have_and_this_one_has_not_is_refused_by_name(option, words):
    with pytest.raises(UserError, match=words):
        check_supported(["--steps", "3", option, "2"])
    check_supported(["--steps", "3"])


def test_an_unknown_option_names_the_nearest(capsys):
    for given, nearest in (("--stepps", "--steps"), ("--optimizer.lrr", "--optimizer.lr ")):
        with pytest.raises(SystemExit):
            tyro.cli(TrainConfig, args=[given, "3"])
        assert nearest in capsys.readouterr().err


def test_the_recipes_that_are_shipped():
    recipe = Path(__file__).parents[2] / "examples/configs/dapo.yaml"
    needed = ["--model", "model", "--data", "a.jsonl", "b.parquet"]
    config = tyro.cli(TrainConfig, args=[*file_arguments(recipe), *needed])
    assert config.data == (Path("a.jsonl"), Path("b.parquet"))
    loss = PolicyLossConfig.preset(config.loss)
    # The numbers of the paper: section 4.1 and verl's script.
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.28, 10)
    assert loss.aggregation == "token-mean"
    assert (config.prompts, config.group, config.prompts // config.minibatches) == (512, 16, 32)
    assert (config.max_new_tokens, config.overlong_buffer) == (20 * 1024, 4 * 1024)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.1)
    assert config.optimizer.warmup_steps == 10 * config.minibatches * config.epochs
    config.layout(8)


DATA = {"data": ("a.jsonl",), "model": Path("m"), "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "grop"}, "grpo.*up-grpo"),  # the known losses are listed
        ({"steps": 0}, "steps=0"),
        ({"group": 1}, "at least 2 responses"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"eval_problems": 0}, "eval_problems=0"),
        ({"loss": "rspo"}, "needs the router's log-probs.*up-gspo"),
        ({"seed": -1}, "seed=-1"),
        ({"digits": 9}, "digits is 9"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"data": ("a.jsonl",)}, "data without model: .* Give --model"),
        ({"data": ("a",), "model": Path("m")}, "data without max_new_tokens.*--max-new-tokens"),
        (DATA | {"digits": 3}, "digits=3 with data"),
        (DATA | {"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
        (
            {"eval_data": ("a",), "instruction": "Think."},
            "eval_data, instruction without data: --data FILE is missing",
        ),
        ({"reward_wrong": 1.0}, "reward_wrong=1.0"),
        ({"overlong_buffer": 5}, "overlong_buffer=5: more than the longest response's 4 tokens"),
        (DATA | {"overlong_buffer": 10}, "overlong_buffer=10.* 9 tokens"),
        ({"overlong_buffer": -1}, "overlong_buffer=-1"),
        ({"overlong_penalty": 2.0}, "overlong_penalty=2.0 without overlong_buffer"),
        ({"overlong_buffer": 1, "overlong_penalty": -1.0}, "overlong_penalty=-1.0"),
        ({"max_refills": -1}, "max_refills=-1"),
        ({"max_refills": 1, "overlap": True}, "max_refills=1 with overlap.* Leave one out"),
        ({"false_positives": 1.0}, "false_positives=1.0"),
        ({"false_positives": 0.1, "max_refills": 1}, "false_positives with max_refills"),
        ({"engine_every": 0}, "engine_every=0"),
        ({"engine_every": 2}, "engine_every=2 with overlap or analyse_every=20"),
        ({"engine_every": 3, "analyse_every": 0}, "eval_every=20 is not a multiple"),
        (
            {"old_log_probs": "rollout", "correction": RolloutCorrection(weight="token-tis")},
            "would be corrected twice",
        ),
        (
            {"loss": "gspo", "correction": RolloutCorrection(weight="token-tis")},
            "correction.weight: 'token-tis' given",
        ),
    ],
)
def test_values_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (OptimizerSettings, {"lr": float("nan")}, "lr=nan"),
        (OptimizerSettings, {"beta1": 1.5}, "beta1=1.5"),
        (OptimizerSettings, {"algorithm": "lion"}, "'adam' or 'sgd'"),
        (TinyModel, {"hidden": 63}, "tiny.hidden=63: a multiple of 32"),
        (TinyModel, {"layers": 0}, "tiny.layers=0"),
        (TinyModel, {"top_k": 9}, "tiny.top_k=9"),
        (TinyModel, {"experts": -1}, "tiny.experts=-1"),
        (TrainConfig, {"token_log": "sampled"}, "token_log_share=1.0"),
        (TrainConfig, {"token_log_share": 0.5}, "token_log='full'"),
        (TrainConfig, {"token_log": "sampled", "token_log_share": 1.5}, "token_log_share=1.5"),
    ],
)
def test_parts_that_cannot_be(cls, options, words):
    with pytest.raises(UserError, match=words):
        cls(**options)


@pytest.mark.parametrize(
    ("options", "world_size", "words"),
    [
        ({"tp": 3}, 2, "tp=3 does not divide the 2 rank"),
        ({"prompts": 3}, 2, "prompts=3 is not a multiple of the 2 ranks"),
        ({"prompts": 2, "group": 3, "minibatches": 4}, 2, "6 sequences .* 4 mini-batches"),
    ],
)
def test_batches_and_ranks_that_do_not_divide(options, world_size, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**options).layout(world_size)
