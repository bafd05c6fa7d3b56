"""Signs in a step's metrics that the run is going wrong, named and explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alarm:
    """`fires` on a row of metrics.jsonl; `means` says what it is and what to do."""

    fires: Callable[[dict], bool]
    means: str


def _exceeds(value: float, limit: float) -> bool:
    return not value <= limit  # NaN as well


def _is_stale(row: dict) -> bool:
    """An update lies between the engine's weights and the trainer's: they differ by right."""
    return row.get("staleness/mean", 0) > 0


def _mismatch_above_noise(row: dict) -> bool:
    floors = [
        rate
        for name, rate in row.items()
        if name.startswith("noise/") and name.endswith("/router_rate")
    ]
    if not floors or _is_stale(row):
        return False
    return _exceeds(row["mismatch/router_rate"], max(0.05, 10 * max(floors)))


def _zero_filled(row: dict) -> bool:
    return _exceeds(max(row.get("mismatch/zero_rows_by_layer", [0.0])), 0.99)


def _large_gap(row: dict) -> bool:
    return not _is_stale(row) and _exceeds(row.get("logp_gap/k3", 0.0), 0.1)


def _few_effective_tokens(row: dict) -> bool:
    if "loss/ratio_effective_sample_size" not in row:
        return False
    return _exceeds(0.5 * row["tokens/visited"], row["loss/ratio_effective_sample_size"])


ALARMS: dict[str, Alarm] = {
    "mismatch-above-noise": Alarm(
        _mismatch_above_noise,
        "more than 5% of routers differ between rollout and trainer, and more than ten times what "
        "either side differs from itself: engine and trainer do not compute the same model, or "
        "their weights are not the same. Compare the mismatch by layer; --replay R3 removes it "
        "from the ratio.",
    ),
    "zero-filled-routes": Alarm(
        _zero_filled,
        "in some MoE layer the rollout sent over 99% of the tokens to expert 0: with top-1 routing "
        "that is how routes look that were never written. Replayed, they would send every token "
        "to one expert. Check that the engine records that layer. (With more than one expert per "
        "token a zero-filled row is an error.)",
    ),
    "large-log-prob-gap": Alarm(
        _large_gap,
        "KL(rollout ‖ trainer at the rollout's weights) is above 0.1 per token, a hundred times "
        "what is published for MoE models: look for stale weights in the engine, another "
        "temperature, or rows joined to the wrong tokens.",
    ),
    "few-effective-tokens": Alarm(
        _few_effective_tokens,
        "the importance ratios of the step's optimizer steps leave less than half of the tokens "
        "as effective sample: a few tokens carry the update. Use fewer optimizer steps for each "
        "batch or a lower learning rate.",
    ),
}


def raised(row: dict) -> list[str]:
    """The names of the alarms that fire on a step's row; those whose metrics it lacks do not."""
    return [name for name, alarm in ALARMS.items() if alarm.fires(row)]
