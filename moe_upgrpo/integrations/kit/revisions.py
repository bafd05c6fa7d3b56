# SPDX-License-Identifier: Apache-2.0
"""The installed revision of a stack, and whether it has the functions that are to be hooked.

`check` is called when a stack's integration starts, before it imports anything of the stack that
may have moved. Files are read with ast (`integrations.hooks`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from moe_upgrpo import ending
from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks
from moe_upgrpo.patching.checkout import head

# The package to look for, and the name of a release's distribution.
MODULES = {
    "verl": ("verl", "verl"),
    "slime": ("slime", "slime"),
    "miles": ("miles", "miles-rl"),
    "nemo-rl": ("nemo_rl", "nemo-rl"),
    "megatron-lm": ("megatron.rl", "megatron-core"),
    "ms-swift": ("swift", "ms-swift"),
}

Part = Literal["loss", "log", "health"]
# The name of each in messages, and how to do without it; empty: it is left out by itself.
PARTS: dict[Part, tuple[str, str]] = {
    "loss": ("a loss", "or take the stack's own loss"),
    "log": ("the routing log", "or unset MOE_UPGRPO_RUN"),
    "health": ("the report of a replay's health", ""),
}
_said: set[tuple[str, str]] = set()  # messages of this process: stack, and subject


@dataclass(frozen=True)
class Installed:
    """An installed stack. root: the folder that holds its top-level package.

    found: the result of `hooks.found_in` there.
    """

    stack: str
    root: Path
    commit: str | None
    version: str | None
    found: Mapping[str, Mapping[str, str]]

    @property
    def name(self) -> str:
        """Its revision, for messages."""
        if self.commit:
            return f"{self.stack} {self.commit[:9]}"
        return f"{self.stack} {self.version or 'of an unknown revision'}"

    def differences(self) -> dict[str, dict[str, str]]:
        """Tested revision → hook → how it is here; empty where it is the same."""
        return {
            name: hooks.differences(of, self.found) for name, of in hooks.tested(self.stack).items()
        }

    @property
    def tested(self) -> str | None:
        """The tested revision whose hooks all equal the installed ones; None: there is none."""
        same = [name for name, changed in self.differences().items() if not changed]
        if self.commit is None and self.version is None:
            return same[0] if same else None
        return next((name for name in same if self._is(name)), None)

    def _is(self, name: str) -> bool:
        if self.commit and len(name) >= 7 and self.commit.startswith(name):
            return True
        return name.removeprefix("v") == self.version

    def missing(self, part: Part) -> list[str]:
        """`FILE: NAME` of the hooks that `part` needs and that are missing."""
        return [
            f"{file}: {name}"
            for file, name in hooks.missing(self.stack, self.found)
            if part in needed_by(self.stack, name)
        ]

    def warning(self) -> str | None:
        """A warning for a revision that was not tested; None for a tested one."""
        if self.tested:
            return None
        every = self.differences()
        nearest = min(reversed(every), key=lambda name: len(every[name]))
        changed = [
            f"{hook} {'is elsewhere' if how == 'gone' else how}"
            for hook, how in every[nearest].items()
        ]
        how = f"but not as at {nearest}: {'; '.join(changed)}" if changed else f"as at {nearest}"
        return (
            f"moe_upgrpo: {self.name} was not tested (tested: {', '.join(every)}). What is hooked "
            f"into is there, {how}. moe-upgrpo doctor --stack {self.stack} has all of it"
        )


def needed_by(stack: str, name: str) -> list[Part]:
    """The parts that need a hook; the log needs all hooks."""
    of_parts = {"loss": hooks.LOSS, "health": hooks.HEALTH}
    return [*(part for part, names in of_parts.items() if name in names[stack]), "log"]


def locate(stack: str) -> Path | None:
    """The folder that holds the stack's top-level package, as this Python finds it."""
    module = MODULES[stack][0]
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # no parent; a stand-in without a spec
        return None
    folders = (spec and spec.submodule_search_locations) or ()  # __init__.py or not
    return next((Path(x).resolve().parents[module.count(".")] for x in folders), None)


def installed(stack: str, root: Path | None = None) -> Installed | None:
    """The stack below `root`, or else the one that this Python finds; None: there is none."""
    root = locate(stack) if root is None else root.absolute()
    if root is None or not (root / MODULES[stack][0].replace(".", "/")).is_dir():
        return None
    found = importlib.metadata.distributions(name=MODULES[stack][1], path=[str(root)])
    versions = [one.version for one in found]
    return Installed(
        stack=stack,
        root=root,
        commit=head(root),
        version=versions[0] if versions else None,
        found=hooks.found_in(root, stack),
    )


def check(stack: str, part: Part) -> None:
    """Warn once if the installed revision was not tested.

    Raises:
        UserError: a function is missing that `part` needs.
    """
    here = installed(stack)
    if here is None:
        return  # not files, such as a zip archive: what is missing shows at import
    if gone := here.missing(part):
        needs, without = PARTS[part]
        raise UserError(
            f"{here.name} lacks what {needs} of moe_upgrpo needs of it: {', '.join(gone)}. "
            f"Tested: {', '.join(hooks.tested(stack))}; install one of them, {without}"
        )
    said, warning = (stack, "revision") in _said, here.warning()
    _said.add((stack, "revision"))
    if warning and not said and ending.rank() == 0:
        print(warning, flush=True)


def has(stack: str, part: Part) -> bool:
    """Whether the installed revision has what `part` needs; if not, say what it lacks, once."""
    here = installed(stack)
    gone = here.missing(part) if here is not None else []
    if gone and (stack, part) not in _said:
        _said.add((stack, part))
        if ending.rank() == 0:
            lacking = f"{here.name} lacks {', '.join(gone)}"
            print(f"moe_upgrpo: {PARTS[part][0]} is left out: {lacking}", flush=True)
    return not gone
