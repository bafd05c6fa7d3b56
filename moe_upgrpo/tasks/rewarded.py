# SPDX-License-Identifier: Apache-2.0
"""A task whose responses are judged by the rewards of `--reward`, or a task of your own.

Either way a reward that raises, hangs or gives no number is 0, is named on the screen and counted.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.rewards import Outcome, Question, Reward, Workers, read_rewards
from moe_upgrpo.rewards.functions import ANSWERS
from moe_upgrpo.rewards.named import REWARDS, by_source, weighted_sum
from moe_upgrpo.rewards.worker import plain, said
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.tasks.base import Problem, Task, Tokens, Verdict
from moe_upgrpo.tasks.math_task import MathTask
from moe_upgrpo.tasks.math_verifier import MathVerifier

_SHOWN = 3  # failures of a kind
# Names among a reward's values: the reward itself, and whether the response is right.
SCORE, RIGHT = "score", "acc"


class RewardedTask:
    """A task with other verdicts than its own.

    Args:
        task: gives problems.
        rewards: words of `--reward`; none: the task's own `reward` is asked.
        timeout_s: wall-clock of one call.
        workers: processes for each of the rewards.
        ends: whether a reward that fails ends the run (UserError).
        text: the text of a response, for rewards; None: the task's own `text`, or that of sums.

    Raises UserError: a reward that is not there, or cannot be called.
    """

    def __init__(
        self,
        task: Task,
        rewards: Sequence[str] = (),
        *,
        timeout_s: float = 30.0,
        workers: int = 1,
        ends: bool = False,
        text: Callable[[Tokens], str] | None = None,
    ):
        self._task, self._ends, self._timeout_s = task, ends, timeout_s
        self._rewards = read_rewards(rewards)
        of_sums = text_of if isinstance(task, arithmetic.ArithmeticTask) else None
        self._text = text or getattr(task, "text", of_sums)
        if rewards and self._text is None:
            raise UserError(
                f"reward={rewards[0]!r} with a task of {type(task).__name__}, which has no "
                "`text(response_ids)` that a reward could read"
            )
        self.killed = 0
        self._said: dict[str, int] = {}
        self._unobserved: dict[tuple[str, bytes], tuple[str, bool]] = {}
        self._math: MathVerifier | None = None
        self._workers: dict[str, Workers] = {}
        self._count = workers
        try:
            for reward in self._rewards:
                self._start(reward)
        except BaseException:
            self._end_workers()
            raise

    def __getattr__(self, name: str) -> Any:
        """Everything else is the task's."""
        return getattr(self._task, name)

    def _start(self, reward: Reward) -> None:
        if reward.label == "math" and self._math is None:
            self._math = MathVerifier()
        if reward.place is not None and reward.place not in self._workers:
            self._workers[reward.place] = Workers(
                reward.place, timeout_s=self._timeout_s, count=self._count
            )
        if reward.label == "data-source":
            for name in sorted(
                {by_source(problem.row, reward.text) for problem in self._all_problems()}
            ):
                self._start(Reward(label=name, place=REWARDS[name]))

    def _all_problems(self) -> list[Problem]:
        return [*getattr(self._task, "all_training_problems", []), *self._task.heldout_problems()]

    def reward(self, problem: Problem, response_ids: Tokens) -> float:
        """The reward of one response."""
        return self.judge([problem], [response_ids])[0].reward

    def observe(self, problem: Problem, response_ids: Tokens) -> np.ndarray | None:
        """Call the task's `observe`; a failure ends the conversation and counts as a reward's.

        May be called in several threads at a time, each with its own limit.
        """
        most = self._task.max_observation_tokens

        def result() -> np.ndarray | None:
            ids = self._task.observe(problem, response_ids)
            if inspect.iscoroutine(ids):
                ids = asyncio.run(ids)
            if ids is None:
                return None
            ids = np.asarray(ids)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 < len(ids) <= most:
                raise ValueError(
                    f"it gave {ids.dtype} {ids.shape}; token ids are needed, 1 to "
                    f"max_observation_tokens={most} of them"
                )
            return ids

        found, why, late = _within(self._timeout_s, result)
        if why:
            failed = f"{type(self._task).__name__}.observe: {why}"
            self._unobserved[problem.prompt, _key(response_ids)] = (failed, late)
        return found

    def judge(
        self,
        problems: Sequence[Problem],
        responses: Sequence[Tokens],
        sampled: Sequence[np.ndarray | None] | None = None,
    ) -> list[Verdict]:
        """A verdict for each response to the problem at its place; see `judged`."""
        if not self._rewards:
            verdicts = [self._own(p, ids) for p, ids in zip(problems, responses, strict=True)]
        else:
            texts = [self._text(ids) for ids in responses]
            masks = sampled or [None] * len(responses)
            questions = [
                Question(
                    prompt=p.prompt,
                    answer=p.answer,
                    tokens=len(ids) if mask is None else int(mask.sum()),
                )
                for p, ids, mask in zip(problems, responses, masks, strict=True)
            ]
            by_reward = [self._outcomes(r, problems, questions, texts) for r in self._rewards]
            verdicts = [self._verdict(of_response) for of_response in zip(*by_reward, strict=True)]
        if self._unobserved:
            verdicts = [
                self._with_failed_tools(*one)
                for one in zip(problems, responses, verdicts, strict=True)
            ]
            for problem, ids in zip(problems, responses, strict=True):
                self._unobserved.pop((problem.prompt, _key(ids)), None)
        for problem, verdict in zip(problems, verdicts, strict=True):
            self.killed += verdict.killed
            if verdict.failed:
                self._tell(problem, verdict.failed)
        return verdicts

    def _outcomes(
        self,
        reward: Reward,
        problems: Sequence[Problem],
        questions: Sequence[Question],
        texts: Sequence[str],
    ) -> list[Outcome]:
        if reward.label == "math":
            return [self._by_math(q.answer, text) for q, text in zip(questions, texts, strict=True)]
        if reward.label == "data-source":
            return self._by_source(reward.text, problems, questions, texts)
        asked = [
            (question, text, problem.row, reward.text)
            for problem, question, text in zip(problems, questions, texts, strict=True)
        ]
        return self._workers[reward.place](asked)

    def _by_math(self, answer: str, text: str) -> Outcome:
        before = self._math.killed
        right = self._math.right(answer, text)
        return Outcome(float(right), late=self._math.killed > before)

    def _by_source(self, otherwise, problems, questions, texts) -> list[Outcome]:
        names = [by_source(problem.row, otherwise) for problem in problems]
        outcomes: list[Outcome | None] = [None] * len(names)
        for name in set(names):
            places = [i for i, other in enumerate(names) if other == name]
            of_name = [[side[i] for i in places] for side in (problems, questions, texts)]
            found = self._outcomes(Reward(label=name, place=REWARDS[name]), *of_name)
            for i, outcome in zip(places, found, strict=True):
                outcomes[i] = outcome
        return outcomes

    def _verdict(self, outcomes: Sequence[Outcome]) -> Verdict:
        """Weighted and added; the first of the rewards says whether the response is right."""
        killed = sum(outcome.late for outcome in outcomes)
        if failed := "; ".join(o.why for o in outcomes if o.value is None):
            return Verdict(reward=0.0, correct=0.0, failed=failed, killed=killed)
        parts, sums = {}, {}
        for reward, outcome in zip(self._rewards, outcomes, strict=True):
            value, named = value_of(outcome.value)
            parts |= {f"{reward.label}.{name}": v for name, v in named.items()}
            if len(self._rewards) > 1:
                parts[reward.label] = value
            sums[reward.label] = reward.weight, value
        terms = sums
        if len(self._rewards) == 1:
            (reward,), (outcome,) = self._rewards, outcomes
            named = terms_of(outcome.value)
            terms = {f"{reward.label}.{name}": (reward.weight, v) for name, v in named.items()}
        return Verdict(
            reward=weighted_sum([*sums.values()]), correct=is_right(outcomes[0].value),
            parts=parts, terms=terms, killed=killed,
        )  # fmt: skip

    def _own(self, problem: Problem, response_ids: Tokens) -> Verdict:
        """The task's own `reward`, in a thread that is left behind where it hangs."""
        given, why, late = _within(
            self._timeout_s, lambda: plain(self._task.reward(problem, response_ids))
        )
        if why:
            why = f"{type(self._task).__name__}.reward: {why}"
            return Verdict(reward=0.0, correct=0.0, failed=why, killed=int(late))
        value, parts = value_of(given)
        terms = {name: (1.0, v) for name, v in terms_of(given).items()}
        return Verdict(reward=value, correct=is_right(given), parts=parts, terms=terms)

    def _with_failed_tools(
        self, problem: Problem, response_ids: Tokens, verdict: Verdict
    ) -> Verdict:
        failed, late = self._unobserved.get((problem.prompt, _key(response_ids)), ("", False))
        if not failed:
            return verdict
        return Verdict(reward=0.0, correct=0.0, failed=failed, killed=verdict.killed + late)

    def _tell(self, problem: Problem, why: str) -> None:
        message = f"problem {problem.prompt!r:.120}: {why}"
        if self._ends:
            raise UserError(
                f"{message}. --reward-failures count goes on, with a reward of 0 for such responses"
            )
        kind = why.partition(": ")[2].partition(":")[0] or why
        self._said[kind] = self._said.get(kind, 0) + 1
        if self._said[kind] <= _SHOWN:
            rank = os.environ.get("RANK", "0")
            last = "; more of this kind are only counted" if self._said[kind] == _SHOWN else ""
            print(f"reward failed, rank {rank}, {message}{last}", file=sys.stderr, flush=True)

    def answer_classes(self, responses: Sequence[Tokens]) -> list[int | None]:
        """Equal answers by the first reward; for rewards without answers, equal texts."""
        if not self._rewards or self._rewards[0].label == "data-source":
            own = getattr(self._task, "answer_classes", _equal_tokens)
            return own(responses)
        first, texts = self._rewards[0], [self._text(ids) for ids in responses]
        if first.label == "math":
            return self._math.classes(texts)
        answer = ANSWERS.get(first.label, lambda text, _: text)
        seen: dict[Any, int] = {}
        answers = [answer(text, first.text or "") for text in texts]
        return [None if a is None else seen.setdefault(a, len(seen)) for a in answers]

    def close(self) -> None:
        self._end_workers()
        if close := getattr(self._task, "close", None):
            close()

    def _end_workers(self) -> None:
        for workers in self._workers.values():
            workers.close()
        if self._math is not None:
            self._math.close()


def text_of(response_ids: Tokens) -> str:
    """A response of the arithmetic task as rewards read it."""
    return arithmetic.decode(response_ids).removesuffix(arithmetic.EOS)


def reward_by_source(task: MathTask) -> str:
    """The rewards other than math-verify that the problems' `data_source` implies, in words; empty
    where there is none."""
    counts = Counter(
        by_source(problem.row, otherwise="math")
        for problem in [*task.all_training_problems, *task.heldout_problems()]
    )
    if counts.keys() <= {"math"}:
        return ""
    return ", ".join(f"{name} for {count} problems" for name, count in counts.most_common())


def _equal_tokens(responses: Sequence[Tokens]) -> list[int | None]:
    seen: dict[tuple, int] = {}
    return [seen.setdefault(tuple(ids), len(seen)) for ids in responses]


def value_of(given: float | Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The reward and the named values: `score` is the reward, or else their sum is."""
    if not isinstance(given, Mapping):
        return given, {}
    if SCORE in given:
        return given[SCORE], {name: v for name, v in given.items() if name != SCORE}
    return math.fsum(terms_of(given).values()), dict(given)


def terms_of(given: float | Mapping[str, float]) -> dict[str, float]:
    """The named rewards that add up to the reward; none where it is a number of its own."""
    if not isinstance(given, Mapping) or SCORE in given:
        return {}
    return {name: v for name, v in given.items() if name != RIGHT}


def is_right(given: float | Mapping[str, float]) -> float:
    """1 where a response counts as right: by `acc` where it is among the names, else from 1 on."""
    if isinstance(given, Mapping) and RIGHT in given:
        return float(given[RIGHT] > 0)
    return float(value_of(given)[0] >= 1)


def _key(response_ids: Tokens) -> bytes:
    return np.asarray(response_ids, np.int64).tobytes()


def _within(seconds: float, call: Callable[[], Any]) -> tuple[Any, str, bool]:
    """The call's result, or why there is none, and whether it was late.

    A call that hangs is left behind in its thread.
    """
    found: list[tuple[Any, str, bool]] = []

    def run() -> None:
        try:
            found.append((call(), "", False))
        except BaseException as error:
            found.append((None, said(error) or type(error).__name__, False))

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(seconds)
    return found[0] if found else (None, f"gave no answer in {seconds:g} s", True)
