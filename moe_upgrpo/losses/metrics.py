# SPDX-License-Identifier: Apache-2.0
"""Metrics that merge exactly: each is a pair of sums, added over micro-batches and ranks.

`GLOSSARY` is the one list of their formulas and normalisers; the docs table is made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moe_upgrpo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Metric(NamedTuple):
    """Two detached scalars. The value is numerator/denominator, or what the glossary says."""

    numerator: Tensor | float
    denominator: Tensor | float


def mean(numerator: float, denominator: float) -> float:
    return numerator / denominator


def effective_sample_size(sum_w: float, sum_w2: float) -> float:
    """(Σw)²/Σw² (Kish): how many equally weighted tokens would be as good."""
    return sum_w**2 / sum_w2


@dataclass(frozen=True)
class Definition:
    """formula: of the value; normaliser: what the denominator counts; value: from the two sums."""

    formula: str
    normaliser: str
    value: Callable[[float, float], float] = mean


ALL, POSITIVE, NEGATIVE = "response tokens", "tokens with A > 0", "tokens with A < 0"
CORRECTED = "tokens that the correction applies to"

GLOSSARY: dict[str, Definition] = {
    "ppo_kl": Definition("mean of log π_old − log π: k1 of KL(π_old‖π)", ALL),
    "ratio_mean": Definition("mean of r = π/π_old, cut at e^20", ALL),
    "ratio_effective_sample_size": Definition("(Σr)²/Σr², in tokens", "Σr²", effective_sample_size),
    "positive_fraction": Definition("share with A > 0", ALL),
    "negative_fraction": Definition("share with A < 0", ALL),
    "clip_fraction": Definition("share whose gradient the loss's own rule took away", ALL),
    "clip_fraction_positive": Definition("share of positive tokens that are clipped", POSITIVE),
    "clip_fraction_negative": Definition("share of negative tokens that are clipped", NEGATIVE),
    "clip_fraction_positive_upper": Definition("share cut by an upper bound", POSITIVE),
    "clip_fraction_positive_lower": Definition("share cut by a lower bound", POSITIVE),
    "clip_fraction_negative_upper": Definition("share cut by an upper bound", NEGATIVE),
    "clip_fraction_negative_lower": Definition("share cut by a lower bound", NEGATIVE),
    "dual_clip_fraction": Definition("share with r > C, for losses with a dual clip", NEGATIVE),
    "positive_beyond_upper_fraction": Definition(
        "share that the loss of the negative branch would cut: where UP-X and X differ", POSITIVE
    ),
    "gradient_share_positive": Definition(
        "Σ_{A>0} w·|A|·c / Σ w·|A|·c, w of the aggregation, c with correction weights", "Σ w·|A|·c"
    ),
    "off_policy_mask_fraction": Definition("share that the off-policy mask drops", NEGATIVE),
    "router_shift_mean": Definition("mean of RSPO's γ", ALL),
    "correction_weight_mean": Definition("mean weight", CORRECTED),
    "correction_zero_fraction": Definition("share dropped", CORRECTED),
    "correction_effective_sample_size": Definition(
        "(Σw)²/Σw² of the weights, in tokens", "Σw²", effective_sample_size
    ),
}


def merge_metrics(parts: Iterable[dict[str, Metric]]) -> dict[str, Metric]:
    """Sum numerators and denominators over micro-batches or ranks, in double precision.

    Raises:
        UserError: no parts, or parts whose metrics differ (they come from different losses).
    """
    parts = list(parts)
    if not parts:
        raise UserError("parts: none given; allowed: the metrics of at least one micro-batch")
    if any(part.keys() != parts[0].keys() for part in parts):
        raise UserError("parts: metrics differ between micro-batches; allowed: those of one config")
    return {
        name: Metric(
            sum(float(part[name].numerator) for part in parts),
            sum(float(part[name].denominator) for part in parts),
        )
        for name in parts[0]
    }


def finalize_metrics(metrics: dict[str, Metric]) -> dict[str, float]:
    """The values as floats, by the glossary; NaN where nothing was counted."""
    values = {}
    for name, (numerator, denominator) in metrics.items():
        numerator, denominator = float(numerator), float(denominator)
        defined = denominator != 0
        values[name] = GLOSSARY[name].value(numerator, denominator) if defined else float("nan")
    return values
