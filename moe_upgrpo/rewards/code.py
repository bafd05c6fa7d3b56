# SPDX-License-Identifier: Apache-2.0
"""Programs that a model wrote, judged by unit tests in a sandboxed process (`sandbox`)."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_upgrpo.rewards import sandbox
from moe_upgrpo.rewards.question import Question

SECONDS, MEMORY = 6, 2**30  # of processor time; bytes of address space
WALL_S = 10.0
_SANDBOX = Path(sandbox.__file__)
_BLOCK = re.compile(r"```([\w+-]*)[^\S\n]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One test: Python that must run through after the program, or the output for an input."""

    test: str = ""
    given: str = ""
    printed: str | None = None


def code(problem: Question, response: str, row: Mapping[str, Any]) -> float:
    """1 where the program in the response passes all tests of the problem, else 0.

    The program is the last block of Python in the response, else the last block, else all of it.
    The tests are the first of these that exists:

    - in the answer, JSON as verl's data sets have it: {"inputs": [...], "outputs": [...]}, a text
      for standard input and what is printed for each, with "fn_name": the arguments and the result
      of a function; or a list of Python statements, `assert` and the like
    - the row's `test_list` (MBPP), with `test_imports`; or its `test` (HumanEval), whose `check`
      gets `entry_point`, after the `prompt` where the program does not define that
    - the answer, Python statements
    """
    if not sandbox.SUPPORTED:
        raise RuntimeError(
            "code: programs are run on Linux on x86_64 only, where they can be shut in; elsewhere "
            "give a reward of your own with a sandbox of yours"
        )
    program = written(response)
    program, cases = read_tests(problem, row, program)
    return float(all(passes(program, case) for case in cases))


def written(response: str) -> str:
    """The program in a response."""
    blocks = _BLOCK.findall(response)
    python = [text for language, text in blocks if language.lower() in ("python", "py", "python3")]
    return (python or [text for _, text in blocks] or [response])[-1]


def read_tests(problem: Question, row: Mapping[str, Any], program: str) -> tuple[str, list[Case]]:
    """The program as it is run, and its tests. Raises ValueError where there is none."""
    try:
        told = json.loads(problem.answer)
    except ValueError:
        told = None
    if isinstance(told, dict) and "inputs" in told:
        return program, _pairs(told)
    if isinstance(told, list) and told and all(isinstance(test, str) for test in told):
        return program, [Case(test="\n".join(told))]
    if row.get("test_list"):
        imports = row.get("test_imports") or row.get("test_setup_code") or ""
        imports = imports if isinstance(imports, str) else "\n".join(imports)
        return program, [Case(test="\n".join([imports, *row["test_list"]]))]
    entry = row.get("entry_point")
    if row.get("test") and entry:
        if not re.search(rf"^\s*(async\s+)?def\s+{re.escape(entry)}\b", program, re.MULTILINE):
            program = problem.prompt + program
        return program, [Case(test=f"{row['test']}\ncheck({entry})")]
    if told is None and problem.answer.strip():
        return program, [Case(test=problem.answer)]
    raise ValueError(f"code: the answer holds no tests: {problem.answer!r:.80}")


def _pairs(told: dict[str, Any]) -> list[Case]:
    inputs, outputs, name = told["inputs"], told.get("outputs"), told.get("fn_name")
    if not inputs or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("code: `inputs` and `outputs` must be lists of the same length, above 0")
    if not name:
        return [
            Case(given=_lines(i), printed=_lines(o)) for i, o in zip(inputs, outputs, strict=True)
        ]
    tests = []
    for arguments, expected in zip(inputs, outputs, strict=True):
        if isinstance(arguments, str):  # one JSON value a line
            arguments = [json.loads(line) for line in arguments.splitlines()]
            expected = json.loads(expected)
        allowed = [expected]
        if isinstance(expected, list) and len(expected) == 1:  # some sets wrap the result
            allowed += expected
        tests.append(
            Case(
                test="import json as _json\n"
                f"_call = getattr(Solution(), {name!r}) if 'Solution' in globals() "
                f"else globals()[{name!r}]\n"
                f"_found = _call(*_json.loads({json.dumps(arguments)!r}))\n"
                "_found = _json.loads(_json.dumps(_found))\n"
                f"assert _found in _json.loads({json.dumps(allowed)!r})"
            )
        )
    return tests


def _lines(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def passes(program: str, case: Case) -> bool:
    """Whether the program passes one test.

    Raises RuntimeError where it cannot be shut in, and is not run.
    """
    token = secrets.token_hex(16)
    job = {
        "program": program,
        "test": case.test,
        "token": token,
        "seconds": SECONDS,
        "memory": MEMORY,
    }
    with (
        tempfile.TemporaryDirectory(prefix="moe_upgrpo_code_") as folder,
        tempfile.TemporaryFile() as printed,  # its size is limited; a pipe's is not
    ):
        Path(folder, sandbox.JOB).write_text(json.dumps(job), encoding="utf-8")
        try:
            subprocess.run(
                [sys.executable, "-I", str(_SANDBOX)],
                input=case.given.encode(),
                stdout=printed,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1"},
                timeout=WALL_S,
                start_new_session=True,  # no terminal: /dev/tty is not there
            )
        except subprocess.TimeoutExpired:
            return False
        printed.seek(0)
        out = printed.read().decode(errors="replace")
    if out.startswith(f"{token}: "):
        raise RuntimeError(
            f"code: programs cannot be shut in here, and are not run: {out[len(token) + 2 :]}. "
            "Landlock (Linux 5.13) and seccomp are needed"
        )
    if not out.endswith(token):
        return False
    return case.printed is None or _same(out[: -len(token)], case.printed)


def _same(found: str, expected: str) -> bool:
    """Whether the lines are the same but for white space at their ends and empty last lines."""
    sides = ([line.rstrip() for line in text.strip().splitlines()] for text in (found, expected))
    first, second = sides
    return first == second
