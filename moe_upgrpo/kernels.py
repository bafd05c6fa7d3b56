# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels that make a computation repeatable, chosen before torch computes.

MKL may choose a kernel by the address of its arrays: on CPUs other than Intel's the same product,
computed twice, then differs in the last place. `MKL_CBWR` (conditional numerical reproducibility)
forbids that. MKL reads it once, at its first call. Every way into this package calls `pin`; an
import of the package changes nothing. What it costs, and what stays different between two CPUs:
docs/repeatability.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

# From mkl_types.h.
_STRICT = 0x10000
_BRANCHES = {
    1: "OFF", 2: "AUTO", 3: "COMPATIBLE", 4: "SSE2", 5: "SSE3", 6: "SSSE3", 7: "SSE4_1",
    8: "SSE4_2", 9: "AVX", 10: "AVX2", 11: "AVX512_MIC", 12: "AVX512", 13: "AVX512_MIC_E1",
    14: "AVX512_E1",
}  # fmt: skip
_ALL = -1  # MKL_CBWR_ALL: the branch and whether it is strict
# MKL's AVX-512 kernels need all of them.
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
# torch, oneDNN and MKL choose among their kernels by these.
_CHOSEN_BY = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
# User settings that make a CPU compute as another would.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def pin() -> None:
    """Let this process and those that it starts compute repeatably, each in one thread.

    Whatever the user has set stays. One thread, because tiny models are thirty times slower where
    threads outnumber cores, and torchrun sets it only for several ranks.
    """
    os.environ.setdefault("MKL_CBWR", repeatable(_cpu()[1]))
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        if torch := sys.modules.get("torch"):  # its threads exist already
            torch.set_num_threads(1)


def repeatable(instructions: frozenset[str]) -> str:
    """The value of MKL_CBWR for a CPU with these instructions.

    AVX2 would do everywhere, but on a CPU with AVX-512 a large product takes 1.6 times as long with
    it.
    """
    return "AVX512,STRICT" if instructions >= _AVX512 else "AVX2"


def facts() -> dict[str, Any]:
    """The CPU and the kernels that this process computes with, for `doctor` and a run's env.json.

    `mkl` is MKL's own answer (None: it cannot be asked), which differs from `MKL_CBWR` where that
    was set after MKL's first call, or names a value that this CPU does not have.
    """
    import torch  # here: `pin` comes before

    model, instructions = _cpu()
    return {
        "model": model,
        "instructions": [name for name in _CHOSEN_BY if name in instructions],
        "MKL_CBWR": os.environ.get("MKL_CBWR"),
        "mkl": _mkl_branch(torch),
        "aten": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in _LIMITS if name in os.environ},
        "threads": torch.get_num_threads(),
    }


def describe(found: dict[str, Any]) -> dict[str, str]:
    """Describe what `facts` found, a line for each library."""
    asked, mkl, limits = found["MKL_CBWR"], found["mkl"], found["limits"]
    if mkl is None:
        says = "cannot be asked (another BLAS, or a build that does not tell)"
    elif mkl == "OFF" and asked:
        says = (
            f"not pinned: MKL_CBWR={asked} came after MKL's first call; set it before the process "
            "starts"
        )
    elif mkl == "OFF":
        says = "not pinned: results may change with the address of an array; set MKL_CBWR"
    elif asked and mkl != asked.replace(" ", ""):
        says = f"pinned to {mkl}: this CPU or this MKL does not have MKL_CBWR={asked}"
    else:
        says = f"pinned to {mkl}"
    if narrowed := limits.get("MKL_ENABLE_INSTRUCTIONS"):
        says += f"; at most {narrowed}"
    one_dnn = limits.get("ONEDNN_MAX_CPU_ISA")
    return {
        "CPU": f"{found['model']} ({', '.join(found['instructions']) or 'none of AVX2, AVX-512'})",
        "MKL (fp32 products)": says,
        "ATen (the rest)": found["aten"],
        "oneDNN (bf16 products)": f"at most {one_dnn}" if one_dnn else "the best of this CPU",
        "threads": str(found["threads"]),
    }


def _cpu() -> tuple[str, frozenset[str]]:
    """The CPU's name, and the names that Linux has for its instructions; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = text.split("\n\n")[0].splitlines()
    found = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    model = found.get("model name") or platform.processor() or platform.machine()
    return model, frozenset(found.get("flags", "").split())


def _mkl_branch(torch) -> str | None:
    """The value of MKL_CBWR that MKL follows, fixed at MKL's first call, which may be this one."""
    if not torch.backends.mkl.is_available():
        return None
    folder = Path(torch.__file__).parent / "lib"
    for library in folder.glob("libtorch_cpu.*"):  # with MKL in it, or linked to it
        loaded = ctypes.CDLL(str(library))
        for name in ("mkl_serv_cbwr_get", "MKL_CBWR_Get"):
            if hasattr(loaded, name):
                found = getattr(loaded, name)(ctypes.c_int(_ALL))
                branch = _BRANCHES.get(found & ~_STRICT)
                return branch and branch + (",STRICT" if found & _STRICT else "")
    return None
