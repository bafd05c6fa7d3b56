# SPDX-License-Identifier: Apache-2.0
"""The protocol of a task: problems with prompt ids, and a verifier."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moe_upgrpo.errors import UserError

Tokens = Sequence[int] | np.ndarray
Terms = Mapping[str, tuple[float, float]]  # name -> (weight, value) of rewards that add up to one
TOOLS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with its reference answer; both also as text, for logs. row: its row of the
    data, for rewards."""

    prompt: str
    prompt_ids: np.ndarray
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The judgement of a response.

    Fields:
        reward: its reward, before training's penalty for length.
        correct: whether it counts as right, 1 or 0.
        parts: named rewards behind it, for the metrics reward/of/NAME.
        terms: the rewards that add up to it, where there are several: Σ weight·value is `reward`.
        failed: why there is no reward, which is 0 then; empty where there is one.
        killed: number of times that it took the verifier too long.
    """

    reward: float
    correct: float
    parts: Mapping[str, float] = field(default_factory=dict)
    terms: Terms = field(default_factory=dict)
    failed: str = ""
    killed: int = 0

    @classmethod
    def of(cls, reward: float, **more: Any) -> "Verdict":
        """The verdict of a single number: right from 1 on."""
        return cls(reward=reward, correct=float(reward >= 1), **more)


class Task(Protocol):
    """Training problems, held-out problems and the verifier of one task."""

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""

    @property
    def max_response_tokens(self) -> int | None:
        """Tokens of the longest correct response, EOS included; None where nobody can say."""

    def training_problems(
        self, count: int, *, seed: int, step: int, refill: int = 0
    ) -> list[Problem]:
        """`count` different training problems, a function of the arguments alone.

        Every rank asks for the problems of the whole step and takes its share, so that what is
        trained on does not depend on the number of ranks. `refill` r >= 1 is the r-th batch that
        dynamic sampling draws in addition: no problem is in two batches of a step, and the list is
        empty once fewer than `count` are left.
        """

    def heldout_problems(self) -> list[Problem]:
        """The problems never trained on, always the same and in the same order; may be none."""

    def reward(self, problem: Problem, response_ids: Tokens) -> float:
        """The response's reward: 1.0 if it answers the problem, 0.0 if it does not, or any other
        finite number; it counts as right from 1 on. A task may have `judge` besides: see `judged`.
        """

    def answer_classes(self, responses: Sequence[Tokens]) -> list[int | None]:
        """For each of the responses to one problem, which answer it gives: equal numbers for equal
        answers, None where it gives none. Majority votes count these."""

    @property
    def killed(self) -> int:
        """Responses so far that took the verifier too long; they count as wrong."""

    def close(self) -> None:
        """Free what the verifier holds; the task is not used afterwards."""

    # A task of several turns has, besides:
    #
    # max_turns: int, above 1: how many times the model speaks.
    # max_observation_tokens: int: the longest result of a tool.
    # observe(problem, response_ids) -> token ids, or None where the conversation has ended: the
    #     result after a response so far, earlier results among its tokens. The ids are put behind
    #     it, and the model speaks again. It may be a coroutine.
    # tools_at_once: int, TOOLS_AT_ONCE without it: calls of `observe` that run at the same time, in
    #     threads, for the responses of a batch; 1: one after the other, in their order.


def judged(
    task: Task,
    problems: Sequence[Problem],
    responses: Sequence[Tokens],
    sampled: Sequence[np.ndarray | None] | None = None,
) -> list[Verdict]:
    """A verdict for each response to the problem at its place. sampled: as `Rollout` has it.

    Where the task has `judge`, it gets the same arguments: all responses of a step at a time. Else
    `task.reward` judges one after the other.
    """
    if judge := getattr(task, "judge", None):
        return judge(problems, responses, sampled)
    verdicts = []
    for problem, ids in zip(problems, responses, strict=True):
        before = task.killed
        reward = float(task.reward(problem, ids))
        if not math.isfinite(reward):
            raise UserError(
                f"The verifier gave {reward} to a response to {problem.prompt!r}: a finite number "
                "is needed."
            )
        verdicts.append(Verdict.of(reward, killed=task.killed - before))
    return verdicts


def refill_indices(
    first: np.ndarray, total: int, count: int, *, seed: int, step: int, refill: int
) -> np.ndarray:
    """The problems of refill r >= 1 of a step whose first batch is `first`, of `total` in all.

    The other problems in an order drawn by (seed, step), the r-th `count` of them; `[0]` where
    fewer are left.
    """
    others = np.setdiff1d(np.arange(total), first)
    order = np.random.default_rng((seed, step, 1)).permutation(others)
    batch = order[(refill - 1) * count : refill * count]
    return batch if len(batch) == count else batch[:0]
