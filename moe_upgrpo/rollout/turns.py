# SPDX-License-Identifier: Apache-2.0
"""Conversations of several turns: model, tool, model.

A task takes part with `max_turns` above 1, `observe` and `max_observation_tokens`. Each turn is a
response of the engine to all that came before. In the rollout the tokens of results are among the
response's, but not `sampled`: neither loss nor log counts them, but the routes include them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.tasks import Problem, Task
from moe_upgrpo.tasks.base import TOOLS_AT_ONCE, Tokens

_TURN = 0x7E57  # a later turn's seed is made from this, the first turn's seed and its number


def turns_of(task: Task) -> int:
    """Number of times that the model may speak to one problem."""
    return getattr(task, "max_turns", 1)


def longest(task: Task, max_new_tokens: int) -> int:
    """Tokens of the longest response, results of tools among them."""
    turns = turns_of(task)
    results = (turns - 1) * task.max_observation_tokens if turns > 1 else 0
    return turns * max_new_tokens + results


def converse(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    sampling: SamplingConfig,
    *,
    samples_per_prompt: int,
    seed: int,
) -> list[Rollout]:
    """Whole conversations on each problem, `samples_per_prompt` each, in the order of `generate`.

    A turn that was cut off, without an end token, is the last. `max_new_tokens` is per turn.
    """
    rollouts = engine.generate(
        [problem.prompt_ids for problem in problems],
        sampling,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
    )
    going = range(len(rollouts))
    for turn in range(1, turns_of(task)):
        ended = [i for i in going if rollouts[i].finished]
        found = _observed(
            task, [(problems[i // samples_per_prompt], rollouts[i].response_ids) for i in ended]
        )
        results = {
            i: np.asarray(result, dtype=np.int64)
            for i, result in zip(ended, found, strict=True)
            if result is not None
        }
        if not results:
            break
        replies = engine.generate(
            [
                np.concatenate([rollouts[i].prompt_ids, rollouts[i].response_ids, result])
                for i, result in results.items()
            ],
            sampling,
            samples_per_prompt=1,
            seed=int(np.random.SeedSequence((_TURN, seed, turn)).generate_state(1)[0]),
        )
        for (i, result), reply in zip(results.items(), replies, strict=True):
            rollouts[i] = joined(rollouts[i], result, reply)
        going = list(results)
    return rollouts


def _observed(task: Task, asked: Sequence[tuple[Problem, Tokens]]) -> list[Tokens | None]:
    """The tool's result for each of these, in their order; several calls run at a time."""
    at_once = min(len(asked), getattr(task, "tools_at_once", TOOLS_AT_ONCE))
    if at_once <= 1:
        return [task.observe(*one) for one in asked]
    pool = ThreadPoolExecutor(at_once, "tool")
    try:
        return list(pool.map(lambda one: task.observe(*one), asked))
    finally:
        # Without waiting: generation may be ended while a tool hangs.
        pool.shutdown(wait=False, cancel_futures=True)


def joined(before: Rollout, result: np.ndarray, reply: Rollout) -> Rollout:
    """A rollout continued by the result of a tool and the engine's reply to all of it.

    Rows that were fed in before keep their routes, with which the earlier tokens were sampled.
    """
    if reply.weight_version != before.weight_version:
        raise UserError(
            f"a turn was sampled with weight version {reply.weight_version}, the one before it "
            f"with {before.weight_version}: the engine's weights may not change between turns"
        )
    rows = len(before.routes)
    return replace(
        before,
        response_ids=np.concatenate([before.response_ids, result, reply.response_ids]),
        logp_rollout=np.concatenate(
            [before.logp_rollout, np.zeros(len(result), np.float32), reply.logp_rollout]
        ),
        routes=np.concatenate([before.routes, reply.routes[rows:]]),
        finished=reply.finished,
        sampled=np.concatenate(
            [
                before.sampled_or_all,
                np.zeros(len(result), bool),
                np.ones(len(reply.response_ids), bool),
            ]
        ),
    )
