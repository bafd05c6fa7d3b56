"""Metrics that merge exactly: each is a pair of sums, added over micro-batches and ranks.

`GLOSSARY` is the one list of their formulas and normalisers; the docs table is made from it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from moe_upgrpo.errors import UserError


class Metric(NamedTuple):
    """Two detached scalars. The value is numerator/denominator, or what the glossary says."""

    numerator: Tensor | float
    denominator: Tensor | float


@dataclass(frozen=True)
class Definition:
    """formula: of the value; normaliser: what the denominator counts; value: from the two sums."""

    formula: str
    normaliser: str
    value: Callable[[float, float], float] = lambda numerator, denominator: numerator / denominator


_effective = Definition(
    "(Σw)²/Σw², in tokens",
    "Σw²",
    lambda sum_w, sum_w2: sum_w**2 / sum_w2,
)
_POSITIVE, _NEGATIVE, _ALL = "tokens with A > 0", "tokens with A < 0", "response tokens"

GLOSSARY: dict[str, Definition] = {
    "ppo_kl": Definition("mean(log π_old − log π_θ): k1 of KL(π_old‖π_θ)", _ALL),
    "ratio_mean": Definition("mean r, r = π_θ/π_old (guarded at e^20)", _ALL),
    "ratio_effective_sample_size": Definition("(Σr)²/Σr², in tokens", "Σr²", _effective.value),
    "positive_fraction": Definition("share of tokens with A > 0", _ALL),
    "negative_fraction": Definition("share of tokens with A < 0", _ALL),
    "clip_fraction": Definition(
        "share of tokens whose gradient the loss's own rule removed (`PolicyLoss.clipped`)", _ALL
    ),
    "clip_fraction_positive_upper": Definition(
        "share of positive tokens cut by an upper bound", _POSITIVE
    ),
    "clip_fraction_positive_lower": Definition(
        "share of positive tokens cut by a lower bound", _POSITIVE
    ),
    "clip_fraction_negative_upper": Definition(
        "share of negative tokens cut by an upper bound (ppo: the dual clip)", _NEGATIVE
    ),
    "clip_fraction_negative_lower": Definition(
        "share of negative tokens cut by a lower bound", _NEGATIVE
    ),
    "dual_clip_fraction": Definition(
        "share of negative tokens with r > C; only where the loss has a dual clip", _NEGATIVE
    ),
    "positive_beyond_upper_fraction": Definition(
        "share of positive tokens whose gradient the *negative* branch's own loss would have "
        "removed: exactly where UP-X differs from X",
        _POSITIVE,
    ),
    "gradient_share_positive": Definition(
        "Σ_{A>0} w|A|c / Σ w|A|c, c the gradient coefficient, w aggregation and correction weight",
        "Σ w|A|c",
    ),
    "correction_weight_mean": Definition(
        "mean weight of the rollout correction", "tokens it applies to"
    ),
    "correction_zero_fraction": Definition("share of tokens it drops", "tokens it applies to"),
    "correction_effective_sample_size": Definition(
        "(Σw)²/Σw² of its weights, in tokens", "Σw²", _effective.value
    ),
    "off_policy_mask_fraction": Definition(
        "share of negative tokens in sequences that the off-policy mask drops", _NEGATIVE
    ),
    "router_shift_mean": Definition("mean γ of RSPO", _ALL),
}


def merge_metrics(parts: Iterable[dict[str, Metric]]) -> dict[str, Metric]:
    """Sum numerators and denominators over micro-batches or ranks.

    Raises:
        UserError: no parts, or parts whose metrics differ (they come from different losses).
    """
    parts = list(parts)
    if not parts:
        raise UserError("parts: none given; allowed: the metrics of at least one micro-batch")
    if any(part.keys() != parts[0].keys() for part in parts):
        raise UserError("parts: metrics differ between micro-batches; allowed: those of one config")
    return {
        name: Metric(*(sum(column) for column in zip(*(p[name] for p in parts), strict=True)))
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
