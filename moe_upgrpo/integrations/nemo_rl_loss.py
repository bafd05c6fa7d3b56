# SPDX-License-Identifier: Apache-2.0
"""The name by which a patched NeMo-RL finds the loss."""

from moe_upgrpo.integrations.kit import revisions

revisions.check("nemo-rl", "loss")  # before importing what may have moved

from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn  # noqa: E402

__all__ = ["PolicyLossFn"]
