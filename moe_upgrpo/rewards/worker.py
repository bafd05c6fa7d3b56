# SPDX-License-Identifier: Apache-2.0
"""The process in which a reward runs: `python -m moe_upgrpo.rewards.worker MODULE:FUNCTION`.

It reads lines of JSON, each a list of (question, response, row, *text), and answers each with a
list of {"value": number or {name: number}} or {"error": text}. Coroutines of a line run together.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_upgrpo.rewards.question import Question

VERL = {"solution_str", "ground_truth"}  # parameters of verl's compute_score


def main(place: str, timeout_s: float) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # text that a reward prints is not a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this one
    try:
        function = load(place)
        call = called(function)
    except BaseException as error:
        print(json.dumps({"error": said(error)}), file=replies, flush=True)
        return
    waits = inspect.iscoroutinefunction(function)
    print(json.dumps({"ready": True, "waits": waits}), file=replies, flush=True)
    for line in sys.stdin:
        asked = [(Question(**question), *rest) for question, *rest in json.loads(line)]
        # An orphan ends too: the parent's own limit comes first.
        signal.setitimer(signal.ITIMER_REAL, 10 + 2 * timeout_s)
        if waits:
            answers = asyncio.run(_together(call, asked, timeout_s))
        else:
            answers = [_answered(call, one) for one in asked]
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answers), file=replies, flush=True)


def load(place: str) -> Callable:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names."""
    module, _, name = place.rpartition(":")
    if module.endswith(".py"):
        path = Path(module).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"{module}: there is no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        found: Any = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = found  # for dataclasses and pickle, as an import does
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{place} is a {type(found).__name__}, no function")
    return found


def called(function: Callable) -> Callable:
    """The function as (question, response, row, *text) calls it; verl's own are taken as they are.

    Raises TypeError where it takes other arguments.
    """
    signature = inspect.signature(function)
    if signature.parameters.keys() >= VERL:

        def as_verl(question: Question, response: str, row: dict):
            return function(
                data_source=row.get("data_source"),
                solution_str=response,
                ground_truth=question.answer,
                extra_info=row.get("extra_info"),
            )

        return as_verl
    parameters = signature.parameters.values()
    if not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        try:
            signature.bind(None, "", {})
        except TypeError:
            bound = [
                p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]
            if len(bound) != 4:  # built-in ones take their text
                raise TypeError(
                    f"it takes {signature}; (problem, response, row) are given, or verl's "
                    "(data_source, solution_str, ground_truth, extra_info)"
                ) from None
    return function


def _answered(call: Callable, asked: tuple) -> dict:
    try:
        return {"value": plain(call(*asked))}
    except BaseException as error:
        return {"error": said(error)}


async def _together(call: Callable, asked: list[tuple], timeout_s: float) -> list[dict]:
    async def one(each: tuple) -> dict:
        try:
            return {"value": plain(await asyncio.wait_for(call(*each), timeout_s))}
        except TimeoutError:
            return {"late": True}
        except BaseException as error:
            return {"error": said(error)}

    return await asyncio.gather(*map(one, asked))


def plain(value: Any) -> float | dict[str, float]:
    """A number, or named numbers, as in JSON. Raises ValueError that says what was returned."""
    if isinstance(value, dict):
        if not value:
            raise ValueError("it gave an empty dict; a number or named numbers are needed")
        return {str(name): _number(of_name, f" for {name!r}") for name, of_name in value.items()}
    return _number(value)


def _number(value: Any, where: str = "") -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(f"it gave {value!r:.80}{where}; one finite number is needed")
    if not math.isfinite(float(value)):
        raise ValueError(f"it gave {float(value)}{where}; a finite number is needed")
    return float(value)


def said(error: BaseException) -> str:
    """The error in one line, with the last place in the user's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, ValueError) and not frames:
        return message
    return f"{type(error).__name__}: {message}{place}"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
