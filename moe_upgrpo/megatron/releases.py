# SPDX-License-Identifier: Apache-2.0
"""The supported releases of Megatron-Core, and the changes in them that matter here.

They are told apart by the shape of Megatron's objects rather than by its version where possible.
Imports no Megatron.
"""

from __future__ import annotations

import functools
import importlib.metadata
import traceback
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from moe_upgrpo.errors import UserError
from moe_upgrpo.extras import install

# 0.16 is the first release with router replay; newer ones only where they were tested. setup.py
# reads this line.
SUPPORTED = ">=0.16,<0.20"
SUPPORTED_SET = SpecifierSet(SUPPORTED)


def installed() -> Version | None:
    """The version of the installed Megatron-Core; None where it is not installed."""
    try:
        return Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError:
        return None


def check() -> None:
    """Raise UserError where the installed Megatron-Core was not tested."""
    version = installed()
    if version is None:
        raise UserError(
            f"Megatron-Core is not installed; it comes with the extra `train`: {install('train')}"
        )
    if not SUPPORTED_SET.contains(version, prereleases=True):
        raise UserError(
            f"Megatron-Core {version} is installed; moe_upgrpo was tested with {SUPPORTED}. "
            f"pip install 'megatron-core{SUPPORTED}'."
        )


def lacks(hook: str) -> UserError:
    """An error that names what the installed Megatron-Core does not have, and what to do."""
    return UserError(
        f"Megatron-Core {installed()} lacks what moe_upgrpo needs of it: {hook}. Supported are "
        f"releases {SUPPORTED}: pip install 'megatron-core{SUPPORTED}'."
    )


def missing(error: BaseException) -> UserError | None:
    """The error for a Megatron-Core that could not be imported, and what to do; else None.

    Either it lacks something, or Transformer Engine is installed but broken: Megatron-Core does
    without it only where importing it raises ImportError.
    """
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "megatron":
        return lacks(error.msg)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    importing = any(
        frame.f_code.co_name == "<module>"
        and frame.f_globals.get("__name__", "").partition(".")[0] == "transformer_engine"
        for frame in frames
    )
    if not importing:
        return None
    return UserError(
        f"Megatron-Core cannot be imported, because Transformer Engine is installed and cannot be "
        f"({type(error).__name__}: {error}). Install all of it (pip install --no-build-isolation "
        "'transformer_engine[pytorch]') or nothing (pip uninstall transformer_engine "
        "transformer_engine_torch transformer_engine_cu12 transformer_engine_cu13)."
    )


def reduces_expert_gradients() -> bool:
    """Whether expert weights are marked as such also with one expert-parallel rank.

    If not (tensor_parallel/layers.py:886 of 0.16.1) their gradients are reduced with the dense
    ones, over the data-parallel ranks alone, although with ETP≠TP other ranks have copies too. Told
    by the version, because a layout is checked before Megatron is imported.
    """
    version = installed()
    return version is None or version >= Version("0.19")


def experts_of(spec: Any, grouped: bool) -> type:
    """The class of the experts that a backend's layer spec uses."""
    try:
        made = spec.grouped_mlp_modules(grouped)  # since 0.17: a builder
    except TypeError:
        made = spec.grouped_mlp_modules(grouped, False)  # 0.16: (class, submodules)
        return made[0]
    return made.func if isinstance(made, functools.partial) else made


def replace_experts(mlp: Any, experts: type) -> None:
    """Put another class of experts into a layer's `mlp` spec; a dense layer's is left alone."""
    # Since 0.17 specs of MLPs, and of the experts in them, are functools.partial; 0.16 has
    # ModuleSpec for both.
    partial = isinstance(mlp, functools.partial)
    submodules = mlp.keywords["submodules"] if partial else mlp.submodules
    found = getattr(submodules, "experts", None)
    if found is None:
        return
    if isinstance(found, functools.partial):
        submodules.experts = functools.partial(experts, *found.args, **found.keywords)
    else:
        found.module = experts
