# SPDX-License-Identifier: Apache-2.0
"""NeMo-RL: every preset in the place of its loss, and the routing log of its Megatron workers.

Flags, metrics and limits: docs/nemo-rl.md.
"""

from moe_upgrpo.integrations.nemo_rl.install import main, rebind

__all__ = ["main", "rebind"]
