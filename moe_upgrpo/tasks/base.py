"""The protocol of a task: problems with prompt ids, and a verifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with its reference answer; both also as text, for logs."""

    prompt: str
    prompt_ids: np.ndarray
    answer: str


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
        """1.0 if the response answers the problem, else 0.0."""

    def answer_classes(self, responses: Sequence[Tokens]) -> list[int | None]:
        """For each of the responses to one problem, which answer it gives: equal numbers for equal
        answers, None where it gives none. Majority votes count these."""

    @property
    def killed(self) -> int:
        """Responses so far that took the verifier too long; they count as wrong."""

    def close(self) -> None:
        """Free what the verifier holds; the task is not used afterwards."""


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
