"""Megatron-LM's own RL: every preset in place of its loss, and a routing log.

`moe-upgrpo patch apply megatron-lm` makes train_rl.py import `calculate_grpo_loss` from here. What
the environment of the ranks says: `loss`. Flags and limits: docs/megatron-lm.md.
"""

from moe_upgrpo.integrations.megatron_lm.install import calculate_grpo_loss, hooks

__all__ = ["calculate_grpo_loss", "hooks"]
