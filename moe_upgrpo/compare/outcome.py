"""How the job of a run ended: done, refused, by its numbers, or for its machine's sake."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import MachineFault, NumericalFailure, UserError

_EXIT_CODE = re.compile(r"^\s*exitcode\s*: (-?\d+) \(pid: ", re.MULTILINE)  # torchrun's report
_BY_KIND = (0, *(kind.status for kind in (UserError, NumericalFailure, MachineFault)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status`: 0, 1, 2, 3 or 4, see `moe_upgrpo.errors`; `message`: the error's."""

    status: int
    message: str

    @property
    def crashed(self) -> bool:
        """Whether the run's own numbers ended it, so that it counts."""
        return self.status == NumericalFailure.status

    @property
    def of_machine(self) -> bool:
        """Whether it is to be run again."""
        return self.status == MachineFault.status


def outcome(status: int, said: str, ranks: Path) -> Outcome:
    """How a job ended.

    Args:
        status: of the process that was started. torchrun's is 1 whatever ended its ranks.
        said: what the job printed.
        ranks: the folder in which its ranks left their error files.
    """
    if status == 0:
        return Outcome(0, "")
    told = [found for file in sorted(ranks.rglob("error.json")) if (found := _read(file))]
    # A rank that ended before our code ran, or on a full disk, has none; torchrun says its status.
    told = told or [
        {"status": int(code), "message": tail(said), "at": 0}
        for code in _EXIT_CODE.findall(said)
        if int(code) > 0
    ]
    # A rank that failed by itself comes before those that it took along.
    own = [one for one in told if one["status"] in (1, UserError.status, NumericalFailure.status)]
    first = min(own or told, key=lambda one: one["at"], default=None)
    if status in _BY_KIND:
        return Outcome(status, first["message"] if first else tail(said))
    if status < 0 or first is None:  # the kernel's killer, a signal: nobody could say a word
        return Outcome(MachineFault.status, tail(said))
    of_machine = first["status"] not in (1, *_BY_KIND)  # 130, 143: interrupted
    return Outcome(MachineFault.status if of_machine else first["status"], first["message"])


def _read(file: Path) -> dict[str, Any] | None:
    """A rank's error file, as `moe_upgrpo.cli` writes it; None where it is none, or cut short."""
    try:
        found = json.loads(file.read_bytes())
        message = found["message"]
        at = int(message["extraInfo"]["timestamp"])
        status = int(message["extraInfo"].get("status", 1))
        return {"status": status, "message": f"error: {_short(message['message'])}", "at": at}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def tail(said: str) -> str:
    """The first error message of a log, or its last lines."""
    found = re.search(r"^error: .*", said, re.MULTILINE | re.DOTALL)
    if found:
        return _short(found.group())
    return "\n".join(said.strip().splitlines()[-12:])


def _short(message: str) -> str:
    return "\n".join(message.strip().splitlines()[:12])
