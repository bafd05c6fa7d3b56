# SPDX-License-Identifier: Apache-2.0
"""`--megatron.NAME VALUE` among the words of a command line. Imports no Megatron."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from moe_upgrpo.errors import UserError

OPTION = "--megatron"


def as_text(value: Any) -> str:
    """A value from YAML as `config.json` keeps it; a word stays as it is."""
    if isinstance(value, str):
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        return value if isinstance(read, str) else as_text(read)
    return json.dumps(value)


def as_words(name: str, value: Any) -> list[str]:
    """The option as the command line would have it."""
    return [f"{OPTION}.{str(name).replace('-', '_')}={as_text(value)}"]


def folded(words: Sequence[str]) -> list[str]:
    """The words with all `--megatron.NAME VALUE` as one option of a mapping; the last value wins.

    Raises UserError for a name without a value.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    waiting = iter(words)
    for word in waiting:
        name, has_value, value = word.partition("=")
        if name == OPTION:
            raise UserError(f"{word}: write {OPTION}.NAME VALUE, once for each option.")
        if not name.startswith(f"{OPTION}."):
            rest.append(word)
            continue
        if not has_value:
            value = next(waiting, "--")
        if value.startswith("--") or not value:
            raise UserError(
                f"{name} without a value: write {name} VALUE, also where it is true or false."
            )
        given[name.removeprefix(f"{OPTION}.").replace("-", "_")] = as_text(value)
    pairs = [word for pair in given.items() for word in pair]
    return [*rest, OPTION, *pairs] if pairs else rest
