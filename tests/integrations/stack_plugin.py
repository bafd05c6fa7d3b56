"""Stand-ins for what slime and miles import and is not here; a pytest plugin for their own tests.

As a plugin, `-p stack_plugin` with this folder on PYTHONPATH (their tests are a package called
`tests`, too) and MOE_UPGRPO_STACK: loads moe_upgrpo's module of that stack before their tests run,
after they have put their own stand-ins for Megatron in place.
"""

import importlib
import os
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

NAMES = [
    *("sglang", "sglang_router", "mooncake", "torch_memory_saver", "mbridge"),
    *("megatron.training", "megatron.bridge"),
]


class StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class StandIns(MetaPathFinder, Loader):
    """Modules under `NAMES`, in which every name is there and does nothing."""

    def find_spec(self, name, path, target=None):
        if any(name == x or name.startswith(x + ".") for x in NAMES):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


STACK = os.environ.get("MOE_UPGRPO_STACK")
if STACK == "miles":  # slime's tests need none
    sys.meta_path.insert(0, StandIns())


def pytest_collection_finish(session):
    importlib.import_module(f"moe_upgrpo.integrations.{STACK}")
