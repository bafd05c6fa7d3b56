"""A step's sums under the names of `moe_upgrpo.store.metrics`, and the metrics made from them.

Every mean is carried as (numerator, denominator) until the ranks are summed.

Shapes: N response tokens, L MoE layers, K experts per token.
"""

import math
import re

import numpy as np

from moe_upgrpo.losses import Metric, finalize_metrics
from moe_upgrpo.routing import RoutingCounts

Sums = dict[str, Metric]


def count_sums(prefix: str, counts: RoutingCounts) -> Sums:
    """The sums of a comparison under the names of `store.metrics`; a histogram's are its counts."""
    sums = {
        f"{prefix}/router_rate": Metric(counts.routers_mismatched, counts.routers_compared),
        f"{prefix}/token_any_rate": Metric(counts.tokens_mismatched, counts.tokens_compared),
    }
    for layer, count in enumerate(counts.routers_mismatched_by_layer.tolist()):
        sums[f"{prefix}/by_layer/{layer}"] = Metric(count, counts.tokens_compared)
    for layers, count in enumerate(counts.token_histogram.tolist()):
        sums[f"{prefix}/histogram/{layers}"] = Metric(count, counts.tokens_compared)
    return sums


def routing_sums(counts: RoutingCounts, rollout_NLK: np.ndarray) -> Sums:
    """Every metric of rollout against trainer that needs nothing but the two routes."""
    zeros_L = (rollout_NLK == 0).all(axis=2).sum(axis=0)
    return count_sums("mismatch", counts) | {
        "mismatch/slot_rate": Metric(counts.slots_mismatched, counts.slots_compared),
        "mismatch/routers_per_token": Metric(counts.routers_mismatched, counts.tokens_compared),
        **{
            f"mismatch/zero_rows_by_layer/{layer}": Metric(count, counts.tokens_compared)
            for layer, count in enumerate(zeros_L.tolist())
        },
    }


_LIST = re.compile(r"(.*)/(\d+)")


def measured(sums: Sums) -> dict[str, float | list[float]]:
    """The metrics that do not come from the loss, from sums over all ranks.

    Names that end in a number are the entries of a list; a histogram's are counts, not rates.
    """
    metrics: dict = {}
    for name, (numerator, denominator) in sums.items():
        if not denominator:
            continue
        if entry := _LIST.fullmatch(name):
            is_count = entry[1].endswith("/histogram")
            value = int(numerator) if is_count else numerator / denominator
            metrics.setdefault(entry[1], []).append(value)
        else:
            metrics[name] = numerator / denominator
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
