"""The packages that the checks need: which a machine has, what to do. Standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DRIVER = Path("/dev/nvidiactl")
CARRIED = ROOT / ".gpu-carry"
# Import name -> distribution: those that all checks need, and those that most do.
NEEDED = {"torch": "torch", "numpy": "numpy"}
USED = {
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "pyarrow": "pyarrow",
    "yaml": "pyyaml",
    "tyro": "tyro",
    "rich": "rich",
    "packaging": "packaging",
}


def use_carried(folder: Path = CARRIED) -> bool:
    """Put the carried packages after those of the machine, which take precedence."""
    site = folder / "site"
    if site.is_dir() and str(site) not in sys.path:
        sys.path.append(str(site))
    return site.is_dir()


def machine() -> dict[str, Any]:
    """Versions by distribution (None: not installed), Python, and the GPUs the driver names."""
    return {
        "python": platform.python_version(),
        "executable": Path(sys.executable).name,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(module, name) for module, name in (NEEDED | USED).items()},
        "gpus": _gpus(),
    }


def _version(module: str, name: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "there"


def _gpus() -> list[str]:
    """Name, memory and driver of each; through torch if the driver's tool is missing. Other
    processes ask, so that this one and its forks have not touched the GPU."""
    smi = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    names = "import torch.cuda as c; [print(c.get_device_name(i)) for i in range(c.device_count())]"
    for question in (smi, [sys.executable, "-c", names]):
        if question is not smi and not DRIVER.exists():
            break
        try:
            answer = subprocess.run(
                question, capture_output=True, encoding="utf-8", timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return answer.stdout.strip().splitlines()
    return []


def card(found: dict[str, Any]) -> str | None:
    """The GPU that torch would use; None where there is none, or torch is not built for it."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks the driver, and leaves the GPU alone
    import torch

    if not found["gpus"] or torch.version.cuda is None:
        return None
    return found["gpus"][0].partition(",")[0]


def advice(found: dict[str, Any]) -> list[str]:
    """Say what cannot be done with the installed packages, and what would help."""
    missing = {name for name, version in found["packages"].items() if version is None}
    said = []
    for name in sorted(missing & set(NEEDED.values())):
        said.append(
            f"{name} is not there, and nothing goes without it: take a Python that has it "
            "(make gpu-check GPU_PYTHON=/path/to/python)."
        )
    for name in sorted(missing & set(USED.values())):
        said.append(
            f"{name} is not there: checks that import it cannot run. Where there is a network: "
            f"pip install {name}; else python -m benchmarks.gpu --carry, where it is installed, "
            f"and take {CARRIED.name}/ along."
        )
    if not found["gpus"]:
        said.append("the driver names no GPU: the checks run on the CPU, with small sizes.")
    return said


def shown(found: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version or '—'}" for name, version in found["packages"].items())
    return [
        f"Python {found['python']} ({found['executable']}), {found['platform']}, "
        f"{found['cpus']} CPUs",
        packages,
        *(found["gpus"] or ["no GPU"]),
    ]
