"""Time and peak memory of a call, on a GPU and on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.megatron.live import Live


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle() -> None:
    """Wait until the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors of one call held, beyond those allocated before it."""
    if not torch.cuda.is_available():
        with Live(set()) as live:
            call()
        return live.peak
    settle()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    settle()
    return torch.cuda.max_memory_allocated() - before


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median over `repeats` calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        settle()
        begin = time.perf_counter()
        call()
        settle()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def cost(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds and peak MB (1e6 bytes) of a call. Its results are released at once."""

    def once() -> None:
        call()

    return {
        "ms": round(1e3 * seconds(once, repeats), 4),
        "peak_MB": round(peak_bytes(once) / 1e6, 3),
    }


def compared(ours: dict[str, float], plain: dict[str, float]) -> str:
    """Two costs in words."""
    return (
        f"{ours['ms']:.3g} ms and {ours['peak_MB']:.3g} MB, "
        f"plain {plain['ms']:.3g} ms and {plain['peak_MB']:.3g} MB"
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found − expected| / |expected| over whole tensors; inf where one is not finite."""
    found, expected = found.double(), expected.double()
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm())
