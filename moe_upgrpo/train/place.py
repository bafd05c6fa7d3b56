# SPDX-License-Identifier: Apache-2.0
"""A rank's place in the job, its share of the common work, and its random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_upgrpo.megatron import groups

# Purposes of streams of random numbers; the step and the rank complete a stream's seed.
SAMPLING, SHUFFLING, EVALUATION, GLOBAL, VERDICTS, DRAWS, CONTINUING = range(7)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A rank among all, among the data-parallel ones and among those of one copy of the model."""

    rank: int = 0
    size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    copy_rank: int = 0
    copy_size: int = 1

    @classmethod
    def here(cls) -> Place:
        """This process's place; the process groups must be up."""
        dp_rank, dp_size = groups.data_parallel()
        copy_rank, copy_size = groups.model_parallel()
        return cls(
            rank=groups.rank(),
            size=groups.world_size(),
            dp_rank=dp_rank,
            dp_size=dp_size,
            copy_rank=copy_rank,
            copy_size=copy_size,
        )

    def of_copy(self, everyone: Sequence) -> list:
        """The items for this rank's copy of the model; they divide evenly."""
        return _share(everyone, self.dp_rank, self.dp_size)

    def of_rank(self, of_copy: Sequence) -> list:
        """This rank's part of the items of its copy of the model; they divide evenly."""
        return _share(of_copy, self.copy_rank, self.copy_size)


def _share(items: Sequence, rank: int, size: int) -> list:
    each = len(items) // size
    return list(items[rank * each : (rank + 1) * each])


def seed_of(seed: int, purpose: int, step: int, which: int, refill: int = 0) -> int:
    """Make the seed of one rank's, or one problem's, draws in a step of a run with `seed`."""
    numbers = (seed, purpose, step, which, *([refill] if refill else []))
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_global_generators(seed: int, step: int, rank: int) -> None:
    """Seed the global generators, so that a resumed run draws the same from them."""
    drawn = seed_of(seed, GLOBAL, step, rank)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
