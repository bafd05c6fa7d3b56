# SPDX-License-Identifier: Apache-2.0
"""Endings of a run's job: done, refused, ended by its own numbers, or by its machine."""

from __future__ import annotations

from dataclasses import dataclass

from moe_upgrpo.errors import MachineFault, NumericalFailure, UserError

_SAID = (1, *(kind.status for kind in (UserError, NumericalFailure, MachineFault)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status`: 0, 1, 2, 3 or 4, see `moe_upgrpo.errors`; `message`: the error's."""

    status: int
    message: str

    @property
    def crashed(self) -> bool:
        """Whether the run's own numbers ended it, which counts as a result."""
        return self.status == NumericalFailure.status

    @property
    def of_machine(self) -> bool:
        """Whether its machine ended it, so that it must be run again."""
        return self.status == MachineFault.status


def outcome(status: int, said: str) -> Outcome:
    """Tell how a job of `moe_upgrpo.launch` ended, from its status and what it printed.

    Any status other than those of `moe_upgrpo.errors` comes from a signal to the launcher or the
    job, not from the run's numbers.
    """
    if status == 0:
        return Outcome(0, "")
    return Outcome(status if status in _SAID else MachineFault.status, last_word(said))


def last_word(said: str) -> str:
    """The last error message of a log, which the launcher prints last, or the log's last lines."""
    found = ("\n" + said).rfind("\nerror: ")
    if found < 0:
        return "\n".join(said.strip().splitlines()[-12:])
    return "\n".join(said[found:].strip().splitlines()[:12])
