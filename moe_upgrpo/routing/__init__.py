# SPDX-License-Identifier: Apache-2.0
"""Route traces compared: which experts the rollout engine and the trainer chose.

What the comparing is made of lies in the modules: `codec` (expert sets in few bytes),
`decomposition` (the log-prob gap in terms), `gates` (gates, router distributions, margins) and
`clustering` (mismatches against independence). Pure torch and numpy.
"""

from moe_upgrpo.routing.compare import (
    ComparisonKind,
    RoutingCounts,
    RoutingDivergence,
    compare_routes,
)

__all__ = ["ComparisonKind", "RoutingCounts", "RoutingDivergence", "compare_routes"]
