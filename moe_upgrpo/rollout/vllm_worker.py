# SPDX-License-Identifier: Apache-2.0
"""How a worker of a vLLM server takes weights, with a digest of what it took.

`vllm_plugin.register` makes these functions methods of vLLM's workers, in the server's processes;
the trainer calls them by their names, through the server's /collective_rpc. A worker reads one
tensor at a time, and vLLM lays it down in the model's own memory layer by layer.
"""

from __future__ import annotations

from typing import Any

from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.rollout.digest import Digest
from moe_upgrpo.rollout.weight_group import received


def take_files(worker: Any, weights_path: str) -> str:
    """Load the weights of a folder; the digest of the tensors that were read."""
    digest = Digest()
    with Weights(weights_path) as weights:
        worker.reload_weights(weights_iterator=digest.through(weights.tensors()))
    return digest.value()


def take_stream(
    worker: Any, *, address: str, port: int, name: str, ranks: int, timeout: float
) -> str:
    """Load the weights that the trainer sends (`weight_group.send`); the digest of the tensors."""
    digest = Digest()
    sent = received(
        worker.rank + 1, address=address, port=port, name=name, ranks=ranks, timeout=timeout
    )
    worker.reload_weights(weights_iterator=digest.through(sent))
    return digest.value()


METHODS = (take_files, take_stream)
