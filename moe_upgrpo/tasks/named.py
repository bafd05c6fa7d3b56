# SPDX-License-Identifier: Apache-2.0
"""Tasks of your own: `--task module:Class`, or by the name that a plug-in gave one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError, nearest
from moe_upgrpo.rewards.worker import load, said
from moe_upgrpo.tasks.base import TOOLS_AT_ONCE, Task

TASKS: dict[str, Callable[..., Task]] = {}
NEEDED = (
    "max_prompt_tokens", "max_response_tokens", "training_problems", "heldout_problems", "reward",
)  # fmt: skip


def register_task(name: str, make: Callable[..., Task]) -> None:
    """Register a task under a name for `--task`."""
    if name in TASKS and TASKS[name] is not make:
        raise UserError(f"register_task: {name!r} is taken; taken are {', '.join(TASKS)}")
    TASKS[name] = make


def check_task(word: str, options: str) -> dict[str, Any]:
    """The options of a task. Raises UserError where they are not a JSON object, or for a word that
    is neither a known name nor module:Class."""
    if ":" not in word and word not in TASKS:
        known = f"; known names: {', '.join(TASKS)}" if TASKS else ""
        raise UserError(
            f"task={word!r}: module:Class or FILE.py:Class is needed{known}{nearest(word, TASKS)}"
        )
    try:
        given = json.loads(options)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"task_options={options!r}: a JSON object is needed, such as {{}}")
    return given


def make_task(word: str, model_dir: Path, options: str) -> Task:
    """The task `word`, made of the folder of the model and its options as keywords.

    Raises UserError: it cannot be imported or made, or lacks an attribute that a task must have.
    """
    keywords = check_task(word, options)
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # `moe-upgrpo` has it not, `python -m moe_upgrpo` has
    try:
        task = (TASKS.get(word) or load(word))(model_dir, **keywords)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"task={word!r} with task_options={options}: {said(error)}") from error
    if lacking := [name for name in NEEDED if not hasattr(task, name)]:
        raise UserError(
            f"task={word!r}: {type(task).__name__} has no {', '.join(lacking)}; "
            "moe_upgrpo/tasks/base.py says what a task has"
        )
    turns = getattr(task, "max_turns", 1)
    if turns > 1 and (
        lacking := [n for n in ("observe", "max_observation_tokens") if not hasattr(task, n)]
    ):
        raise UserError(
            f"task={word!r}: {type(task).__name__} has max_turns={turns} and no "
            f"{' and no '.join(lacking)}; moe_upgrpo/tasks/base.py says what a task has"
        )
    at_once = getattr(task, "tools_at_once", TOOLS_AT_ONCE)
    if not isinstance(at_once, int) or at_once < 1:
        raise UserError(
            f"task={word!r}: {type(task).__name__} has tools_at_once={at_once!r}; allowed: a whole "
            "number of at least 1, 1 for tools that are asked one after the other"
        )
    return task
