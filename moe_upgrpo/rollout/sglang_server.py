# SPDX-License-Identifier: Apache-2.0
"""Starts an SGLang server; on a machine without GPU also what SGLang 0.5.23 lacks there.

Run as a file by the Python of SGLang's own environment, which has no moe_upgrpo, with the arguments
of `sglang serve` and the server's key in the variable SGLANG_API_KEY:
`python -P moe_upgrpo/rollout/sglang_server.py --model-path DIR --host 127.0.0.1`. The server's
processes import this file again (multiprocessing's spawn), and so all get the mends. With a GPU
nothing is touched. File and line numbers are those of sglang 0.5.23.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading
import zlib
from importlib.metadata import version

VERSIONS = ("0.5.23",)  # the mends were tried with
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than small models run
}
# Given first, so that the caller's own win. Without a limit SGLang takes half the memory for keys
# and values, and sizes the routes' buffer by it.
CPU_ARGUMENTS = [
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--disable-cuda-graph",
    "--mem-fraction-static=0.5",
    "--max-total-tokens=32768",
    "--max-running-requests=64",
    "--sleep-on-idle",  # else it takes a whole core also while the trainer computes
]
UNTIL_STDIN_CLOSES = "--until-stdin-closes"
KEY = "SGLANG_API_KEY"  # a variable of ours: SGLang takes a key from its command line alone


def main(arguments: list[str]) -> None:
    """Serve until killed; with `--until-stdin-closes` also until the starting process is gone.

    The key of the variable SGLANG_API_KEY is that of `--api-key`, which `ps` would show.
    """
    if UNTIL_STDIN_CLOSES in arguments:
        arguments.remove(UNTIL_STDIN_CLOSES)
        threading.Thread(target=_die_with_stdin, daemon=True).start()
    if on_cpu():
        arguments = CPU_ARGUMENTS + arguments
    if key := os.environ.get(KEY):
        arguments = [*arguments, f"--api-key={key}"]
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    if key:
        _keep_key_from_log()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _die_with_stdin() -> None:
    """A pipe closes however its writer ends; the parent-death signal would follow one thread."""
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(0, signal.SIGKILL)  # the starter gave this server a process group of its own


def on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


class _Absent:
    """A kernel, or a constant, that the CPU path imports and never uses."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self._name} is of sgl-kernel, which is not installed.")


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """sgl_kernel and its modules; SGLang imports names of them and runs on torch without them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = _Absent(module.__name__).__getattr__


def _provide_torchvision_operators() -> None:
    """The index's torchvision is built for CUDA and looks for operators that it then lacks.

    SGLang imports it for image models only.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


def _allocate_unpinned() -> None:
    """mem_cache/pool_host/common.py:347 pins the host's buffer of routes with a CUDA call."""
    import torch
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    ALLOC_MEMORY_FUNCS["cpu"] = lambda dims, dtype, device, **_: torch.empty(dims, dtype=dtype)


def _sample_by_request_seed() -> None:
    """sampling_batch_info.py:172 keeps `sampling_seed` for deterministic inference, a GPU mode."""
    import numpy as np
    import torch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from_schedule_batch = SamplingBatchInfo.from_schedule_batch.__func__

    def with_seeds(cls, batch, vocab_size):
        info = from_schedule_batch(cls, batch, vocab_size)
        if info.sampling_seed is None:
            info.sampling_seed = torch.tensor(
                [
                    zlib.crc32(r.rid.encode()) if (s := r.sampling_params.sampling_seed) is None
                    else s
                    for r in batch.reqs
                ]
            )  # fmt: skip
        return info

    low = np.uint64(0xFFFFFFFF)

    def rotl(x, bits):
        return (x << np.uint64(bits) | x >> np.uint64(32 - bits)) & low

    def hash_NV(seed_N, positions_N, columns_V):
        """MurmurHash3 of 32 bits, seed 0, over (seed, position, column), as the GPU's kernel."""
        seed, position = seed_N.numpy().astype(np.uint64), positions_N.numpy().astype(np.uint64)
        words = (seed & low, seed >> np.uint64(32), position & low)
        h = np.zeros((len(seed), 1), np.uint64)
        for word in (*(w[:, None] for w in words), columns_V.numpy().astype(np.uint64)[None]):
            k = rotl(word * np.uint64(0xCC9E2D51) & low, 15) * np.uint64(0x1B873593) & low
            h = rotl(h ^ k, 13) * np.uint64(5) + np.uint64(0xE6546B64) & low
        h = h ^ np.uint64(16)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor) & low
        return torch.from_numpy(h.astype(np.uint32))

    SamplingBatchInfo.from_schedule_batch = classmethod(with_seeds)
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    if not hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
        library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
        library.impl("murmur_hash32_cpu", hash_NV, "CPU")
    _libraries.append(library)


def _keep_key_from_log() -> None:
    """entrypoints/engine.py:1185 logs all arguments, the key among them."""
    from sglang.srt.entrypoints import engine

    logged = engine._server_args_for_logging

    def without_key(server_args):
        return logged(server_args) | {"api_key": "***"}

    engine._server_args_for_logging = without_key


_libraries = []  # operators live as long as their library


def mend() -> None:
    os.environ.update(CPU_ENVIRONMENT)
    found = version("sglang")
    if found not in VERSIONS:
        print(
            f"moe_upgrpo: SGLang {found} on CPU was not tried, {', '.join(VERSIONS)} was.",
            file=sys.stderr,
        )
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.meta_path.append(_StandIn())
    _provide_torchvision_operators()
    _allocate_unpinned()
    _sample_by_request_seed()


# In the server and, as multiprocessing names it there, in the processes that it starts.
if __name__ in ("__main__", "__mp_main__") and on_cpu():
    mend()

if __name__ == "__main__":
    main(sys.argv[1:])
