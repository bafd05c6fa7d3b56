# SPDX-License-Identifier: Apache-2.0
"""The settings of a verl job that the routing log needs, and those that it cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.environment import RUN

ROOT = "actor_rollout_ref"


@dataclass(frozen=True)
class Rule:
    """accepts: the values the setting may have. instead: what to change otherwise."""

    accepts: Callable[[Any], bool]
    instead: str


RULES: dict[str, Rule] = {  # by the setting's name under actor_rollout_ref
    "actor.strategy": Rule(
        lambda value: value == "megatron",
        "the log is of verl's Megatron engine: take megatron (--config-name "
        "ppo_megatron_trainer), or unset the variable",
    ),
    "rollout.enable_rollout_routing_replay": Rule(
        bool, "the log compares the rollout's routes, which come with True (under R2 as well)"
    ),
    "rollout.calculate_log_probs": Rule(
        bool, "the log compares the rollout's log-probs, which come with True"
    ),
}


def refused(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings under actor_rollout_ref that the log refuses, and what to change."""
    found = {}
    for name, rule in RULES.items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if value is not None else None
        if not rule.accepts(value):
            found[f"{ROOT}.{name}"] = f"{value} given; {rule.instead}"
    return found


def check(config: Mapping[str, Any]) -> None:
    """Raise UserError with every setting that the log refuses."""
    if problems := refused(config):
        lines = [f"{name}: {problem}" for name, problem in problems.items()]
        raise UserError(f"{RUN}: " + "; ".join(lines))
