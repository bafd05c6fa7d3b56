# SPDX-License-Identifier: Apache-2.0
"""Per-token estimates of KL(π_θ‖π_ref) from samples of π_θ (Schulman, joschu.net/blog/kl-approx).

With d = log π_ref − log π_θ of the sampled token: k1 = −d, k2 = d²/2, k3 = e^d − d − 1. k1 and k3
are unbiased in value; as a loss, only the gradient of k2 is that of the KL. Computed in float32 or
better, whatever the inputs' type and torch.autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.names import check_name
from moe_upgrpo.losses.tokens import MAX_LOG_RATIO, without_autocast

if TYPE_CHECKING:
    from torch import Tensor


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """log π_θ − log π_ref: unbiased, either sign."""
    return log_probs - ref_log_probs


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """(log π_θ − log π_ref)²/2: biased, never negative."""
    return (log_probs - ref_log_probs).square() / 2


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """e^d − d − 1, d = log π_ref − log π_θ: unbiased, never negative.

    Beyond d = 20 it continues along its tangent, so that neither value nor gradient overflows and a
    token that is too unlikely is still pulled up (if only e^d were cut, −d would push it further
    down).
    """
    d = ref_log_probs - log_probs
    beyond = torch.relu(d - MAX_LOG_RATIO)
    return torch.expm1(d - beyond) - d + math.exp(MAX_LOG_RATIO) * beyond


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@without_autocast
def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k3") -> Tensor:
    """The estimator of that name, elementwise; UserError for an unknown one or other shapes."""
    check_name("kind", kind, KL_ESTIMATORS)
    if log_probs.shape != ref_log_probs.shape:
        raise UserError(
            f"ref_log_probs: shape {tuple(ref_log_probs.shape)} given; allowed: "
            f"{tuple(log_probs.shape)}, the shape of log_probs"
        )
    dtype = torch.promote_types(
        torch.promote_types(log_probs.dtype, ref_log_probs.dtype), torch.float32
    )
    return KL_ESTIMATORS[kind](log_probs.to(dtype), ref_log_probs.to(dtype))
