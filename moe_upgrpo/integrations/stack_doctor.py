# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo doctor --stack NAME`: which functions of a stack are hooked, and their state here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks
from moe_upgrpo.integrations.kit import revisions


def diagnose(stack: str, root: Path | None = None) -> dict[str, Any]:
    """Return what `--json` prints. root: a checkout's folder; None: what this Python finds.

    Raises:
        UserError: an unknown stack, or one that is not installed.
    """
    if stack not in revisions.MODULES:
        raise UserError(f"--stack: {stack!r} given; allowed: {', '.join(revisions.MODULES)}")
    here = revisions.installed(stack, root)
    if here is None:
        module = revisions.MODULES[stack][0]
        where = f"{root} has no {module}" if root else f"{stack} is not installed here ({module})"
        raise UserError(
            f"{where}: start doctor in the environment of the stack's workers, or give the folder "
            "of a checkout with --root"
        )
    tested, changed = hooks.tested(stack), here.differences()
    listed = []
    for hook in hooks.HOOKS[stack]:
        places = [f"{file}:{name}" for file, name in hooks.places(hook)]
        found = next((place for place in places if place in here.found), None)
        against = {}
        for revision, of in tested.items():
            at = next((place for place in places if place in of), None)
            if at is None:
                against[revision] = "not there then"
            elif found is None:
                against[revision] = "gone"
            elif at != found:
                same = of[at] == here.found[found]
                against[revision] = f"{'moved' if same else 'moved and changed'} from {at}"
            else:
                against[revision] = changed[revision].get(at, "same")
        listed.append(
            {
                "file": (found or places[0]).partition(":")[0],
                "name": (found or places[0]).partition(":")[2],
                "needed_by": ", ".join(revisions.needed_by(stack, hook[1])),
                "found": found is not None,
                "signature": here.found[found]["signature"] if found else None,
                "against": against,
            }
        )
    return {
        "stack": stack,
        "root": str(here.root),
        "commit": here.commit,
        "version": here.version,
        "tested_as": here.tested,
        "tested": list(tested),
        "hooks": listed,
        "missing": {part: here.missing(part) for part in revisions.PARTS},
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print each hook and its difference from each tested revision."""
    revision = found["commit"] or found["version"] or "of an unknown revision"
    console.print(f"{found['stack']} {revision} in {found['root']}")
    heads = ["needed by", "here", *(f"against {name}" for name in found["tested"])]
    table = Table(
        Column("hook", no_wrap=True), *(Column(head, overflow="fold") for head in heads)
    )  # names and places are meant to be copied
    for hook in found["hooks"]:
        table.add_row(
            f"{hook['name']}\n{hook['file']}",
            hook["needed_by"],
            "found" if hook["found"] else "MISSING",
            *map(_short, hook["against"].values()),
        )
    console.print(table)
    if any(how != _short(how) for hook in found["hooks"] for how in hook["against"].values()):
        console.print("Which arguments: --json has them.")
    for part, gone in found["missing"].items():
        needs, without = revisions.PARTS[part]
        if gone:
            how = "refused" if without else "left out"
            console.print(f"{needs} is {how} here: it needs {', '.join(gone)}")
        else:
            console.print(f"{needs} has all that it needs")
    console.print(
        f"This is the tested revision {found['tested_as']}."
        if found["tested_as"]
        else "This revision was not tested; a job says so as it starts."
    )


def _short(how: str) -> str:
    """Difference of a hook from a revision, without signatures, which are wider than a page."""
    return "other arguments" if how.startswith("takes ") else how
