# SPDX-License-Identifier: Apache-2.0
"""Put routing log and health figures into verl's workers when verl imports them, not before.

verl's rollout servers and its driver load the plugin too; they need neither Megatron nor the log.
"""

import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

from moe_upgrpo.integrations.kit import environment, revisions
from moe_upgrpo.integrations.verl import settings

ENGINE = "verl.workers.engine.megatron.transformer_impl"
WORKER = "verl.workers.engine_workers"


def when_imported() -> None:
    """Call `_into_engine` once verl's engine is imported; with MOE_UPGRPO_RUN, also check a job's
    settings once its worker is."""
    wanted = [(ENGINE, _into_engine)]
    if environment.run_folder() is not None:
        wanted.append((WORKER, _into_worker))
    for name, install in wanted:
        if name in sys.modules:
            install(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Finder(name, install))


def _into_engine(module) -> None:
    """Install the log if MOE_UPGRPO_RUN asks for one; the figures if verl has what they need."""
    logs = environment.run_folder() is not None
    if logs:
        revisions.check("verl", "log")
    if revisions.has("verl", "health"):
        from moe_upgrpo.integrations.verl import health

        health.install(module)  # inside of the log, whose own forwards are not counted
    if logs:
        from moe_upgrpo.integrations.verl import log

        log.install(module)


def _into_worker(module) -> None:
    worker = module.ActorRolloutRefWorker
    init_model = worker.init_model
    if hasattr(init_model, "moe_upgrpo_checks"):
        return

    @wraps(init_model)  # with the marks by which verl finds the methods of a worker
    def checked(self, *args, **kwargs):
        if "actor" in self.role:
            settings.check(self.config)
        return init_model(self, *args, **kwargs)

    checked.moe_upgrpo_checks = True
    worker.init_model = checked


class _Finder(MetaPathFinder):
    def __init__(self, name: str, install: Callable):
        self.name, self.install = name, install

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.install(module)

        spec.loader.exec_module = exec_module
        return spec
