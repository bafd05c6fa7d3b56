"""Megatron-Core's own options on the command line, in files, in config.json, and at the start."""

from pathlib import Path

import pytest
import tyro

from moe_upgrpo import cli
from moe_upgrpo.errors import UserError
from moe_upgrpo.store import RunFolder
from moe_upgrpo.tools.plan import make_plan
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.checks import check_start
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.options import changes, file_arguments, run_arguments
from moe_upgrpo.train.passed_words import folded

SMALL = Path(__file__).parents[2] / "examples/configs/models/qwen3-30b-a3b"


def parsed(words: list[str]) -> TrainConfig:
    return cli._parse_with_files(TrainConfig, words, "train_moe.sh")


@pytest.mark.parametrize(
    "words",
    [
        ["--megatron.overlap_grad_reduce", "true", "--megatron.bucket_size", "4000"],
        ["--megatron.overlap-grad-reduce=True", "--megatron.bucket-size=4000"],
        ["--megatron.bucket_size", "1", "--megatron.overlap_grad_reduce=true",
         "--megatron.bucket-size", "4000"],
    ],
)  # fmt: skip
def test_both_ways_of_writing_mean_the_same_and_the_last_value_wins(words):
    config = parsed(["--steps", "3", *words, "--prompts", "64"])
    assert config.trainer.megatron == {"overlap_grad_reduce": "true", "bucket_size": "4000"}
    assert (config.run.steps, config.batch.prompts) == (3, 64)


@pytest.mark.parametrize(
    ("value", "text"),
    [("-1", "-1"), ("null", "null"), ("[a, 2]", '["a", 2]'), ("1e-4", "1e-4"), ("flash", "flash"),
     ("FALSE", "false"), (".5", "0.5"), ("a: b: c", "a: b: c")],
)  # fmt: skip
def test_a_value_is_kept_as_yaml_reads_it(value, text):
    assert parsed([f"--megatron.x={value}"]).trainer.megatron == {"x": text}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--megatron.fp8"], "--megatron.fp8 without a value"),
        (["--megatron.fp8", "--steps", "3"], "--megatron.fp8 without a value"),
        (["--megatron.fp8="], "--megatron.fp8 without a value"),
        (["--megatron", "fp8", "e4m3"], "write --megatron.NAME VALUE"),
    ],
)
def test_a_name_without_a_value_is_an_error(words, said):
    with pytest.raises(UserError, match=said):
        folded(words)


def test_a_file_says_the_same_and_the_command_line_wins(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "steps: 7\nmegatron:\n  overlap-grad-reduce: false\n  bucket_size: 9\n"
        "  offload_modules: [core_attn]\n"
    )
    config = parsed(["--config", str(file), "--megatron.bucket_size", "10"])
    assert config.trainer.megatron == {
        "overlap_grad_reduce": "false",
        "bucket_size": "10",
        "offload_modules": '["core_attn"]',
    }
    for text in ("megatron: 3\n", "megatron: [a]\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"megatron is .*; lines of `name: value` are needed"):
            file_arguments(file)
    file.write_text("megatron:\n  bucket_size: 9\n  bucket-size: 8\n")
    with pytest.raises(UserError, match="'bucket_size' stands in line 2 and in line 3"):
        file_arguments(file)


def test_a_resumed_run_has_them_and_may_change_those_about_memory_alone(tmp_path):
    given = {"overlap_grad_reduce": "true", "grad_reduce_in_fp32": "false"}
    run = RunFolder.create(tmp_path / "run", {"megatron": given, "steps": 9, "keep": 3})
    assert parsed(run_arguments(run.path)).trainer.megatron == given
    resumed = ["--resume", str(run.path)]
    config = parsed([*resumed, "--megatron.overlap_grad_reduce", "false"])
    stored = {"megatron": given, "steps": 9, "keep": 3}
    assert changes(stored, config) == {"megatron.overlap_grad_reduce": ["true", "false"]}
    config = parsed([*resumed, "--megatron.optimizer_cpu_offload", "true"])
    assert changes(stored, config) == {"megatron.optimizer_cpu_offload": [None, "true"]}
    config = parsed([*resumed, "--megatron.grad_reduce_in_fp32", "true"])
    with pytest.raises(UserError, match=r"megatron.grad_reduce_in_fp32 was false, now true"):
        changes(stored, config)


@pytest.mark.parametrize("world_size", [None, 2])
def test_before_any_rank_starts_they_are_checked(world_size):
    with pytest.raises(UserError, match=r"--megatron.bucket_sise: .* nearest is bucket_size"):
        check_start(TrainConfig.of(megatron={"bucket_sise": "1"}), world_size)
    check_start(TrainConfig.of(megatron={"bucket_size": "100"}), world_size)


def test_plan_takes_what_needs_a_gpu_and_counts_what_the_host_holds():
    options = dict(
        model=SMALL, data=("a.jsonl",), max_prompt_tokens=100, max_new_tokens=100, tp=2, ep=8,
        dtype="bfloat16", engine="vllm", engine_url="http://host:1",
    )  # fmt: skip
    plain = make_plan(PlanConfig.of(**options)).fullest.held["optimizer"]
    half = {"optimizer_cpu_offload": "true", "optimizer_offload_fraction": "0.5"}
    for given, share in ((half, 0.5), ({"optimizer_cpu_offload": "true"}, 0), ({"fp8": "e4m3"}, 1)):
        plan = make_plan(PlanConfig.of(**options, megatron=given))
        assert plan.fullest.held["optimizer"] == pytest.approx(share * plain) and plain > 1e9
        assert ("optimizer offload" in dict(plan.assumptions)) == (share < 1)
    with pytest.raises(UserError, match=r"--megatron.hidden_size: refused"):
        make_plan(PlanConfig.of(**options, megatron={"hidden_size": "1"}))


def test_help_names_the_way(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=["--help"])
    assert "--megatron.NAME" in capsys.readouterr().out
