# SPDX-License-Identifier: Apache-2.0
"""The Megatron edge: the only folder that imports megatron.

Some of its modules do without Megatron. Where Megatron-Core is absent, importing one of the others
says which extra brings it.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from moe_upgrpo import extras


class _NamesTheExtra:
    """Finds this folder's modules as usual, and names the extra in the error of an import."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except ModuleNotFoundError as error:
                if (lacking := extras.absent(error)) is None:
                    raise
                raise ModuleNotFoundError(str(lacking), name=error.name) from None

        spec.loader.exec_module = exec_module
        return spec


if not extras.is_there("megatron"):
    sys.meta_path.insert(0, _NamesTheExtra())
