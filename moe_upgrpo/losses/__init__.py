"""Policy losses for RL of language models: UP-GRPO with any negative branch, and its baselines.

Pure PyTorch. Start with `policy_loss` and `PolicyLossConfig.preset`; tables: `docs/losses.md`.
"""

from moe_upgrpo.losses.advantages import (
    dynamic_sampling,
    group_advantages,
    informative_groups,
    overlong_penalty,
    register_advantage,
)
from moe_upgrpo.losses.aggregation import AGGREGATIONS, aggregation_weights
from moe_upgrpo.losses.branches import BRANCHES, Branch, Side
from moe_upgrpo.losses.config import PRESETS, PolicyLossConfig
from moe_upgrpo.losses.correction import RolloutCorrection
from moe_upgrpo.losses.drop_in import compute_policy_loss
from moe_upgrpo.losses.kl import kl_estimate
from moe_upgrpo.losses.metrics import GLOSSARY, Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.policy import PolicyLoss, gradient_coefficients, policy_loss
from moe_upgrpo.losses.register import register_loss

__all__ = [
    "AGGREGATIONS",
    "BRANCHES",
    "GLOSSARY",
    "PRESETS",
    "Branch",
    "Metric",
    "PolicyLoss",
    "PolicyLossConfig",
    "RolloutCorrection",
    "Side",
    "aggregation_weights",
    "compute_policy_loss",
    "dynamic_sampling",
    "finalize_metrics",
    "gradient_coefficients",
    "group_advantages",
    "informative_groups",
    "kl_estimate",
    "merge_metrics",
    "overlong_penalty",
    "policy_loss",
    "register_advantage",
    "register_loss",
]
