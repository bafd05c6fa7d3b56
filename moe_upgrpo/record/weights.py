# SPDX-License-Identifier: Apache-2.0
"""Whether an update changed the weights, by one number for each of a model's tensors."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from moe_upgrpo.losses import Metric


@torch.no_grad()
def fingerprint(modules: Iterable[nn.Module]) -> list[float]:
    """The sum of each parameter's elements, in float64: equal before and after only if nothing
    moved, except for changes that cancel to the last bit.

    Parameters of which this rank holds nothing are left out; the others may be on several devices.
    """
    held = [p.detach() for module in modules for p in module.parameters() if p.numel()]
    sums = [torch.sum(p, dtype=torch.float64) for p in held]
    # To one device, so that the numbers are copied at once.
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def changed(before: Sequence[float], after: Sequence[float]) -> Metric:
    """The number of parameter tensors that changed, over the number of all."""
    return Metric(sum(a != b for a, b in zip(before, after, strict=True)), len(after))
