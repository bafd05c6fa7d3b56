"""Advantages of a step's responses, where some kinds need the sums of all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_upgrpo.losses import advantage_sums, group_advantages
from moe_upgrpo.megatron import groups
from moe_upgrpo.rollout.base import Rollout


def advantages_of(
    rewards_B: np.ndarray, rollouts: Sequence[Rollout], *, group: int, kind: str
) -> np.ndarray:
    """`[B]` float32, of this data-parallel rank's responses. A collective."""
    given = {"lengths": torch.tensor([int(one.sampled_or_all.sum()) for one in rollouts])}
    rewards = torch.from_numpy(rewards_B)
    sums = advantage_sums(rewards, group, kind, **given)
    if sums is not None:
        given["batch_sums"] = torch.tensor(groups.summed(sums.tolist()), dtype=torch.float64)
    return group_advantages(rewards, group, kind, **given).numpy()
