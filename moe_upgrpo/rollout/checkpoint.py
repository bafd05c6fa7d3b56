# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders for engines, and checks of their new weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import eos_ids, is_tied, read_config
from moe_upgrpo.hugging_face.export import make_view, needs_view
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.rollout.weights_folder import WeightsFolder

DTYPES = (torch.bfloat16, torch.float32)


def faults_of(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The faults in the names, shapes and types of some of the weights, in words."""
    wrong = []
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            wrong.append(f"{name} is unexpected")
        elif shape != expected[name]:
            wrong.append(f"{name} has shape {shape}, not {expected[name]}")
        elif tensor.dtype not in DTYPES:
            wrong.append(f"{name} is {tensor.dtype}, not bfloat16 or float32")
    return wrong


def check_weights(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], *, held: int | None
) -> None:
    """Raise UserError unless `state` has the names and shapes `expected`, in bf16 or fp32.

    `held` is the weight version that stays in use; None where others were replaced already.
    """
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += faults_of(state, expected)
    if wrong:
        more = f"; and {len(wrong) - 5} more faults" if len(wrong) > 5 else ""
        now = f"version {held} stays in use" if held is not None else "nothing is sampled till then"
        raise UserError(
            f"Weights refused: {'; '.join(wrong[:5])}{more}. The names and shapes of the "
            f"checkpoint that the engine started from are needed; {now}."
        )


def moe_layers(names: Iterable[str], layers: int) -> tuple[int, ...]:
    """The layers whose checkpoint tensors belong to routed experts, `...layers.<i>...experts...`.

    Layers after the model's `layers` (multi-token prediction) are not among them.
    """
    found = {int(m[1]) for m in (re.search(r"\.(\d+)\..*\bexperts\.", n) for n in names) if m}
    return tuple(sorted(layer for layer in found if layer < layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """The facts about a model folder that an engine needs before it starts.

    `view` is the folder for an engine that reads every *.safetensors file in it: the folder itself,
    or one with links to the model's own files, which lives as long as this object.
    """

    config: PretrainedConfig  # of the language model
    shapes: dict[str, tuple[int, ...]]  # of every tensor
    eos_ids: list[int]
    moe_layer_ids: tuple[int, ...]
    view: Path
    links: WeightsFolder | None

    @classmethod
    def read(cls, model_dir: str | Path, view_in: str | Path | None = None) -> ModelFolder:
        """Read a folder; refusals: `moe_upgrpo.hugging_face`. view_in: where a view may be made."""
        hf = read_config(model_dir)
        config, links = hf.get_text_config(), None
        with Weights(model_dir, tied=is_tied(hf)) as weights:
            shapes, view = weights.shapes(), weights.folder.absolute()
            if needs_view(weights):
                links = WeightsFolder("moe_upgrpo-model-", view_in)
                view = Path(links.name)
                make_view(weights, view)
        return cls(
            config=config,
            shapes=shapes,
            eos_ids=eos_ids(model_dir, hf),
            moe_layer_ids=moe_layers(shapes, config.num_hidden_layers),
            view=view,
            links=links,
        )
