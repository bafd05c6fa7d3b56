# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank holds, keeps for the backward pass and sends. Imports no Megatron.

Arithmetic on sizes, in bytes. What autograd keeps is counted tensor by tensor for this trainer's
layers (without Transformer Engine), in the manner of Korthikanti et al. 2022 (arXiv:2205.05198),
sections 4.1 and 4.2, with RMSNorm, SwiGLU, grouped queries, QK-norm, routed and shared experts in
the place of GPT's layers, attention that keeps no scores, and no dropout.
tests/megatron/test_plan.py compares the sums with what autograd keeps.

n tokens of a micro-batch = sequences x padded length S; h hidden size, D head dimension, c bytes of
a number in the trainer's dtype, V vocabulary, E experts, K of them per token, I the inner size of
an expert or MLP; t = tp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.families import family, head_dim, moe_layers, num_experts, top_k
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.logprobs import rows_at_a_time

Bytes = dict[str, float]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of a Hugging Face config that memory depends on."""

    hidden: int
    vocab: int
    tied: bool
    layers: int
    heads: int
    kv_heads: int
    head: int
    qk_norm: bool
    norms_all_heads: bool
    qkv_bias: bool
    inner: int  # of a dense layer's MLP
    moe_layers: int
    experts: int
    top_k: int
    expert_inner: int
    shared_inner: int  # of the expert of every token; 0: none
    shared_gate: bool

    @classmethod
    def of(cls, hf) -> Sizes:
        """Make the sizes; raises UserError for a family whose layers are not counted here."""
        kind = family(hf)
        settings = kind.settings(hf)
        if settings.get("multi_latent_attention"):
            raise UserError(
                f"A {hf.model_type!r} model (multi_latent_attention): its activations are not "
                "counted here. plan takes models of grouped queries."
            )
        shared = moe_layers(hf) and settings.get("moe_shared_expert_intermediate_size")
        return cls(
            hidden=hf.hidden_size,
            vocab=hf.vocab_size,
            tied=hf.tie_word_embeddings,
            layers=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            kv_heads=hf.num_key_value_heads,
            head=head_dim(hf),
            qk_norm=settings["qk_layernorm"],
            norms_all_heads=kind.norms_all_heads,
            qkv_bias=settings.get("add_qkv_bias", False),
            inner=hf.intermediate_size,
            moe_layers=len(moe_layers(hf)),
            experts=num_experts(hf),
            top_k=top_k(hf),
            expert_inner=getattr(hf, kind.expert_size) if moe_layers(hf) else 0,
            shared_inner=shared or 0,
            shared_gate=bool(shared) and settings.get("moe_shared_expert_gate", False),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Parameters on each rank of a pipeline stage; all its ranks hold tensors of equal shapes."""

    index: int
    shared: int  # parameters outside of experts: copies on all data-parallel ranks
    expert: int  # of this rank's experts: copies where the expert group repeats
    layers: int  # with attention
    moe_layers: int
    first: bool
    last: bool

    @property
    def parameters(self) -> int:
        return self.shared + self.expert


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences of padded length S in one forward of a rank; with context parallelism S is the
    length of the rank's parts."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def expert_copies(layout: Layout, world_size: int) -> int:
    """Ranks that hold the same experts."""
    return world_size // (layout.ep * layout.expert_tp * layout.pp)


def dense_copies(layout: Layout, world_size: int) -> int:
    """Ranks that hold the same weights outside of experts."""
    return world_size // (layout.tp * layout.pp)


def own_parameters(stage: Stage, layout: Layout, world_size: int) -> float:
    """Parameters whose optimizer state a rank keeps under the distributed optimizer."""
    of_dense = stage.shared / dense_copies(layout, world_size)
    return of_dense + stage.expert / expert_copies(layout, world_size)


def weights(
    stage: Stage, layout: Layout, world_size: int, *, dtype: str, algorithm: str = "adam"
) -> Bytes:
    """Bytes that a rank of a trained model holds for the whole run.

    parameters c; gradients 4 (fp32, whole on every data-parallel rank); Adam 8 (two moments) and
    with bf16 4 (fp32 weights), split over the ranks that hold the same parameter. SGD is not split
    and has the fp32 weights alone.
    """
    c = DTYPE_BYTES[dtype]
    master = 4 if c == 2 else 0
    if algorithm == "adam":
        optimizer = (8 + master) * own_parameters(stage, layout, world_size)
    else:
        optimizer = master * stage.parameters
    return {
        "parameters": c * stage.parameters,
        "gradients": 4 * stage.parameters,
        "optimizer": optimizer,
    }


def state_copies(
    stages: Iterable[Stage],
    layout: Layout,
    world_size: int,
    *,
    ranks: int,
    dtype: str,
    algorithm: str = "adam",
    frozen: int = 0,
) -> float:
    """Bytes of a checkpoint that the first `ranks` ranks write, and hold meanwhile: `--async-save`.

    Parameters c, fp32 weights 4, Adam 8; SGD has fp32 weights with bf16 alone. frozen: models
    beside it, c each. The first ranks of a stage write: what each holds outside of experts on tp
    ranks (weights that all of these have are counted for each), experts on ep·etp.
    """
    c = DTYPE_BYTES[dtype]
    optimizer = 12 if algorithm == "adam" else 4 * (c == 2)
    of_stage = world_size // layout.pp
    written = 0
    for stage in stages:
        here = min(max(0, ranks - stage.index * of_stage), of_stage)
        written += stage.shared * min(here, layout.tp)
        written += stage.expert * min(here, layout.ep * layout.expert_tp)
    return (c * (1 + frozen) + optimizer) * written


def layer_activations(
    model: Sizes,
    layout: Layout,
    batch: MicroBatch,
    *,
    dtype: str,
    moe: bool,
    imbalance: float = 1.0,
) -> Bytes:
    """Bytes that autograd keeps of one layer and micro-batch, for one rank.

    norms     2·(8h + 4)/t: input and normalised input in fp32, of both
    qkv       h·c/t input; QK-norm 8D + 4 for each query and key head, /t; cosines and sines 4SDc.
              A norm over all heads: (4 + c)·D for each head, and 8 for the two norms
    attention queries, keys, the fused projection (v is a part of it), the output, c each, and the
              logarithm of each query head's sum, 4, /t. With context parallelism queries, the
              output by chunk and as one, keys and values of all its ranks
    router    h·c/t input; 8E + 24K for the maps, /t (5E before Megatron-Core 0.19)
    experts   (K·x/t)·(h·c·etp + 5·I·c): x the imbalance; input, gate and up, silu, product, product
              with the router's weight
    mlp       (dense layers) h·c/t input and 5·I·c/t: gate and up, gate, silu, product
    shared    (a shared expert) 5·I·c/t, its input is the router's; with a gate (h + 1)·c/t more
    """
    c, t = DTYPE_BYTES[dtype], layout.tp
    n, length = batch.tokens, batch.length
    h, head = model.hidden, model.head
    heads, kv_heads = model.heads / t, model.kv_heads / t
    fused = (heads + 2 * kv_heads) * head
    # The key's norm keeps its input in fp32: in bf16 a copy, else a part of the fused projection.
    key_in = 4 * kv_heads * head if c == 2 else 0
    if model.norms_all_heads:
        qk_norm = heads * (4 + c) * head + key_in + kv_heads * c * head + 8
    else:
        qk_norm = heads * (8 * head + 4) + key_in + 4 * kv_heads * (head + 1)
    kept = {
        "norms": 2 * n * (8 * h + 4) / t,
        "qkv": n * (h * c / t + qk_norm * model.qk_norm) + 4 * length * head * c,
        "attention": n * (c * (2 * heads * head + kv_heads * head + fused) + 4 * heads),
    }
    if layout.cp > 1:
        of_norm = fused * (c == 4 and model.qk_norm)  # a part of it is the norm's input
        parts = 3 * heads * head + 2 * layout.cp * kv_heads * head + of_norm
        kept["attention"] = n * (c * parts + 4 * heads)
    if moe:
        K = model.top_k
        etp = layout.expert_tp
        kept["router"] = n * (h * c + 8 * model.experts + 24 * K) / t
        # With etp the tokens of all its ranks are gathered, and each computes a part of I.
        kept["experts"] = n * K / t * imbalance * c * (h * etp + 5 * model.expert_inner)
        if model.shared_inner:
            kept["shared"] = n * c / t * (5 * model.shared_inner + (h + 1) * model.shared_gate)
    else:
        kept["mlp"] = n * c / t * (h + 5 * model.inner)
    return kept


def activations(
    model: Sizes,
    layout: Layout,
    stage: Stage,
    batch: MicroBatch,
    *,
    dtype: str,
    recompute: str = "none",
    micro_batches: int = 1,
    imbalance: float = 1.0,
) -> Bytes:
    """Bytes that a rank of `stage` keeps at its fullest moment, the head aside.

    A pipeline stage keeps several micro-batches: pp − stage of them, and with vpp parts of the
    model (2·(pp − stage − 1) + (vpp − 1)·pp + 1) of its vpp parts. recompute=full keeps each
    layer's input (h·c/t) and one layer at a time.
    """
    given = dict(dtype=dtype, imbalance=imbalance)
    of_layer = {
        moe: layer_activations(model, layout, batch, moe=moe, **given)
        for moe in (True, False)
        if (stage.moe_layers if moe else stage.layers - stage.moe_layers)
    }
    counts = {True: stage.moe_layers, False: stage.layers - stage.moe_layers}
    behind = layout.pp - stage.index
    kept_batches = min(behind, micro_batches)
    if layout.vpp > 1:
        parts = 2 * (behind - 1) + (layout.vpp - 1) * layout.pp + 1
        kept_batches = min(parts, micro_batches * layout.vpp) / layout.vpp
    kept: Bytes = {}
    if recompute == "full":
        inputs = batch.tokens * model.hidden * DTYPE_BYTES[dtype] / layout.tp
        kept["layer inputs"] = kept_batches * stage.layers * inputs
        kept |= max(of_layer.values(), key=lambda layer: sum(layer.values()))
    else:
        for moe, layer in of_layer.items():
            for name, size in layer.items():
                kept[name] = kept.get(name, 0) + kept_batches * counts[moe] * size
    return kept


def head(model: Sizes, layout: Layout, batch: MicroBatch, *, dtype: str, purpose: str) -> float:
    """Bytes of the last stage's norm and head, at their fullest moment; v = V/t.

    n·((8h + 4)/t + h·c)  the norm, and its output gathered from the ranks
    r·v·(4 + e + b)       logits of r rows at a time (moe_upgrpo/megatron/logprobs.py); e = 4 for
                          the entropy in a "score", a "recorded update" and, in its backward too,
                          an "update with entropy", b = 2 in bf16
    n·h·c + v·h·b         in an update's backward: the gradient of the hidden states and, in bf16,
                          of the head before it is added to the fp32 gradients
    """
    c, n, h = DTYPE_BYTES[dtype], batch.tokens, model.hidden
    v = model.vocab // layout.tp
    rows = min(rows_at_a_time(v), n)
    cast = c if c == 2 else 0
    forward = rows * v * (4 + 4 * (purpose != "update") + cast)
    backward = 0.0
    if purpose != "score":
        of_entropy = 4 * (purpose == "update with entropy")
        backward = rows * v * (4 + of_entropy + cast) + n * h * c + v * h * cast
    return n * ((8 * h + 4) / layout.tp + h * c) + max(forward, backward)


def working_space(
    model: Sizes, layout: Layout, batch: MicroBatch, *, dtype: str, imbalance: float = 1.0
) -> float:
    """Bytes of one layer while it is computed, beside those that are kept: the larger of

    attention  n/t·((heads + 4·kv)·D·c + 12·heads·D): the fused projection, keys and values once
               more, and three of the queries in fp32 in their norm. With context parallelism the
               gathered keys and values, 4·cp·kv·D·c
    experts    (K·x/t)·n·(2·h·etp + 4·I)·c: input as it came and by expert; gate and up, silu,
               product. While gate and up are made, in the place of the other two the weights of the
               rank's first linear layers in one tensor, c·(E/ep)·2·h·I/etp
    mlp        (dense layers, shared experts) n·(h + 4·I/t)·c

    and the layer's own four of n·h·c/t; with tp > 1 Megatron's buffer for what is gathered, n·h·c.
    """
    c, t, n, h = DTYPE_BYTES[dtype], layout.tp, batch.tokens, model.hidden
    queries, keys = model.heads * model.head / t, model.kv_heads * model.head / t
    gathered = 4 * layout.cp * keys * (layout.cp > 1)
    spaces = [n * ((queries + 4 * keys + gathered) * c + 12 * queries)]
    if model.moe_layers:
        inner, etp = model.expert_inner, layout.expert_tp
        sent = n * model.top_k / t * imbalance * c
        stacked = c * model.experts / layout.ep * 2 * h * inner / etp
        spaces.append(sent * (2 * h * etp + 2 * inner) + max(sent * 2 * inner, stacked))
    inner = max(model.inner * (model.moe_layers < model.layers), model.shared_inner)
    if inner:
        spaces.append(n * (h + 4 * inner / t) * c)
    return max(spaces) + 4 * n * h * c / t + n * h * c * (t > 1)


def traces(model: Sizes, layout: Layout, *, tokens: float, layers: int) -> float:
    """Bytes that a rank hands over of `tokens` in `layers` routers: K ids of 1 (of 2 with more than
    256 experts), and a margin of 4."""
    width = 1 if model.experts <= 256 else 2
    return tokens / layout.tp * layers * (width * model.top_k + 4)


def gathered_layer(model: Sizes, *, dtype: str) -> float:
    """Bytes of the largest weights that are whole at one time on the way to an engine: a layer's
    experts (or its MLP), or the embedding, once gathered and once joined."""
    h, c = model.hidden, DTYPE_BYTES[dtype]
    inner = max(model.inner, model.experts * model.expert_inner, model.shared_inner)
    return 2 * c * h * max(2 * inner, model.vocab)


def model_parameters(model: Sizes) -> int:
    """Parameters of the whole model, written out by hand from its sizes."""
    h, head = model.hidden, model.head
    q, kv = model.heads * head, model.kv_heads * head
    of_norms = (q + kv if model.norms_all_heads else 2 * head) * model.qk_norm
    attention = (h + model.qkv_bias) * (q + 2 * kv) + q * h + of_norms + 2 * h  # with two norms
    dense = (model.layers - model.moe_layers) * 3 * h * model.inner
    moe = model.moe_layers * model.experts * (3 * h * model.expert_inner + h)  # with the router
    moe += model.moe_layers * (3 * h * model.shared_inner + h * model.shared_gate)
    embeddings = model.vocab * h * (1 if model.tied else 2)
    return model.layers * attention + dense + moe + embeddings + h


def active_parameters(model: Sizes) -> int:
    """Parameters that one token uses: all but the experts that are not among its K."""
    idle = model.moe_layers * (model.experts - model.top_k)
    return model_parameters(model) - idle * 3 * model.hidden * model.expert_inner


def communication(
    model: Sizes,
    layout: Layout,
    stage: Stage,
    world_size: int,
    *,
    tokens: float,
    dtype: str,
    forwards: int,
    backwards: int,
    optimizer_steps: int,
) -> Bytes:
    """Bytes that a rank of `stage` sends in an RL step over `tokens`: its own, or with tensor
    parallelism those of the ranks that share them.

    tensor-parallel   for each layer and forward n·h·c·(t − 1)/t for each of two gathers and two
                      reductions (attention, and a dense MLP or shared expert); half as much again
                      in a backward; once each for the embedding and the head, and again in a
                      backward
    context-parallel  for each layer n·2·kv·D·c/t·(cp − 1) to gather keys and values, and in the
                      backward their gradients
    expert-parallel   dispatch and combine, each and in the backward too: alltoall n·K/t·h·c·(ep −
                      1)/ep, and (etp − 1) times n·K/t·h·c, with the gates once 4 in the place of
                      h·c; allgather n/t·h·c·(ep·etp − 1)
    pipeline          n·h·c/t to the next part of the model, and its gradient back
    data-parallel     an optimizer step reduces fp32 gradients, 4·P·(d − 1)/d, and gathers the new
                      parameters, c·P·(d − 1)/d, over the d ranks with the same parameters; with
                      ep > 1 twice, as the experts' optimizer and the others' each gather all
                      (distrib_optimizer.py:2617; 0.16 without overlap_param_gather)
    engine            after a step, each stage's parameters to the other stages, c·P·(pp − 1), and
                      those of every stage to the ranks that share it; stages taken to be alike

    benchmarks/micro/messages.py counts what processes send.
    """
    c, t = DTYPE_BYTES[dtype], layout.tp
    hidden = tokens * model.hidden * c
    passes = forwards + 1.5 * backwards
    unshared = 0 if model.shared_inner else stage.moe_layers
    sharded = 2 * stage.layers + 2 * (stage.layers - unshared)
    ends = (forwards + backwards) * (stage.first + stage.last)
    sent: Bytes = {"tensor-parallel": (passes * sharded + ends) * hidden * (t - 1) / t}
    if layout.cp > 1:
        keys = tokens * 2 * model.kv_heads * model.head * c / t
        sent["context-parallel"] = (forwards + backwards) * stage.layers * keys * (layout.cp - 1)
    if stage.moe_layers:
        etp = layout.expert_tp
        crossing = model.top_k * ((layout.ep - 1) / layout.ep + etp - 1)
        if layout.dispatcher == "allgather":
            crossing = layout.ep * etp - 1
        each = 2 * hidden / t * crossing
        if layout.dispatcher == "alltoall":
            each += 4 * tokens / t * crossing
        sent["expert-parallel"] = (forwards + backwards) * stage.moe_layers * each
    if layout.pp > 1:
        crossings = forwards * (layout.vpp - stage.last) + backwards * (layout.vpp - stage.first)
        sent["pipeline"] = crossings * hidden / t
    copies = (
        (stage.shared, dense_copies(layout, world_size)),
        (stage.expert, expert_copies(layout, world_size)),
    )
    gathers = 2 if stage.expert else 1
    sent["data-parallel"] = optimizer_steps * sum(
        (4 + gathers * c) * parameters * (d - 1) / d for parameters, d in copies
    )
    of_stage = stage.shared * (t - 1) + stage.expert * (layout.ep * layout.expert_tp - 1)
    sent["engine"] = c * (layout.pp * of_stage + stage.parameters * (layout.pp - 1))
    return sent


def messages(
    model: Sizes,
    layout: Layout,
    stage: Stage,
    world_size: int,
    *,
    forwards: int,
    backwards: int,
    optimizer_steps: int,
) -> dict[str, int]:
    """Collectives that a rank of `stage` takes part in, by the names of `communication`.

    forwards, backwards: of micro-batches. For dispatcher=alltoall, where a forward of experts is a
    gather of counts and three exchanges (tokens, gates, results). All gradients of one kind, the
    experts' or the others', are reduced at once, as without overlap_grad_reduce.
    """
    unshared = 0 if model.shared_inner else stage.moe_layers
    sharded = 2 * stage.layers + 2 * (stage.layers - unshared)
    ends = (forwards + backwards) * (stage.first + stage.last)
    found = {}
    if layout.tp > 1:
        found["tensor-parallel"] = forwards * sharded + backwards * 3 * sharded // 2 + ends
    if layout.ep * layout.expert_tp > 1:
        found["expert-parallel"] = stage.moe_layers * (4 * forwards + 3 * backwards)
    if layout.pp > 1:
        found["pipeline"] = forwards * (not stage.last) + backwards * (not stage.first)
    copies = (
        (stage.shared, dense_copies(layout, world_size)),
        (stage.expert, expert_copies(layout, world_size)),
    )
    kinds = sum(parameters > 0 and d > 1 for parameters, d in copies)
    found["data-parallel"] = optimizer_steps * kinds * (1 + (2 if stage.expert else 1))
    return found
