"""What the command line and the config file accept, and what they say where they do not."""

import sys
from pathlib import Path

import pytest
import tyro

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.config import TinyModel, TrainConfig, file_arguments, named


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
    """What `make train` types; the run itself is test_launch.py's."""
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


def test_an_unknown_option_in_a_file_names_the_nearest(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("stepps: 3\n")
    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=file_arguments(file))
    assert "--steps" in capsys.readouterr().err


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
