"""Policy losses for RL of language models: UP-GRPO with any negative branch, and its baselines.

Pure PyTorch. Start with `policy_loss` and `PolicyLossConfig.preset`; `docs/losses.md` has the tables.
"""

from moe_upgrpo.losses.advantages import group_advantages, informative_groups
from moe_upgrpo.losses.aggregation import aggregation_weights
from moe_upgrpo.losses.config import PolicyLossConfig
from moe_upgrpo.losses.correction import RolloutCorrection
from moe_upgrpo.losses.metrics import GLOSSARY, Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.policy import PolicyLoss, gradient_coefficients, policy_loss

__all__ = [
    "GLOSSARY",
    "Metric",
    "PolicyLoss",
    "PolicyLossConfig",
    "RolloutCorrection",
    "aggregation_weights",
    "finalize_metrics",
    "gradient_coefficients",
    "group_advantages",
    "informative_groups",
    "merge_metrics",
    "policy_loss",
]
