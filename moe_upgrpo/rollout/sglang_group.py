# SPDX-License-Identifier: Apache-2.0
"""The broadcasts by which a trainer hands weights to an SGLang server."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from moe_upgrpo.errors import MachineFault, UserError

Call = Callable[[str, dict], Any]  # POST a body to a path of the server; UserError if refused


class WeightGroup:
    """The process group of `transfer="distributed"`: rank 0 here, the server's ranks after it.

    It is not registered with torch.distributed, so that the trainer's groups need not know of it;
    the names in the store are those of SGLang's `init_custom_process_group` (utils/common.py:2859).
    """

    def __init__(self, call: Call, host: str, server_ranks: int, *, cuda: bool, timeout: float):
        self._call, self._name = call, uuid.uuid4().hex
        limit = timedelta(seconds=timeout)
        # The address of this machine as the server's machine sees it.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((host, 9))
            address = route.getsockname()[0]
        store = torch.distributed.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=limit
        )
        joined = _Asked(
            call,
            "/init_weights_update_group",
            {
                "master_address": address,
                "master_port": store.port,
                "rank_offset": 1,
                "world_size": 1 + server_ranks,
                "group_name": self._name,
                "backend": "nccl" if cuda else "gloo",
            },
        )
        for prefix in (self._name, f"{self._name}/", "cuda/" if cuda else "cpu/"):
            store = torch.distributed.PrefixStore(prefix, store)
        try:
            if cuda:
                options = torch.distributed.ProcessGroupNCCL.Options()
                options._timeout = limit
                group = torch.distributed.ProcessGroupNCCL(store, 0, 1 + server_ranks, options)
            else:
                group = torch.distributed.ProcessGroupGloo(store, 0, 1 + server_ranks, limit)
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
        try:
            works = [self._group.broadcast(tensor, 0) for tensor in tensors]
            # Where the server refuses it never joins in: its answer ends the waiting.
            while not all(work.is_completed() for work in works):
                asked.check()
                time.sleep(0.001)
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise MachineFault(f"Broadcasting the weights to SGLang failed: {error}") from error
        asked.wait()

    def close(self) -> None:
        """Leave the group, also on the server where that still answers."""
        with suppress(UserError):
            self._call("/destroy_weights_update_group", {"group_name": self._name})
        self._group = None


class _Asked:
    """A request that is answered while this side does its part."""

    def __init__(self, call: Call, path: str, body: dict):
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._ask, args=(call, path, body), daemon=True)
        self._thread.start()

    def _ask(self, call: Call, path: str, body: dict) -> None:
        try:
            call(path, body)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise the request's error, if it has ended with one."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        self._thread.join()
        self.check()
