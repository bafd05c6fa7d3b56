# SPDX-License-Identifier: Apache-2.0
"""Layout of a micro-batch's tokens in a stack: context parallelism, packing, one length.

thd: sequences one after another; with several context-parallel ranks, each has two pieces of every
sequence, or with `--allgather-cp` one piece of the whole. bshd: padded to one length.

Shapes: N rows of a micro-batch on this rank, B sequences of S positions each.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_upgrpo.integrations.slime_miles.revisions import taken

KEYS = ["tokens", "loss_masks", "total_lengths", "response_lengths", "max_seq_lens"]


def is_padded(args: Namespace) -> bool:
    """Whether sequences are padded to one length: bshd. slime no longer has a flag for it."""
    return getattr(args, "qkv_format", "thd") != "thd"


def splits_the_whole(args: Namespace) -> bool:
    """Whether the context-parallel ranks split the sequences as one: `--allgather-cp`."""
    return args.context_parallel_size > 1 and bool(getattr(args, "allgather_cp", False))


def split_places(args: Namespace, batch: dict[str, Any]) -> list[tuple]:
    """Arguments of the stack's functions for context parallelism, for each sequence: its lengths
    and, if padded, also the common length."""
    places = list(zip(batch["total_lengths"], batch["response_lengths"], strict=True))
    if args.context_parallel_size == 1 or not is_padded(args):
        return places
    return [
        (*place, args.qkv_format, length)
        for place, length in zip(places, batch["max_seq_lens"], strict=True)
    ]


def reducer_of(function: Callable, args: Namespace, batch: dict[str, Any], **more: Any) -> Callable:
    """The stack's get_sum_of_sample_mean, with the arguments that the revision's takes.

    more: arguments that not every revision has.
    """
    more |= {
        "calculate_per_token_loss": args.calculate_per_token_loss,
        "qkv_format": getattr(args, "qkv_format", "thd"),
        "max_seq_lens": batch.get("max_seq_lens"),
    }
    lengths = batch["total_lengths"], batch["response_lengths"]
    return function(*lengths, batch["loss_masks"], **taken(function, **more))


def rows_of_routers(
    get_batch: Callable,
    args: Namespace,
    data_iterator: Sequence[Any],
    num_microbatches: Sequence[int],
    *,
    tensor_rank: int,
) -> list[Tensor]:
    """For each micro-batch `[N]`: the row of the routes for each row of this rank's routers,
    counted over all of the rank's sequences; -1 at padding and at a sequence's last token.

    The stack's get_batch lays out the row numbers, from 1, in place of the tokens.
    """
    layout = taken(
        get_batch,
        qkv_format=getattr(args, "qkv_format", "thd"),
        allgather_cp=bool(getattr(args, "allgather_cp", False)),
    )
    iterator, start, numbers = copy.copy(data_iterator[0]), 1, []
    for tokens in iterator.rollout_data["tokens"]:
        numbers.append(torch.arange(start, start + len(tokens), device=tokens.device))
        numbers[-1][-1] = 0  # as the stack pads
        start += len(tokens) - 1
    iterator.rollout_data = iterator.rollout_data | {"tokens": numbers}
    iterator.reset()
    rows = []
    for _ in range(sum(num_microbatches)):
        batch = get_batch(iterator, KEYS, args.data_pad_size_multiplier, **layout)
        rows_SB = batch["tokens"].t()  # Megatron's order: position by position
        if args.sequence_parallel:
            rows_SB = rows_SB.chunk(args.tensor_model_parallel_size)[tensor_rank]
        rows.append(rows_SB.reshape(-1) - 1)
    return rows
