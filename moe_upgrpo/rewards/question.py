# SPDX-License-Identifier: Apache-2.0
"""The question that a response answers, as a reward sees it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem without its tokens. tokens: the number of sampled tokens in the response."""

    prompt: str
    answer: str
    tokens: int = 0
