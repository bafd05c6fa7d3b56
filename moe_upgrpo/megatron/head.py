# SPDX-License-Identifier: Apache-2.0
"""The end of the model: log-probs and entropy of tokens instead of logits.

B sequences, S tokens, s = S / tp of this rank under sequence parallelism, H hidden size, V token
ids, v = vocabulary / tp of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
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
    squares: bool = False  # Σ p² of each row
    hidden: bool = False  # what the output layer takes, after the last norm


# What `MegatronActor.score` records of the head where it is named: a field of `Scored` each.
HEAD_RECORDS = ("sum_pi_squared", "hidden")


class ScoringModel(GPTModel):
    """GPTModel whose output is [B, S, x] in fp32: the quantities that the call `wanted`.

    Log-probs, with gradient; entropy, with a gradient where it is asked for; Σ p²; the H values of
    the last hidden state. A stage that is not the last one returns its hidden states, as GPTModel
    does.
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

    @torch.no_grad()
    def head_rows(self, ids_V: torch.Tensor) -> torch.Tensor | None:
        """Gather these ids' rows `[V, H]` of the output layer's weight, in fp32.

        None on a stage that is not the last one. A collective of the tensor-parallel ranks.
        """
        if not self.post_process:
            return None
        weight_vH = self.output_layer.weight
        if weight_vH is None:  # that of the embedding, on this stage
            weight_vH = self.shared_embedding_or_output_weight()
        group, v = self.output_layer.tp_group, len(weight_vH)
        local_V = ids_V.to(weight_vH.device) - group.rank() * v
        mine_V1 = ((local_V >= 0) & (local_V < v))[:, None]
        rows_VH = weight_vH[local_V.clamp(0, v - 1)].float().where(mine_V1, 0)
        if group.size() > 1:
            dist.all_reduce(rows_VH, group=group)  # one summand of each is not 0
        return rows_VH


class _Head(ColumnParallelLinear):
    """Megatron's output layer, with its parameter and in its place, but without making logits."""

    wanted: Wanted | None = None

    def forward(self, input_, weight=None, runtime_gather_output=None):
        """[S, B, x], which GPTModel takes for logits, and no bias."""
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
            squares=wanted.squares,
        )
        parts_SB = [part.view(hidden_SBH.shape[:2]) for part in found if part is not None]
        output_SBx = torch.stack(parts_SB, dim=-1)
        if wanted.hidden:
            output_SBx = torch.cat([output_SBx, hidden_SBH.detach().float()], dim=-1)
        return output_SBx, None
