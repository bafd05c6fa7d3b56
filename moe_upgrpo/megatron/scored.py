# SPDX-License-Identifier: Apache-2.0
"""One sequence as the trainer sees it, taken from the results of its micro-batch.

P prompt and T response tokens, N of which count, L MoE layers, K experts each, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.work import Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One sequence as the trainer sees it, without gradient.

    L = K = 0 for a dense model and where routes were not asked for. Row p is the input at position
    p, whose output is the distribution of the token at p + 1.
    """

    log_probs: np.ndarray  # [T] float32, under the sampling temperature
    entropy: np.ndarray  # [T] float32, nats
    routes: np.ndarray  # [P+T-1, L, K] uint8 or int16: the experts used, ascending in each row
    own_routes: (
        np.ndarray
    )  # the router's own top-k in this forward; `routes` where none is replayed
    # [P+T-1, L] float32, s_(K) − s_(K+1) of the scores that the router's own top-k was taken over
    # (with the selection bias, where there is one); inf where K = E. None where not asked for.
    margins: np.ndarray | None = None
    # [P+T-1, L, K] float32: the final routing weight of each expert in `routes`, in its order.
    gates: np.ndarray | None = None
    sum_pi_squared: np.ndarray | None = None  # [T] float32: Σ π² over the vocabulary
    # [N, H] in the model's number type: what the output layer takes at each token that counts. On
    # one rank of each copy of the model alone, see `holds_hidden`; None on the others.
    hidden: torch.Tensor | None = None


def scored_of(
    work: Work,
    outputs: Sequence[tuple[np.ndarray, ...]],
    traces: Sequence[dict[str, np.ndarray]],
    record: Collection[str],
    *,
    moe: bool,
    hidden: Sequence[Sequence[torch.Tensor]] = (),
) -> list[Scored]:
    """Each sequence's part of the outputs and of the records of micro-batches.

    outputs: log-probs, entropy and, where asked for, Σπ². moe: whether the model has experts;
    without them the traces are empty. hidden: [N, H] of each row of each micro-batch, where
    this rank holds them.
    """
    scored = []
    for sample, (m, b), start in zip(work.samples, work.places, work.starts, strict=True):
        arrays = (array[b][sample.response_rows] for array in outputs[m])
        named = dict(zip(("log_probs", "entropy", "sum_pi_squared"), arrays, strict=False))
        routing = _routing(traces[m], start, sample, record, moe)
        # A copy: a part of the micro-batch's would be kept, and sent, with the whole.
        kept = hidden[m][b].clone() if hidden else None
        scored.append(Scored(**named, **routing, hidden=kept))
    return scored


def _routing(
    trace: dict[str, np.ndarray],
    start: tuple[int, int],
    sample: Sample,
    record: Collection[str],
    moe: bool,
) -> dict[str, np.ndarray]:
    """One sequence's part of what was recorded of a micro-batch, as the fields of `Scored`."""
    (row, first), rows = start, len(sample.tokens) - 1
    found = {name: array[row, first : first + rows] for name, array in trace.items()}
    found.setdefault("routes", np.empty((rows, 0, 0), np.uint8))
    found.setdefault("own_routes", found["routes"])
    if not moe:
        empty = {"margins": (rows, 0), "gates": (rows, 0, 0)}
        found |= {n: np.empty(shape, np.float32) for n, shape in empty.items() if n in record}
    return found
