# SPDX-License-Identifier: Apache-2.0
"""A training run's configuration, checked before anything starts. Imports no Megatron."""

from __future__ import annotations

import math
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Self

from tyro.conf import arg

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import ADVANTAGES
from moe_upgrpo.megatron.balance import Limit
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rewards import read_rewards
from moe_upgrpo.train.parts import (
    BatchOptions,
    EvaluationOptions,
    LogOptions,
    ObjectiveOptions,
    ParallelOptions,
    ProblemOptions,
    RewardOptions,
    RolloutOptions,
    RunOptions,
    StartOptions,
    TermOptions,
    TrainerOptions,
)

_FLAT = arg(name="")  # no part's name before its options' on the command line


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a mixture-of-experts model by reinforcement learning on Megatron-Core actors."""

    run: Annotated[RunOptions, _FLAT] = field(default_factory=RunOptions)
    objective: Annotated[ObjectiveOptions, _FLAT] = field(default_factory=ObjectiveOptions)
    terms: Annotated[TermOptions, _FLAT] = field(default_factory=TermOptions)
    start: Annotated[StartOptions, _FLAT] = field(default_factory=StartOptions)
    problems: Annotated[ProblemOptions, _FLAT] = field(default_factory=ProblemOptions)
    rollouts: Annotated[RolloutOptions, _FLAT] = field(default_factory=RolloutOptions)
    trainer: Annotated[TrainerOptions, _FLAT] = field(default_factory=TrainerOptions)
    parallel: Annotated[ParallelOptions, _FLAT] = field(default_factory=ParallelOptions)
    batch: Annotated[BatchOptions, _FLAT] = field(default_factory=BatchOptions)
    rewarding: Annotated[RewardOptions, _FLAT] = field(default_factory=RewardOptions)
    evaluation: Annotated[EvaluationOptions, _FLAT] = field(default_factory=EvaluationOptions)
    log: Annotated[LogOptions, _FLAT] = field(default_factory=LogOptions)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Make a config from options, by the names that they have on the command line."""
        return cls().but(**options)

    def but(self, **options: Any) -> Self:
        """Make a copy with other values of some options, by the same names."""
        given: dict[str | None, dict[str, Any]] = {}
        for name, value in options.items():
            given.setdefault(_PART_OF.get(name), {})[name] = value
        own = given.pop(None, {})
        parts = {part: replace(getattr(self, part), **these) for part, these in given.items()}
        return replace(self, **own, **parts)

    def flat(self) -> dict[str, Any]:
        """All options as a flat mapping, as config.json has them."""
        return {
            name: _kept(value)
            for part in _PARTS
            for name, value in asdict(getattr(self, part)).items()
        }

    def __post_init__(self):
        self._check_data()
        self._check_engine_every()
        _check_staleness(self)
        self._check_refills()
        self._check_epochs()
        self._check_rewards()
        _check_several_rewards(self)
        _check_whole_groups(self)
        if self.rewarding.overlong_buffer:
            self._check_overlong_buffer()

    def _check_data(self) -> None:
        if not self.problems.data:
            return
        if self.start.model is None:
            raise UserError(
                "data without model: the tiny model knows the signs of sums only. Give --model."
            )
        if self.rollouts.max_new_tokens is None:
            raise UserError(
                "data without max_new_tokens: nobody knows how long the answers are. Give "
                "--max-new-tokens."
            )

    def _check_engine_every(self) -> None:
        every = self.rollouts.engine_every
        if every == 1:
            return
        analyse_every = self.log.analyse_every
        if self.rollouts.ahead or analyse_every:
            raise UserError(
                f"engine_every={every} with staleness or analyse_every={analyse_every}: the "
                "weights that sampled are not kept. Give --staleness 0 and --analyse-every 0."
            )
        multiples = {
            "steps": self.run.steps,
            "eval_every": self.evaluation.eval_every,
            "save_every": self.run.save_every,
        }
        for name, value in multiples.items():
            if value % every:
                raise UserError(
                    f"{name}={value} is not a multiple of engine_every={every}: the engine "
                    "evaluates, and is resumed, with the newest weights."
                )

    def _check_epochs(self) -> None:
        terms, batch = self.terms, self.batch
        if terms.stop_ratio not in (None, math.inf) and batch.epochs == 1:
            raise UserError(
                f"stop_ratio={terms.stop_ratio:g} with epochs=1: there is no epoch to leave out. "
                "Give --epochs."
            )
        if terms.gradient_at == "old" and batch.optimizer_steps == 1:
            raise UserError(
                "gradient_at=old with one optimizer step in a step: its gradient is at the old "
                "weights as it is. Give --minibatches or --epochs above 1."
            )
        if terms.gradient_at == "old" and self.stop_ratio is not None:
            raise UserError(
                "gradient_at=old with stop_ratio: every ratio is 1 at the old weights. Leave one "
                "out."
            )

    def _check_rewards(self) -> None:
        """Raise UserError where an advantage is not defined for every possible reward."""
        kind, reward = self.objective.advantage, self.rewarding
        low, high = ADVANTAGES[kind].allowed
        least = reward.reward_wrong - reward.overlong_penalty * bool(reward.overlong_buffer)
        in_reward = self.terms.kl_coef > 0 and self.terms.kl_in == "reward"
        if least < low or (in_reward and (low, high) != (-math.inf, math.inf)):
            raise UserError(
                f"advantage={kind!r} is defined for rewards from {low:g} to {high:g}; reward_wrong="
                f"{reward.reward_wrong:g}, overlong_buffer={reward.overlong_buffer} and kl_in="
                f"{self.terms.kl_in} give others."
            )

    @property
    def compares_groups(self) -> bool:
        """Whether the loss needs all responses to a prompt in one micro-batch."""
        return "groups" in self.objective.policy_loss().arguments

    def micro_batches(self, longest: int | None = None) -> Limit:
        """The most that one forward of a rank may hold: whole groups, where the loss needs them.

        longest: tokens of the run's longest sequence, where they are known.
        """
        if not self.compares_groups:
            return self.trainer.micro_batches(longest)
        limit = self.trainer.micro_batches()
        return replace(limit, sequences=limit.sequences - limit.sequences % self.batch.group)

    def _check_refills(self) -> None:
        max_refills = self.batch.max_refills
        if self.rewarding.false_positives and max_refills:
            raise UserError(
                "false_positives with max_refills: groups are kept or dropped by the true "
                "verdicts. Leave one out."
            )
        if max_refills and self.rollouts.ahead:
            raise UserError(
                f"max_refills={max_refills} with staleness: refills would be sampled with newer "
                "weights than the batch they fill. Leave one out."
            )

    def _check_overlong_buffer(self) -> None:
        from moe_upgrpo.tasks.arithmetic import ArithmeticTask  # here: it brings numpy

        of_sums = ArithmeticTask(self.problems.digits).max_response_tokens
        longest = self.rollouts.max_new_tokens or of_sums
        if self.rewarding.overlong_buffer > longest:
            raise UserError(
                f"overlong_buffer={self.rewarding.overlong_buffer}: more than the longest "
                f"response's {longest} tokens."
            )

    @property
    def stop_ratio(self) -> float | None:
        """Largest mean |ratio − 1| of an epoch that another one may follow; None: no limit."""
        asked = self.terms.stop_ratio
        if asked is None and self.objective.loss.endswith("ppo-early-stop"):
            return 0.25
        return None if asked == math.inf else asked

    @property
    def has_reference(self) -> bool:
        """Whether a second copy of the model scores each batch."""
        return self.log.reference_kl or self.terms.kl_coef > 0

    def layout(self, world_size: int) -> Layout:
        """The layout on `world_size` ranks, checked as far as possible before the start."""
        # Where a run is resumed, its config.json names the model.
        tiny = self.start.model is None or self.run.resume is not None
        model = self.start.model
        dense = (tiny and self.start.tiny.dense) or (model is not None and _is_dense(model))
        layout = self.parallel.layout(world_size, dense=dense)
        if self.trainer.packing:
            layout.check_packing()
        data_parallel = layout.data_parallel(world_size)
        self.batch.check_ranks(world_size, data_parallel)
        parts = data_parallel * self.batch.minibatches
        if self.compares_groups and self.batch.prompts % parts:
            raise UserError(
                f"prompts={self.batch.prompts} with loss={self.objective.loss!r}, which needs "
                f"whole groups in a mini-batch: with {self.batch.minibatches} mini-batches on "
                f"{data_parallel} data-parallel rank(s) a multiple of {parts} is needed."
            )
        return layout


def starve_after(config: TrainConfig) -> float:
    """Seconds for which a step waits for its batch before the queue starves."""
    asked = config.rollouts.starve_after
    return 30 * config.run.timeout if asked is None else asked


def _check_staleness(config: TrainConfig) -> None:
    """Refuse what needs other weights than are kept, or a ratio that is not to what sampled."""
    rollouts, analyse_every = config.rollouts, config.log.analyse_every
    ahead, partial, timeout = rollouts.ahead, rollouts.partial_rollouts, config.run.timeout
    if 0 < analyse_every < ahead:
        raise UserError(
            f"analyse_every={analyse_every} with staleness={ahead}: the weights that sampled "
            f"one batch are kept at a time. Give --analyse-every {ahead} or more, or 0."
        )
    if partial and analyse_every:
        raise UserError(
            f"partial_rollouts={partial} with analyse_every={analyse_every}: no one version of "
            "the weights sampled a response. Give --analyse-every 0."
        )
    if partial and config.objective.old_log_probs != "rollout":
        raise UserError(
            f"partial_rollouts={partial} with old_log_probs={config.objective.old_log_probs}: the "
            "ratio would not be to what sampled each token. Give --old-log-probs rollout."
        )
    if ahead and starve_after(config) >= 60 * timeout:
        raise UserError(
            f"starve_after={starve_after(config):g} with timeout={timeout:g}: the ranks would end "
            "each other before. Give fewer seconds than those minutes have."
        )


def _check_several_rewards(config: TrainConfig) -> None:
    """Refuse a kind of advantage that takes several rewards where there is only one, or where their
    sum is changed."""
    kind = config.objective.advantage
    if not ADVANTAGES[kind].several:
        return
    problems, rewarding = config.problems, config.rewarding
    words = read_rewards(problems.reward)
    if not problems.task and (not words or (len(words) == 1 and words[0].is_one_number)):
        single = [name for name, other in ADVANTAGES.items() if not other.several]
        raise UserError(
            f"advantage={kind!r} takes several rewards of a response, and there is one. Give "
            "--reward several words, each as WEIGHT*REWARD, or a function of your own that "
            f"returns a mapping; with one reward take {', '.join(single)}."
        )
    changed = {
        "reward_wrong": rewarding.reward_wrong != 0,
        "false_positives": rewarding.false_positives != 0,
        "overlong_buffer": rewarding.overlong_buffer != 0,
        "kl_in=reward": config.terms.kl_coef > 0 and config.terms.kl_in == "reward",
    }
    if given := [name for name, is_given in changed.items() if is_given]:
        raise UserError(
            f"{', '.join(given)} with advantage={kind!r}: it is of a response's one "
            "reward, and this takes each of several. Leave it out; for the length there is "
            "--reward length:TOKENS, for the KL --kl-in loss."
        )


def _check_whole_groups(config: TrainConfig) -> None:
    """Refuse micro-batches too small for a whole group, where the loss compares within groups."""
    if not config.compares_groups:
        return
    trainer, loss = config.trainer, config.objective.loss
    if trainer.micro_batch_tokens is not None:
        raise UserError(
            f"micro_batch_tokens={trainer.micro_batch_tokens} with loss={loss!r}, which needs "
            "whole groups in a micro-batch, where a budget sorts sequences by length. Give "
            "--micro-batch instead."
        )
    if not config.micro_batches().sequences:
        raise UserError(
            f"micro_batch={trainer.micro_batches().sequences} with loss={loss!r}, which "
            f"needs whole groups in a micro-batch: at least group={config.batch.group} is needed."
        )


def _is_dense(model: Path) -> bool:
    """Whether the config.json of a model folder says that it has no experts.

    Errors in the folder are reported where the model is read.
    """
    from moe_upgrpo.hugging_face.config import read_raw_config  # here: they bring transformers
    from moe_upgrpo.megatron.families import FAMILIES

    try:
        described = FAMILIES.get(read_raw_config(model).get("model_type"))
    except UserError:
        return False
    return described is not None and described.experts is None


def _kept(value: Any) -> Any:
    """A value as JSON can keep it: an infinite number as a word that the options can read."""
    if isinstance(value, dict):
        return {name: _kept(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


_PARTS = {part.name: fields(part.default_factory) for part in fields(TrainConfig)}
_PART_OF = {option.name: part for part, options in _PARTS.items() for option in options}
OPTIONS: dict[str, Field] = {
    option.name: option for options in _PARTS.values() for option in options
}
