"""Puts routing log and health figures into verl's Megatron engine when verl imports it, not before.

verl's rollout servers and its driver load the plugin too; they need neither Megatron nor the log.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

from moe_upgrpo.integrations.kit import environment, revisions

ENGINE = "verl.workers.engine.megatron.transformer_impl"


def when_imported() -> None:
    """`_install` once verl's engine is there."""
    if ENGINE in sys.modules:
        _install(sys.modules[ENGINE])
    else:
        sys.meta_path.insert(0, _Finder())


def _install(module) -> None:
    """The log where MOE_UPGRPO_RUN asks for one; the figures always."""
    from moe_upgrpo.integrations.verl import health

    health.install(module)  # inside of the log, whose own forwards are not counted
    if environment.run_folder() is not None:
        revisions.check("verl", "log")
        from moe_upgrpo.integrations.verl import log

        log.install(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _install(module)

        spec.loader.exec_module = exec_module
        return spec
