"""Reinforcement learning of mixture-of-experts models on Megatron-Core, with the routing in view."""

__version__ = "0.1.0"
