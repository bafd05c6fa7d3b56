# SPDX-License-Identifier: Apache-2.0
"""Sequences of mixed lengths shared out to data-parallel ranks and micro-batches. No Megatron.

The shares depend on the lengths alone: every rank computes the same ones, and so does a resumed
run.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.families import family, head_dim, moe_layers, top_k

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What one more micro-batch on each rank, or moving sequences away from the rank that has them, has
# to save: a share of the busiest rank's work, as kernels get smaller, and the work of so many
# tokens, as starting them takes time. With the tiny model one CPU core computes some hundred tokens
# in the time that a micro-batch takes without any.
_WORTH = 0.02
_START = 512
_MORE = 4  # numbers of micro-batches that are compared, from the least one up


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The most that one micro-batch may hold: a number of sequences, or of tokens with padding.

    longest: the longest sequence, where the budget is what `sequences` of that length take. Their
    order and ranks then change only where that saves enough (`saves`).
    packed: the sequences are not padded to the longest (`moe_upgrpo.megatron.packing`).
    """

    sequences: int
    tokens: int | None = None
    longest: int | None = None
    packed: bool = False

    def budget(self, multiple_of: int) -> int | None:
        """Tokens that one micro-batch may hold, lengths padded to that multiple; None: no limit."""
        if self.tokens is None and self.longest is not None:
            return self.sequences * -(-self.longest // multiple_of) * multiple_of
        return self.tokens

    def rows(self, length: int) -> int:
        """Sequences of that length that one micro-batch may hold."""
        return self.sequences if self.tokens is None else max(1, self.tokens // length)

    def check(self, length: int) -> None:
        """Raise UserError where a sequence of that padded length is more than the budget."""
        if self.tokens is not None and length > self.tokens:
            raise UserError(
                f"micro_batch_tokens={self.tokens}: a sequence may have {length} tokens, prompt, "
                "response and padding together, and each is computed whole. Give "
                f"--micro-batch-tokens {length} or more, shorten the prompts or max_new_tokens, or "
                "count sequences instead (--micro-batch)."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Work of a model on a sequence, in multiplications a layer."""

    linear: float = 1.0
    quadratic: float = 0.0

    def __call__(self, tokens: int) -> float:
        """`tokens · linear + tokens² · quadratic`: weights see each token, attention each pair."""
        return tokens * self.linear + tokens**2 * self.quadratic

    @classmethod
    def of(cls, hf: PretrainedConfig) -> Cost:
        """Make the cost of a model; close enough with latent attention and shared experts too.

        linear: q, k, v and output projections, the chosen experts or the MLP with their gates, the
        head's share. quadratic: scores and weighted values, halved by the causal mask.
        """
        h, layers, sparse = hf.hidden_size, hf.num_hidden_layers, len(moe_layers(hf))
        queries = hf.num_attention_heads * head_dim(hf)
        both = queries + hf.num_key_value_heads * head_dim(hf)
        inner = (layers - sparse) * hf.intermediate_size
        if sparse:
            inner += sparse * top_k(hf) * getattr(hf, family(hf).expert_size)
        return cls(
            linear=h * (2 * both + (3 * inner + hf.vocab_size) / layers), quadratic=float(queries)
        )


Share = list[list[int]]  # of one rank: the sequences of each of its micro-batches


def shares(
    lengths: Sequence[int], *, ranks: int, tokens: int, multiple_of: int = 1, cost: Cost
) -> list[Share]:
    """Micro-batches of at most `tokens` tokens each (rows × longest) for each of `ranks` ranks.

    Sorted by length, the sequences are cut into pieces of like cost, which are dealt out so that
    the ranks' costs are close. Each rank's pieces are in falling order of cost: ranks that share
    experts wait for each other in every micro-batch, and the first takes the most memory. Numbers
    of micro-batches may differ between ranks. lengths: of the sequences of all ranks; each is
    padded to a multiple of `multiple_of`, and none is above `tokens`.
    """
    padded = [-(-length // multiple_of) * multiple_of for length in lengths]
    order = sorted(range(len(padded)), key=lambda i: (-padded[i], i))
    falling = [padded[i] for i in order]
    least = -(-len(_pieces(falling, tokens, cost, float("inf"))) // ranks)
    best, best_value = None, float("inf")
    for more in range(_MORE):
        cuts = _even(falling, tokens, cost, ranks * (least + more))
        costs = [(end - start) * cost(falling[start]) for start, end in cuts]
        dealt = _deal(costs, [1] * len(cuts), ranks, least + more)
        busiest = max(sum(costs[i] for i in of_rank) for of_rank in dealt)
        value = busiest + more * _worth(busiest, cost)
        if value < best_value:
            best, best_value = [[cuts[i] for i in of_rank] for of_rank in dealt], value
    return [[order[i:j] for i, j in of_rank] for of_rank in best]


def packed_shares(
    lengths: Sequence[int], *, ranks: int, tokens: int, multiple_of: int = 1, cost: Cost
) -> list[Share]:
    """`shares` of packed micro-batches, which hold any sequences of `tokens` tokens together.

    All micro-batches are of like cost, and each rank has as few as it can: micro-batches that share
    experts or follow each other through pipeline stages wait for the slowest.
    """
    room, costs = tokens - tokens % multiple_of, [cost(length) for length in lengths]
    each = -(-sum(lengths) // (ranks * room))
    while (batches := _deal(costs, lengths, ranks * each, room)) is None:
        each += 1
    batches = [batch for batch in batches if batch]
    of_batches = [sum(costs[i] for i in batch) for batch in batches]
    dealt = _deal(of_batches, [1] * len(batches), ranks, each)
    return [[batches[b] for b in of_rank] for of_rank in dealt]


def equal_shares(
    lengths: Sequence[int], *, ranks: int, tokens: int, multiple_of: int = 1
) -> tuple[list[Share], tuple[int, int]]:
    """`shares` where all micro-batches have one shape; returns the shape too: (rows, length).

    Every sequence costs as much as the longest, and the ranks get about equal numbers of them.
    """
    length = -(-max(lengths) // multiple_of) * multiple_of
    most = max(1, tokens // length)
    each = -(-len(lengths) // ranks)  # sequences of a rank
    rows = -(-each // -(-each // most))  # the last micro-batch is no emptier than it must be
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    dealt = [order[r::ranks] for r in range(ranks)]
    return [[d[i : i + rows] for i in range(0, len(d), rows)] for d in dealt], (rows, length)


def counted(of_ranks: Sequence[int], sequences: int) -> list[Share]:
    """Micro-batches of at most `sequences` sequences, in the order given, each on its own rank.

    of_ranks: the number of sequences that each rank was given.
    """
    ends = list(accumulate(of_ranks))
    return [
        [[*range(i, min(i + sequences, end))] for i in range(end - count, end, sequences)]
        for end, count in zip(ends, of_ranks, strict=True)
    ]


def saves(
    lengths: Sequence[int],
    moved: Sequence[Share],
    kept: Sequence[Share],
    cost: Cost,
    *,
    packed: bool = False,
    multiple_of: int = 1,
) -> bool:
    """Whether the shares `moved` save more of the busiest rank's time than their moving takes.

    Moving is taken to cost as much as one more micro-batch.
    """
    padded = [-(-length // multiple_of) * multiple_of for length in lengths]

    def time_of(of_ranks: Sequence[Share], more: int) -> float:
        busiest = _busiest(padded, of_ranks, cost, packed)
        return busiest + (max(map(len, of_ranks)) + more) * _worth(busiest, cost)

    return time_of(moved, 1) < time_of(kept, 0)


def useful_share(
    lengths: Sequence[int], of_ranks: Sequence[Share], cost: Cost, *, packed: bool = False
) -> float:
    """Share of the ranks' time that goes into sequences, and not into padding or waiting.

    The sequences' cost over (number of ranks · cost of the slowest rank, padded unless `packed`).
    """
    slowest = _busiest(lengths, of_ranks, cost, packed)
    return sum(map(cost, lengths)) / (len(of_ranks) * slowest)


def _busiest(lengths: Sequence[int], of_ranks: Sequence[Share], cost: Cost, packed: bool) -> float:
    """Cost of the slowest rank, padded unless `packed`."""

    def cost_of(batch: list[int]) -> float:
        if packed:
            return sum(cost(lengths[i]) for i in batch)
        return len(batch) * cost(max(lengths[i] for i in batch))

    return max(sum(cost_of(batch) for batch in share if batch) for share in of_ranks)


def _worth(busiest: float, cost: Cost) -> float:
    """The least that one more micro-batch on each rank has to save."""
    return max(_WORTH * busiest, _START * cost.linear)


def _pieces(falling: list[int], tokens: int, cost: Cost, most: float) -> list[tuple[int, int]]:
    """Cuts of the sorted lengths, each as long as the budget and a cost of `most` allow."""
    cuts, start = [], 0
    while start < len(falling):
        length = falling[start]  # the longest of the piece
        rows = max(1, int(min(tokens // length, most / cost(length))))
        cuts.append((start, min(start + rows, len(falling))))
        start += rows
    return cuts


def _even(falling: list[int], tokens: int, cost: Cost, count: int) -> list[tuple[int, int]]:
    """Cut the sorted lengths into at most `count` parts, the costliest within .2% of the least."""
    low = max(cost(falling[0]), sum(map(cost, falling)) / count)
    high = low
    while len(cuts := _pieces(falling, tokens, cost, high)) > count:
        low, high = high, 2 * high
    while high > 1.002 * low:
        middle = (low + high) / 2
        tried = _pieces(falling, tokens, cost, middle)
        if len(tried) <= count:
            cuts, high = tried, middle
        else:
            low = middle
    return cuts


def _deal(
    costs: Sequence[float], sizes: Sequence[int], places: int, room: int
) -> list[list[int]] | None:
    """Deal out indices, the costliest first, each to the place with the least cost so far that has
    room for its size; None where there is no room for one."""
    dealt: list[list[int]] = [[] for _ in range(places)]
    left = [room] * places
    by_load = [(0.0, place) for place in range(places)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        too_full = []
        while by_load and left[by_load[0][1]] < sizes[index]:
            too_full.append(heapq.heappop(by_load))
        if not by_load:
            return None
        load, place = heapq.heappop(by_load)
        dealt[place].append(index)
        left[place] -= sizes[index]
        for one in (*too_full, (load + costs[index], place)):
            heapq.heappush(by_load, one)
    return dealt
