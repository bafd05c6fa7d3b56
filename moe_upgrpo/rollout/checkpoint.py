"""What an engine takes as weights: the tensors of the checkpoint that it started from."""

from collections.abc import Mapping

import torch

from moe_upgrpo.errors import UserError

DTYPES = (torch.bfloat16, torch.float32)


def check_weights(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], *, held: int
) -> None:
    """Raise UserError unless `state` has the names and shapes `expected`, in bf16 or fp32.

    `held` is the weight version that stays in use.
    """
    wrong = [f"{name} is missing" for name in expected if name not in state]
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            wrong.append(f"{name} is unexpected")
        elif shape != expected[name]:
            wrong.append(f"{name} has shape {shape}, not {expected[name]}")
        elif tensor.dtype not in DTYPES:
            wrong.append(f"{name} is {tensor.dtype}, not bfloat16 or float32")
    if wrong:
        more = f"; and {len(wrong) - 5} more faults" if len(wrong) > 5 else ""
        raise UserError(
            f"Weights refused: {'; '.join(wrong[:5])}{more}. The names and shapes of the "
            f"checkpoint that the engine started from are needed; version {held} stays in use."
        )
