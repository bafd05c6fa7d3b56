"""The options of `moe-upgrpo plan`: those of train, and the machines."""

from __future__ import annotations

from dataclasses import dataclass

from moe_upgrpo.errors import UserError
from moe_upgrpo.train.config import TrainConfig


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
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        if self.gpu_memory_gb <= 0 or self.server_gb < 0:
            raise UserError("gpu_memory_gb must be above 0, and server_gb 0 or more.")
        if self.imbalance < 1:
            raise UserError(f"imbalance={self.imbalance}: the busiest rank has 1 or more means.")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node
