"""What a task has to offer: problems with prompt ids, and a verifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with its reference answer; both also as text, for logs."""

    prompt: str
    prompt_ids: np.ndarray
    answer: str


class Task(Protocol):
    """Training problems, held-out problems and the verifier of one task."""

    @property
    def max_response_tokens(self) -> int:
        """Tokens of the longest correct response, EOS included."""

    def training_problems(self, count: int, *, seed: int, step: int) -> list[Problem]:
        """`count` training problems, a function of (seed, step, count) alone.

        Every rank asks for the problems of the whole step and takes its share, so that what is
        trained on does not depend on the number of ranks.
        """

    def heldout_problems(self) -> list[Problem]:
        """The problems never trained on, always the same and in the same order."""

    def reward(self, problem: Problem, response_ids: Sequence[int] | np.ndarray) -> float:
        """1.0 if the response answers the problem, else 0.0."""
