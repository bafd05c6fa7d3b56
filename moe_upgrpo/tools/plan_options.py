# SPDX-License-Identifier: Apache-2.0
"""The options of `moe-upgrpo plan`: those of train, and the machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_upgrpo.errors import UserError
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.parts import at_least


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Show what a training run needs of each GPU: memory, messages and logs, and whether it fits.

    Takes the options of train; --model may name a folder that holds a config.json alone.
    """

    nodes: int = 1
    """Machines of the job."""
    gpus_per_node: int = 8
    gpu_memory_gb: float = 141
    """Memory of each GPU, in 1e9 bytes."""
    server_gb: float = 0
    """Memory that a server of the engine takes of each of these GPUs; 0: it runs on others."""
    imbalance: float = 1.5
    """Tokens of the busiest rank's experts over the mean of the ranks."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "nodes", "gpus_per_node")
        if not 0 < self.gpu_memory_gb < math.inf:
            raise UserError(f"gpu_memory_gb={self.gpu_memory_gb:g}: GB above 0 are needed.")
        if not 0 <= self.server_gb < math.inf:
            raise UserError(f"server_gb={self.server_gb:g}: 0 GB or more are needed.")
        if not 1 <= self.imbalance < math.inf:
            raise UserError(f"imbalance={self.imbalance:g}: the busiest rank has 1 or more means.")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node
