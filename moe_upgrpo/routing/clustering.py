# SPDX-License-Identifier: Apache-2.0
"""Test whether mismatches cluster on the same tokens, against layers that mismatch independently.

Shape suffixes: L MoE layers.
"""

import math
from dataclasses import dataclass

import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing.compare import ComparisonKind, RoutingCounts


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Observed counts beside what independent layers with the same rates would give.

    With p_l the router mismatch rate of layer l and J the number of layers in which a token's
    expert sets differ, under independence J is Poisson-binomial:

    - ``token_any_rate``: share of tokens with J ≥ 1
    - ``token_any_rate_independent``: 1 − Π_l (1 − p_l)
    - ``variance``: mean of J² − (mean of J)² over tokens, in layers²
    - ``variance_independent``: Σ_l p_l·(1 − p_l)
    - ``tokens``: tokens compared; ``kind``: what was compared

    Mismatches cluster where the share of tokens is below, and the variance above, that of
    independence. In free-running comparisons they cluster because a flip carries on through later
    layers, and on tokens with small top-k margins.
    """

    token_any_rate: float
    token_any_rate_independent: float
    variance: float
    variance_independent: float
    tokens: int
    kind: ComparisonKind

    @property
    def dispersion(self) -> float:
        """variance / variance_independent: 1 for uncorrelated layers, L for layers that only flip
        together; NaN where no layer's mismatch varies between tokens (all rates 0 or 1)."""
        if self.variance_independent == 0:
            return math.nan
        return self.variance / self.variance_independent

    @property
    def pair_covariance_sum(self) -> float:
        """Σ_{l<m} Cov(1[S_l ≠ S'_l], 1[S_m ≠ S'_m]) = (variance − variance_independent) / 2."""
        return (self.variance - self.variance_independent) / 2


def clustering(counts: RoutingCounts) -> Clustering:
    """Compare the histogram of mismatching layers per token with the per-layer rates.

    Moments are those of the tokens at hand, with their number as the denominator. Tokens of a
    sequence are not independent: intervals are by prompt (`moe_upgrpo.store.questions`).

    Raises:
        UserError: the counts hold no token.
    """
    if counts.tokens_compared == 0:
        raise UserError("no clustering without tokens: the counts are empty")
    rates_L = counts.router_mismatch_by_layer.cpu()
    layers = torch.arange(counts.num_layers + 1)
    tokens_by_layers = counts.token_histogram.cpu()
    # In integers up to the division, so that equal numbers in all tokens give exactly 0.
    N = counts.tokens_compared
    sum_of_squares = int((tokens_by_layers * layers.square()).sum())
    variance = (N * sum_of_squares - counts.routers_mismatched**2) / N**2
    return Clustering(
        token_any_rate=counts.token_any_rate,
        token_any_rate_independent=1 - float((1 - rates_L).prod()),
        variance=variance,
        variance_independent=float((rates_L * (1 - rates_L)).sum()),
        tokens=N,
        kind=counts.kind,
    )
