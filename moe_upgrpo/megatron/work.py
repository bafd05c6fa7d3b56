# SPDX-License-Identifier: Apache-2.0
"""The sequences of one call of the actor as micro-batches, and the way back of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.balance import (
    Cost,
    Limit,
    counted,
    equal_shares,
    packed_shares,
    saves,
    shares,
)
from moe_upgrpo.megatron.batch import Batch, Sample, make_batch
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.packing import Inputs, pack, padded

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moved:
    """Which sequences went from this data-parallel rank to which, and which came from where."""

    sent: list[list[int]]  # by the rank that computes them: indices into this rank's own samples
    came: list[list[int]]  # by the rank that owns them: indices into what this rank computes


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of this rank in one call, micro-batch after micro-batch."""

    samples: list[Sample]
    places: list[tuple[int, int]]  # of each sample: its micro-batch, and its row there
    batches: list[Batch]  # as many on every rank; some may be without a sample
    inputs: list[Inputs]  # of the model, for each of `batches`
    # Of each sample, where its first token stands in `inputs`: the row, and the place there.
    starts: list[tuple[int, int]]
    _moved: _Moved | None = field(default=None)

    def back(self, values: list[T]) -> list[T]:
        """Send one value of each of `samples` back; returns the values of the samples that this
        rank was given, in their order. A collective of the data-parallel ranks."""
        if self._moved is None:
            return values
        return _exchange(values, self._moved.came, self._moved.sent)


def make_work(
    samples: Sequence[Sample], limit: Limit, layout: Layout, cost: Cost, *, multiple_of: int
) -> Work:
    """Make micro-batches of this rank's samples; a collective of the data-parallel ranks.

    Limited by a number of sequences, they stay in their order and on their rank. Limited by tokens,
    they are shared out over the data-parallel ranks by cost; padded ones are sorted by length. By a
    number of the longest, they are so where it saves enough, and otherwise stay.
    """
    # With allgather, the data-parallel ranks that share experts exchange tensors of one shape; so
    # do pipeline stages, unless they tell each other the shapes first (`tells_shapes`).
    gathers = layout.ep > 1 and layout.dispatcher == "allgather"
    one_shape = gathers or (layout.pp > 1 and not tells_shapes(limit, layout))
    moved, shape, computed = None, (1, 1), list(samples)
    dealt = None
    # Of one shape all sequences cost as much as the longest: moving them saves nothing by itself.
    if limit.tokens is not None or (limit.longest and (limit.packed or not one_shape)):
        dealt = _by_tokens(samples, limit, cost, one_shape, multiple_of)
    if dealt is None:
        (of_rank,) = counted([len(computed)], limit.sequences)
        parts = [[computed[i] for i in batch] for batch in of_rank]
        if one_shape and not limit.packed:
            widest = {"B": len(parts[0]), "S": max(len(sample.tokens) for sample in computed)}
            if gathers:
                widest = groups.largest(widest)
            shape = int(widest["B"]), int(widest["S"])
    else:
        parts, moved, shape = dealt
        computed = [sample for part in parts for sample in part]
    places = [(m, b) for m, part in enumerate(parts) for b in range(len(part))]
    # Data-parallel ranks share the experts, so all have to run the same number of forwards.
    count = int(groups.largest({"micro-batches": len(parts)})["micro-batches"])
    if layout.vpp > 1:  # schedules.py:1007 interleaves groups of pp micro-batches
        count = -(-count // layout.pp) * layout.pp
    parts += [[]] * (count - len(parts))
    padding = {"shape": shape} if limit.packed else {"shape": shape, "multiple_of": multiple_of}
    batches = [make_batch(part, **padding).to(groups.device()) for part in parts]
    if limit.packed:
        inputs, starts = _packed(batches, parts, one_shape, multiple_of)
    else:
        inputs = [padded(batch) for batch in batches]
        starts = [(b, 0) for _, b in places]
    return Work(
        samples=computed,
        places=places,
        batches=batches,
        inputs=inputs,
        starts=starts,
        _moved=moved,
    )


def _packed(
    batches: Sequence[Batch], parts: Sequence[Sequence[Sample]], one_shape: bool, multiple_of: int
) -> tuple[list[Inputs], list[tuple[int, int]]]:
    """The inputs of each micro-batch, packed, and where each sequence starts in them."""
    lengths = [[len(sample.tokens) for sample in part] for part in parts]
    least = 1
    if one_shape:
        least = int(groups.largest({"tokens": max(map(sum, lengths))})["tokens"])
    inputs = [
        pack(batch, of_batch, multiple_of=multiple_of, least=least)
        for batch, of_batch in zip(batches, lengths, strict=True)
    ]
    ends = [accumulate([0, *of_batch[:-1]]) for of_batch in lengths if of_batch]
    return inputs, [(0, start) for of_batch in ends for start in of_batch]


def tells_shapes(limit: Limit, layout: Layout) -> bool:
    """Whether pipeline stages send the shape of each tensor before it, Megatron-Core's
    variable_seq_lengths.

    Not between interleaved stages, whose messages overlap, nor with allgather, which Megatron-Core
    refuses (transformer_config.py:1828).
    """
    varying = limit.tokens is not None or limit.longest is not None or limit.packed
    staged = layout.pp > 1 and layout.vpp == 1
    return varying and staged and layout.dispatcher != "allgather"


def _by_tokens(
    samples: Sequence[Sample],
    limit: Limit,
    cost: Cost,
    one_shape: bool,
    multiple_of: int,
) -> tuple[list[list[Sample]], _Moved, tuple[int, int]] | None:
    """The samples of each of this rank's micro-batches, where they came from, the least shape; None
    where it is not worth it to move them."""
    rank, ranks = groups.data_parallel()
    own = [len(sample.tokens) for sample in samples]
    of_ranks = groups.gather_over_data_parallel([own]) if ranks > 1 else [own]
    lengths = [length for given in of_ranks for length in given]
    limit.check(-(-max(lengths) // multiple_of) * multiple_of)
    budget = {"ranks": ranks, "tokens": limit.budget(multiple_of), "multiple_of": multiple_of}
    if limit.packed:
        dealt, shape = packed_shares(lengths, **budget, cost=cost), (1, 1)
    elif one_shape:
        dealt, shape = equal_shares(lengths, **budget)
    else:
        dealt, shape = shares(lengths, **budget, cost=cost), (1, 1)
    if limit.tokens is None:
        kept = counted(list(map(len, of_ranks)), limit.sequences)
        of_shapes = {"packed": limit.packed, "multiple_of": multiple_of}
        if not saves(lengths, dealt, kept, cost, **of_shapes):
            return None
    ends = list(accumulate(map(len, of_ranks)))
    given_to = [r for r, given in enumerate(of_ranks) for _ in given]
    first = ends[rank] - len(own)
    mine = [index for batch in dealt[rank] for index in batch]
    moved = _Moved(
        sent=[
            [i - first for batch in share for i in batch if given_to[i] == rank] for share in dealt
        ],
        came=[[n for n, i in enumerate(mine) if given_to[i] == r] for r in range(ranks)],
    )
    computed = iter(_exchange(samples, moved.sent, moved.came))
    return [[next(computed) for _ in batch] for batch in dealt[rank]], moved, shape


def _exchange(values: Sequence[T], sent: list[list[int]], came: list[list[int]]) -> list[T]:
    """The values that come to this rank, each at the index that `came` has for its sender."""
    parts = groups.exchange_over_data_parallel([[values[i] for i in of_rank] for of_rank in sent])
    found: list = [None] * sum(map(len, came))
    for indices, part in zip(came, parts, strict=True):
        for index, value in zip(indices, part, strict=True):
            found[index] = value
    return found


def check_samples(samples: Sequence[Sample], moe_layers: int, top_k: int) -> None:
    """Raise UserError where there is nothing to compute, or routes do not fit the model."""
    if not samples:
        raise UserError("No samples for the actor on this rank: nothing to compute.")
    for sample in samples:
        expected = (len(sample.tokens) - 1, moe_layers, top_k)
        if sample.routes is not None and sample.routes.shape != expected:
            raise UserError(
                f"Routes of shape {sample.routes.shape} to replay in a sequence of "
                f"{len(sample.tokens)} tokens: this model takes {expected} (tokens − 1, MoE "
                "layers, experts per token)."
            )
