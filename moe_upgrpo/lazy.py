# SPDX-License-Identifier: Apache-2.0
"""Imports at first use, so that a refused option does not wait for torch, numpy and pyarrow.

For the modules that declaring the options imports. All others import torch as usual.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # the next time it is found without this function
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _Lazy("torch")


def exports(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: each name comes from its module when it is first used.

    modules: the name of a module in the package -> the names that the package takes from it.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get
