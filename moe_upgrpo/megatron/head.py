# SPDX-License-Identifier: Apache-2.0
"""The end of the model: log-probs and entropy of tokens instead of logits.

B sequences, S tokens, s = S / tp of this rank under sequence parallelism, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.logprobs import log_probs_and_entropy


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Quantities to compute for a micro-batch."""

    targets_BS: torch.Tensor
    mask_BS: torch.Tensor  # the rows to compute; the others are 0
    temperature: float
    entropy: bool
    entropy_gradient: bool = False


class ScoringModel(GPTModel):
    """GPTModel whose output is [B, S, 1 or 2] in fp32: the quantities that the call `wanted`.

    Log-probs, with gradient, and entropy, with a gradient where it is asked for. A stage that is
    not the last one returns its hidden states, as GPTModel does.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.post_process:
            return
        if type(self.output_layer) is not ColumnParallelLinear:
            raise UserError(
                f"The model's output layer is a {type(self.output_layer).__name__}: log-probs are "
                "computed from the weight of a ColumnParallelLinear. Leave the output layer in the "
                "model's own precision."
            )
        self.output_layer.__class__ = _Head  # GPTModel names the class itself (gpt_model.py:241)

    def forward(self, *args, wanted: Wanted, **kwargs):
        if not self.post_process:
            return super().forward(*args, **kwargs)
        self.output_layer.wanted = wanted
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.output_layer.wanted = None


class _Head(ColumnParallelLinear):
    """Megatron's output layer, with its parameter and in its place, but without making logits."""

    wanted: Wanted | None = None

    def forward(self, input_, weight=None, runtime_gather_output=None):
        """[S, B, 1 or 2], which GPTModel takes for logits, and no bias."""
        wanted = self.wanted
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        found = log_probs_and_entropy(
            hidden_SBH.flatten(0, 1),
            self.weight if weight is None else weight,
            wanted.targets_BS.t().flatten(),
            wanted.mask_BS.t().flatten(),
            temperature=wanted.temperature,
            group=self.tp_group,
            entropy=wanted.entropy,
            entropy_gradient=wanted.entropy_gradient,
        )
        parts_SB = [part.view(hidden_SBH.shape[:2]) for part in found if part is not None]
        return torch.stack(parts_SB, dim=-1), None
