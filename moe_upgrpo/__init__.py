# SPDX-License-Identifier: Apache-2.0
"""RL of mixture-of-experts models on Megatron-Core, with the routing mismatch in view."""

__version__ = "0.1.0"
