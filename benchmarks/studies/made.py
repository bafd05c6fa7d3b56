"""How long something took, and on what."""

import os
import platform
import time
from pathlib import Path

import torch


class Stopwatch:
    """Wall-clock and CPU time since it was made."""

    def __init__(self):
        self.begun, self.cpu = time.time(), time.process_time()

    def made(self) -> dict:
        return {
            "wall_s": time.time() - self.begun,
            "cpu_s": time.process_time() - self.cpu,
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


def said(made: dict) -> str:
    return (
        f"Made in {made['wall_s'] / 60:.1f} minutes ({made['cpu_s'] / 60:.1f} of CPU) on one of "
        f"{made['cores']} shared cores ({made['processor']}), Python {made['python']}, "
        f"torch {made['torch']}."
    )


def processor() -> str:
    """Name of the CPU where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
