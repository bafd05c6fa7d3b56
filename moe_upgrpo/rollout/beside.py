# SPDX-License-Identifier: Apache-2.0
"""New weights for an engine that is still sampling, and the ranks that share its servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moe_upgrpo.errors import as_user_error
from moe_upgrpo.rollout.base import Engine

Weights = Iterable[tuple[str, torch.Tensor]]


def hand_over(engine: Engine, named_tensors: Weights, *, version: int) -> Callable[[], None]:
    """Read the weights to their end now; the function returned puts them into use.

    That function may be called later, in another thread, while the trainer computes and changes
    the tensors. An engine with a method `take_weights` of this kind is asked; for any other the
    weights are copied to the host's memory and given to `update_weights`.
    """
    if take := getattr(engine, "take_weights", None):
        return take(named_tensors, version=version)
    return later(engine, named_tensors, version, whole=True)


def later(engine: Engine, named_tensors: Weights, version: int, *, whole: bool) -> Callable:
    """`engine.update_weights`, with a copy of the weights; whole: False keeps their shapes alone,
    on ranks of which a shared server needs no more."""
    kept = {
        name: tensor.detach().to("cpu", copy=True) if whole else tensor.detach().to("meta")
        for name, tensor in named_tensors
    }
    return partial(engine.update_weights, kept.items(), version=version)


class SharingRanks:
    """The ranks that share servers, all of torch.distributed; making it is a collective of them.

    They have a process group of their own, so that a thread may update the servers while the
    trainer uses the other groups. limit_s: how long a rank may wait in it for another.
    """

    def __init__(self, limit_s: float):
        self.rank, self._count = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        limit = timedelta(seconds=limit_s)
        alone = self._count == 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=limit)

    @property
    def first(self) -> bool:
        """Whether this rank speaks to the servers about weights."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait until every rank has come here."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def from_first(self, action: Callable[[], Any]) -> Any:
        """Give every rank the result of `action` on rank 0; where it raises there, all do."""
        told = [None, None]
        if self.first:
            try:
                told[0] = action()
            except Exception as error:
                told[1] = as_user_error(error)
        if self._group is not None:
            dist.broadcast_object_list(told, src=0, group=self._group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def gathered(self, mine: Any) -> list[Any]:
        """Gather what each rank has, in their order."""
        found = [mine] * self._count
        if self._group is not None:
            dist.all_gather_object(found, mine, group=self._group)
        return found
