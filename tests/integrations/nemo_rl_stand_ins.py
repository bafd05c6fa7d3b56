"""Stand-ins for packages that are not there when NeMo-RL's source is imported on a CPU.

Empty modules for what is only named at import: web servers and loggers, Megatron-Bridge, and what
NeMo-RL's own Megatron-Core has beyond 0.16.1. Nothing of them is called in the tests but what
tests/integrations/nemo_rl_ranks.py defines. A package that is installed is not replaced.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
import typing

import typing_extensions

ABSENT = (
    "aiohttp", "blobfile", "colored", "debugpy", "decord", "fastapi", "latex2sympy2_extended",
    "math_verify", "matplotlib", "megatron.bridge", "megatron.core", "megatron.training", "mlflow",
    "modelopt", "nccl", "num2words", "nvtx", "openai", "plotly", "prometheus_client", "pynvml",
    "soundfile", "swanlab", "torchdata", "uvicorn", "zmq",
)  # fmt: skip


class Anything:
    """A class that takes every argument, and every class statement that derives from it."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass


def _attribute(module: str):
    def get(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {"__module__": module})

    return get


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last to be asked: for modules that nobody else found."""

    def find_spec(self, name, path, target=None):
        if any(name == top or name.startswith(f"{top}.") for top in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _attribute(spec.name)
        return module

    def exec_module(self, module):
        pass


def install(root: str | None = None) -> None:
    """NeMo-RL of the checkout `root` (MOE_UPGRPO_NEMO_RL) can be imported in this process."""
    root = root or os.environ["MOE_UPGRPO_NEMO_RL"]
    if root not in sys.path:
        sys.path.insert(0, root)
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
    typing.TypedDict = typing_extensions.TypedDict  # NeMo-RL is for Python 3.13
    _older_transformers()
    # Of the Megatron-Core that NeMo-RL pins (its submodule), not of 0.16.1.
    import megatron.core.dist_checkpointing.strategies.torch as strategies
    import megatron.core.distributed.fsdp.mcore_fsdp_adapter as fsdp

    for module in (strategies, fsdp):
        if "__getattr__" not in vars(module):
            module.__getattr__ = _attribute(module.__name__)


def _older_transformers() -> None:
    """nemo_rl/models/policy/__init__.py:52 asserts a version below 5.12, for a tokenizer's sake."""
    import packaging.version

    class Version(packaging.version.Version):
        def __init__(self, version: str):
            super().__init__("5.8.1" if version == transformers.__version__ else version)

    import transformers

    original, packaging.version.Version = packaging.version.Version, Version
    try:
        import nemo_rl.models.policy  # noqa: F401
    finally:
        packaging.version.Version = original


def install_worker() -> None:
    """Also the module of the Megatron worker: what its constructor and rollouts need."""
    for name in (
        "nemo_rl.models.generation.megatron.megatron_worker",
        "nemo_rl.models.megatron.setup",
        "nemo_rl.models.policy.workers.checkpoint_engine",
        "nemo_rl.models.policy.workers.patches",
    ):
        module = types.ModuleType(name)
        module.__getattr__ = _attribute(name)
        sys.modules[name] = module


if os.environ.get("MOE_UPGRPO_NEMO_RL_PLUGIN"):  # as a plugin of pytest, for NeMo-RL's own tests
    import torch

    from moe_upgrpo.megatron import backend

    install()
    _cpu = backend.apply()
    _cpu.__enter__()
    torch.cuda.is_available = lambda: True  # else they skip; what asks for CUDA gets the CPU
    if os.environ.get("MOE_UPGRPO_REBIND"):
        from moe_upgrpo.integrations.nemo_rl import rebind

        rebind()
