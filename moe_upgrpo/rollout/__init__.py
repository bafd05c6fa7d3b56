# SPDX-License-Identifier: Apache-2.0
"""Rollout engines behind one protocol; each engine's module is imported only when it is used."""

from typing import TYPE_CHECKING

from moe_upgrpo.lazy import exports

if TYPE_CHECKING:
    from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig, routes_dtype

__getattr__ = exports(__name__, {"base": ("Engine", "Rollout", "SamplingConfig", "routes_dtype")})

__all__ = ["Engine", "Rollout", "SamplingConfig", "routes_dtype"]
