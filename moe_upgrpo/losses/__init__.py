"""Policy losses for RL of language models: UP-GRPO with any negative branch, and its baselines.

Pure PyTorch. Start with `policy_loss` and `PolicyLossConfig.preset`; tables: `docs/losses.md`.
"""

from moe_upgrpo.losses.advantages import (
    dynamic_sampling,
    group_advantages,
    informative_groups,
    overlong_penalty,
)
from moe_upgrpo.losses.aggregation import AGGREGATIONS, aggregation_weights
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.config import PRESETS, PolicyLossConfig
from moe_upgrpo.losses.correction import RolloutCorrection
from moe_upgrpo.losses.drop_in import compute_policy_loss
from moe_upgrpo.losses.kl import kl_estimate
from moe_upgrpo.losses.metrics import GLOSSARY, Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.policy import (
    PolicyLoss,
    batch_statistics,
    gradient_coefficients,
    policy_loss,
)
from moe_upgrpo.losses.tokens import Context

__all__ = [
    "AGGREGATIONS",
    "BRANCHES",
    "GLOSSARY",
    "PRESETS",
    "Context",
    "Metric",
    "PolicyLoss",
    "PolicyLossConfig",
    "RolloutCorrection",
    "aggregation_weights",
    "batch_statistics",
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
]
