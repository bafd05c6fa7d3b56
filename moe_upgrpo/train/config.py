"""Everything a training run can be told, checked before anything starts. Imports no Megatron."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, PolicyLossConfig
from moe_upgrpo.megatron.layout import Dispatcher, Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.rollout.engines import EngineName, VLLMSettings
from moe_upgrpo.store import read_config
from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.train.warm_start import WarmStartConfig


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """The Qwen3-MoE (dense Qwen3 with experts=0) that is made where no --model is given."""

    layers: int = 4
    hidden: int = 128
    experts: int = 8
    top_k: int = 2
    expert_intermediate: int = 64

    def __post_init__(self):
        for name in ("hidden", "expert_intermediate"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise UserError(f"tiny.{name}={getattr(self, name)}: a multiple of 32 is needed.")
        if self.layers < 1:
            raise UserError(f"tiny.layers={self.layers}: at least 1 is needed.")
        if self.experts < 0:
            raise UserError(f"tiny.experts={self.experts}: 0 (a dense model) or more is needed.")
        if self.top_k < 1 or (self.experts and self.top_k > self.experts):
            raise UserError(f"tiny.top_k={self.top_k}: 1 to tiny.experts={self.experts}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a mixture-of-experts model by reinforcement learning on Megatron-Core actors."""

    config: Path | None = None
    """YAML file of these options; those of the command line win."""
    loss: str = "up-grpo"
    """Loss preset: grpo, gspo, up-grpo, up-gspo, ... An unknown name lists them all."""
    steps: int = 60
    """RL steps: a batch of rollouts and the optimizer steps on it."""
    seed: int = 0
    """Of everything random: problems, sampling, the order of mini-batches."""
    output_dir: Path | None = None
    """The run folder; must not hold another run. None: runs/LOSS-DATE-TIME."""
    resume: Path | None = None
    """Run folder to continue from its newest checkpoint, with its settings; layout, steps, engine
    URL, evaluation and checkpoints may be given anew."""
    save_every: int = 20
    """Steps between checkpoints to resume from; the last step has one too; 0: none."""
    keep: int = 2
    """Newest checkpoints to keep; an older one goes once a new one is whole."""
    save_rollouts: Path | None = None
    """Folder to keep every step's rollouts in."""
    load_rollouts: Path | None = None
    """Folder of a run's saved rollouts to train on: no engine, no evaluation."""

    model: Path | None = None
    """Hugging Face checkpoint folder (qwen3_moe). None: a tiny model, warm-started and cached."""
    digits: int = 2
    """The task: addition of two numbers of this many digits."""
    tiny: TinyModel = field(default_factory=TinyModel)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    cache_dir: Path = Path("runs/cache")
    """Where warm-started checkpoints are kept."""

    engine: EngineName = "hf"
    """Rollout engine: hf (transformers) or vllm in every rank, or an sglang server."""
    engine_url: str | None = None
    """A running server of vllm or sglang, http://HOST:PORT. None: sglang's is started here."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trainer; with bfloat16 the optimizer keeps fp32 weights."""
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
    overlap: bool = False
    """Generate the next batch while the update runs: one step off-policy."""
    temperature: float = 1.0
    max_new_tokens: int | None = None
    """Longest response. None: the longest right answer of the task."""
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

    def __post_init__(self):
        if "router_log_probs" in PolicyLossConfig.preset(self.loss).arguments:
            served = [n for n, c in PRESETS.items() if "router_log_probs" not in c.arguments]
            raise UserError(
                f"loss={self.loss!r} needs the router's log-probs, which the trainer does not "
                f"record; it serves {', '.join(served)}."
            )
        ArithmeticTask(self.digits)
        for name in ("seed", "analyse_every", "save_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: 0 or more is needed.")
        for name in ("steps", "prompts", "minibatches", "epochs", "micro_batch", "eval_every",
                     "eval_samples", "eval_problems", "keep"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        if (self.token_log == "sampled") != (self.token_log_share != 1):
            raise UserError(
                f"token_log={self.token_log!r} with token_log_share={self.token_log_share}: a "
                "share between 0 and 1 goes with token_log=sampled, and only with it."
            )
        if not 0 < self.token_log_share <= 1:
            raise UserError(f"token_log_share={self.token_log_share}: above 0 and below 1.")
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

    def layout(self, world_size: int) -> Layout:
        """The layout on `world_size` ranks, with all checked that can be before the start."""
        tiny = self.model is None or self.resume is not None  # whose config.json names the model
        dense = tiny and not self.tiny.experts
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
    "micro_batch": "memory",
    "vllm": "memory",
    "engine_url": "where the engine is; which engine it is may not change",
    "cache_dir": "not used any more: the start model is there",
    "eval_every": "evaluation",
    "eval_samples": "evaluation",
    "eval_problems": "evaluation",
    "reference_kl": "a measurement, and the memory of a second model",
    "save_every": "checkpoints",
    "keep": "checkpoints",
}
# Which folder, and how the options came.
_NO_SETTINGS = ("config", "resume", "output_dir")


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
    wrong = [name for name in changed if name.partition(".")[0] not in MAY_CHANGE]
    if wrong:
        values = "; ".join(f"{n} was {changed[n][0]}, now {changed[n][1]}" for n in wrong)
        raise UserError(
            f"--resume {config.resume}: {values}. That would be another run: leave the option out, "
            f"or start one with another --output-dir. May change: {', '.join(MAY_CHANGE)}."
        )
    return changed


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
    return [
        word
        for name, value in _settings(read_config(path))
        if value is not None  # the default of every setting that can be None
        for word in _option(name, value)
    ]


def file_arguments(path: Path) -> list[str]:
    """The options in a YAML (or JSON) file as the command line would have them.

    `optimizer: {lr: 3.0e-4}` becomes `--optimizer.lr 3.0e-4`: names, kinds and mistakes are then
    those of the command line, whose own options come after and win.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: lines of `option: value` are needed.")
    return list(_flatten(values, prefix=""))


def _flatten(values: dict, prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield from _option(f"{prefix}{key}", value)


def _option(name: str, value: Any) -> list[str]:
    *outer, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*outer, last if value else f"no-{last}"])]
    option = "--" + ".".join([*outer, last])
    return [option, *map(str, value)] if isinstance(value, list) else [option, str(value)]
