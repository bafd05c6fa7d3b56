# SPDX-License-Identifier: Apache-2.0
"""The record of a step: sequences as rollout and trainer saw them, and the figures made from them.

It alone makes token rows, a step's sums and its alarms, for this package's trainer and for the
stacks of `moe_upgrpo.integrations`. Arrays are handed in: it knows no Megatron, engine or file.
"""

from typing import TYPE_CHECKING

from moe_upgrpo.lazy import exports

if TYPE_CHECKING:
    from moe_upgrpo.record.gap import gap_terms
    from moe_upgrpo.record.sequence import SequenceRecord, known_rows
    from moe_upgrpo.record.step import StepRecord
    from moe_upgrpo.record.sums import Sums, count_sums, finish, measured, routing_sums

# Lazy, as options hold the alarms' limits and a command's help needs no torch.
__getattr__ = exports(
    __name__,
    {
        "gap": ("gap_terms",),
        "sequence": ("SequenceRecord", "known_rows"),
        "step": ("StepRecord",),
        "sums": ("Sums", "count_sums", "finish", "measured", "routing_sums"),
    },
)

__all__ = [
    "SequenceRecord",
    "StepRecord",
    "Sums",
    "count_sums",
    "finish",
    "gap_terms",
    "known_rows",
    "measured",
    "routing_sums",
]
