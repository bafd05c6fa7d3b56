# SPDX-License-Identifier: Apache-2.0
"""The options of a training run by theme, each declared, documented and checked in its part.

Rules that concern two parts are checked in `moe_upgrpo.train.config`. Imports no Megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    ADVANTAGES,
    PRESETS,
    EntropyControl,
    LossTerms,
    PolicyLossConfig,
    RolloutCorrection,
)
from moe_upgrpo.losses.names import check_name
from moe_upgrpo.megatron.balance import Limit
from moe_upgrpo.megatron.layout import Dispatcher, Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.record.limits import AlarmLimits
from moe_upgrpo.rewards import read_rewards
from moe_upgrpo.rollout.engines import (
    ENGINES,
    EngineWeights,
    Transfer,
    VLLMSettings,
    WhenLost,
    check_engine,
    urls_of,
)
from moe_upgrpo.train.policy_options import (
    PolicyOptions,
    asked,
    check_token_advantages,
    resolved,
)
from moe_upgrpo.train.tiny import TinyModel, WarmStartConfig
from moe_upgrpo.train.tracking import Tracker

# Optional arguments of `policy_loss` that the actor hands over.
_SERVED = {"rollout_log_probs", "entropy", "draws", "statistics", "groups", "token_weights"}


def at_least(part: Any, least: int, *names: str) -> None:
    """Raise UserError where a field of `part` is below `least`, 0 or 1; None is allowed."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            allowed = "at least 1" if least else "0 or more"
            raise UserError(f"{name}={value}: {allowed} is needed.")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How far a run goes, its folder and its checkpoints, and when its ranks end."""

    config: Path | None = None
    """YAML file of these options; those of the command line win."""
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
    save_every: int = 20
    """Steps between checkpoints to resume from; the last step has one too; 0: none."""
    keep: int = 2
    """Newest checkpoints to keep; an older one goes once a new one is whole."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory."""

    def __post_init__(self):
        at_least(self, 0, "seed", "save_every")
        at_least(self, 1, "steps", "keep")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout={self.timeout:g}: minutes above 0 are needed.")
        if not 0 < self.stop_within < math.inf:
            raise UserError(f"stop_within={self.stop_within:g}: seconds above 0 are needed.")
        if self.restart and self.resume is None:
            raise UserError("restart without resume: --resume RUN says which run begins again.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The loss: its ratio, its advantages, and replay of the engine's routes."""

    loss: str = "up-grpo"
    """Loss preset: grpo, gspo, up-grpo, up-gspo, ... An unknown name lists them all."""
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    """Choices and numbers of the loss over those of its preset: docs/options.md."""
    correction: RolloutCorrection = field(default_factory=RolloutCorrection)
    old_log_probs: Literal["trainer", "rollout"] = "trainer"
    """Denominator of the ratio: the trainer's log-probs at the old weights, or the rollout's
    (bypass), which puts the mismatch into the ratio."""
    advantage: str = "grpo"
    """How rewards of a group become advantages: grpo, dr-grpo, rloo, ..., or one that a plug-in has
    registered. An unknown name lists them all."""
    nthr_beta: float | None = None
    """NTHR's β: a wrong response's tokens that pull on the right ones by more than β times the
    least of these pull on one another get η times their advantage: docs/losses.md. None: off."""
    nthr_eta: float | None = None
    """NTHR's η, from 0 to 1. None: 2·|.5 − share of right responses|."""
    replay: Literal["none", "R2", "R3"] = "none"
    """Expert sets the trainer is held to. none: its own, the rollout's are only compared; R2: the
    old policy's in the update; R3: the rollout's, in the old log-probs and the update."""

    def __post_init__(self):
        check_name("advantage", self.advantage, ADVANTAGES)
        if lacking := self.policy_loss().arguments - _SERVED:
            served = [name for name, preset in PRESETS.items() if preset.arguments <= _SERVED]
            raise UserError(
                f"loss={self.loss_in_words!r} needs {', '.join(sorted(lacking))}, which the "
                f"trainer does not record; it serves {', '.join(served)}."
            )
        check_token_advantages(
            self.advantage, self.nthr_beta, self.nthr_eta, self.policy_loss(), self.loss_in_words
        )
        if self.correction.active and self.old_log_probs == "rollout":
            raise UserError(
                "correction with old_log_probs=rollout: the ratio is taken to the rollout already, "
                "and would be corrected twice. Leave one out."
            )

    @property
    def head_records(self) -> tuple[str, ...]:
        """The outputs of the old policy's head, beside log-probs, that the advantages need."""
        of_tokens = ADVANTAGES[self.advantage].of_tokens is not None
        asked = {"sum_pi_squared": of_tokens, "hidden": self.nthr_beta is not None}
        return tuple(name for name, is_asked in asked.items() if is_asked)

    def policy_loss(self) -> PolicyLossConfig:
        """The preset, with this run's changes."""
        return resolved(self.loss, self.policy, self.correction)

    @property
    def loss_in_words(self) -> str:
        """The preset's name and this run's changes to it."""
        changed = [f"{n} {'none' if v is None else v}" for n, v in asked(self.policy).items()]
        return f"{self.loss} with {', '.join(changed)}" if changed else self.loss


@dataclass(frozen=True, kw_only=True)
class TermOptions:
    """Terms beside the policy loss: KL, entropy, old gradients, an early stop of the epochs."""

    kl_coef: float = 0.0
    """β of the KL divergence from the reference: the start model; 0: none. docs/options.md."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Added to the loss, or taken off the rewards before advantages are made of them."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated from the sampled tokens; in the loss k2's gradient is that of the KL."""
    reference_every: int = 0
    """Steps after which the reference becomes the policy as it is then; 0: it stays."""
    entropy_coef: float = 0.0
    """α of the entropy bonus; with entropy_target that of the first step."""
    entropy_target: float | None = None
    """Nats: each step below raises α by entropy_delta, any other lowers it, and the bonus is given
    after steps below only, as Skywork-OR1 does. None: α stays."""
    entropy_delta: float = 1e-4
    """The change of α in a step, with entropy_target."""
    entropy_coef_range: tuple[float, float] = (0.0, 5e-3)
    """The least and the largest α, with entropy_target."""
    gradient_at: Literal["current", "old"] = "current"
    """Weights at which each optimizer step's gradient is taken: those that it changes, or those at
    which the RL step began, for all its optimizer steps (a fixed old policy)."""
    stop_ratio: float | None = None
    """No further epoch after one whose tokens' mean |ratio − 1| is above this; inf: all epochs.
    None: .25 with the losses ppo-early-stop and up-ppo-early-stop, all epochs with any other."""

    def __post_init__(self):
        terms = LossTerms(
            kl_coef=self.kl_coef, kl_estimator=self.kl_estimator, entropy_coef=self.entropy_coef
        )
        at_least(self, 0, "reference_every")
        if self.reference_every and not terms.kl_coef:
            raise UserError(
                f"reference_every={self.reference_every} without kl_coef: nothing is measured "
                "against the reference but the start model's KL. Give --kl-coef too."
            )
        for name in ("kl_in", "kl_estimator"):
            if not terms.kl_coef and getattr(self, name) != getattr(TermOptions, name):
                raise UserError(
                    f"{name}={getattr(self, name)!r} without kl_coef: there is no KL term. Give "
                    "--kl-coef too."
                )
        control = self.control()
        for name in ("entropy_delta", "entropy_coef_range"):
            if control is None and getattr(self, name) != getattr(TermOptions, name):
                raise UserError(
                    f"{name}={getattr(self, name)} without entropy_target: nothing is controlled. "
                    "Give --entropy-target too."
                )
        if control is not None and not control.least <= self.entropy_coef <= control.most:
            raise UserError(
                f"entropy_coef={self.entropy_coef} is outside of entropy_coef_range="
                f"{control.least:g} {control.most:g}."
            )
        if self.stop_ratio is not None and not self.stop_ratio > 0:
            raise UserError(f"stop_ratio={self.stop_ratio}: a number above 0 is needed.")

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether any step's loss may have the entropy in it."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    def control(self) -> EntropyControl | None:
        """The rule that changes α from step to step."""
        if self.entropy_target is None:
            return None
        least, most = self.entropy_coef_range
        return EntropyControl(
            target=self.entropy_target, delta=self.entropy_delta, least=least, most=most
        )


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The model that training starts from."""

    model: Path | None = None
    """Hugging Face checkpoint folder: docs/models.md. None: a tiny model, warm-started, cached."""
    trust_remote_code: bool = False
    """Run Python code of the model folder that its tokenizer needs. Never taken from a run that is
    resumed: give it again."""
    tiny: TinyModel = field(default_factory=TinyModel)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    cache_dir: Path = Path("runs/cache")
    """Where warm-started checkpoints are kept."""


@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """The problems: sums, or those of files, and how a prompt is made of one."""

    digits: int = 2
    """The task where there is no --data and no --task: addition of two numbers of this many digits,
    which is also what the tiny model is warm-started on."""
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
    reward: tuple[str, ...] = ()
    """Judges of responses: math, exact, choice, gsm8k, regex:PATTERN, code, format, length:N,
    data-source, or your own as module:function; several are added, each as WEIGHT*REWARD, and the
    first says what is right: docs/data.md. None: what the data's data_source means, or math."""
    task: str | None = None
    """A task of your own, module:Class: docs/extending.md. None: --data, or sums."""
    task_options: str = "{}"
    """JSON of what it takes, {"turns": 3} for instance."""

    def __post_init__(self):
        read_rewards(self.reward)
        if self.task is not None:
            from moe_upgrpo.tasks.named import check_task  # here: it brings numpy

            check_task(self.task, self.task_options)
            if self.data:
                raise UserError(
                    f"task={self.task} with data: it has its own problems. Leave one out."
                )
        elif self.task_options != "{}":
            raise UserError(f"task_options={self.task_options!r} without task.")
        if self.digits not in (1, 2, 3):
            raise UserError(f"digits is {self.digits}; 1, 2 or 3 are allowed.")
        if self.data:
            if self.digits != ProblemOptions.digits:
                raise UserError(
                    f"digits={self.digits} with data: sums or the files' problems, not both."
                )
            at_least(self, 1, "max_prompt_tokens")
        elif given := [
            name
            for name in ("eval_data", "prompt_field", "answer_field", "chat_template",
                         "chat_template_kwargs", "instruction", "max_prompt_tokens")
            if getattr(self, name) != getattr(ProblemOptions, name)
        ]:  # fmt: skip
            raise UserError(f"{', '.join(given)} without data: --data FILE is missing.")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The engine, how it samples, and when."""

    engine: str = "hf"
    """Rollout engine, in every rank or a server: hf (transformers), vllm, sglang, or a plug-in's:
    docs/engines.md."""
    engine_url: str | None = None
    """A running server of the engine, http://HOST:PORT, or several with commas between them, which
    share the prompts. None: in every rank, or started here."""
    engine_transfer: Transfer = "disk"
    """How a server gets new weights: through a folder that it sees too, or over the network (gloo)
    part by part."""
    engine_lost: WhenLost = "end"
    """Where one of several servers falls away, or has other weights: end, or go on with the
    others."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number type of the engine."""
    engine_weights: EngineWeights = "as-trained"
    """fp8: engine hf samples with weights rounded to e4m3, as an FP8 server would."""
    engine_every: int = 1
    """Steps between weight updates of the engine: rollouts are up to one less stale."""
    staleness: int = 0
    """Generate up to so many batches ahead while updates run, each with weights of so many steps
    before; 0: each batch with the weights that it trains."""
    partial_rollouts: int | None = None
    """With staleness above 1: tokens of a response between two updates. An unfinished one goes on
    with the next weights, and each token keeps its own log-prob and version."""
    overlap: bool = False
    """The older name of --staleness 1."""
    starve_after: float | None = None
    """Seconds for which a step waits for a batch that is generated ahead, until one line says that
    the queue starves. None: half of --timeout."""
    starved: Literal["wait", "end"] = "wait"
    """Answer to a starving queue. wait: training goes on once the batch is there; end: the run
    ends. No other batch is taken."""
    temperature: float = 1.0
    """Sampling temperature, which the trainer applies to its log-probs too."""
    max_new_tokens: int | None = None
    """Longest response. None: the longest sum; with --data it must be said."""
    save_rollouts: Path | None = None
    """Folder to keep every step's rollouts in."""
    load_rollouts: Path | None = None
    """Folder of a run's saved rollouts to train on: no engine, no evaluation."""

    def __post_init__(self):
        at_least(self, 1, "engine_every", "max_new_tokens", "partial_rollouts")
        at_least(self, 0, "staleness")
        check_engine(
            self.engine, weights=self.engine_weights, url=self.engine_url, ahead=self.ahead
        )
        self._check_servers()
        self._check_queue()
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: RL samples at a temperature above 0.")

    @property
    def ahead(self) -> int:
        """Most batches generated ahead, each so many steps stale."""
        return self.staleness or int(self.overlap)

    def _check_servers(self) -> None:
        if (
            self.engine_transfer != "disk"
            and ENGINES[self.engine].place(self.engine_url) == "each rank"
        ):
            raise UserError(
                f"engine_transfer={self.engine_transfer} with engine={self.engine} in each rank: "
                "it is for servers. Name one with engine_url, or leave engine_transfer out."
            )
        if self.engine_lost == "go-on" and len(urls_of(self.engine_url)) < 2:
            raise UserError(
                f"engine_lost=go-on with engine_url={self.engine_url}: several servers are needed, "
                "so that there are others. Leave engine_lost out."
            )

    def _check_queue(self) -> None:
        if self.overlap and self.staleness > 1:
            raise UserError(
                f"overlap with staleness={self.staleness}: it is --staleness 1. Leave it out."
            )
        if self.ahead and self.load_rollouts is not None:
            raise UserError("staleness with load_rollouts: nothing is generated. Leave one out.")
        if self.partial_rollouts and self.ahead < 2:
            raise UserError(
                f"partial_rollouts={self.partial_rollouts} with staleness={self.ahead}: no update "
                "comes between the beginning of a batch and its end. Give --staleness 2 or more."
            )
        for name in ("starve_after", "starved"):
            if not self.ahead and getattr(self, name) != getattr(RolloutOptions, name):
                raise UserError(
                    f"{name}={getattr(self, name)} without staleness: there is no queue that could "
                    "starve. Give --staleness too."
                )
        if self.starve_after is not None and not 0 < self.starve_after < math.inf:
            raise UserError(f"starve_after={self.starve_after}: seconds above 0 are needed.")


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How each rank computes: numbers, kernels, memory, optimizer."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the trainer; with bfloat16 the optimizer keeps fp32 weights."""
    micro_batch: int | None = None
    """Most sequences in one forward of a rank, counted in the order given, instead of
    micro_batch_tokens. None: 128 for a loss that compares the responses of a group."""
    micro_batch_tokens: int | None = None
    """Most tokens in one forward of a rank, or of all context-parallel ranks together, padding
    included: sequences are sorted by length and shared out over the data-parallel ranks by cost.
    None: what 128 sequences of the run's longest take, and sequences keep their order and rank
    where sorting them would save less than 2% or less than 512 tokens."""
    packing: bool = False
    """Put the sequences of a micro-batch one after the other instead of padding them: everything
    but attention then computes real tokens only."""
    recompute: Literal["none", "full"] = "none"
    """full: keep no activations of a layer, run it again in the backward pass."""
    deterministic: bool = False
    """On GPUs: only kernels that give the same bits each time, slower ones among them. A CPU's do
    of themselves."""
    megatron: dict[str, str] = field(default_factory=dict)
    """Options of Megatron-Core's own, each as --megatron.NAME VALUE: docs/scale.md."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self):
        at_least(self, 1, "micro_batch", "micro_batch_tokens")
        if self.micro_batch is not None and self.micro_batch_tokens is not None:
            raise UserError(
                f"micro_batch={self.micro_batch} with micro_batch_tokens={self.micro_batch_tokens}"
                ": sequences or tokens are counted. Leave one out; over a file or a run that gives "
                "the other, say --micro-batch None or --micro-batch-tokens None."
            )

    def micro_batches(self, longest: int | None = None) -> Limit:
        """The most that one micro-batch may hold. longest: tokens of the run's longest sequence;
        None: not known, or nothing may be sorted."""
        return Limit(
            sequences=self.micro_batch or 128,
            tokens=self.micro_batch_tokens,
            longest=None if self.micro_batch or self.micro_batch_tokens else longest,
            packed=self.packing,
        )


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the model is laid out on the ranks."""

    tp: int | None = None
    """Tensor parallelism, with sequence parallelism. None: 2 on an even number of ranks, else 1."""
    cp: int = 1
    """Context parallelism: each rank has a part of every sequence."""
    ep: int | None = None
    """Expert parallelism. None: 2 on an even number of ranks, else 1."""
    etp: int | None = None
    """Tensor parallelism inside an expert. None: 1 with ep > 1, else tp."""
    pp: int = 1
    """Pipeline parallelism: stages of consecutive layers."""
    vpp: int = 1
    """Virtual pipeline: parts of the model that each stage holds in turn."""
    dispatcher: Dispatcher = "alltoall"
    """How tokens reach their experts. alltoall: each token is sent to the ranks that hold its
    experts; allgather: every one of those ranks gets all tokens."""

    def layout(self, world_size: int, *, dense: bool) -> Layout:
        """The layout on `world_size` ranks, checked. dense: the model is known to be dense."""
        layout = Layout.for_world(
            world_size,
            tp=self.tp,
            cp=self.cp,
            ep=1 if dense and self.ep is None else self.ep,
            etp=self.etp,
            pp=self.pp,
            vpp=self.vpp,
            dispatcher=self.dispatcher,
        )
        layout.check_world(world_size)
        return layout


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The responses of a step, and the optimizer steps on them."""

    prompts: int = 32
    """Prompts in a step, over all ranks."""
    group: int = 8
    """Responses to each prompt."""
    minibatches: int = 4
    """Optimizer steps per pass over a step's responses."""
    epochs: int = 1
    """Passes over a step's responses."""
    max_refills: int = 0
    """DAPO's dynamic sampling: no group that is all right or all wrong is trained on, up to so many
    more batches are sampled in their place; 0: off."""

    def __post_init__(self):
        at_least(self, 0, "max_refills")
        at_least(self, 1, "prompts", "minibatches", "epochs")
        if self.group < 2:
            raise UserError(f"group={self.group}: advantages compare at least 2 responses.")

    @property
    def sequences(self) -> int:
        """Responses in a step, over all ranks."""
        return self.prompts * self.group

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps in a step."""
        return self.minibatches * self.epochs

    def check_ranks(self, world_size: int, data_parallel: int) -> None:
        """Raise UserError where a step's prompts or mini-batches cannot be split over the ranks."""
        if self.prompts % world_size:
            raise UserError(
                f"prompts={self.prompts} is not a multiple of the {world_size} ranks, which "
                "generate equal shares."
            )
        if self.sequences % (data_parallel * self.minibatches):
            raise UserError(
                f"prompts x group = {self.sequences} sequences cannot be split into "
                f"{self.minibatches} mini-batches on {data_parallel} data-parallel rank(s): it "
                f"must be a multiple of {data_parallel * self.minibatches}."
            )


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Rewards: for the verifier's verdict, and for the length."""

    reward_wrong: float = 0.0
    """Reward in place of 0; 1 stays, and what lies between is shifted in proportion."""
    false_positives: float = 0.0
    """Share of the wrong responses that are rewarded as right in training, drawn at random: a
    verifier that errs."""
    overlong_buffer: int = 0
    """DAPO: the last so many tokens before max_new_tokens cost reward, linearly; 0: off."""
    overlong_penalty: float = 1.0
    """Reward that a response of max_new_tokens loses."""
    reward_timeout: float = 30.0
    """Seconds of one call of a --reward, or of a --task's reward or tool; then it has failed."""
    reward_workers: int | None = None
    """Processes in each rank for each --reward. None: this machine's cores over its ranks, up to
    8."""
    reward_failures: Literal["count", "end"] = "count"
    """A reward that raises, hangs or gives no finite number: count such responses, with a reward of
    0, or end the run."""

    def __post_init__(self):
        at_least(self, 0, "overlong_buffer")
        at_least(self, 1, "reward_workers")
        if not 0 < self.reward_timeout < math.inf:
            raise UserError(f"reward_timeout={self.reward_timeout:g}: seconds above 0 are needed.")
        if not 0 <= self.false_positives < 1:
            raise UserError(f"false_positives={self.false_positives}: 0 or more and below 1.")
        if not -math.inf < self.reward_wrong < 1:
            raise UserError(f"reward_wrong={self.reward_wrong}: a number below 1 is needed.")
        if not 0 <= self.overlong_penalty < math.inf:
            raise UserError(f"overlong_penalty={self.overlong_penalty}: 0 or more is needed.")
        if self.overlong_penalty != 1 and not self.overlong_buffer:
            raise UserError(
                f"overlong_penalty={self.overlong_penalty} without overlong_buffer: nothing is "
                "overlong. Give both or none."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """When and how the model is tried on held-out problems."""

    eval_every: int = 20
    """Steps between evaluations on held-out problems; the first and the last step have one too."""
    eval_samples: int = 4
    """Samples of each held-out problem, for pass@1 and pass@k."""
    eval_problems: int = 1024
    """Most held-out problems to use."""

    def __post_init__(self):
        at_least(self, 1, "eval_every", "eval_samples", "eval_problems")


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Measurements, and where they are written down."""

    track: tuple[Tracker, ...] = ("none",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb or both."""
    analyse_every: int = 20
    """Steps between analyses: the log-prob gap taken apart, and the noise floors; 0: never."""
    reference_kl: bool = True
    """Log the KL divergence from the start model: a second copy of it, and a forward each step.
    Not logged with reference_every, which gives that copy other weights."""
    token_log: Literal["full", "sampled", "aggregate"] = "full"
    """Token rows of every sequence, of a share of the sequences, or none."""
    token_log_share: float = 1.0
    """Share of the sequences that token_log=sampled keeps."""
    report: bool = True
    """Write report.html at the end."""
    alarm: AlarmLimits = field(default_factory=AlarmLimits)
    """Where alarms ring: docs/mismatch.md."""

    def __post_init__(self):
        at_least(self, 0, "analyse_every")
        if (self.token_log == "sampled") != (self.token_log_share != 1):
            raise UserError(
                f"token_log={self.token_log!r} with token_log_share={self.token_log_share}: a "
                "share between 0 and 1 goes with token_log=sampled, and only with it."
            )
        if not 0 < self.token_log_share <= 1:
            raise UserError(f"token_log_share={self.token_log_share}: above 0 and below 1.")
