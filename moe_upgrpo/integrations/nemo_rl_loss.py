"""The name by which a patched NeMo-RL finds the loss."""

from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn

__all__ = ["PolicyLossFn"]
