"""The name by which a patched NeMo-RL finds the routing log."""

from moe_upgrpo.integrations.nemo_rl.log import logged

__all__ = ["logged"]
