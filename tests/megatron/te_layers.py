"""The weights of models with Transformer Engine's layers: their names, shapes and marks.

`te_layers.json` has them as its own modules made them (benchmarks/micro/te_layers.py wrote it, with
the versions in it). From it `stand_in` makes models that have these weights and compute nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.transformer.moe.router import TopKRouter

from moe_upgrpo.megatron import weights
from moe_upgrpo.megatron.layout import Layout

TABLE = Path(__file__).with_name("te_layers.json")
# One rank, and ranks that hold parts of weights and of the experts.
LAYOUTS = {"one rank": Layout(), "TP2·EP2": Layout(tp=2, ep=2), "TP2": Layout(tp=2)}
MODELS = {  # layouts of each checkpoint of conftest.py
    "tiny": ("one rank", "TP2·EP2"),
    "mixed": ("one rank", "TP2·EP2"),
    "dense": ("one rank", "TP2"),
    "mixtral": ("one rank", "TP2·EP2"),
    "deepseek": ("one rank", "TP2·EP2"),
    "moonlight": ("one rank", "TP2·EP2"),
}
# What Megatron-Core reads of a weight: who holds parts of it (the gradient norm), who sums its
# gradient (sequence-parallel ranks; of experts, the ranks with the same experts).
MARKS = {"tensor_model_parallel": False, "sequence_parallel": False, "allreduce": True}
_LAYER, _EXPERT = re.compile(r"(?<=^decoder\.layers\.)\d+"), re.compile(r"(?<=\.weight)\d+$")


@dataclass(frozen=True)
class Row:
    """One weight of every layer that has it, and of each of this rank's experts."""

    name: str  # with {layer} and {expert}
    shape: tuple[int, ...]
    marks: dict[str, bool]
    layers: tuple[int, ...] = (0,)  # of the model
    experts: int = 0  # none: it is no expert's

    def names(self, numbers: dict[int, int]) -> list[str]:
        """Its names in a stage whose layers are the keys of `numbers`; their own numbers there."""
        if "{layer}" not in self.name:
            return [self.name]
        return [
            self.name.format(layer=numbers[layer], expert=expert)
            for layer in self.layers
            if layer in numbers
            for expert in range(max(1, self.experts))
        ]


def marks(parameter: torch.nn.Parameter) -> dict[str, bool]:
    return {name: bool(getattr(parameter, name, default)) for name, default in MARKS.items()}


def rows(chunk: torch.nn.Module) -> list[Row]:
    """The weights of a model of one pipeline stage."""
    found: dict[str, Row] = {}
    layers: dict[str, set[int]] = {}
    experts: dict[str, set[int]] = {}
    for name, parameter in chunk.named_parameters():
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        pattern = _EXPERT.sub("{expert}", _LAYER.sub("{layer}", name))
        row = Row(pattern, tuple(parameter.shape), marks(parameter))
        assert found.setdefault(pattern, row) == row, f"{name} is not as in other layers"
        layers.setdefault(pattern, set()).add(int(layer[0]) if layer else 0)
        if expert:
            experts.setdefault(pattern, set()).add(int(expert[0]))
    table = [
        Row(name, row.shape, row.marks, tuple(sorted(layers[name])), len(experts.get(name, ())))
        for name, row in found.items()
    ]
    numbers = {layer.layer_number - 1: i for i, layer in enumerate(chunk.decoder.layers)}
    written_out = {name for row in table for name in row.names(numbers)}
    assert written_out == set(dict(chunk.named_parameters()))
    return table


def read() -> dict[str, list[Row]]:
    """The rows of each "checkpoint, layout"."""
    models = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    return {
        name: [
            Row(**(row | {"shape": tuple(row["shape"]), "layers": tuple(row["layers"])}))
            for row in table
        ]
        for name, table in models.items()
    }


def write(models: dict[str, list[Row]], about: dict) -> None:
    lines = [f'  "{name}": {json.dumps(said, ensure_ascii=False)},' for name, said in about.items()]
    tables = []
    for name, table in models.items():
        inner = ",\n".join(f"      {json.dumps(asdict(row))}" for row in table)
        tables.append(f'    "{name}": [\n{inner}\n    ]')
    lines += ['  "models": {', ",\n".join(tables), "  }"]
    TABLE.write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")


def stand_in(chunk: torch.nn.Module, table: list[Row]) -> torch.nn.Module:
    """A stage of a model of local layers with the weights of the rows in the place of its own.

    Its routers stay: they are Megatron's own with either layers.
    """
    dtype = next(chunk.parameters()).dtype
    for module in list(chunk.modules()):
        if not isinstance(module, TopKRouter):
            for name in [n for n, p in module._parameters.items() if p is not None]:
                del module._parameters[name]
    routers = dict(chunk.named_parameters())
    numbers = {layer.layer_number - 1: i for i, layer in enumerate(chunk.decoder.layers)}
    for row in table:
        if not chunk.pre_process and row.name.startswith("embedding."):
            continue
        if not chunk.post_process and row.name in (
            "decoder.final_layernorm.weight",
            "output_layer.weight",
        ):
            continue
        for name in row.names(numbers):
            if name in routers:
                assert tuple(routers[name].shape) == row.shape
                continue
            *path, leaf = name.split(".")
            module = chunk
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            weight = torch.nn.Parameter(torch.full(row.shape, torch.nan, dtype=dtype))
            module.register_parameter(leaf, weight)
            for mark, value in row.marks.items():
                setattr(weight, mark, value)
    return chunk


def differences(chunk: torch.nn.Module, ours: torch.nn.Module, hf) -> list[str]:
    """Weights of a model that are not as in one of local layers, once marked by the table."""
    for one in (chunk, ours):
        weights.mark_split_weights([one], hf)
    theirs, local = weights._parameters([chunk]), weights._parameters([ours])
    found = [f"{name} has no counterpart" for name in sorted(theirs.keys() ^ local.keys())]
    for name in sorted(theirs.keys() & local.keys()):
        if theirs[name].shape != local[name].shape:
            found.append(f"{name}: {tuple(theirs[name].shape)}, not {tuple(local[name].shape)}")
        if isinstance(theirs[name], torch.nn.Parameter) and marks(theirs[name]) != marks(
            local[name]
        ):
            found.append(f"{name}: {marks(theirs[name])}, not {marks(local[name])}")
    return found
