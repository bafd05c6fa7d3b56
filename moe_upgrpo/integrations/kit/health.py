# SPDX-License-Identifier: Apache-2.0
"""Health figures of a replay, with or without a routing log: was it applied, what did it change.

The routers of a model are watched permanently, by hooks that count on the device and never wait;
`Health.take` adds the counts up over all ranks, once for each step. They count only inside
`counting`, which a stack puts around its update. Figures: `routing.health`, docs/stacks.md.

Where a stack replays with a RouterReplay on `router.router_replay` (Megatron-Core's class, verl's,
NeMo-RL's change of the first), nothing more is needed; one that replaces the top-k itself (slime,
miles) calls `Health.replayed` from there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe_upgrpo.integrations.kit import routers
from moe_upgrpo.routing.health import FIGURES, count_rows, metrics_of

_WATCHES = "moe_upgrpo_health"


class Health:
    """Counts of a model's routers since the last `take`.

    model: its chunks on this rank. There is one object for each model, to be made after the stack
    has put its own changes into RouterReplay.
    """

    def __init__(self, model: Sequence[torch.nn.Module]):
        watched = [router for chunk in model for router in routers.counted(chunk)]
        self.num_layers = max([0, *(router.config.num_layers for router in watched)])
        self.counts: dict[int, Tensor] = {}  # layer number → [F]
        self.counts_now = False
        self._at: TopKRouter | None = None  # the router now running
        self._given: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._again = False  # it runs a second time, for its gradient
        for router in watched:
            router.register_forward_pre_hook(self._begin)
            router.register_forward_hook(self._end)
            if (replay := getattr(router, "router_replay", None)) is not None:
                setattr(replay, _WATCHES, self)
                _watch(type(replay))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count forward passes inside this context."""
        self.counts_now = True
        try:
            yield
        finally:
            self.counts_now = False

    def replayed(self, given_NK: Tensor, native_NK: Tensor, held_N: Tensor | None = None) -> None:
        """Count a running router that is held to these routes; arguments as in `count_rows`."""
        self._given = given_NK, native_NK, held_N

    def recomputed(self) -> None:
        """Skip a running router that was counted before: its activations are recomputed."""
        self._again = True

    @property
    def looks(self) -> bool:
        """Whether the running router is one that is counted."""
        return self.counts_now and self._at is not None

    def _begin(self, router: TopKRouter, *_) -> None:
        self._at, self._given, self._again = router, None, False

    def _end(self, router: TopKRouter, _, outputs) -> None:
        given, self._given, self._at = self._given, None, None
        if not self.counts_now or self._again or outputs[1] is None or _captures():
            return
        with torch.no_grad():
            counts_F = count_rows(outputs[1], *(given or ()))
            number = router.layer_number
            before = self.counts.get(number)
            self.counts[number] = counts_F if before is None else before + counts_F

    def take(self) -> dict[str, float]:
        """Metrics of all ranks and layers since the last call. A collective of all ranks.

        Where tensor-parallel ranks see the same rows, each counts them; the rates are unaffected.
        """
        counts, self.counts = self.counts, {}
        layers = torch.tensor([self.num_layers])
        device = next((of.device for of in counts.values()), _device())
        layers = _summed(layers.to(device), dist.ReduceOp.MAX)
        counts_LF = torch.zeros(int(layers), len(FIGURES), dtype=torch.int64, device=device)
        for number, of_layer in counts.items():
            counts_LF[number - 1] += of_layer
        counts_LF = _summed(counts_LF, dist.ReduceOp.SUM).cpu()
        ran = counts_LF[:, 0].nonzero()[:, 0]
        return metrics_of(counts_LF[ran], ran.tolist())


def _captures() -> bool:
    """Whether a CUDA graph is being captured: its later replays would not pass through here."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _device() -> torch.device:
    here = torch.cuda.is_available() and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu")


def _summed(values: Tensor, how: dist.ReduceOp) -> Tensor:
    """Sum over the stages and shards of a replica, then over the replicas and context shards.

    Not over all ranks of the job: where replicas are independent, one of them may be gone.
    """
    for group in (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    ):
        dist.all_reduce(values, how, group=group)
    return values


def _watch(replay_class: type) -> None:
    """Let the class show the routes it was given and those its router would have chosen; once."""
    get = replay_class.get_replay_topk
    if getattr(get, _WATCHES, False):
        return

    @functools.wraps(get)
    def get_replay_topk(
        self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None
    ):
        health = getattr(self, _WATCHES, None)
        if health is not None and health.looks:
            action = getattr(self.router_replay_action, "name", None)
            given = self.target_topk_idx
            if action == "REPLAY_BACKWARD":
                health.recomputed()
            elif action == "REPLAY_FORWARD" and given is not None:
                with torch.no_grad():
                    limits = dict(num_groups=num_groups, group_topk=group_topk)
                    _, native_NK = default_compute_topk(scores.detach(), topk, **limits)
                    held_N = getattr(self, "target_replay_mask", None)  # verl's
                    health.replayed(given.to(scores.device), native_NK, held_N)
        return get(self, scores, topk, num_groups, group_topk, default_compute_topk)

    setattr(get_replay_topk, _WATCHES, True)
    replay_class.get_replay_topk = get_replay_topk


def reports_here() -> bool:
    """Whether this rank's values reach a stack's trackers: it is the first shard and replica of the
    last stage."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and routers.first_of_stage()
        and parallel_state.get_data_parallel_rank() == 0
    )
