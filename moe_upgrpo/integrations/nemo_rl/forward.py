# SPDX-License-Identifier: Apache-2.0
"""Choices of the routers of a NeMo-RL worker in one of its forwards, by row of its batch.

NeMo-RL hands micro-batches to `megatron_forward_backward`; between two of them the routers' watch
is emptied, and the rows are assigned to their sequences: in padded batches, in sequences packed one
after the other, and in sequences whose tokens context-parallel ranks share. The last are cut in the
same way by NeMo-RL and by models that slice their inputs themselves (Transformer Engine's
`thd_get_partitioned_indices`, requested by data.py:446): each sequence into 2 × ranks pieces, of
which rank r has pieces r and 2 × ranks − 1 − r.

Shapes: S tokens of a sequence, N rows of a micro-batch on this rank, L MoE layers, X as in the kit.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from megatron.core import parallel_state
from nemo_rl.distributed.model_utils import allgather_cp_sharded_tensor

from moe_upgrpo.integrations.kit import routers

FORWARD = "megatron_forward_backward"
ROW = "moe_upgrpo_row"  # of each sequence in a worker's batch; travels with the micro-batches


class Recorder:
    """Records the routers of one model chunk."""

    def __init__(self, model, get_logprobs: Callable, sequence_parallel: bool):
        """get_logprobs: the worker's own, in whose globals `FORWARD` is looked up."""
        self.names = names_of(get_logprobs, FORWARD)
        self.sequence_parallel = sequence_parallel
        self.routers = routers.counted(model)

    def recorded(
        self, forward: Callable[[], Any], own: bool = False
    ) -> tuple[Any, dict[int, routers.Layers]]:
        """Return `forward`'s result, and the record for each row and layer of this rank.

        own: what the routers would choose without replay, else what they chose.
        """
        found: dict[int, routers.Layers] = defaultdict(dict)
        run = self.names[FORWARD]
        watched_routers = routers.watched_under_replay if own else routers.watched
        before: list[Any] = []  # the micro-batch that the watch has just seen

        with watched_routers(self.routers) as watch:

            def take():
                for batch in before:
                    self._take(batch, *watch.take(), found)
                before.clear()

            def one_by_one(batches):
                for batch in batches:
                    take()
                    before.append(batch)
                    yield batch

            @functools.wraps(run)
            def watched(*args, data_iterator, **kwargs):
                result = run(*args, data_iterator=one_by_one(data_iterator), **kwargs)
                take()
                return result

            with _replaced(self.names, FORWARD, watched):
                output = forward()
        return output, found

    def _take(self, batch, numbers: list[int], table_NLX, found: dict) -> None:
        if not numbers:  # a stage without MoE layers
            return
        table_NLX = routers.whole_sequence_parallel(table_NLX, self.sequence_parallel)
        data = batch.data_dict
        lengths = data["input_lengths"].tolist()
        if batch.cu_seqlens_padded is None:
            of_rows = table_NLX.unflatten(0, (-1, len(lengths))).unbind(dim=1)
        else:
            size = parallel_state.get_context_parallel_world_size()
            starts = (batch.cu_seqlens_padded // size).tolist()
            of_rows = [table_NLX[a:b] for a, b in pairwise(starts)]
            if size > 1:
                group = parallel_state.get_context_parallel_group()
                of_rows = [
                    allgather_cp_sharded_tensor(x.contiguous(), group, seq_dim=0) for x in of_rows
                ]
        for row, length, table_SLX in zip(data[ROW].tolist(), lengths, of_rows, strict=True):
            found[row].update(routers.by_layer(numbers, table_SLX[:length]))


def names_of(function: Callable, name: str) -> dict[str, Any] | None:
    """The globals of `function`, or of one that it wraps, that have `name`.

    Not the module's globals: Ray pickles an actor's methods by value, with globals of their own.
    """
    if name in function.__globals__:
        return function.__globals__
    inside = [cell.cell_contents for cell in function.__closure__ or ()]
    found = (names_of(f, name) for f in inside if hasattr(f, "__globals__"))
    return next((names for names in found if names is not None), None)


@contextmanager
def _replaced(names: dict[str, Any], name: str, value: Any):
    original = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = original
