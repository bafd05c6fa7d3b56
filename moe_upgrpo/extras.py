# SPDX-License-Identifier: Apache-2.0
"""Packages that only some uses need: the extra that brings each, and the message without it.

The requirements themselves are in setup.py.
"""

from __future__ import annotations

from importlib.util import find_spec

from moe_upgrpo.errors import UserError

EXTRA_OF = {
    "megatron": "train",
    "transformers": "train",
    "tokenizers": "train",
    "huggingface_hub": "train",
    "matplotlib": "report",
    "jinja2": "report",
    "markupsafe": "report",
    "math_verify": "math",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "vllm": "vllm",
}
"""Module -> extra."""
_NAMES = {"megatron": "Megatron-Core", "math_verify": "math-verify"}


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'moe_upgrpo[{extra}]'"


def absent(error: BaseException) -> UserError | None:
    """The error for a failed import of a package that an extra brings; None for any other error."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in EXTRA_OF or is_there(module):
        return None
    extra, name = EXTRA_OF[module], _NAMES.get(module, module)
    return UserError(
        f"{name} is not installed; it comes with the extra `{extra}`: {install(extra)}"
    )


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ValueError:  # sys.modules has None in its place
        return False
