# SPDX-License-Identifier: Apache-2.0
"""verl 0.9.1: every preset as a policy loss, and the routing log of its Megatron engine.

verl's plugin loader imports this package (the entry point `verl.plugins`). Flags, metrics and
limits: docs/verl.md.
"""

from moe_upgrpo.integrations.verl.loss import LOSSES, PREFIX, LossConfig, VerlLoss, check

__all__ = ["LOSSES", "PREFIX", "LossConfig", "VerlLoss", "check"]
