# SPDX-License-Identifier: Apache-2.0
"""The broadcasts by which a trainer hands weights to the processes of a server.

A group of a server has the trainer as its rank 0 and the server's processes after it. It is not
registered with torch.distributed, so that the trainer's own groups need not know of it.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from moe_upgrpo.errors import MachineFault, UserError

Call = Callable[[str, dict], Any]  # POST a body to a path of the server; UserError if refused
ALIGNED = 16  # bytes: where a tensor of a part may begin
ANSWER_S = 2.0  # for the answer of a request whose broadcast has failed
ABORTED = -1  # in the place of a part's size

Part = list[tuple[str, torch.Tensor]]


class Meeting:
    """The store where a server's processes meet the trainer, which hosts it.

    host: the server's. The names in the store are those of SGLang's `init_custom_process_group`
    (utils/common.py:2859).
    """

    def __init__(self, host: str, *, timeout: float):
        self.name, self._limit = uuid.uuid4().hex, timedelta(seconds=timeout)
        # The address of this machine as the server's machine sees it.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((host, 9))
            self.address = route.getsockname()[0]
        self._store = torch.distributed.TCPStore(
            self.address, 0, is_master=True, wait_for_workers=False, timeout=self._limit
        )
        self.port = self._store.port

    def group(self, size: int, *, cuda: bool = False) -> torch.distributed.ProcessGroup:
        """Enter the group of the trainer and `size - 1` processes, once all are there."""
        store = _prefixed(self._store, self.name, "cuda" if cuda else "cpu")
        if cuda:
            options = torch.distributed.ProcessGroupNCCL.Options()
            options._timeout = self._limit
            return torch.distributed.ProcessGroupNCCL(store, 0, size, options)
        return torch.distributed.ProcessGroupGloo(store, 0, size, self._limit)


def _prefixed(store: torch.distributed.Store, name: str, device: str):
    for prefix in (name, f"{name}/", f"{device}/"):
        store = torch.distributed.PrefixStore(prefix, store)
    return store


class WeightGroup:
    """The group of an SGLang server, `transfer="distributed"`."""

    def __init__(self, call: Call, host: str, server_ranks: int, *, cuda: bool, timeout: float):
        meeting = Meeting(host, timeout=timeout)
        self._call, self._name = call, meeting.name
        joined = _Asked(
            call,
            "/init_weights_update_group",
            {
                "master_address": meeting.address,
                "master_port": meeting.port,
                "rank_offset": 1,
                "world_size": 1 + server_ranks,
                "group_name": self._name,
                "backend": "nccl" if cuda else "gloo",
            },
        )
        try:
            group = meeting.group(1 + server_ranks, cuda=cuda)
        except RuntimeError as error:
            joined.check()
            raise MachineFault(f"SGLang did not join the group for its weights: {error}") from error
        joined.wait()
        self._group = group

    def broadcast(self, part: list[tuple[str, torch.Tensor]], about: dict) -> None:
        """Send the tensors of `part`; `about` goes with the request to take them."""
        names, tensors = zip(*part, strict=True)
        asked = _Asked(
            self._call,
            "/update_weights_from_distributed",
            about
            | {
                "group_name": self._name,
                "names": names,
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            },
        )
        tensors = [tensor.contiguous() for tensor in tensors]  # held until they are sent
        _broadcast(self._group, tensors, asked, "SGLang")
        asked.wait()

    def close(self) -> None:
        """Leave the group, also on the server where that still answers."""
        with suppress(UserError):
            self._call("/destroy_weights_update_group", {"group_name": self._name})
        self._group = None


def _broadcast(group: Any, tensors: Sequence[torch.Tensor], asked: _Asked, server: str) -> None:
    """Send tensors to all others of a group, unless the request that they serve ends before."""
    try:
        works = [group.broadcast(tensor, 0) for tensor in tensors]
        # Where the server refuses it never joins in: its answer ends the waiting.
        while not all(work.is_completed() for work in works):
            asked.check()
            time.sleep(0.001)
        for work in works:
            work.wait()
    except RuntimeError as error:
        asked.check(within=ANSWER_S)  # it says more
        said = str(error).partition(". This is typically")[0]
        raise MachineFault(f"Broadcasting the weights to {server} failed: {said}") from error


def send(
    parts: Iterable[Part],
    ask: Callable[[dict], Any],
    host: str,
    ranks: int,
    *,
    server: str,
    timeout: float,
) -> Any:
    """Send parts of weights by gloo to `ranks` processes, which run `received`: what `ask` returns.

    ask: makes the server's processes enter the group, by the request whose arguments it gets, and
    returns when they have taken all. A part's tensors travel as one, in the host's memory.
    """
    meeting = Meeting(host, timeout=timeout)
    where = {"address": meeting.address, "port": meeting.port, "name": meeting.name, "ranks": ranks}
    asked = _Asked(lambda _, body: ask(body), "", where)
    try:
        group = meeting.group(1 + ranks)
    except RuntimeError as error:
        asked.check()
        raise MachineFault(
            f"{server} did not join the group for its weights within {timeout:g} s: {error}"
        ) from error
    whole = False
    try:
        for part in parts:
            about, flat_B = _packed(part)
            _broadcast(group, [torch.tensor([len(about)]), about, flat_B], asked, server)
        whole = True
    finally:
        with suppress(UserError, RuntimeError):  # of a server that is gone
            last = torch.tensor([0 if whole else ABORTED])
            _broadcast(group, [last], asked, server)
    return asked.wait()


def _packed(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Names, types, shapes and places of a part's tensors as JSON, and their bytes as one."""
    about, size = [], 0
    for name, tensor in part:
        about.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size])
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    flat_B = torch.zeros(size, dtype=torch.uint8)
    for (_, tensor), (_, _, _, start) in zip(part, about, strict=True):
        flat_B[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8).cpu()
    said = json.dumps({"size": size, "tensors": about}).encode()
    return torch.frombuffer(bytearray(said), dtype=torch.uint8), flat_B


def received(
    rank: int, *, address: str, port: int, name: str, ranks: int, timeout: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `send` sends, in a process of the server: `rank` 1 ... `ranks`.

    They are views of a part's bytes. Raises where the trainer falls silent or breaks off.
    """
    limit = timedelta(seconds=timeout)
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=limit)
    group = torch.distributed.ProcessGroupGloo(
        _prefixed(store, name, "cpu"), rank, 1 + ranks, limit
    )

    def take(tensor: torch.Tensor) -> torch.Tensor:
        group.broadcast(tensor, 0).wait()
        return tensor

    while length := int(take(torch.empty(1, dtype=torch.int64))):
        if length == ABORTED:
            raise RuntimeError("The trainer broke off the update of the weights.")
        said = json.loads(bytes(take(torch.empty(length, dtype=torch.uint8)).tolist()))
        flat_B = take(torch.empty(said["size"], dtype=torch.uint8))
        for tensor_name, kind, shape, start in said["tensors"]:
            dtype = getattr(torch, kind)
            end = start + math.prod(shape) * dtype.itemsize
            yield tensor_name, flat_B[start:end].view(dtype).view(shape)


class _Asked:
    """A request that is answered while this side does its part."""

    def __init__(self, call: Call, path: str, body: dict):
        self._error: Exception | None = None
        self._answer: Any = None
        self._thread = threading.Thread(target=self._ask, args=(call, path, body), daemon=True)
        self._thread.start()

    def _ask(self, call: Call, path: str, body: dict) -> None:
        try:
            self._answer = call(path, body)
        except Exception as error:
            self._error = error

    def check(self, within: float = 0.0) -> None:
        """Raise the request's error, if it has ended with one, or does within that many seconds."""
        self._thread.join(within)
        if self._error is not None:
            raise self._error

    def wait(self) -> Any:
        """The answer, when it is there."""
        self._thread.join()
        self.check()
        return self._answer
