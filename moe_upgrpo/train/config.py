"""Everything a training run can be told, checked before anything starts. Imports no Megatron."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, PolicyLossConfig, RolloutCorrection
from moe_upgrpo.megatron import passed_fields
from moe_upgrpo.megatron.layout import Dispatcher, Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.rollout.engines import EngineName, EngineWeights, VLLMSettings
from moe_upgrpo.train.passed_words import as_words
from moe_upgrpo.train.tiny import TinyModel, WarmStartConfig
from moe_upgrpo.train.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a mixture-of-experts model by reinforcement learning on Megatron-Core actors."""

    config: Path | None = None
    """YAML file of these options; those of the command line win."""
    loss: str = "up-grpo"
    """Loss preset: grpo, gspo, up-grpo, up-gspo, ... An unknown name lists them all."""
    correction: RolloutCorrection = field(default_factory=RolloutCorrection)
    old_log_probs: Literal["trainer", "rollout"] = "trainer"
    """Denominator of the ratio: the trainer's log-probs at the old weights, or the rollout's
    (bypass): the ratio then has the mismatch in it."""
    steps: int = 60
    """RL steps: a batch of rollouts and the optimizer steps on it."""
    seed: int = 0
    """Seed of everything random: problems, sampling, the order of mini-batches."""
    output_dir: Path | None = None
    """The run folder; must not hold another run. None: runs/LOSS-DATE-TIME."""
    resume: Path | None = None
    """Run folder to continue from its newest checkpoint, with its settings; layout, steps, engine
    URL, evaluation and checkpoints may be given anew."""
    restart: bool = False
    """With resume: begin again from step 1 where no state is left, and delete what was logged."""
    timeout: float = 10.0
    """Minutes without a sign of life of a rank, or in one exchange between ranks, until all end."""
    stop_within: float = 120.0
    """Seconds from SIGTERM or Ctrl-C to the checkpoint that is written then; at their end the
    ranks end without it."""
    track: tuple[Tracker, ...] = ("none",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb or both."""
    save_every: int = 20
    """Steps between checkpoints to resume from; the last step has one too; 0: none."""
    keep: int = 2
    """Newest checkpoints to keep; an older one goes once a new one is whole."""
    save_rollouts: Path | None = None
    """Folder to keep every step's rollouts in."""
    load_rollouts: Path | None = None
    """Folder of a run's saved rollouts to train on: no engine, no evaluation."""

    model: Path | None = None
    """Hugging Face checkpoint folder: docs/models.md. None: a tiny model, warm-started, cached."""
    trust_remote_code: bool = False
    """Run Python code of the model folder that its tokenizer needs. Never taken from a run that is
    resumed: give it again."""
    digits: int = 2
    """The task where there is no --data: addition of two numbers of this many digits."""
    tiny: TinyModel = field(default_factory=TinyModel)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    cache_dir: Path = Path("runs/cache")
    """Where warm-started checkpoints are kept."""

    data: tuple[Path, ...] = ()
    """Files of problems to train on, .jsonl or .parquet: docs/data.md."""
    eval_data: tuple[Path, ...] = ()
    """Files of held-out problems. None: no evaluation."""
    prompt_field: str | None = None
    """Name of the prompt in the files. None: prompt, question or problem."""
    answer_field: str | None = None
    """Name of the answer in the files. None: answer, reward_model.ground_truth, ground_truth,
    label or solution."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, where it has one; none; or a file with a Jinja template."""
    chat_template_kwargs: str = "{}"
    """JSON of what the template takes, {"enable_thinking": false} for instance."""
    instruction: str = ""
    """Text after each question."""
    max_prompt_tokens: int | None = None
    """Longer training problems are left out; a longer held-out one is an error. None: no limit."""

    engine: EngineName = "hf"
    """Rollout engine, in every rank or a server: docs/engines.md. hf is transformers."""
    engine_url: str | None = None
    """A running server of the engine, http://HOST:PORT. None: in every rank, or started here."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    engine_weights: EngineWeights = "as-trained"
    """fp8: engine hf samples with weights rounded to e4m3, as an FP8 server would."""
    engine_every: int = 1
    """Steps between weight updates of the engine: rollouts are up to one less stale."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the trainer; with bfloat16 the optimizer keeps fp32 weights."""
    tp: int | None = None
    """Tensor parallelism, with sequence parallelism. None: 2 on an even number of ranks, else 1."""
    ep: int | None = None
    """Expert parallelism. None: 2 on an even number of ranks, else 1."""
    etp: int | None = None
    """Tensor parallelism inside an expert. None: 1 with ep > 1, else tp."""
    pp: int = 1
    """Pipeline parallelism: stages of consecutive layers."""
    vpp: int = 1
    """Virtual pipeline: parts of the model that each stage holds in turn."""
    dispatcher: Dispatcher = "alltoall"
    """How tokens get to their experts: each to its experts' ranks, or all to every such rank."""
    recompute: Literal["none", "full"] = "none"
    """full: keep no activations of a layer, run it again in the backward pass."""
    megatron: dict[str, str] = field(default_factory=dict)
    """Options of Megatron-Core's own, each as --megatron.NAME VALUE: docs/scale.md."""

    prompts: int = 32
    """Prompts in a step, over all ranks."""
    group: int = 8
    """Responses to each prompt."""
    minibatches: int = 4
    """Optimizer steps per pass over a step's responses."""
    epochs: int = 1
    """Passes over a step's responses."""
    micro_batch: int = 128
    """Most sequences in one forward of a rank."""
    deterministic: bool = False
    """On GPUs: only kernels that give the same bits each time, slower ones among them. A CPU's do
    of themselves."""
    overlap: bool = False
    """Generate the next batch while the update runs: one step off-policy."""
    temperature: float = 1.0
    max_new_tokens: int | None = None
    """Longest response. None: the longest sum; with --data it must be said."""
    reward_wrong: float = 0.0
    """Reward of a wrong response; a right one's is 1."""
    false_positives: float = 0.0
    """Share of the wrong responses that are rewarded as right in training, drawn at random: a
    verifier that errs."""
    overlong_buffer: int = 0
    """DAPO: the last so many tokens before max_new_tokens cost reward, linearly; 0: off."""
    overlong_penalty: float = 1.0
    """Taken off at max_new_tokens."""
    max_refills: int = 0
    """DAPO's dynamic sampling: no group that is all right or all wrong is trained on, up to so many
    more batches are sampled in their place; 0: off."""
    advantage: Literal["grpo", "dr-grpo", "rloo"] = "grpo"
    replay: Literal["none", "R2", "R3"] = "none"
    """Expert sets the trainer is held to. none: its own, the rollout's are only compared; R2: the
    old policy's in the update; R3: the rollout's, in the old log-probs and the update."""
    analyse_every: int = 20
    """Steps between analyses: the log-prob gap taken apart, and the noise floors; 0: never."""
    token_log: Literal["full", "sampled", "aggregate"] = "full"
    """Token rows of every sequence, of a share of the sequences, or none."""
    token_log_share: float = 1.0
    """Share of the sequences that token_log=sampled keeps."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    eval_every: int = 20
    """Steps between evaluations on held-out problems; the first and the last step have one too."""
    eval_samples: int = 4
    """Samples of each held-out problem, for pass@1 and pass@k."""
    eval_problems: int = 1024
    """Most held-out problems to use."""
    reference_kl: bool = True
    """Log the KL divergence from the start model: a second copy of it, and a forward each step."""
    report: bool = True
    """Write report.html at the end."""

    def __post_init__(self):
        if "router_log_probs" in self.policy_loss().arguments:
            served = [n for n, c in PRESETS.items() if "router_log_probs" not in c.arguments]
            raise UserError(
                f"loss={self.loss!r} needs the router's log-probs, which the trainer does not "
                f"record; it serves {', '.join(served)}."
            )
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout={self.timeout:g}: minutes above 0 are needed.")
        if not 0 < self.stop_within < math.inf:
            raise UserError(f"stop_within={self.stop_within:g}: seconds above 0 are needed.")
        if self.restart and self.resume is None:
            raise UserError("restart without resume: --resume RUN says which run begins again.")
        if self.digits not in (1, 2, 3):
            raise UserError(f"digits is {self.digits}; 1, 2 or 3 are allowed.")
        self._check_data()
        self._check_rewards()
        for name in ("seed", "analyse_every", "save_every", "overlong_buffer", "max_refills"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: 0 or more is needed.")
        for name in ("steps", "prompts", "minibatches", "epochs", "micro_batch", "eval_every",
                     "eval_samples", "eval_problems", "keep", "engine_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        if (self.token_log == "sampled") != (self.token_log_share != 1):
            raise UserError(
                f"token_log={self.token_log!r} with token_log_share={self.token_log_share}: a "
                "share between 0 and 1 goes with token_log=sampled, and only with it."
            )
        if not 0 < self.token_log_share <= 1:
            raise UserError(f"token_log_share={self.token_log_share}: above 0 and below 1.")
        self._check_engine_every()
        if self.correction.active and self.old_log_probs == "rollout":
            raise UserError(
                "correction with old_log_probs=rollout: the ratio is taken to the rollout already, "
                "and would be corrected twice. Leave one out."
            )
        if self.overlap and self.load_rollouts is not None:
            raise UserError("overlap with load_rollouts: nothing is generated. Leave one out.")
        if self.group < 2:
            raise UserError(f"group={self.group}: advantages compare at least 2 responses.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: RL samples at a temperature above 0.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens}: at least 1 is needed, or leave it out."
            )

    def _check_engine_every(self) -> None:
        every = self.engine_every
        if every == 1:
            return
        if self.overlap or self.analyse_every:
            raise UserError(
                f"engine_every={every} with overlap or analyse_every={self.analyse_every}: the "
                "weights that sampled are not kept. Give --no-overlap and --analyse-every 0."
            )
        for name in ("steps", "eval_every", "save_every"):
            if getattr(self, name) % every:
                raise UserError(
                    f"{name}={getattr(self, name)} is not a multiple of engine_every={every}: "
                    "the engine evaluates, and is resumed, with the newest weights."
                )

    def _check_data(self) -> None:
        if self.data:
            needed = {
                "model": "the tiny model knows the signs of sums only",
                "max_new_tokens": "nobody knows how long the answers are",
            }
            for name, why in needed.items():
                if getattr(self, name) is None:
                    option = name.replace("_", "-")
                    raise UserError(f"data without {name}: {why}. Give --{option}.")
            if self.digits != TrainConfig.digits:
                raise UserError(
                    f"digits={self.digits} with data: sums or the files' problems, not both."
                )
            if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
                raise UserError(
                    f"max_prompt_tokens={self.max_prompt_tokens}: at least 1 is needed."
                )
        elif given := [
            name
            for name in ("eval_data", "prompt_field", "answer_field", "chat_template",
                         "chat_template_kwargs", "instruction", "max_prompt_tokens")
            if getattr(self, name) != getattr(TrainConfig, name)
        ]:  # fmt: skip
            raise UserError(f"{', '.join(given)} without data: --data FILE is missing.")

    def _check_overlong_buffer(self) -> None:
        from moe_upgrpo.tasks.arithmetic import ArithmeticTask  # here: it brings numpy

        longest = self.max_new_tokens or ArithmeticTask(self.digits).max_response_tokens
        if self.overlong_buffer > longest:
            raise UserError(
                f"overlong_buffer={self.overlong_buffer}: more than the longest response's "
                f"{longest} tokens."
            )

    def _check_rewards(self) -> None:
        if not 0 <= self.false_positives < 1:
            raise UserError(f"false_positives={self.false_positives}: 0 or more and below 1.")
        if self.false_positives and self.max_refills:
            raise UserError(
                "false_positives with max_refills: groups are kept or dropped by the true "
                "verdicts. Leave one out."
            )
        if not -math.inf < self.reward_wrong < 1:
            raise UserError(f"reward_wrong={self.reward_wrong}: a number below 1 is needed.")
        if not 0 <= self.overlong_penalty < math.inf:
            raise UserError(f"overlong_penalty={self.overlong_penalty}: 0 or more is needed.")
        if self.overlong_buffer:
            self._check_overlong_buffer()
        if self.overlong_penalty != 1 and not self.overlong_buffer:
            raise UserError(
                f"overlong_penalty={self.overlong_penalty} without overlong_buffer: nothing is "
                "overlong. Give both or none."
            )
        if self.max_refills and self.overlap:
            raise UserError(
                f"max_refills={self.max_refills} with overlap: refills would be sampled with newer "
                "weights than the batch they fill. Leave one out."
            )

    def policy_loss(self) -> PolicyLossConfig:
        """The preset, with this run's rollout correction."""
        changed = {"correction": self.correction} if self.correction.active else {}
        return PolicyLossConfig.preset(self.loss, **changed)

    def layout(self, world_size: int) -> Layout:
        """The layout on `world_size` ranks, with all checked that can be before the start."""
        tiny = self.model is None or self.resume is not None  # whose config.json names the model
        dense = tiny and self.tiny.dense
        layout = Layout.for_world(
            world_size,
            tp=self.tp,
            ep=1 if dense and self.ep is None else self.ep,
            etp=self.etp,
            pp=self.pp,
            vpp=self.vpp,
            dispatcher=self.dispatcher,
        )
        layout.check_world(world_size)
        if self.prompts % world_size:
            raise UserError(
                f"prompts={self.prompts} is not a multiple of the {world_size} ranks, which "
                "generate equal shares."
            )
        data_parallel = layout.data_parallel(world_size)
        if self.prompts * self.group % (data_parallel * self.minibatches):
            raise UserError(
                f"prompts x group = {self.prompts * self.group} sequences cannot be split into "
                f"{self.minibatches} mini-batches on {data_parallel} data-parallel rank(s): it "
                f"must be a multiple of {data_parallel * self.minibatches}."
            )
        return layout


# What may be given anew where a run is resumed: it says where the run is computed, how far it goes
# and how it is watched. Everything else says what the run is.
MAY_CHANGE = {
    "steps": "a run goes on where it ended; fewer than are done is refused",
    "tp": "the layout, and with it the number of ranks: checkpoints are of the whole model",
    "ep": "the layout",
    "etp": "the layout",
    "pp": "the layout",
    "vpp": "the layout",
    "dispatcher": "how experts are reached",
    "recompute": "memory",
    "megatron": "of its options those about memory and communication: [scale.md](scale.md)",
    "micro_batch": "memory",
    "vllm": "memory",
    "engine_url": "where the engine is; which engine it is may not change",
    "cache_dir": "not used any more: the start model is there",
    "max_refills": "how long a step looks for groups",
    "eval_data": "evaluation",
    "eval_every": "evaluation",
    "eval_samples": "evaluation",
    "eval_problems": "evaluation",
    "reference_kl": "a measurement, and the memory of a second model",
    "track": "how the run is watched",
    "save_every": "checkpoints",
    "keep": "checkpoints",
    "deterministic": "which kernels compute on a GPU",
    "timeout": "how long ranks wait for each other",
    "stop_within": "how long a signal waits for a checkpoint",
    "report": "how the run is watched",
}
# Of the command line only.
_OF_THE_START = ("config", "resume", "restart")
# Which folder, how the options came, and what may be done on this machine.
_NO_SETTINGS = (*_OF_THE_START, "output_dir", "trust_remote_code")


def changes(stored: dict[str, Any], config: TrainConfig) -> dict[str, list]:
    """Setting -> [the run's value, the value now] of what a resumed run changes.

    `stored` is the run's config.json; a setting that it does not know had its default. Raises
    UserError naming both values of a setting that may not change.
    """
    if config.output_dir is not None and config.output_dir.resolve() != config.resume.resolve():
        raise UserError(
            f"--output-dir {config.output_dir} with --resume {config.resume}: a run is continued "
            "in its own folder. Leave --output-dir out."
        )
    now, before = dict(_settings(asdict(config))), dict(_settings(stored))
    before = dict(_settings(asdict(TrainConfig()))) | before
    changed = {n: [before.get(n), v] for n, v in now.items() if before.get(n) != v}
    wrong = [name for name in changed if not _may_change(name)]
    if wrong:
        values = "; ".join(f"{n} was {changed[n][0]}, now {changed[n][1]}" for n in wrong)
        raise UserError(
            f"--resume {config.resume}: {values}. That would be another run: leave the option out, "
            f"or start one with another --output-dir. May change: {', '.join(MAY_CHANGE)}."
        )
    return changed


def _may_change(setting: str) -> bool:
    group, _, name = setting.partition(".")
    return group in MAY_CHANGE and (group != "megatron" or passed_fields.may_change(name))


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value as JSON has it) of the settings among `values`."""
    known = {field.name for field in fields(TrainConfig)} - {*_NO_SETTINGS}
    for name, value in values.items():
        if not prefix and name not in known:
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield prefix + name, [str(v) if isinstance(v, Path) else v for v in value]
        else:
            yield prefix + name, str(value) if isinstance(value, Path) else value


_CONTEXT = (
    "context parallelism is not supported: each rank sees whole sequences. tp (with sequence "
    "parallelism) and recompute=full save activations."
)
_PACKED = (
    "packed sequences are not supported: sequences are padded to the longest of their micro-batch. "
    "A smaller micro_batch pads less."
)
# By the names that Megatron-LM, verl, slime and NeMo-RL give them.
NOT_SUPPORTED = {
    "cp": _CONTEXT,
    "context_parallel_size": _CONTEXT,
    "packed_sequences": _PACKED,
    "sequence_packing": _PACKED,
    "use_remove_padding": _PACKED,
    "use_dynamic_batch_size": _PACKED,
}


def check_supported(arguments: Sequence[str]) -> None:
    """Raise UserError where an option asks for what other stacks have and this one has not."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in NOT_SUPPORTED:
            raise UserError(f"{argument}: {NOT_SUPPORTED[name]}")


def named(option: str, arguments: Sequence[str]) -> list[Path]:
    """The paths of every `OPTION PATH` and `OPTION=PATH` among command line arguments."""
    paths = []
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == option and (value or arguments[i + 1 :]):
            paths.append(Path(value or arguments[i + 1]))
    return paths


def run_arguments(path: Path) -> list[str]:
    """The settings of a run folder as the command line would have them; see `file_arguments`."""
    from moe_upgrpo.store import read_config  # here: it brings pyarrow

    return [
        word
        for name, value in _settings(read_config(path))
        if value is not None  # the default of every setting that can be None
        for word in _option(name, value)
    ]


def options(values: dict[str, Any]) -> list[str]:
    """Options as the command line would have them, of a mapping as `file_arguments` reads it.

    Raises UserError where a field is not known.
    """
    return list(_flatten(values, TrainConfig, prefix=""))


def file_arguments(path: Path) -> list[str]:
    """The options in a YAML (or JSON) file as the command line would have them.

    `optimizer: {lr: 3.0e-4}` becomes `--optimizer.lr 3.0e-4`: kinds of values and their mistakes
    are those of the command line, whose own options come after and win.

    Raises UserError, which names the file: it cannot be read, or a field is not known (the nearest
    one is named) or stands there twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if not isinstance(values, dict):
            raise UserError("lines of `option: value` are needed.")
        return options(values)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML without fields that stand there twice, of which the last would win silently."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{name!r} stands in line {lines[name]} and in line {line}.")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _flatten(values: dict, cls: type, prefix: str) -> Iterator[str]:
    known = {f.name: f.default_factory for f in fields(cls) if f.name not in _OF_THE_START}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(_unknown(f"{prefix}{name}"))
        group = known[name] if is_dataclass(known[name]) else None
        if group and not isinstance(value, dict):
            inner = ", ".join(f.name for f in fields(group))
            raise UserError(f"{prefix}{name} is {value!r}; it is a group of the fields {inner}.")
        if known[name] is dict:
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name} is {value!r}; lines of `name: value` are needed.")
            for inner, of_inner in value.items():
                yield from as_words(inner, of_inner)
        elif group:
            yield from _flatten(value, group, f"{prefix}{name}.")
        else:
            as_text = json.dumps(value) if isinstance(value, dict) else value
            yield from _option(f"{prefix}{name}", as_text)


def _unknown(given: str) -> str:
    if given in NOT_SUPPORTED:
        return f"{given}: {NOT_SUPPORTED[given]}"
    names = [f.name for f in fields(TrainConfig)]
    for f in fields(TrainConfig):
        if is_dataclass(f.default_factory):
            names += [f"{f.name}.{inner.name}" for inner in fields(f.default_factory)]
    # `lr` at the top is optimizer.lr.
    near = [name for name in names if name.split(".")[-1] == given.split(".")[-1]]
    near = near or get_close_matches(given, names, n=1)
    if given in names:
        return f"{given} is an option of the command line only."
    return f"{given!r} is not a field" + (f"; {near[0]!r} is." if near else ".")


def _option(name: str, value: Any) -> list[str]:
    if name.startswith("megatron."):
        return as_words(name.partition(".")[2], value)
    *outer, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*outer, last if value else f"no-{last}"])]
    option = "--" + ".".join([*outer, last])
    # With "=" a value may begin with a dash.
    return [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
