"""Per-token estimates of KL(π_θ‖π_ref) from samples of π_θ (Schulman, joschu.net/blog/kl-approx).

With d = log π_ref − log π_θ of the sampled token: k1 = −d, k2 = d²/2, k3 = e^d − d − 1. k1 and k3
are unbiased in value; as a loss, only the gradient of k2 is that of the KL.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses.tokens import MAX_LOG_RATIO


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """log π_θ − log π_ref: unbiased, either sign."""
    return log_probs - ref_log_probs


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """(log π_θ − log π_ref)²/2: biased, never negative."""
    return (log_probs - ref_log_probs).square() / 2


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """e^d − d − 1, d = log π_ref − log π_θ: unbiased, never negative; e^d is cut at e^20."""
    d = ref_log_probs - log_probs
    return torch.expm1(d.clamp(max=MAX_LOG_RATIO)) - d


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k3") -> Tensor:
    """The estimator of that name, elementwise; UserError for an unknown one or other shapes."""
    if kind not in KL_ESTIMATORS:
        raise UserError(f"kind: {kind!r} given; allowed: {', '.join(KL_ESTIMATORS)}")
    if log_probs.shape != ref_log_probs.shape:
        raise UserError(
            f"ref_log_probs: shape {tuple(ref_log_probs.shape)} given; allowed: "
            f"{tuple(log_probs.shape)}, the shape of log_probs"
        )
    return KL_ESTIMATORS[kind](log_probs, ref_log_probs)
