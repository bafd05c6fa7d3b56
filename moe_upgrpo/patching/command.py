# SPDX-License-Identifier: Apache-2.0
"""The command `moe-upgrpo patch`, and what it prints."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from moe_upgrpo.errors import UserError
from moe_upgrpo.patching.checkout import UnknownRevision, find, installed, recognise
from moe_upgrpo.patching.series import WITHOUT, Series, all_series, of_stack


@dataclass(kw_only=True, slots=True)
class PatchCommand:
    """Patch an installed or checked-out stack: all of its patches or none."""

    # list and show change nothing; verify imports what apply changed; revert puts back what
    # upstream has, to the last bit.
    command: Positional[Literal["list", "show", "apply", "verify", "revert"]]
    # As list names it; list takes none for all.
    stack: Positional[str | None] = None
    # The folder that holds the stack's package. Default: where `python` finds it.
    root: Path | None = None
    # The interpreter whose stack is meant.
    python: str = sys.executable


def run(asked: PatchCommand, out: Console) -> None:
    """Run the command. Raises UserError where it cannot be done; nothing is changed then."""
    try:
        _run(asked, out)
    except OSError as error:  # such as a folder that may not be entered
        raise UserError(f"{error}. Give yourself access, or name another --root.") from error


def _run(asked: PatchCommand, out: Console) -> None:
    command, stack, python = asked.command, asked.stack, asked.python
    root = asked.root and asked.root.absolute()
    if command == "list":
        show_all({stack: of_stack(stack)} if stack else all_series(), root, python, out)
        return
    if stack is None:
        raise UserError(
            f"no stack given; usage: moe-upgrpo patch {command} STACK; "
            f"known: {', '.join(all_series())}."
        )
    if command == "show" and root is None:
        for series in of_stack(stack):
            show(series, out)
        return
    checkout = find(stack, root, python)
    name = f"{stack} {checkout.series.version} in {checkout.root}"
    if command == "show":
        show(checkout.series, out)
    elif command == "verify":
        modules = checkout.verify(python)
        out.print(f"{name}: patched, and imported by {python}: {', '.join(modules)}.")
    else:
        changed = checkout.apply() if command == "apply" else checkout.revert()
        if changed:
            out.print(f"{name} is {checkout.state}; changed:", *changed, sep="\n  ")
        else:
            out.print(f"{name} is {checkout.state} already; nothing changed.")


def show(series: Series, out: Console) -> None:
    """Show every patch with its reason and its diff."""
    revision = f" at {series.commit}" if series.commit else ""
    out.print(f"{series.stack} {series.version}: {series.repository}{revision}")
    out.print(f"upstream's license: {series.license}")
    for patch in series.patches:
        out.print(f"\n{patch.path.name}\n  {patch.reason}\n  test: {patch.test}\n")
        out.print(patch.path.read_text(encoding="utf-8"))


def show_all(known: dict[str, list[Series]], root: Path | None, python: str, out: Console) -> None:
    """Show a table of the stacks, their revisions and the state of those found here."""
    table = Table(box=None)
    for title in ("stack", "revision", "patches", "state", "where"):
        table.add_column(title)
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root} is not a folder.")
    modules = {versions[0].module for versions in known.values()}
    roots = installed(sorted(modules), python) if root is None else dict.fromkeys(modules, root)
    for stack, versions in known.items():
        where, here = roots[versions[0].module], None
        state = "not installed"
        if where is not None and (where / versions[0].module.replace(".", "/")).is_dir():
            try:
                here = recognise(versions, where)
                state = here.state
            except UnknownRevision:
                state = "unknown revision"
        for series in versions:
            elsewhere = here is not None and series is not here.series
            table.add_row(
                stack,
                series.version,
                str(len(series.patches)),
                "" if elsewhere else state,
                "" if elsewhere or state == "not installed" else str(where),
            )
    out.print(table)
    out.print(f"{WITHOUT}.")
