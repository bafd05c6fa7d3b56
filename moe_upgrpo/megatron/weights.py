# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weights in and out of a sharded Megatron model, by the table of the model's family.

Only concatenation and splitting happen on the way, so a round trip is exact to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face import export
from moe_upgrpo.hugging_face.config import is_tied
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.hugging_face.shards import ShardWriter
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.families import check_weights, family, moe_layers, num_experts
from moe_upgrpo.megatron.rules import Rule, Tensors

PART_BYTES = 2 << 30  # of a file of a checkpoint, and in the host's memory while it is written


@dataclass(frozen=True, slots=True)
class _Entry:
    """A parameter of one stage, or a row of its experts, with the names of all their parts."""

    rule: Rule
    parameters: list[str]  # one name, or one for each local expert
    names: list[list[str]]  # Hugging Face names: its own, or those of every expert of the model


def _entries(hf: PretrainedConfig) -> Iterator[_Entry]:
    """The table written out for one model, in the same order on every rank: layer by layer.

    Who takes weights one after the other holds no more than a layer that is not complete.
    """
    rules = family(hf).rules(hf)
    for layer in range(hf.num_hidden_layers):
        yield from _entries_of(layer, rules, hf)


def _entries_of(layer: int, rules: Sequence[Rule], hf: PretrainedConfig) -> Iterator[_Entry]:
    experts, moe = num_experts(hf), set(moe_layers(hf))
    experts_here = experts // parallel_state.get_expert_model_parallel_world_size()
    for rule in rules:
        if layer in rule.layers(hf.num_hidden_layers, moe):
            yield _Entry(
                rule,
                [
                    rule.megatron.format(layer=layer, expert=e)
                    for e in range(experts_here if rule.is_expert else 1)
                ],
                [
                    [name.format(layer=layer, expert=e) for name in rule.hugging_face]
                    for e in range(experts if rule.is_expert else 1)
                ],
            )


# Transformer Engine's layers have norms inside the linear layers that follow them, and all experts
# of a rank in one module. Names as found by benchmarks/micro/te_layers.py; see
# tests/megatron/test_te_layers.py.
_TE_NAMES = {
    r"self_attention\.linear_qkv\.layer_norm_weight": "input_layernorm.weight",
    r"mlp\.linear_fc1\.layer_norm_weight": "pre_mlp_layernorm.weight",
    r"linear_(q|kv)_up_proj\.layer_norm_weight": r"\1_layernorm.weight",
    r"mlp\.experts\.linear_fc(\d)\.weight(\d+)": (
        r"mlp.experts.local_experts.\2.linear_fc\1.weight"
    ),
}


def _local_name(name: str) -> str:
    for pattern, replacement in _TE_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """This rank's weights, under the names of the local layer spec, layers counted over the model.

    They include the routers' selection bias, which is fp32 in a model of any dtype.
    """
    found = {}
    for chunk in unwrap_model(list(chunks)):
        named = dict(chunk.named_parameters())
        for name, module in chunk.named_modules():
            if isinstance(module, TopKRouter) and module.expert_bias is not None:
                module.expert_bias.data = module.expert_bias.float()
                named[f"{name}.expert_bias"] = module.expert_bias
        for name, parameter in named.items():
            if name.startswith("decoder.layers."):
                *start, layer, rest = name.split(".", 3)
                number = chunk.decoder.layers[int(layer)].layer_number  # counts from 1
                name = ".".join([*start, str(number - 1), rest])
            found[_local_name(name)] = parameter
    return found


def _tied(entry: _Entry, hf: PretrainedConfig) -> bool:
    """Whether it is the embedding's second copy, which the last of several stages holds."""
    return hf.tie_word_embeddings and entry.rule.megatron == "output_layer.weight"


def load_weights(chunks: Sequence[torch.nn.Module], hf: PretrainedConfig, model_dir: Path) -> None:
    """Copy a Hugging Face checkpoint into this rank's part of the model; each rank reads its own.

    Raises UserError where a tensor is missing, unexpected or of another shape, and names it.
    """
    parameters = _parameters(chunks)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    etp_group = parallel_state.get_expert_tensor_parallel_group()
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    entries = list(_entries(hf))
    with Weights(model_dir, tied=is_tied(hf)) as checkpoint:
        check_weights(checkpoint, hf)
        for entry in entries:
            group = etp_group if entry.rule.is_expert else tp_group
            first_expert = ep_rank * len(entry.parameters) if entry.rule.is_expert else 0
            for i, name in enumerate(entry.parameters):
                if name not in parameters:  # of another pipeline stage
                    continue
                sources = entry.names[first_expert + i]
                if _tied(entry, hf):
                    sources = ["model.embed_tokens.weight"]
                tensors = [checkpoint.read(source) for source in sources]
                target = parameters.pop(name)
                try:
                    shard = entry.rule.form.shard(tensors, hf, group.rank(), group.size())
                    fits = shard.shape == target.shape
                except RuntimeError:  # the tensors do not even fit together
                    fits = False
                if not fits:
                    shapes = ", ".join(
                        f"{source} {tuple(t.shape)}"
                        for source, t in zip(sources, tensors, strict=True)
                    )
                    raise UserError(
                        f"{model_dir}: {shapes} does not fit the model that its config.json "
                        f"describes: this rank's part of it should be {tuple(target.shape)}. "
                        "Check that config.json and the weights are of the same model."
                    )
                with torch.no_grad():
                    target.copy_(shard)
    if parameters:
        raise RuntimeError(f"No rule of the table fills these parameters: {sorted(parameters)}")


def mark_split_weights(chunks: Sequence[torch.nn.Module], hf: PretrainedConfig) -> None:
    """Mark each weight by whether tensor-parallel ranks hold different parts of it, by the table.

    The gradient norm takes a weight without this mark for a copy and counts the first rank's only
    (tensor_parallel/layers.py:89). Modules mark their own weights, or forget to, as Transformer
    Engine's experts do before 0.19 (extensions/transformer_engine.py:1551): ranks hold different
    experts, and clipping would silently be too weak.
    """
    parameters = _parameters(chunks)
    for entry in _entries(hf):
        split = entry.rule.is_expert or entry.rule.form.axis is not None
        for name in entry.parameters:
            if name in parameters:
                parameters[name].tensor_model_parallel = split


def export_weights(
    chunks: Sequence[torch.nn.Module], hf: PretrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor) for every weight, on every rank, in the model's dtype.

    A collective: all ranks must run it to the end, in step.
    """
    parameters = _parameters(chunks)
    stages = _stages(parameters)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    for entry in _entries(hf):
        if _tied(entry, hf):
            continue
        form = entry.rule.form
        local = _from_stage(entry, parameters, stages)
        if not entry.rule.is_expert:
            shards = [local] if form.axis is None else _gather(local, tp_group)
            yield from zip(entry.names[0], form.join([s[0] for s in shards], hf), strict=True)
            continue
        ranks = _gather(local, expert_group)  # the expert tensor-parallel rank counts fastest
        for i, names in enumerate(entry.names):
            owner, j = divmod(i, len(entry.parameters))
            shards = [ranks[owner * etp + r][j] for r in range(etp)]
            yield from zip(names, form.join(shards, hf), strict=True)


def _stages(parameters: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Name -> (rank of the pipeline stage that holds it, shape, dtype), over all stages."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return dict(
        groups.gather_over_pipeline(
            [(name, (rank, p.shape, p.dtype)) for name, p in parameters.items()]
        )
    )


def _from_stage(entry: _Entry, parameters: dict, stages: dict[str, tuple]) -> torch.Tensor:
    """This rank's shards of an entry, stacked: [1 or its experts, ...], on every pipeline stage."""
    owner, shape, dtype = stages[entry.parameters[0]]
    group = parallel_state.get_pipeline_model_parallel_group()
    if owner == group.rank():
        local = torch.stack([parameters[name].detach() for name in entry.parameters])
    else:
        local = torch.empty(len(entry.parameters), *shape, dtype=dtype, device=groups.device())
    if group.size() > 1:
        dist.broadcast(local, group=group, group_src=owner)
    return local


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> Tensors:
    if group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def write_checkpoint(
    chunks: Sequence[torch.nn.Module],
    hf: PretrainedConfig,
    files: Mapping[str, bytes],
    output_dir: Path,
) -> None:
    """Write the model as a Hugging Face folder with `files` of its tokenizer. A collective.

    The folder appears whole or not at all, in the place of an older one.
    """
    weights = export_weights(chunks, hf)
    if dist.get_rank() == 0:
        with export.writing(Path(output_dir)) as folder:
            writer, dtype = ShardWriter(folder, PART_BYTES), None
            for name, tensor in weights:
                dtype = dtype or str(tensor.dtype).split(".")[-1]
                writer.add(name, tensor)
            writer.finish()
            export.write_beside(folder, hf, dtype, files)
    else:
        for _ in weights:
            pass
    dist.barrier()
