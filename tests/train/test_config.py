"""Options that the command line and the config file accept, and their words where they do not."""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from tyro.conf import arg

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig, RolloutCorrection
from moe_upgrpo.megatron.balance import Limit
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.rollout.engines import VLLMSettings
from moe_upgrpo.store import RunFolder
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.command_line import parsed
from moe_upgrpo.train.config import OPTIONS, TrainConfig, starve_after
from moe_upgrpo.train.options import check_own_code, check_supported, file_arguments, named
from moe_upgrpo.train.parts import BatchOptions, LogOptions
from moe_upgrpo.train.tiny import TinyModel


def test_a_file_says_what_the_command_line_says_and_the_command_line_wins(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "loss: up-gspo\nsteps: 7\nreference_kl: false\noptimizer:\n  lr: 3.0e-4\n  clip-grad: 0\n"
    )
    config = tyro.cli(TrainConfig, args=[*file_arguments(file), "--steps", "9"])
    optimizer = OptimizerSettings(lr=3e-4, clip_grad=0)
    given = dict(loss="up-gspo", steps=9, reference_kl=False, optimizer=optimizer)
    assert config == TrainConfig.of(**given)
    assert config.flat() == TrainConfig().flat() | given | {"optimizer": asdict(optimizer)}


# As older runs have them in config.json, and scripts on their command lines.
NAMES = {
    "config", "loss", "correction", "old_log_probs", "steps", "seed", "output_dir", "resume",
    "restart", "timeout", "stop_within", "track", "save_every", "keep", "save_rollouts",
    "load_rollouts", "model", "trust_remote_code", "digits", "tiny", "warm_start", "cache_dir",
    "data", "eval_data", "prompt_field", "answer_field", "chat_template",
    "chat_template_kwargs", "instruction", "max_prompt_tokens", "engine", "engine_url", "vllm",
    "engine_dtype", "engine_weights", "engine_every", "dtype", "tp", "ep", "etp", "pp", "vpp",
    "dispatcher", "recompute", "megatron", "prompts", "group", "minibatches", "epochs",
    "micro_batch", "deterministic", "overlap", "temperature", "max_new_tokens", "reward_wrong",
    "false_positives", "overlong_buffer", "overlong_penalty", "max_refills", "advantage",
    "replay", "analyse_every", "token_log", "token_log_share", "optimizer", "eval_every",
    "eval_samples", "eval_problems", "reference_kl", "report",
}  # fmt: skip


def test_every_option_keeps_its_name_in_one_part_of_the_config():
    config, parts = TrainConfig(), fields(TrainConfig)
    declared = [option.name for part in parts for option in fields(getattr(config, part.name))]
    assert len(declared) == len({*declared}) and NAMES <= {*declared} == OPTIONS.keys()
    assert not {part.name for part in parts} & {*declared}
    assert list(config.flat()) == declared
    json.dumps(config.flat(), default=str)


def test_how_far_ahead_is_generated_and_where():
    ahead = [TrainConfig.of(**given).rollouts.ahead for given in ({}, {"overlap": True})]
    assert ahead == [0, 1] and TrainConfig.of(staleness=3).rollouts.ahead == 3
    assert TrainConfig.of(staleness=1, engine="vllm").rollouts.ahead == 1
    server = TrainConfig.of(staleness=2, engine="vllm", engine_url="http://h:1")
    assert server.rollouts.ahead == TrainConfig.of(staleness=2, engine="sglang").rollouts.ahead == 2
    assert starve_after(server) == 300 and starve_after(server.but(starve_after=7.0)) == 7


def test_a_copy_with_other_values_of_options_in_two_parts():
    config = TrainConfig.of(steps=7, group=2)
    other = config.but(steps=8, prompts=4)
    assert (config.run.steps, config.batch.group, config.batch.prompts) == (7, 2, 32)
    assert (other.run.steps, other.batch.group, other.batch.prompts) == (8, 2, 4)
    with pytest.raises(TypeError, match="stepps"):
        config.but(stepps=8)
    with pytest.raises(UserError, match="steps=0"):
        config.but(steps=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 0", "steps=0: at least 1 is needed"),
        ("--engine-every 2", "engine_every=2 with staleness or analyse_every=20: the weights "
         "that sampled are not kept. Give --staleness 0 and --analyse-every 0"),
        ("--tiny.layers 0", "tiny.layers=0: at least 1 is needed"),
        ("--optimizer.lr -1", "optimizer: lr=-1.0: a number of at least 0 is needed"),
        ("--correction.weight x", "correction.weight: 'x' given; allowed: none, "
         "decoupled, token-tis, sequence-tis, token-mis, sequence-mis, icepop, token-mask, "
         "sequence-mask"),
        ("--eval-samples x", "--eval-samples: invalid literal for int() with base 10: 'x'; "
         "--eval-samples INT Samples of each held-out problem, for pass@1 and pass@k. (default: "
         "4)"),
        ("--vllm.sequences 0", "vllm.sequences=0: at least 1 is needed"),
        ("--micro-batch-tokens 0", "micro_batch_tokens=0: at least 1 is needed"),
        ("--micro-batch 8 --micro-batch-tokens 64",
         "micro_batch=8 with micro_batch_tokens=64: sequences or tokens are counted. Leave one "
         "out; over a file or a run that gives the other, say --micro-batch None or "
         "--micro-batch-tokens None"),
        ("--alarm.entropy-left nan",
         "alarm.entropy_left=nan: a finite number, 0 or more, is needed"),
        ("--engine-url http://h:1", "engine_url=http://h:1 with engine=hf: only vllm and sglang "
         "have servers. Name one, or leave engine_url out"),
        ("--engine sglang --engine-weights fp8",
         "engine_weights='fp8' with engine=sglang: allowed with engine=hf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [TrainConfig, PlanConfig])
def test_a_mistake_on_the_command_line_is_named_as_it_is_typed(cls, words, said):
    with pytest.raises(UserError) as error:
        parsed(cls, words.split(), "prog")
    assert str(error.value) == f"{said}. All options: prog --help"


def test_what_a_micro_batch_holds_is_counted_in_sequences_or_in_tokens(tmp_path):
    """A budget of 128 of the longest is the default, and the command line may take the other than a
    file has. A loss of groups is counted."""
    default = Limit(sequences=128, longest=10)
    assert TrainConfig().micro_batches(10) == default
    assert (default.budget(1), default.budget(4)) == (1280, 128 * 12)
    assert TrainConfig.of(micro_batch=1).micro_batches(10) == Limit(sequences=1)
    assert TrainConfig.of(micro_batch_tokens=64).micro_batches(10).budget(4) == 64
    assert TrainConfig.of(loss="real", group=5).micro_batches(10) == Limit(sequences=125)
    file = tmp_path / "config.yaml"
    file.write_text("micro_batch: 1")
    words = [*file_arguments(file), "--micro-batch", "None", "--micro-batch-tokens", "64"]
    assert parsed(TrainConfig, words, "prog").micro_batches(10).tokens == 64
    file.write_text("micro_batch_tokens: 64")
    words = [*file_arguments(file), "--micro-batch-tokens", "None"]
    assert parsed(TrainConfig, words, "prog").micro_batches(10) == default


@dataclass(frozen=True, kw_only=True)
class Small:
    """Options, with a group of them."""

    run: Annotated[BatchOptions, arg(name="")] = field(default_factory=BatchOptions)
    vllm: VLLMSettings = field(default_factory=VLLMSettings)


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("--run.epochs 3", "--epochs"),  # the part has a name that is not typed
        ("--kv_cache_gib=3", "--vllm.kv-cache-gib"),
        ("--epoch 3", "--epochs"),
        ("--vllm.sequenze 3", "--vllm.sequences"),
        ("--vllm.nope 3", "--vllm.sequences, --vllm.kv-cache-gib"),
        ("--vllm 3", "--vllm.sequences, --vllm.kv-cache-gib"),
        ("--policy grpo", ""),
        ("three", ""),
    ],
)
def test_an_option_that_is_not_known_is_answered_by_those_near_it(words, near):
    with pytest.raises(UserError) as error:
        parsed(Small, words.split(), "prog")
    given = ", ".join(words.split())
    near = near and f". Near it: {near}"
    assert str(error.value) == f"Unrecognized options: {given}{near}. All options: prog --help"


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
        ("context_parallel_size: 2", "context_parallel_size: here it is cp"),
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
        ("--context-parallel-size=2", "--context-parallel-size=2: here it is cp"),
        ("--use-remove-padding", "here it is packing, which goes with .*micro_batch_tokens"),
        ("--use-dynamic-batch-size", "here it is micro_batch_tokens N, .*packing"),
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
    assert config.problems.data == (Path("a.jsonl"), Path("b.parquet"))
    loss = PolicyLossConfig.preset(config.objective.loss)
    # The numbers of the paper: section 4.1 and verl's script.
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.28, 10)
    assert loss.aggregation == "token-mean"
    batch, optimizer = config.batch, config.trainer.optimizer
    assert (batch.prompts, batch.group, batch.prompts // batch.minibatches) == (512, 16, 32)
    assert config.rollouts.max_new_tokens == 20 * 1024
    assert config.rewarding.overlong_buffer == 4 * 1024
    assert (optimizer.lr, optimizer.weight_decay) == (1e-6, 0.1)
    assert optimizer.warmup_steps == 10 * batch.optimizer_steps
    config.layout(8)


def test_the_recipe_of_the_post_has_groups_of_64_and_a_kl_penalty():
    recipe = Path(__file__).parents[2] / "examples/configs/pro-grpo.yaml"
    needed = ["--model", "model", "--data", "a.jsonl"]
    config = tyro.cli(TrainConfig, args=[*file_arguments(recipe), *needed])
    assert config.objective.policy_loss() == PolicyLossConfig.preset("pro-grpo")
    # GRPO's: DeepSeekMath, section 4.2.
    terms, batch, optimizer = config.terms, config.batch, config.trainer.optimizer
    assert (terms.kl_coef, terms.kl_in, terms.kl_estimator) == (0.04, "loss", "k3")
    assert terms.reference_every == 0
    assert (batch.group, batch.sequences, optimizer.lr) == (64, 1024, 1e-6)
    assert config.rollouts.max_new_tokens == 1024
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
        ({"loss": "rspo"}, "needs router_log_probs, which the trainer.*up-gspo"),
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
        (DATA | {"task": "my:Task"}, "task=my:Task with data: it has its own problems"),
        ({"task": "mine"}, "task='mine': module:Class"),
        ({"task_options": '{"a": 1}'}, "task_options='{\"a\": 1}' without task"),
        ({"task": "my:Task", "task_options": "1"}, "task_options='1': a JSON object is needed"),
        ({"reward": ("mth",)}, "reward='mth': allowed are math, .*nearest: math"),
        ({"reward_timeout": 0}, "reward_timeout=0: seconds above 0"),
        ({"reward_workers": 0}, "reward_workers=0"),
        ({"advantage": "rlo"}, "advantage: 'rlo' given; allowed: grpo, dr-.*nearest: rloo"),
        ({"loss": "up-gspoo"}, "loss: 'up-gspoo' given; .*nearest: up-gspo"),
        ({"loss": "ppo"}, "loss: 'ppo' given; allowed: grpo, dapo, .*up-grpo"),
        ({"engine": "hff"}, "engine='hff': allowed are hf, vllm, sglang"),
        ({"engine_url": "http://h:1"}, "engine_url=http://h:1 with engine=hf: only vllm and sgl"),
        ({"engine": "vllm", "engine_url": "http://h:1,http://h:1"}, "different URLs are needed"),
        (
            {"engine": "vllm", "engine_url": "http://h:1", "engine_lost": "go-on"},
            "engine_lost=go-on with engine_url=http://h:1: several servers are needed",
        ),
        (
            {"engine": "vllm", "engine_transfer": "distributed"},
            "engine_transfer=distributed with engine=vllm in each rank: it is for servers",
        ),
        ({"engine": "vllm", "engine_weights": "fp8"}, "engine=vllm: allowed with engine=hf"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"reward_wrong": 1.0}, "reward_wrong=1.0"),
        ({"overlong_buffer": 5}, "overlong_buffer=5: more than the longest response's 4 tokens"),
        (DATA | {"overlong_buffer": 10}, "overlong_buffer=10.* 9 tokens"),
        ({"overlong_buffer": -1}, "overlong_buffer=-1"),
        ({"overlong_penalty": 2.0}, "overlong_penalty=2.0 without overlong_buffer"),
        ({"overlong_buffer": 1, "overlong_penalty": -1.0}, "overlong_penalty=-1.0"),
        ({"max_refills": -1}, "max_refills=-1"),
        ({"max_refills": 1, "overlap": True}, "max_refills=1 with staleness.* Leave one out"),
        ({"staleness": -1}, "staleness=-1: 0 or more"),
        ({"staleness": 2, "overlap": True}, "overlap with staleness=2: it is --staleness 1"),
        ({"staleness": 1, "load_rollouts": "r"}, "staleness with load_rollouts: nothing is"),
        ({"staleness": 3, "analyse_every": 2}, "staleness=3: .* Give --analyse-every 3 or more"),
        (
            {"staleness": 2, "engine": "vllm"},
            "staleness=2 with engine=vllm in each rank: .* 1 is the most. .* --engine hf",
        ),
        ({"staleness": 2, "partial_rollouts": 0}, "partial_rollouts=0: at least 1"),
        ({"staleness": 1, "partial_rollouts": 8}, "no update comes between .* --staleness 2 or"),
        ({"staleness": 2, "partial_rollouts": 8}, "analyse_every=20: .* Give --analyse-every 0"),
        (
            {"staleness": 2, "partial_rollouts": 8, "analyse_every": 0},
            "old_log_probs=trainer: the ratio would not be .* Give --old-log-probs rollout",
        ),
        ({"starve_after": 5.0}, "starve_after=5.0 without staleness: there is no queue"),
        ({"starved": "end"}, "starved=end without staleness"),
        ({"starve_after": 0.0, "staleness": 1}, "starve_after=0.0: seconds above 0"),
        (
            {"starve_after": 60.0, "staleness": 1, "timeout": 1.0},
            "starve_after=60 with timeout=1: the ranks would end each other",
        ),
        ({"false_positives": 1.0}, "false_positives=1.0"),
        ({"false_positives": 0.1, "max_refills": 1}, "false_positives with max_refills"),
        ({"engine_every": 0}, "engine_every=0"),
        ({"engine_every": 2}, "engine_every=2 with staleness or analyse_every=20"),
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
        TrainConfig.of(**options)


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
        (LogOptions, {"token_log": "sampled"}, "token_log_share=1.0"),
        (LogOptions, {"token_log_share": 0.5}, "token_log='full'"),
        (LogOptions, {"token_log": "sampled", "token_log_share": 1.5}, "token_log_share=1.5"),
    ],
)
def test_parts_that_cannot_be(cls, options, words):
    with pytest.raises(UserError, match=words):
        cls(**options)


@pytest.mark.parametrize(
    ("options", "world_size", "words"),
    [
        ({"tp": 3}, 2, "tp=3 does not divide the 2 rank"),
        ({"cp": 2, "packing": True}, 2, "--packing with --cp 2"),
        ({"prompts": 3}, 2, "prompts=3 is not a multiple of the 2 ranks"),
        ({"prompts": 2, "group": 3, "minibatches": 4}, 2, "6 sequences .* 4 mini-batches"),
    ],
)
def test_batches_and_ranks_that_do_not_divide(options, world_size, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.of(**options).layout(world_size)


@pytest.mark.parametrize("option", ["reward", "task"])
def test_code_that_a_run_folder_names_is_asked_for_again(option, tmp_path):
    """Built-in rewards and the names of plug-ins are no code of the folder's."""
    word = "their/file.py:Name"
    stored = {"reward": ["math", word]} if option == "reward" else {"task": word, "reward": []}
    RunFolder.create(tmp_path / "run", stored)
    with pytest.raises(UserError, match=rf"its {option} is code, .*{word}.* --{option} .*again"):
        check_own_code(tmp_path / "run", ["--resume", "run", "--steps=7"])
    check_own_code(tmp_path / "run", [f"--{option}", "math", word])
    check_own_code(tmp_path / "run", [f"--{option}={word}"])
    RunFolder.create(tmp_path / "plain", {"reward": ["0.5*math", "regex:a:b"], "task": "mine"})
    check_own_code(tmp_path / "plain", [])
    RunFolder.create(tmp_path / "older", {})
    check_own_code(tmp_path / "older", [])


def test_a_dense_model_needs_no_ep_1(tmp_path):
    """By its config.json; two ranks then share its tensors and no experts."""
    for model_type, ep in (("qwen3", 1), ("qwen3_moe", 2), ("unknown", 2)):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        layout = TrainConfig.of(model=folder).layout(2)
        assert (layout.tp, layout.ep) == (2, ep), model_type
        assert TrainConfig.of(model=folder, resume=tmp_path).layout(2) == layout
    assert TrainConfig.of(model=tmp_path / "absent").layout(2).ep == 2
    assert TrainConfig.of(model=tmp_path / "qwen3", ep=2).layout(2).ep == 2  # as asked for
