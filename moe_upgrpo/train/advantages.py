# SPDX-License-Identifier: Apache-2.0
"""Advantages of a step's responses, and of their tokens where a kind or a loss defines them.

Some kinds need sums over all data-parallel ranks. B responses of this rank, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import ADVANTAGES, advantage_sums, group_advantages, gtpo_weights
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.tasks.base import Terms


def advantages_of(
    rewards_B: np.ndarray,
    rollouts: Sequence[Rollout],
    *,
    group: int,
    kind: str,
    terms_B: Sequence[Terms] = (),
) -> np.ndarray:
    """Advantages `[B]` float32 of this data-parallel rank's responses. A collective.

    terms_B: the rewards that add up to a response's reward, for kinds that take several.
    """
    given = {"lengths": torch.tensor([int(one.sampled_or_all.sum()) for one in rollouts])}
    rewards = torch.from_numpy(rewards_B)
    if ADVANTAGES[kind].several:
        rewards, given["reward_weights"] = _several(terms_B, kind)
    sums = advantage_sums(rewards, group, kind, **given)
    if sums is not None:
        given["batch_sums"] = torch.tensor(groups.summed(sums.tolist()), dtype=torch.float64)
    return group_advantages(rewards, group, kind, **given).numpy()


def _several(terms_B: Sequence[Terms], kind: str) -> tuple[torch.Tensor, list[float]]:
    """The rewards `[K, B]` and their weights, in one order on all ranks.

    A reward that a response lacks is 0; one that failed lacks all.
    """
    mine = {name: weight for terms in terms_B for name, (weight, _) in terms.items()}
    weights: Mapping[str, float] = dict(groups.gather_over_data_parallel([*mine.items()]))
    if len(weights) < 2:
        raise UserError(
            f"advantage={kind!r} takes several rewards of a response, and this step's have "
            f"{', '.join(weights) or 'one number'} alone. Give --reward several words, or a "
            "function that returns a mapping of names to numbers, without a 'score'."
        )
    absent = (0.0, 0.0)
    rewards_KB = [[terms.get(name, absent)[1] for terms in terms_B] for name in weights]
    return torch.tensor(rewards_KB, dtype=torch.float32), [*weights.values()]


def with_token_weights(
    samples: Sequence[Sample], scored: Sequence[Scored], *, group: int
) -> list[Sample]:
    """The samples with GTPO's token weights and its advantages (`gtpo_weights`).

    The G responses to a prompt are adjacent. scored: at the old weights, whose entropy is used; the
    authors use the entropy of the policy at each update.
    """
    found = []
    for first in range(0, len(samples), group):
        mine = slice(first, first + group)
        responses = [torch.as_tensor(s.tokens[s.prompt_length :]).long() for s in samples[mine]]
        masks = [
            torch.ones(len(ids), dtype=torch.bool) if s.sampled is None else torch.tensor(s.sampled)
            for s, ids in zip(samples[mine], responses, strict=True)
        ]
        entropies = [
            float(one.entropy[s.counted].mean())
            for s, one in zip(samples[mine], scored[mine], strict=True)
        ]
        advantages, weights = gtpo_weights(
            pad_sequence(responses, batch_first=True),
            torch.tensor([s.advantage for s in samples[mine]]),
            pad_sequence(masks, batch_first=True),
            group,
            torch.tensor(entropies),
        )
        found += [
            replace(s, advantage=float(a), token_weights=w_T[: len(ids)].numpy())
            for s, a, w_T, ids in zip(samples[mine], advantages, weights, responses, strict=True)
        ]
    return found
