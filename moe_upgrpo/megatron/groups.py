# SPDX-License-Identifier: Apache-2.0
"""The process groups of a layout, and the device of this rank."""

from __future__ import annotations

import datetime
import itertools
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from moe_upgrpo import ending
from moe_upgrpo.errors import MachineFault, PeerLost, UserError
from moe_upgrpo.losses import Metric
from moe_upgrpo.megatron import backend
from moe_upgrpo.megatron.heartbeat import Heartbeat
from moe_upgrpo.megatron.layout import Layout

_ALIGNED = 64  # bytes
_SENT = 1 << 26  # bytes of a file at once


def device() -> torch.device:
    """The device of this rank: its GPU where the machine has CUDA, else the CPU."""
    if backend.has_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def process_groups(
    layout: Layout, *, seed: int = 0, timeout_s: float = 1800, deterministic: bool = False
) -> Iterator[None]:
    """Start torch.distributed (where it is not running) and Megatron's groups; end both on leaving.

    Expects the environment of torchrun; a single process needs none. The backend of
    `moe_upgrpo.megatron.backend` is applied inside. This process ends when a rank is silent for
    `timeout_s`, or a collective takes that long. Errors of the transport become PeerLost, which
    names the lost rank where that can be seen. deterministic: see `backend.deterministic`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layout.check_world(world_size)
    if backend.has_cuda():
        if device().index >= torch.cuda.device_count():
            raise UserError(
                f"Rank {rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}"
                ". Start as many ranks as GPUs (torchrun --nproc-per-node, or NPROC with bash)."
            )
        torch.cuda.set_device(device())
    with backend.deterministic() if deterministic else nullcontext(), backend.apply():
        dist.init_process_group(
            "nccl" if backend.has_cuda() else "gloo",
            store=dist.HashStore() if world_size == 1 else None,  # else torchrun's, by env://
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        heartbeat = Heartbeat(rank, world_size, limit_s=timeout_s, on_silence=_end_for_silence)
        if world_size > 1:
            heartbeat.start()
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.expert_tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                distributed_timeout_minutes=timeout_s / 60,
            )
            if backend.has_cuda():
                tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield
        except BaseException as error:
            # With other ranks the groups stay up until this one has said why it ends: if they were
            # closed, the others would report a lost connection first.
            if world_size == 1:
                _end_groups()
            elif lost := heartbeat.explain(error):
                raise PeerLost(f"{lost}. {ending.how_to_resume()}") from error
            raise
        heartbeat.stop()
        _end_groups()


def _end_for_silence(who: str) -> None:
    ending.fail(f"{who}. {ending.how_to_resume()}", MachineFault.status)


def _end_groups() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def data_parallel() -> tuple[int, int]:
    """This rank's index among the data-parallel ranks, and how many there are."""
    group = parallel_state.get_data_parallel_group()
    return group.rank(), group.size()


def model_parallel() -> tuple[int, int]:
    """This rank's index among the ranks that compute one copy of the model, and how many there are:
    pipeline stages, tensor- and context-parallel ranks."""
    group = parallel_state.get_model_parallel_group()
    context = parallel_state.get_context_parallel_group()
    return context.rank() * group.size() + group.rank(), context.size() * group.size()


def gather_in_model_copy(items: list) -> list:
    """The items of all ranks of one copy of the model, in their order, on each of them."""
    of_part = _gather(items, parallel_state.get_model_parallel_group())
    return _gather(of_part, parallel_state.get_context_parallel_group())


def gather_over_pipeline(items: list) -> list:
    """The items of all pipeline stages of one copy, in their order, on each of them."""
    return _gather(items, parallel_state.get_pipeline_model_parallel_group())


def gather_over_data_parallel(items: list) -> list:
    """Concatenate the data-parallel ranks' items, in their order, on each of them."""
    return _gather(items, parallel_state.get_data_parallel_group())


def exchange_over_data_parallel(parts: Sequence[list]) -> list[list]:
    """The lists that all data-parallel ranks have for this one; `parts` has one for each rank."""
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return list(parts)
    mine = group.rank()
    # The part that stays on this rank is not copied.
    sent = [[] if r == mine else _pickled(part) for r, part in enumerate(parts)]
    sizes = [_size(buffers) for buffers in sent]
    coming = torch.empty(len(sizes), dtype=torch.int64, device=device())
    dist.all_to_all_single(coming, torch.tensor(sizes, device=device()), group=group)
    out_B = np.empty(sum(sizes), np.uint8)
    for buffers, start in zip(sent, itertools.accumulate(sizes, initial=0), strict=False):
        _lay_out(buffers, out_B[start:])
    received_B = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device())
    out = torch.from_numpy(out_B).to(device())
    dist.all_to_all_single(received_B, out, coming.tolist(), sizes, group=group)
    pieces = received_B.cpu().split(coming.tolist())
    return [
        parts[r] if r == mine else _unpacked(piece_B.numpy()) for r, piece_B in enumerate(pieces)
    ]


def gather_everywhere(items: list) -> list:
    """The items of all ranks, in rank order, on each of them."""
    return _gather(items, dist.group.WORLD)


def _gather(items: list, group: dist.ProcessGroup) -> list:
    """As `all_gather_object`, but arrays travel as they lie in memory, and are not copied again.

    A received array is a view of everything that its rank sent.
    """
    if group.size() == 1:
        return list(items)
    buffers = _pickled(items)
    longest = torch.tensor(_size(buffers), device=device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    flat_B = np.zeros(int(longest), np.uint8)
    _lay_out(buffers, flat_B)
    mine_B = torch.from_numpy(flat_B).to(device())
    shares = [torch.empty_like(mine_B) for _ in range(group.size())]
    dist.all_gather(shares, mine_B, group=group)
    return [item for share_B in shares for item in _unpacked(share_B.cpu().numpy())]


def _pickled(items: list) -> list[np.ndarray]:
    """Buffers for `_lay_out`: their sizes, the pickle, and the arrays as they lie in memory.

    The sizes begin with their number.
    """
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(items, protocol=5, buffer_callback=arrays.append)
    parts = [np.frombuffer(part, np.uint8) for part in (pickled, *(a.raw() for a in arrays))]
    sizes = np.array([len(parts), *map(len, parts)], np.int64)
    return [sizes.view(np.uint8), *parts]


def _lay_out(buffers: Sequence[np.ndarray], flat_B: np.ndarray) -> None:
    """Write the buffers of `_pickled` into `_size` bytes, for `_unpacked`."""
    for offset, buffer in zip(_offsets(map(len, buffers)), buffers, strict=False):
        flat_B[offset : offset + len(buffer)] = buffer


def _unpacked(flat_B: np.ndarray) -> list:
    """The items of `_pickled`; arrays are views of the bytes."""
    count = int(flat_B[:8].view(np.int64)[0])
    sizes = flat_B[8 : 8 + 8 * count].view(np.int64).tolist()
    places = zip(_offsets([8 * (1 + count), *sizes])[1:], sizes, strict=False)
    pickled, *buffers = (flat_B[offset : offset + size] for offset, size in places)
    return pickle.loads(pickled, buffers=buffers)


def _size(buffers: Sequence[np.ndarray]) -> int:
    return _offsets(map(len, buffers))[-1]


def _offsets(lengths: Iterable[int]) -> list[int]:
    """The places where parts of these lengths begin, and where the last one ends."""
    aligned = (-(-length // _ALIGNED) * _ALIGNED for length in lengths)
    return list(itertools.accumulate(aligned, initial=0))


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def send_to_rank_0(files: Sequence[tuple[str, Path]]) -> None:
    """Send files, each with a name for it; rank 0 takes them by `received_from` this rank."""
    told = [[(name, file.stat().st_size) for name, file in files]]
    dist.send_object_list(told, dst=0, device=device())
    for _, path in files:
        with path.open("rb") as file:
            while some := file.read(_SENT):
                dist.send(torch.from_numpy(np.frombuffer(some, np.uint8).copy()).to(device()), 0)


def received_from(source: int) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Name and parts of each file that a rank sends to rank 0; all parts are to be taken."""
    told: list = [None]
    dist.recv_object_list(told, src=source, device=device())
    for name, size in told[0]:
        yield name, _parts_from(source, size)


def _parts_from(source: int, size: int) -> Iterator[bytes]:
    for start in range(0, size, _SENT):
        part_B = torch.empty(min(_SENT, size - start), dtype=torch.uint8, device=device())
        dist.recv(part_B, source)
        yield part_B.cpu().numpy().tobytes()


def largest_everywhere(number: int) -> int:
    """The largest of all ranks' numbers. A collective of all ranks."""
    largest = torch.tensor(number, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def summed_everywhere(values: Sequence[float]) -> list[float]:
    """Each value's sum over all ranks. A collective of all, with as many values on each."""
    return _reduced(values, dist.ReduceOp.SUM, dist.group.WORLD)


def sum_metrics(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Numerators and denominators summed over the data-parallel ranks; all pass the same names."""
    flat = _over_data_parallel([x for pair in metrics.values() for x in pair], dist.ReduceOp.SUM)
    return {
        name: Metric(*pair)
        for name, pair in zip(metrics, zip(flat[::2], flat[1::2], strict=True), strict=True)
    }


def summed(values: Sequence[float]) -> list[float]:
    """Each value's sum over the data-parallel ranks."""
    return _over_data_parallel(list(values), dist.ReduceOp.SUM)


def largest(values: dict[str, float]) -> dict[str, float]:
    """The largest of each value over the data-parallel ranks; all pass the same names."""
    flat = _over_data_parallel(list(values.values()), dist.ReduceOp.MAX)
    return dict(zip(values, flat, strict=True))


def _over_data_parallel(values: Sequence, op: dist.ReduceOp) -> list[float]:
    return _reduced(values, op, parallel_state.get_data_parallel_group())


def _reduced(values: Sequence, op: dist.ReduceOp, group: dist.ProcessGroup) -> list[float]:
    tensor = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=op, group=group)
    return tensor.tolist()
