# SPDX-License-Identifier: Apache-2.0
"""Compare route traces: which experts the rollout engine and the trainer chose.

The parts of the comparison are in the modules: `codec` (expert sets in few bytes),
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
