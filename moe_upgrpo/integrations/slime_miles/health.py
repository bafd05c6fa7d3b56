# SPDX-License-Identifier: Apache-2.0
"""Health figures of a replay in slime's and miles' Megatron actor: `kit.health`, by rollout."""

import functools
from argparse import Namespace

from moe_upgrpo.integrations.kit.health import Health, reports_here
from moe_upgrpo.integrations.slime_miles.revisions import need


def install(stack, args: Namespace) -> None:
    """Put the figures around the actor's `train`, once.

    stack: `log.Stack` with `watch_replay(look)`, which lets `look(stage, shown)` see every top-k of
    the stack's replay: `shown()` gives the routes that a replay_forward is held to, and those that
    the router would have chosen.
    """
    if hasattr(stack.actor, "moe_upgrpo_health"):
        return
    need(stack.actor, "train")
    watches: list[Health] = []
    train = stack.actor.train

    def look(stage: str, shown) -> None:
        if not watches or not watches[0].looks:
            return
        if stage == "replay_forward":
            watches[0].replayed(*shown())
        elif stage == "replay_backward":
            watches[0].recomputed()

    @functools.wraps(train)
    def counted(rollout_id, model, *rest, **kwargs):
        if not watches:
            watches.append(Health(model))
        with watches[0].counting():
            result = train(rollout_id, model, *rest, **kwargs)
        found = watches[0].take()
        if reports_here():
            stack.report(args, rollout_id, found)
        return result

    stack.watch_replay(look)
    stack.actor.train, stack.actor.moe_upgrpo_health = counted, watches
