# SPDX-License-Identifier: Apache-2.0
"""Responses that go on under other weights than those that began them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig


def unfinished(rollouts: Sequence[Rollout], longest: int) -> list[int]:
    """The rollouts that have neither ended nor `longest` tokens, by their indices."""
    return [i for i, r in enumerate(rollouts) if not r.finished and len(r.response_ids) < longest]


def go_on(
    engine: Engine,
    rollouts: Sequence[Rollout],
    sampling: SamplingConfig,
    *,
    most: int | None,
    seed: int,
) -> list[Rollout]:
    """The rollouts, the unfinished ones continued with the weights that the engine has now.

    most: tokens that are added to each; None: up to `sampling.max_new_tokens` in all. Unfinished
    rollouts of a batch have one length, as they were begun and cut off together.
    """
    going = unfinished(rollouts, sampling.max_new_tokens)
    if not going:
        return list(rollouts)
    lengths = {len(rollouts[i].response_ids) for i in going}
    if len(lengths) > 1:
        raise UserError(f"unfinished responses of {sorted(lengths)} tokens: one length is needed.")
    left = sampling.max_new_tokens - lengths.pop()
    replies = engine.generate(
        [np.concatenate([rollouts[i].prompt_ids, rollouts[i].response_ids]) for i in going],
        replace(sampling, max_new_tokens=left if most is None else min(most, left)),
        samples_per_prompt=1,
        seed=seed,
    )
    whole = list(rollouts)
    for i, reply in zip(going, replies, strict=True):
        whole[i] = continued(rollouts[i], reply)
    return whole


def continued(before: Rollout, reply: Rollout) -> Rollout:
    """A rollout with the engine's reply to all of it; every token keeps what sampled it.

    Rows that were fed in before keep their routes. The last token's is the reply's: its output
    gave the first new token.
    """
    new = np.full(len(reply.response_ids), reply.weight_version, np.int32)
    return replace(
        before,
        response_ids=np.concatenate([before.response_ids, reply.response_ids]),
        logp_rollout=np.concatenate([before.logp_rollout, reply.logp_rollout]),
        routes=np.concatenate([before.routes, reply.routes[len(before.routes) :]]),
        versions=np.concatenate([before.versions_or_all, new]),
        finished=reply.finished,
    )
