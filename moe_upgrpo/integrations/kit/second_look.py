# SPDX-License-Identifier: Apache-2.0
"""A second evaluation of a stack's policy loss, on detached log-probs.

Its gradient says which tokens the loss's own rule cut, whatever the loss is, and how much each of
the others weighs; the stack's own backward pass is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_upgrpo.losses import Metric


@dataclass(frozen=True)
class SecondLook:
    """loss: the value. pulls: ∂loss/∂log-prob, in the shapes of the log-probs.

    metrics: the loss library's, if the loss is one of its own; else empty.
    """

    loss: Tensor
    pulls: list[Tensor]
    metrics: dict[str, Metric]


def second_look(
    evaluate: Callable[[list[Tensor]], tuple[Tensor, dict]], log_probs: Sequence[Tensor]
) -> SecondLook:
    """Evaluate a loss on leaves with the values of `log_probs`.

    evaluate: leaves → the loss and the library's metrics. A loss that draws random numbers draws
    the same ones when it is called for the training step.
    """
    leaves = [x.detach().requires_grad_() for x in log_probs]
    with torch.enable_grad(), torch.random.fork_rng():
        loss, metrics = evaluate(leaves)
        # Not autograd.grad(loss, leaves): a context-parallel rank without tokens of a sequence
        # would leave out its part in the backward of a gather, and the others would wait.
        loss.backward()
    return SecondLook(
        loss=loss.detach(),
        pulls=[torch.zeros_like(x) if x.grad is None else x.grad for x in leaves],
        metrics={name: Metric(*map(float, pair)) for name, pair in metrics.items()},
    )


def clipped_tokens(pull, advantage, mask):
    """Tokens that have an advantage and no gradient, as tensors or arrays of one shape."""
    return (pull == 0) & (advantage != 0) & mask
