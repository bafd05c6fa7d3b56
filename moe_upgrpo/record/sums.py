# SPDX-License-Identifier: Apache-2.0
"""A step's sums under the names of `moe_upgrpo.store.metrics`, and the metrics made from them.

Every mean is carried as (numerator, denominator) until the ranks are summed.

Shapes: N response tokens, L MoE layers, K experts per token.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_upgrpo.losses import Metric, finalize_metrics
from moe_upgrpo.routing import RoutingCounts
from moe_upgrpo.routing.sets import zeros
from moe_upgrpo.stats import (
    BINS,
    POSITION_EDGES,
    log_counts,
    pareto_k_of_counts,
    position_bins,
    quantiles,
)

Sums = dict[str, Metric]


def count_sums(prefix: str, counts: RoutingCounts) -> Sums:
    """The sums of a comparison, named as in `store.metrics`; a histogram's sums are its counts."""
    sums = {
        f"{prefix}/router_rate": Metric(counts.routers_mismatched, counts.routers_compared),
        f"{prefix}/token_any_rate": Metric(counts.tokens_mismatched, counts.tokens_compared),
    }
    for layer, count in enumerate(counts.routers_mismatched_by_layer.tolist()):
        sums[f"{prefix}/by_layer/{layer}"] = Metric(count, counts.tokens_compared)
    for layers, count in enumerate(counts.token_histogram.tolist()):
        sums[f"{prefix}/histogram/{layers}"] = Metric(count, counts.tokens_compared)
    return sums


def routing_sums(counts: RoutingCounts, rollout: Iterable[np.ndarray]) -> Sums:
    """Every metric of rollout against trainer that needs only the two sides' routes.

    rollout: the engine's, ``[N, L, K]`` in pieces of any number of tokens.
    """
    zeros_L = np.sum([zeros(piece_nLK).sum(axis=0) for piece_nLK in rollout], axis=0)
    return count_sums("mismatch", counts) | {
        "mismatch/slot_rate": Metric(counts.slots_mismatched, counts.slots_compared),
        "mismatch/routers_per_token": Metric(counts.routers_mismatched, counts.tokens_compared),
        **{
            f"mismatch/zero_rows_by_layer/{layer}": Metric(count, counts.tokens_compared)
            for layer, count in enumerate(zeros_L.tolist())
        },
    }


BEYOND = (2, 10)
"""Factors by which a ratio is further from 1, either way, in `beyond_2` and `beyond_10`."""


def tail_sums(name: str, log_ratios_N: np.ndarray) -> Sums:
    """Distances of ratios from 1: those beyond a factor, and counts by size for `measured`."""
    size_N, total = np.abs(log_ratios_N), len(log_ratios_N)
    # A ratio that is NaN is not near 1.
    sums = {
        f"{name}/beyond_{tau}": Metric(int((~(size_N <= math.log(tau))).sum()), total)
        for tau in BEYOND
    }
    for side, counts_B in zip(_SIDES, log_counts(log_ratios_N), strict=True):
        sums |= {f"{name}/{side}/{i}": Metric(int(c), total) for i, c in enumerate(counts_B)}
    return sums


def position_sums(name: str, positions_N: np.ndarray, values_N: np.ndarray, each: int = 1) -> Sums:
    """Sums of values and of `each` for every token, by bins of position (`POSITION_EDGES`)."""
    bins_N, size = position_bins(positions_N), len(POSITION_EDGES) + 1
    above = np.bincount(bins_N, weights=values_N, minlength=size)
    below = np.bincount(bins_N, minlength=size) * each
    pairs = zip(above.tolist(), below.tolist(), strict=True)
    return {f"{name}/by_position/{i}": Metric(*pair) for i, pair in enumerate(pairs)}


_SIDES = ("_above", "_below")
_TAIL = re.compile(r"(.*)/(_above|_below)/(\d+)")
_LIST = re.compile(r"(.*)/(\d+)")


def measured(sums: Sums) -> dict[str, Any]:
    """The metrics that do not come from the loss, from sums over all ranks.

    Names that end in a number are the entries of a list; a histogram's are counts, not rates, and
    an entry for positions without tokens is None.
    """
    metrics: dict[str, Any] = {}
    tails: dict[str, dict[str, np.ndarray]] = {}
    for name, (numerator, denominator) in sums.items():
        if entry := _TAIL.fullmatch(name):
            of_name = tails.setdefault(entry[1], {side: np.zeros(BINS, int) for side in _SIDES})
            of_name[entry[2]][int(entry[3])] = int(numerator)
            continue
        if not denominator:
            if "/by_position/" in name:  # no token there; the others keep their place
                metrics.setdefault(name.rpartition("/")[0], []).append(None)
            continue
        if entry := _LIST.fullmatch(name):
            is_count = entry[1].endswith("/histogram")
            value = int(numerator) if is_count else numerator / denominator
            metrics.setdefault(entry[1], []).append(value)
        else:
            metrics[name] = numerator / denominator
    for name, of_name in tails.items():
        above_B, below_B = of_name.values()
        if name == "logp_gap":
            found = quantiles(above_B + below_B)
            metrics |= {f"{name}/{quantile}": value for quantile, value in found.items()}
        k = pareto_k_of_counts(above_B, below_B)
        if not math.isnan(k):
            metrics[f"{name}/pareto_k"] = k
    if "reward/mean" in metrics:
        variance = metrics.pop("reward/mean_square") - metrics["reward/mean"] ** 2
        metrics["reward/std"] = math.sqrt(max(variance, 0.0))
        metrics["tokens/sampled"] = sums["response/length_mean"].numerator
    if "groups/kept" in sums:
        metrics["groups/kept"], metrics["groups/sampled"] = sums["groups/kept"]
    if "mismatch/router_rate" in sums:
        routers = sums["mismatch/router_rate"]
        metrics["mismatch/router_numerator"] = routers.numerator
        metrics["mismatch/router_denominator"] = routers.denominator
    return metrics


def finish(
    sums: Sums, loss_metrics: Sums, maxima: dict[str, float]
) -> dict[str, float | list[float]]:
    """All metrics of a step, from sums, the loss library's sums and maxima over all ranks."""
    of_loss = finalize_metrics(loss_metrics)
    clipped = {f"clip/{sign}": of_loss[f"clip_fraction_{sign}"] for sign in _SIGNS}
    named = {f"loss/{name}": value for name, value in of_loss.items()}
    return measured(sums) | clipped | named | maxima


_SIGNS = ("positive", "negative")
