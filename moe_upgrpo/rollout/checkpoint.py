"""What engines read of a checkpoint folder, and what they take as new weights."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig

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


def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint folder, read from the files' headers."""
    shapes = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (the file is no dict)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    if not shapes:
        raise UserError(f"{model_dir} holds no *.safetensors; a Hugging Face checkpoint is needed.")
    return shapes


def moe_layers(names: Iterable[str], layers: int) -> tuple[int, ...]:
    """The layers whose checkpoint tensors belong to routed experts, `...layers.<i>...experts...`.

    Those behind the model's `layers` (multi-token prediction) are not among them.
    """
    found = {int(m[1]) for m in (re.search(r"\.(\d+)\..*\bexperts\.", n) for n in names) if m}
    return tuple(sorted(layer for layer in found if layer < layers))


def eos_ids(model_dir: str | Path, config) -> list[int]:
    """The tokens that end a sequence; UserError where the checkpoint names none."""
    try:
        ids = GenerationConfig.from_pretrained(model_dir).eos_token_id
    except OSError:  # no such file
        ids = config.eos_token_id
    if ids is None:
        raise UserError(f"{model_dir} names no eos_token_id; set it in generation_config.json.")
    return [ids] if isinstance(ids, int) else list(ids)
