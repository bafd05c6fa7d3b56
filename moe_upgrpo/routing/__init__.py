"""Route traces compared: which experts the rollout engine and the trainer chose. Pure torch."""

from moe_upgrpo.routing.compare import RoutingCounts, RoutingDivergence, compare_routes

__all__ = ["RoutingCounts", "RoutingDivergence", "compare_routes"]
