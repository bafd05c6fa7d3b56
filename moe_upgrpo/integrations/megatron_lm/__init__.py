# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's own RL: every preset in place of its loss, and a routing log.

`moe-upgrpo patch apply megatron-lm` makes train_rl.py import `calculate_grpo_loss` from here. The
ranks' environment holds the settings: `settings`. Flags and limits: docs/megatron-lm.md.
"""

import importlib
from typing import Any

__all__ = ["calculate_grpo_loss", "hooks"]


def __getattr__(name: str) -> Any:
    # Imported late: `settings` is also read where there is no Megatron-LM.
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.install"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
