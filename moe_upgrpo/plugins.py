# SPDX-License-Identifier: Apache-2.0
"""Plug-ins: packages with an entry point in the group `moe_upgrpo.plugins`.

    [project.entry-points."moe_upgrpo.plugins"]
    mine = "my_package.moe"

They are loaded before a command runs, and by the integrations of other stacks. The module is
imported, and for `my_package.moe:set_up` the function is called; either registers what it brings:
`register_loss`, `register_advantage` (moe_upgrpo.losses), `register_reward` (moe_upgrpo.rewards),
`register_task` (moe_upgrpo.tasks), `register_engine` (moe_upgrpo.rollout.engines),
`register_family` (moe_upgrpo.megatron.families).
"""

from __future__ import annotations

import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from moe_upgrpo.errors import UserError

GROUP = "moe_upgrpo.plugins"
_loaded: dict[str, EntryPoint] = {}


def load() -> list[str]:
    """Load every plug-in not loaded yet, and name all, as `NAME (PACKAGE VERSION)`.

    Raises UserError naming a plug-in that cannot be loaded, and its error.
    """
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        key = f"{entry.name} = {entry.value}"
        if key in _loaded:
            continue
        _loaded[key] = entry  # before: a plug-in may import what loads plug-ins
        try:
            made = entry.load()
            if entry.attr:
                made()
        except BaseException as error:
            del _loaded[key]
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(
                f"plug-in {_named(entry)}, {entry.value}: {_said(error)}. Mend it, or uninstall it"
            ) from error
    return [_named(entry) for entry in _loaded.values()]


def _named(entry: EntryPoint) -> str:
    of = f" ({entry.dist.name} {entry.dist.version})" if entry.dist else ""
    return f"{entry.name}{of}"


def _said(error: BaseException) -> str:
    message = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if not f.filename.startswith("<frozen") and f.filename != __file__]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{place}"
