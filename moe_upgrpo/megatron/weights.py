"""Hugging Face Qwen3 weights in and out of a sharded Megatron model: one mapping table.

Only concatenation and splitting happen on the way, so a round trip is exact to the bit.

Shapes: H hidden, D head dimension, G key/value heads, Q query heads per key/value head,
I intermediate size, V vocabulary, E experts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import moe_layers

Tensors = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """How Hugging Face tensors lie in one Megatron tensor and along which axis ranks share it.

    fuse: Hugging Face tensors -> one array with the shared axis at `axis` (None: not shared).
    split: its inverse. local_shape: what a rank's flat 2-d shard is viewed as before it is joined.
    """

    fuse: Callable[[Tensors, PretrainedConfig], torch.Tensor]
    split: Callable[[torch.Tensor, PretrainedConfig], Tensors]
    axis: int | None
    local_shape: Callable[[torch.Tensor, PretrainedConfig], tuple[int, ...]]

    def shard(self, tensors: Tensors, hf: PretrainedConfig, rank: int, size: int) -> torch.Tensor:
        full = self.fuse(tensors, hf)
        part = full if self.axis is None else full.chunk(size, dim=self.axis)[rank]
        return part.reshape(-1, part.shape[-1]) if part.dim() == 3 else part

    def join(self, shards: Tensors, hf: PretrainedConfig) -> Tensors:
        if self.axis is None:
            return self.split(shards[0], hf)
        parts = [shard.reshape(self.local_shape(shard, hf)) for shard in shards]
        return self.split(torch.cat(parts, dim=self.axis), hf)


def _fuse_qkv(qkv: Tensors, hf: PretrainedConfig) -> torch.Tensor:
    """Query, key and value rows [Q·D | D | D] of each key/value head together: [G, (Q+2)·D, H]."""
    return torch.cat([t.reshape(hf.num_key_value_heads, -1, t.shape[-1]) for t in qkv], dim=1)


def _split_qkv(full: torch.Tensor, hf: PretrainedConfig) -> Tensors:
    rows_q = hf.num_attention_heads // hf.num_key_value_heads * hf.head_dim
    parts = full.split([rows_q, hf.head_dim, hf.head_dim], dim=1)
    return [part.reshape(-1, part.shape[-1]) for part in parts]


def _same_shape(shard: torch.Tensor, hf: PretrainedConfig) -> tuple[int, ...]:
    return tuple(shard.shape)


def _one(axis: int | None) -> Form:
    return Form(lambda tensors, hf: tensors[0], lambda full, hf: [full], axis, _same_shape)


WHOLE, ROWS, COLUMNS = _one(None), _one(0), _one(1)
QKV = Form(
    _fuse_qkv,
    _split_qkv,
    0,
    lambda shard, hf: (
        -1,
        (hf.num_attention_heads // hf.num_key_value_heads + 2) * hf.head_dim,
        shard.shape[-1],
    ),
)
GATE_UP = Form(  # each rank holds its rows of the gate above its rows of the up projection
    lambda tensors, hf: torch.stack(tensors),  # [2, I, H]
    lambda full, hf: list(full),
    1,
    lambda shard, hf: (2, -1, shard.shape[-1]),
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table: a Megatron parameter, the Hugging Face tensors in it, and their form."""

    megatron: str
    hugging_face: tuple[str, ...]
    form: Form


_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
_EXPERT = _MLP + "experts.{expert}."

# {layer} counts the model's layers, {expert} the model's experts on the right and the rank's own on
# the left. A rule of mlp.{...} without experts is of the dense layers.
QWEN3: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS),
    Rule(
        "decoder.layers.{layer}.input_layernorm.weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        WHOLE,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        tuple(_ATTENTION + name for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")),
        QKV,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        (_ATTENTION + "q_norm.weight",),
        WHOLE,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        (_ATTENTION + "k_norm.weight",),
        WHOLE,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        (_ATTENTION + "o_proj.weight",),
        COLUMNS,
    ),
    Rule(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        WHOLE,
    ),
    Rule(
        "decoder.layers.{layer}.mlp.router.weight",
        ("model.layers.{layer}.mlp.gate.weight",),
        WHOLE,
    ),
    Rule(
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        GATE_UP,
    ),
    Rule(
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
        (_EXPERT + "down_proj.weight",),
        COLUMNS,
    ),
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
        GATE_UP,
    ),
    Rule("decoder.layers.{layer}.mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), COLUMNS),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
    Rule("output_layer.weight", ("lm_head.weight",), ROWS),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A parameter of one stage, or a row of its experts, with the names of all their parts."""

    rule: Rule
    parameters: list[str]  # one name, or one for each local expert
    names: list[list[str]]  # Hugging Face names: of it, or of every expert of the model

    @property
    def is_expert(self) -> bool:
        return "{expert}" in self.rule.megatron


def _entries(hf: PretrainedConfig) -> Iterator[_Entry]:
    """The table written out for one model, in the same order on every rank."""
    of_layers = set(range(hf.num_hidden_layers))
    of_experts = set(moe_layers(hf))
    experts = hf.num_experts if of_experts else 0
    experts_here = experts // parallel_state.get_expert_model_parallel_world_size()
    for rule in QWEN3:
        is_expert = "{expert}" in rule.megatron
        layers = of_layers if "{layer}" in rule.megatron else {0}
        if is_expert or ".mlp.router." in rule.megatron:
            layers = of_experts
        elif ".mlp." in rule.megatron:
            layers = of_layers - of_experts
        for layer in sorted(layers):
            yield _Entry(
                rule,
                [
                    rule.megatron.format(layer=layer, expert=e)
                    for e in range(experts_here if is_expert else 1)
                ],
                [
                    [name.format(layer=layer, expert=e) for name in rule.hugging_face]
                    for e in range(experts if is_expert else 1)
                ],
            )


def _parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters, their layers counted over the whole model as in the table."""
    found = {}
    for chunk in unwrap_model(list(chunks)):
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                *start, layer, rest = name.split(".", 3)
                number = chunk.decoder.layers[int(layer)].layer_number  # counts from 1
                name = ".".join([*start, str(number - 1), rest])
            found[name] = parameter
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
    with _Checkpoint(model_dir) as checkpoint:
        whole = [e for e in entries if not _tied(e, hf)]
        # Of a tied model's lm_head transformers takes no notice either.
        optional = {"lm_head.weight"} if hf.tie_word_embeddings else set()
        checkpoint.check_names({n for e in whole for names in e.names for n in names}, optional)
        for entry in entries:
            group = etp_group if entry.is_expert else tp_group
            first_expert = ep_rank * len(entry.parameters) if entry.is_expert else 0
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


class _Checkpoint:
    """The tensors of a Hugging Face folder, one file or several, read one at a time."""

    def __init__(self, model_dir: Path):
        self.model_dir = Path(model_dir)
        self.files = []
        self.by_name = {}

    def __enter__(self) -> _Checkpoint:
        paths = sorted(self.model_dir.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{self.model_dir} holds no *.safetensors file.")
        for path in paths:
            try:
                file = safe_open(path, framework="pt").__enter__()
            except SafetensorError as error:
                raise UserError(f"{path} is truncated or not a safetensors file: {error}") from None
            self.files.append(file)
            self.by_name.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *exc) -> None:
        for file in self.files:
            file.__exit__(*exc)

    def check_names(self, expected: set[str], optional: set[str]) -> None:
        missing, extra = expected - set(self.by_name), set(self.by_name) - expected - optional
        if missing or extra:
            parts = [
                f"{len(names)} tensor(s) {what}, for example {min(names)}"
                for names, what in ((missing, "are missing"), (extra, "are not of this model"))
                if names
            ]
            raise UserError(
                f"{self.model_dir} does not fit its config.json: {' and '.join(parts)}."
            )

    def read(self, name: str) -> torch.Tensor:
        return self.by_name[name].get_tensor(name)


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
        if not entry.is_expert:
            shards = [local] if form.axis is None else _gather(local, tp_group)
            yield from zip(entry.names[0], form.join([s[0] for s in shards], hf), strict=True)
            continue
        ranks = _gather(local, expert_group)  # the expert tensor-parallel rank counts fastest
        for i, names in enumerate(entry.names):
            owner, j = divmod(i, len(entry.parameters))
            shards = [ranks[owner * etp + r][j] for r in range(etp)]
            yield from zip(names, form.join(shards, hf), strict=True)


def _stages(parameters: dict[str, torch.nn.Parameter]) -> dict[str, tuple]:
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
    chunks: Sequence[torch.nn.Module], hf: PretrainedConfig, source_dir: Path, output_dir: Path
) -> None:
    """Write the model as a Hugging Face folder with the tokenizer of `source_dir`. A collective.

    The folder appears whole or not at all.
    """
    state = {}
    for name, tensor in export_weights(chunks, hf):
        if dist.get_rank() == 0:  # copied: the tensors are views of the gathered ones
            state[name] = tensor.to("cpu", copy=True).contiguous()
    if dist.get_rank() == 0:
        output_dir = Path(output_dir)
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
        save_torch_state_dict(state, staging)
        config = hf.to_dict() | {"dtype": str(next(iter(state.values())).dtype).split(".")[-1]}
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in Path(source_dir).iterdir():
            if path.name != "config.json" and not path.name.endswith(
                (".safetensors", ".safetensors.index.json")
            ):
                shutil.copy(path, staging)
        staging.chmod(0o755)
        staging.rename(output_dir)
    dist.barrier()
