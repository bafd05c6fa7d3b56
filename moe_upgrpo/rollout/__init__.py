"""Rollout engines behind one protocol; each engine's module is imported only when it is used."""

from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig, routes_dtype

__all__ = ["Engine", "Rollout", "SamplingConfig", "routes_dtype"]
