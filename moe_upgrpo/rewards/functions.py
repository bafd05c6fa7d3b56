# SPDX-License-Identifier: Apache-2.0
"""The built-in rewards: functions of a question, the text of a response and the row of its data.

Each takes the text after the colon of its name, `regex:PATTERN`, as a last argument. A function of
your own has the first three.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from moe_upgrpo.rewards.question import Question

Row = Mapping[str, Any]
# What may precede a letter, as in \boxed{\text{(B)}}, **B**, (B).
_OPENED = r"(?:\*\*|\$|\(|\[|\\boxed\{|\\text\{|\\textbf\{|\\mathrm\{|\s)*"
_BOXED = re.compile(r"\\boxed\{" + _OPENED + r"([A-Ja-j])\b")
_SAID = re.compile(
    r"\b(?i:answer|option|choice)\b(?i:\s+(?:is|was|would\s+be|should\s+be))?(?:\*\*|\s)*[:=]?"
    + _OPENED
    + r"([A-J])(?![\w'’])"
)
_LINE = re.compile(r"^[\W_]*([A-J])(?:[).:]\s.*)?[\W_]*$", re.MULTILINE)
_ANOTHER = re.compile(r"[\W_]*(?:,|/|\b(?:or|and)\b)[\W_]*[A-J]\b")
_FINAL_NUMBER = re.compile(r"####\s+\$?\s*(-?[\d.,]*\d)")
_TAGS = r"\s*<{0}>(?:(?!</?{0}>).)*</{0}>\s*"
_THINK = re.compile(_TAGS.format("think") + _TAGS.format("answer"), re.DOTALL)


def exact(problem: Question, response: str, row: Row, _: str = "") -> float:
    """1 where the response is the answer; runs of white space count as one space."""
    return float(exact_answer(response) == exact_answer(problem.answer))


def exact_answer(response: str, _: str = "") -> str | None:
    return " ".join(response.split()) or None


def choice(problem: Question, response: str, row: Row, _: str = "") -> float:
    """1 where the response chooses the answer's letter, A to J.

    The letter is the last in a \\boxed{}, else the last that "answer is", "answer:", "option" or
    "choice" names, else that of the last line that is a letter alone or begins with `B)`. Naming
    two ("A or B") chooses none. The answer is a letter, or a number: the place in the row's
    `choices` or `options`, counted from 0.
    """
    return float(chosen(response) == _reference_letter(problem.answer, row))


def chosen(response: str, _: str = "") -> str | None:
    for pattern in (_BOXED, _SAID, _LINE):
        found = list(pattern.finditer(response))
        if found:
            if _ANOTHER.match(response, found[-1].end(1)):
                return None
            return found[-1][1].upper()
    return None


def _reference_letter(answer: str, row: Row) -> str:
    if answer.isdigit():
        choices = row.get("choices") or row.get("options")
        if isinstance(choices, Mapping):  # as ARC and OpenBookQA have them: {"text": [...], ...}
            choices = choices.get("text")
        if not isinstance(choices, list) or int(answer) >= len(choices):
            raise ValueError(
                f"choice: the answer {answer!r} is no letter, and no place in a list `choices` or "
                "`options` of the row"
            )
        return "ABCDEFGHIJ"[int(answer)]
    letter = chosen(answer)
    if letter is None:
        raise ValueError(f"choice: the answer {answer!r} is no letter from A to J")
    return letter


def gsm8k(problem: Question, response: str, row: Row, _: str = "") -> float:
    """1 where the number after the response's last `####` is the answer's; as verl's `strict`."""
    reference = final_number(problem.answer) or _number(problem.answer)
    if reference is None:
        raise ValueError(f"gsm8k: the answer {problem.answer!r} is no number")
    return float(final_number(response) == reference)


def final_number(response: str, _: str = "") -> Decimal | None:
    found = _FINAL_NUMBER.findall(response)
    return _number(found[-1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None


def regex(problem: Question, response: str, row: Row, pattern: str) -> float:
    """1 where the last match of the pattern has the answer in its first group; for a pattern
    without a group, where it matches at all."""
    compiled = re.compile(pattern)
    if not compiled.groups:
        return float(compiled.search(response) is not None)
    return float(matched(response, pattern) == exact_answer(problem.answer))


def matched(response: str, pattern: str) -> str | None:
    found = list(re.finditer(pattern, response))
    return exact_answer(found[-1][1] or "") if found and found[-1].re.groups else None


def form(problem: Question, response: str, row: Row, pattern: str = "") -> float:
    """1 where the whole response matches the pattern, whatever it answers.

    Without a pattern: <think>…</think> and then <answer>…</answer>, each once.
    """
    compiled = re.compile(pattern, re.DOTALL) if pattern else _THINK
    return float(compiled.fullmatch(response) is not None)


def length(problem: Question, response: str, row: Row, most: str) -> float:
    """1 up to `most` sampled tokens, then down linearly to 0 at twice as many."""
    return min(1.0, max(0.0, 2.0 - problem.tokens / int(most)))


# The answer that a response gives, for majority votes, by the name of the reward.
ANSWERS: dict[str, Callable[[str, str], Any]] = {
    "exact": exact_answer,
    "choice": chosen,
    "gsm8k": final_number,
    "regex": matched,
}
