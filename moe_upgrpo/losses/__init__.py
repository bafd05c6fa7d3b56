# SPDX-License-Identifier: Apache-2.0
"""Policy losses for RL of language models: UP-GRPO with any negative branch, and its baselines.

Pure PyTorch. Start with `policy_loss` and `PolicyLossConfig.preset`; tables: `docs/losses.md`.
"""

from moe_upgrpo.losses.advantages import (
    ADVANTAGES,
    Advantage,
    advantage_sums,
    dynamic_sampling,
    group_advantages,
    informative_groups,
    overlong_penalty,
    register_advantage,
)
from moe_upgrpo.losses.aggregation import AGGREGATIONS, aggregation_weights
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.config import PRESETS, PolicyLossConfig
from moe_upgrpo.losses.correction import RolloutCorrection
from moe_upgrpo.losses.drop_in import compute_policy_loss
from moe_upgrpo.losses.kl import kl_estimate
from moe_upgrpo.losses.metrics import GLOSSARY, Metric, finalize_metrics, merge_metrics
from moe_upgrpo.losses.per_token import (
    Gtpo,
    gtpo_weights,
    nthr_factors,
    optimal_token_baseline,
    ratio_deviation,
    stops_early,
    token_draws,
)
from moe_upgrpo.losses.policy import (
    PolicyLoss,
    batch_statistics,
    gradient_coefficients,
    policy_loss,
)
from moe_upgrpo.losses.register import register_loss
from moe_upgrpo.losses.side import Branch, Side
from moe_upgrpo.losses.terms import EntropyControl, LossTerms, loss_terms
from moe_upgrpo.losses.tokens import CONTEXT, Context

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "BRANCHES",
    "CONTEXT",
    "GLOSSARY",
    "PRESETS",
    "Advantage",
    "Branch",
    "Context",
    "EntropyControl",
    "Gtpo",
    "LossTerms",
    "Metric",
    "PolicyLoss",
    "PolicyLossConfig",
    "RolloutCorrection",
    "Side",
    "advantage_sums",
    "aggregation_weights",
    "batch_statistics",
    "compute_policy_loss",
    "dynamic_sampling",
    "finalize_metrics",
    "gradient_coefficients",
    "group_advantages",
    "gtpo_weights",
    "informative_groups",
    "kl_estimate",
    "loss_terms",
    "merge_metrics",
    "nthr_factors",
    "optimal_token_baseline",
    "overlong_penalty",
    "policy_loss",
    "ratio_deviation",
    "register_advantage",
    "register_loss",
    "stops_early",
    "token_draws",
]
