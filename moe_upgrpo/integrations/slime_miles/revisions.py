"""Names that a stack's revisions have in different places: what is found decides."""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from moe_upgrpo.errors import UserError


def first_module(*names: str) -> ModuleType:
    """The first of the modules that the installed revision has.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as missing:
            if not f"{name}.".startswith(f"{missing.name}."):  # something that the module needs
                raise
    raise UserError(
        f"{' and '.join(names)}: not in the installed {names[0].split('.')[0]}; install a revision "
        "that docs/slime.md says was run"
    )


def taken(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the installed revision's function has a name for."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}
