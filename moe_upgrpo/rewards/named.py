# SPDX-License-Identifier: Apache-2.0
"""Rewards by the words of `--reward`: [WEIGHT*]NAME[:TEXT], [WEIGHT*]MODULE:FUNCTION."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_upgrpo.errors import UserError, nearest

_BUILT_IN = "moe_upgrpo.rewards.functions"
# Name -> where its function is. math-verify has a process of its own kind (tasks/math_verifier.py);
# data-source takes for each row the one that verl takes for its `data_source`.
REWARDS: dict[str, str | None] = {
    "math": None,
    "exact": f"{_BUILT_IN}:exact",
    "choice": f"{_BUILT_IN}:choice",
    "gsm8k": f"{_BUILT_IN}:gsm8k",
    "regex": f"{_BUILT_IN}:regex",
    "code": "moe_upgrpo.rewards.code:code",
    "format": f"{_BUILT_IN}:form",
    "length": f"{_BUILT_IN}:length",
    "data-source": None,
}
# Whether a text goes after the name's colon: it must, it may, or (others) it must not.
_NEEDS, _MAY = ("regex", "length"), ("format", "data-source")
_WEIGHTED = re.compile(r"([\d.]+(?:e[+-]?\d+)?)\*(.+)", re.DOTALL)

# As verl/utils/reward_score/__init__.py has them; its rules for mathematics are math-verify here.
SOURCES = {
    "openai/gsm8k": "gsm8k",
    **dict.fromkeys(
        ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500",
         "math_dapo", "math", "math_dapo_reasoning", "numina_aops_forum", "numina_synthetic_math",
         "numina_amc_aime", "numina_synthetic_amc", "numina_cn_k12", "numina_olympiads"), "math"),
    **dict.fromkeys(("codecontests", "apps", "codeforces", "taco"), "code"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """One of the words. label: its name in metrics. place: module:function, None where it has none.
    text: the text after the colon of a built-in one."""

    label: str
    place: str | None
    weight: float = 1.0
    text: str | None = None

    @property
    def is_one_number(self) -> bool:
        """Whether it is known to return one number; your own, and a plug-in's, may return names."""
        return self.place is None or self.place.startswith("moe_upgrpo.rewards.")


def register_reward(name: str, function: Callable) -> None:
    """Register a reward under a name for `--reward`. Workers import it by module and name."""
    place = f"{function.__module__}:{function.__qualname__}"
    if not re.fullmatch(r"[\w-]+", name) or (name in REWARDS and REWARDS[name] != place):
        raise UserError(
            f"register_reward: {name!r} given; allowed: letters, digits, - and _, and none of the "
            f"names that are taken: {', '.join(REWARDS)}"
        )
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise UserError(
            f"register_reward({name!r}): {place} cannot be imported by a worker process; a "
            "function at the top of a module is needed"
        )
    REWARDS[name] = place


def read_rewards(words: Sequence[str]) -> list[Reward]:
    """The rewards that the words name, in their order.

    Raises UserError: an unknown name (the nearest are named), a weight that is no number, a text
    that is missing, broken or not taken, a reward given twice.
    """
    rewards = [_read(word) for word in words]
    labels = [reward.label for reward in rewards]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"reward: {', '.join(sorted(twice))} given twice")
    return rewards


def is_own_code(word: str) -> bool:
    """Whether the word names a module or a file, not a built-in reward or a plug-in's."""
    return _read(word).place not in REWARDS.values()


def _read(word: str) -> Reward:
    weight = 1.0
    if weighted := _WEIGHTED.fullmatch(word):
        try:
            weight = float(weighted[1])
        except ValueError:
            raise UserError(f"reward={word!r}: the weight {weighted[1]!r} is no number") from None
    name = weighted[2] if weighted else word
    known, colon, text = name.partition(":")
    if known in REWARDS:
        _check_text(name, known, text if colon else None)
        return Reward(label=known, place=REWARDS[known], weight=weight, text=text or None)
    if re.fullmatch(r"[\w./-]+:[\w.]+", name):
        return Reward(label=text.rpartition(".")[2], place=name, weight=weight)
    raise UserError(
        f"reward={word!r}: allowed are {', '.join(REWARDS)}, or your own as module:function or "
        f"FILE.py:function{nearest(known, REWARDS)}"
    )


def _check_text(word: str, name: str, text: str | None) -> None:
    if text and name not in (*_NEEDS, *_MAY):
        raise UserError(f"reward={word!r}: {name} takes no text after it")
    if not text and name in _NEEDS:
        example = {"regex": r"regex:answer: (\d+)", "length": "length:512"}[name]
        raise UserError(f"reward={word!r}: {name}:TEXT is needed, for instance {example!r}")
    if name == "length" and not (text.isdigit() and int(text)):
        raise UserError(f"reward={word!r}: a number of tokens is needed, of at least 1")
    if text and name == "data-source":
        if text not in REWARDS or text in (*_NEEDS, name):
            raise UserError(
                f"reward={word!r}: after data-source: stands the reward of rows whose data_source "
                f"is not known; allowed: math, exact, choice, gsm8k, code{nearest(text, REWARDS)}"
            )
    elif text and name != "length":
        try:
            re.compile(text)
        except re.error as error:
            raise UserError(f"reward={word!r} is no regular expression: {error}") from None


def by_source(row: Any, otherwise: str | None) -> str:
    """The built-in reward that verl's data sets mean by the row's `data_source`.

    otherwise: the one of rows without a `data_source`, or with one that is not known. Raises
    UserError where it is None, and for rows that a reward model is to judge
    (`reward_model.style`: model).
    """
    style = row.get("reward_model")
    style = style.get("style") if isinstance(style, dict) else None
    if style == "model":
        raise UserError(
            "reward_model.style is 'model': the answers are for a reward model to judge. Give "
            "--reward, for instance module:function that asks yours."
        )
    source = str(row.get("data_source"))  # a list or an object in some files: not known
    name = SOURCES.get(source, "math" if source.startswith("aime") else otherwise)
    if name is None:
        raise UserError(
            f"data_source is {row.get('data_source')!r}; allowed with the reward data-source: "
            f"{', '.join(SOURCES)}, aime…{nearest(source, SOURCES)}"
        )
    return name


def weighted_sum(values: Sequence[tuple[float, float]]) -> float:
    """Σ weight·value, exactly rounded: a lone reward stays as it is."""
    return math.fsum(weight * value for weight, value in values)
