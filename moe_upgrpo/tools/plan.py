# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo plan`: what a run needs of each GPU, computed before any GPU is requested for it.

The model's parts are counted in the model that each rank would build (`moe_upgrpo.megatron.plan`);
the rest is arithmetic (`moe_upgrpo.megatron.memory`) on the longest sequences that the config
allows. GB are 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.export import side_files, try_export
from moe_upgrpo.megatron import memory
from moe_upgrpo.megatron.balance import Limit
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import Bytes, MicroBatch, Sizes, Stage
from moe_upgrpo.rollout.engines import ENGINES, with_servers
from moe_upgrpo.routing.codec import set_bytes
from moe_upgrpo.store.schema import COLUMNS
from moe_upgrpo.tasks.arithmetic import ArithmeticTask
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.tiny import TinyModel

GB = 1e9
RESERVE = 2 * GB, 0.06  # of each GPU: bytes, and a share of its memory
FIXED_WIDTH = {"int16": 2, "int32": 4, "int64": 8, "float": 4, "bool": 1 / 8}  # columns of the log


class DoesNotFit(UserError):
    """The GPUs have too little memory for the config."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The ranks of one pipeline stage: what each holds, and the extra bytes at each moment."""

    stage: Stage
    ranks: range
    held: Bytes
    moments: dict[str, Bytes]
    sent: Bytes  # in one RL step

    @property
    def fullest(self) -> str:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + sum(self.moments[self.fullest].values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    config: PlanConfig
    layout: Layout
    model: Sizes
    prompt_tokens: int
    new_tokens: int
    stages: list[StagePlan]
    logged: Bytes  # all ranks, one RL step
    host: Bytes  # of the first machine
    assumptions: list[tuple[str, str]]

    @property
    def available(self) -> float:
        each, share = RESERVE
        return self.config.gpu_memory_gb * GB * (1 - share) - each

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.available


def make_plan(config: PlanConfig) -> Plan:
    """Make the plan of a config; UserError where the run would be refused or is not covered."""
    start, trainer = config.start, config.trainer
    layout = config.layout(config.ranks)
    hf = _model_config(start.model or start.tiny)
    layout.check_model(hf)
    if trainer.megatron:
        from moe_upgrpo.megatron import passthrough  # slow: it imports Megatron

        passed = passthrough.read(trainer.megatron, here=False)
        passthrough.check_optimizer(passed, trainer.optimizer)
    if start.model:
        try_export(hf, side_files(start.model), None)
    model = Sizes.of(hf)
    prompt_tokens, new_tokens = _lengths(config)
    length = prompt_tokens + new_tokens
    if length > hf.max_position_embeddings:
        raise UserError(
            f"Sequences of {length} tokens, prompt and response together: the model has "
            f"max_position_embeddings={hf.max_position_embeddings}. Lower max_new_tokens."
        )
    multiple_of = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    length = -(-length // multiple_of) * multiple_of
    sequences = _sequences(config, layout)
    in_update = sequences // config.batch.minibatches
    most = config.micro_batches(length)
    most.check(length)
    update, score = (_fullest(most, count, length, layout) for count in (in_update, sequences))
    _check_place(config)
    of_stage = config.ranks // layout.pp
    stages = _stages(config, layout)
    made = [
        StagePlan(
            stage=stage,
            ranks=range(stage.index * of_stage, (stage.index + 1) * of_stage),
            held=_held(config, layout, model, stage, length),
            moments=_moments(config, layout, model, stage, update, score, length),
            sent=_sent(config, layout, model, stage, sequences * length // layout.cp),
        )
        for stage in stages
    ]
    return Plan(
        config=config,
        layout=layout,
        model=model,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        stages=made,
        logged=_logged(config, model, length, new_tokens),
        host=_host(config, layout, model, stages, length),
        assumptions=list(_assumptions(config, model, update)),
    )


def _sequences(config: PlanConfig, layout: Layout) -> int:
    """Sequences that one copy of the model has in a step."""
    return config.batch.sequences // layout.data_parallel(config.ranks)


def _stages(config: PlanConfig, layout: Layout) -> list[Stage]:
    model = config.start.model or config.start.tiny
    return _built(model, layout, config.ranks, config.trainer.dtype)


@cache
def _built(model: Path | TinyModel, layout: Layout, ranks: int, dtype: str) -> list[Stage]:
    from moe_upgrpo.megatron import plan  # slow: it imports Megatron

    return plan.stages(_model_config(model), layout, ranks, dtype)


def _model_config(model: Path | TinyModel) -> PretrainedConfig:
    return model.hugging_face() if isinstance(model, TinyModel) else read_model_config(model)


def _lengths(config: PlanConfig) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest response."""
    problems, longest = config.problems, config.rollouts.max_new_tokens
    if problems.data:
        if problems.max_prompt_tokens is None:
            raise UserError(
                "max_prompt_tokens is not given: without it nobody knows how long sequences get, "
                "and how much memory they need. Give --max-prompt-tokens."
            )
        return problems.max_prompt_tokens, longest
    task = ArithmeticTask(problems.digits)
    return task.max_prompt_tokens, longest or task.max_response_tokens


def _in_process(config: PlanConfig) -> bool:
    """Whether each rank has its own engine, with its own copy of the model."""
    rollouts = config.rollouts
    place = ENGINES[rollouts.engine].place(rollouts.engine_url)
    return rollouts.load_rollouts is None and place == "each rank"


def _check_place(config: PlanConfig) -> None:
    rollouts = config.rollouts
    engine = ENGINES[rollouts.engine]
    started_here = engine.place(rollouts.engine_url) == "a server started here"
    if started_here and rollouts.load_rollouts is None and not config.server_gb:
        raise UserError(
            f"engine={rollouts.engine} without engine_url: rank 0 would start the server on a GPU "
            f"of the trainer, where {engine.title} takes most of the memory unless told otherwise. "
            "Start it yourself and give --engine-url; where it shares these GPUs, give --server-gb "
            "too."
        )


def _held(config: PlanConfig, layout: Layout, model: Sizes, stage: Stage, length: int) -> Bytes:
    trainer, rollouts = config.trainer, config.rollouts
    held = memory.weights(
        stage, layout, config.ranks, dtype=trainer.dtype, algorithm=trainer.optimizer.algorithm
    )
    held["optimizer"] *= 1 - _offloaded(config)
    copy = memory.DTYPE_BYTES[trainer.dtype] * stage.parameters
    if config.has_reference:
        held["reference model"] = copy
    if config.terms.gradient_at == "old":
        held["old weights, and the policy's while they are used"] = 2 * copy
    if rollouts.ahead and config.log.analyse_every:
        held["policy as it sampled"] = copy
    if _in_process(config):
        width = memory.DTYPE_BYTES[rollouts.engine_dtype]
        held["engine: model"] = width * memory.model_parameters(model)
        if cache_gib := ENGINES[rollouts.engine].cache_gib(rollouts):
            held["engine: cache"] = cache_gib * 2**30
    if config.server_gb:
        held["engine: server"] = config.server_gb * GB
    return held


def _offloaded(config: PlanConfig) -> float:
    """The share of the optimizer's state that is kept in the host's memory."""
    passed = config.trainer.megatron
    if passed.get("optimizer_cpu_offload") != "true":
        return 0.0
    return float(passed.get("optimizer_offload_fraction", 1))


def _fullest(most: Limit, sequences: int, length: int, layout: Layout) -> MicroBatch:
    """The largest micro-batch of that many sequences, all of the greatest length; a rank's part of
    it."""
    if most.packed:  # one row, and shorter ones may fill a budget to its end
        tokens = most.tokens or most.sequences * length
        return MicroBatch(sequences=1, length=min(tokens, sequences * length))
    return MicroBatch(sequences=min(most.rows(length), sequences), length=length // layout.cp)


def _moments(
    config: PlanConfig,
    layout: Layout,
    model: Sizes,
    stage: Stage,
    update: MicroBatch,
    score: MicroBatch,
    length: int,
) -> dict[str, Bytes]:
    """Bytes beyond the permanent ones, at each moment of a step."""
    trainer, rollouts = config.trainer, config.rollouts
    given = dict(dtype=trainer.dtype)
    sequences = _sequences(config, layout)
    moments = {}

    def computing(batch: MicroBatch, purpose: str) -> Bytes:
        """The larger of the head's and one layer's working space; they are not needed at once."""
        options = {
            "layer in work": memory.working_space(
                model, layout, batch, imbalance=config.imbalance, **given
            )
        }
        if stage.last:
            options["head"] = memory.head(model, layout, batch, purpose=purpose, **given)
        largest = max(options, key=options.get)
        return {largest: options[largest]}

    engine = ENGINES[rollouts.engine]
    if _in_process(config) and engine.in_flight is not None:
        in_flight = min(engine.in_flight, config.batch.sequences // config.ranks)
        width = memory.DTYPE_BYTES[rollouts.engine_dtype]
        cache_bytes = 2 * model.layers * model.kv_heads * model.head * width * in_flight * length
        moments["generation"] = {"engine: cache": cache_bytes * (1 + 1 / model.layers)}
    moments["old log-probs"] = computing(score, "score")
    moments["update"] = memory.activations(
        model,
        layout,
        stage,
        update,
        recompute=trainer.recompute,
        micro_batches=-(
            -(sequences // config.batch.minibatches) * length // (update.tokens * layout.cp)
        ),
        imbalance=config.imbalance,
        **given,
    ) | computing(update, _purpose(config))
    if stage.moe_layers:
        # Pickled, and over NCCL: the bytes sent, and those of every rank of the copy.
        tokens = sequences * length / layout.cp
        each = memory.traces(model, layout, tokens=tokens, layers=stage.moe_layers)
        of_copy = layout.tp * layout.cp * layout.pp
        moments["routes gathered"] = {"routes and margins": each * (1 + of_copy)}
    if rollouts.load_rollouts is None:
        layer = memory.gathered_layer(model, **given)
        moments["weights to the engine"] = {"one layer": layer}
        if _in_process(config):
            moments["weights to the engine"]["engine's next layer"] = layer
    return moments


def _purpose(config: PlanConfig) -> str:
    """The head's work in the update, as `memory.head` knows it."""
    if config.terms.has_entropy_bonus:
        return "update with entropy"
    return "recorded update" if _old_from_update(config) else "update"


def _old_from_update(config: PlanConfig) -> bool:
    """Whether the update's only forward pass is also the old policy's, as `Learner` has it."""
    once = config.objective.replay == "none" and config.batch.optimizer_steps == 1
    return once and not config.objective.head_records


def _passes(config: PlanConfig) -> tuple[int, int]:
    """Forward and backward passes of each token in a step, without the analyses."""
    held = config.objective.replay == "R3"
    before = (not _old_from_update(config)) + held + config.has_reference
    again = 2 if config.trainer.recompute == "full" else 1
    again += "statistics" in config.objective.policy_loss().arguments
    return before + again * config.batch.epochs, config.batch.epochs


def _sent(config: PlanConfig, layout: Layout, model: Sizes, stage: Stage, tokens: int) -> Bytes:
    forwards, backwards = _passes(config)
    sent = memory.communication(
        model,
        layout,
        stage,
        config.ranks,
        tokens=tokens,
        dtype=config.trainer.dtype,
        forwards=forwards,
        backwards=backwards,
        optimizer_steps=config.batch.optimizer_steps,
    )
    if config.rollouts.load_rollouts is not None:
        del sent["engine"]
    return {name: size for name, size in sent.items() if size}


def _host(
    config: PlanConfig, layout: Layout, model: Sizes, stages: list[Stage], length: int
) -> Bytes:
    """The most host memory that the ranks of the first machine use at a time."""
    host: Bytes = {}
    if model.moe_layers:
        # Every rank of a copy gets all of it, both as sent and joined.
        tokens = _sequences(config, layout) * length * layout.tp
        each = memory.traces(model, layout, tokens=tokens, layers=model.moe_layers)
        host["routes and margins of a step"] = 2 * each * config.gpus_per_node
    rollouts, trainer = config.rollouts, config.trainer
    if config.run.async_save and config.run.save_every:
        behind = rollouts.ahead > 0 and config.log.analyse_every > 0
        host["a checkpoint's copy (--async-save)"] = memory.state_copies(
            stages,
            layout,
            config.ranks,
            ranks=config.gpus_per_node,
            dtype=trainer.dtype,
            algorithm=trainer.optimizer.algorithm,
            frozen=behind + bool(config.terms.reference_every),
        )
    if config.rollouts.ahead > 1:
        # Those of the steps since the oldest batch that is still sampled, and the newest.
        copies = (1 + config.rollouts.ahead) * (config.gpus_per_node if _in_process(config) else 1)
        width = memory.DTYPE_BYTES[config.trainer.dtype]
        host["weights that wait for the engine"] = copies * width * memory.model_parameters(model)
    return host


def _logged(config: PlanConfig, model: Sizes, length: int, new_tokens: int) -> Bytes:
    """Bytes of routes and token rows of an RL step, over all ranks, before compression."""
    log, sequences = config.log, config.batch.sequences
    logged: Bytes = {}
    if model.moe_layers:
        ids = sequences * (length - 1) * model.moe_layers * model.top_k
        width = 1 if model.experts <= 256 else 2
        logged["routes from the engine, in memory"] = width * ids
        logged["routes of the trainer, in memory"] = width * ids
    share = {"full": 1.0, "sampled": log.token_log_share, "aggregate": 0.0}[log.token_log]
    rows = sequences * new_tokens * share
    columns = sum(FIXED_WIDTH.get(column.type, 0) for column in COLUMNS.values())
    logged["token log: numbers"] = rows * columns
    if model.moe_layers:
        packed = set_bytes(model.moe_layers, model.top_k, model.experts)
        logged["token log: routes and overlap"] = rows * (packed + model.moe_layers)
    return logged


def _assumptions(config: PlanConfig, model: Sizes, update: MicroBatch) -> Iterator[tuple[str, str]]:
    fixed, share = RESERVE
    c = memory.DTYPE_BYTES[config.trainer.dtype]
    yield (
        "longest case",
        f"every sequence of a micro-batch has prompt and response of full length: "
        f"{update.sequences} x {update.length} tokens"
        f"{' of it on each context-parallel rank' if config.layout(config.ranks).cp > 1 else ''}",
    )
    master = " + 4 (fp32 weights)" if c == 2 else ""
    yield (
        "trained weights",
        f"{c} a parameter, fp32 gradients 4; Adam 8{master} over the ranks with the same parameter "
        "(checked: a run on one CPU, to 2%)",
    )
    yield (
        "activations",
        "tensors that autograd keeps of these layers, after Korthikanti et al. 2022 (checked: CPU "
        "runs of one rank and of TP2·EP2, to 0.5%)",
    )
    if model.moe_layers:
        yield "imbalance", f"the busiest rank's experts get {config.imbalance:g} x the mean tokens"
    yield "attention", "no scores are kept (torch's kernels, or Transformer Engine's)"
    rows = memory.rows_at_a_time(model.vocab // config.layout(config.ranks).tp)
    yield (
        "head",
        f"logits of {rows:,} rows at a time, and again in the backward (checked: peaks of CPU "
        "runs, to 15%)",
    )
    if share_of_host := _offloaded(config):
        yield (
            "optimizer offload",
            f"{share_of_host:.0%} of Adam's state and of the fp32 weights is in the host's memory, "
            "with a copy of their gradients: 16 bytes a parameter over the ranks that share it "
            "(not measured)",
        )
    yield "optimizer step", "torch's fused kernel, which takes nothing beside"
    if _in_process(config):
        yield (
            "engine in process",
            "one whole copy of the model in each rank, and the trainer's whole weights once more "
            "while they are handed over; vLLM's own buffers are not counted",
        )
    elif config.rollouts.load_rollouts is None:
        yield "engine", f"a server; {config.server_gb:g} GB of each of these GPUs (--server-gb)"
    yield (
        "reserve",
        f"{fixed / GB:g} GB and {share:.0%} of a GPU for CUDA, NCCL and what the allocator loses "
        "(not measured: no GPU of ours ran this)",
    )
    yield (
        "not counted",
        "analyses (--analyse-every), evaluation, checkpoints without --async-save; of the "
        "machine's own memory all but routes, a checkpoint's copy and weights for a server",
    )


# Options that may help; tried one at a time on the same config.
def _remedies(config: PlanConfig) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if config.trainer.dtype == "float32":
        found["--dtype bfloat16"] = {"dtype": "bfloat16"}
    if config.trainer.recompute == "none":
        found["--recompute full"] = {"recompute": "full"}
    if config.trainer.micro_batch_tokens is None and config.micro_batches().sequences > 1:
        found["--micro-batch 1"] = {"micro_batch": 1}
    if config.log.reference_kl and not config.terms.kl_coef:
        found["--no-reference-kl"] = {"reference_kl": False}
    if _in_process(config):
        engine = ENGINES[config.rollouts.engine]
        served = config.rollouts.engine if engine.takes_url else with_servers()[0]
        away = {"engine": served, "engine_url": "http://HOST:PORT"}
        found["a server of the engine on other GPUs (--engine-url)"] = away
        if engine.cache_gib(config.rollouts) > 1:
            option = engine.cache_setting.replace("_", "-")
            found[f"--{option} 1"] = engine.with_cache(config.rollouts, 1.0)
    layout = config.layout(config.ranks)
    for name in ("tp", "cp", "ep", "pp"):
        size = 2 * getattr(layout, name)
        found[f"--{name} {size}"] = {"tp": layout.tp, "ep": layout.ep} | {name: size}
    same = {"tp": layout.tp, "ep": layout.ep, "nodes": 2 * config.nodes}
    found[f"--nodes {2 * config.nodes}"] = same
    return found


def _peak(config: PlanConfig, change: dict[str, Any]) -> float | None:
    try:
        return make_plan(config.but(**change)).fullest.peak
    except UserError:  # for example, the layout does not divide
        return None


def check_fits(plan: Plan) -> None:
    """Raise DoesNotFit, naming what is too large and what would help, if the plan does not fit."""
    if plan.fits:
        return
    worst = plan.fullest
    parts = worst.held | worst.moments[worst.fullest]
    largest = sorted(parts, key=parts.get, reverse=True)[:3]
    lines = [
        f"does not fit: rank {_span(worst.ranks)} needs {worst.peak / GB:.1f} GB (at the moment: "
        f"{worst.fullest}) of {plan.available / GB:.1f} GB, which is {plan.config.gpu_memory_gb:g} "
        "GB less the reserve. The largest: "
        + ", ".join(f"{name} {parts[name] / GB:.1f} GB" for name in largest)
        + "."
    ]
    peaks = {name: _peak(plan.config, change) for name, change in _remedies(plan.config).items()}
    helping = {n: p for n, p in peaks.items() if p is not None and p < worst.peak - 0.05 * GB}
    enough = {n: p for n, p in helping.items() if p <= plan.available}
    best = sorted(enough or helping, key=helping.get)[:4]
    if best:
        lines.append(
            ("Enough by itself: " if enough else "None is enough by itself; the most: ")
            + ", ".join(f"{name} ({helping[name] / GB:.1f} GB)" for name in best)
            + "."
        )
    raise DoesNotFit(" ".join(lines))


def _span(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def show(plan: Plan, console: Console) -> None:
    """Print the plan with its assumptions."""
    model, config = plan.model, plan.config
    name, batch = config.start.model or "tiny model", config.batch
    console.print(
        f"{name}: {memory.model_parameters(model) / 1e9:.2f}B parameters, "
        f"{memory.active_parameters(model) / 1e9:.2f}B of them for a token; {plan.layout} on "
        f"{config.nodes} x {config.gpus_per_node} GPUs; a step of {batch.prompts} x "
        f"{batch.group} sequences of {plan.prompt_tokens} + {plan.new_tokens} tokens at most"
    )
    for made in plan.stages:
        stage = made.stage
        of_experts = f", {stage.expert / 1e9:.2f}B of them its experts'" if stage.expert else ""
        name = f"stage {stage.index}, " if plan.layout.pp > 1 else ""
        console.print(
            f"{name}rank {_span(made.ranks)}: {stage.parameters / 1e9:.2f}B parameters{of_experts}"
        )
        table = Table()
        table.add_column("memory of a GPU")
        table.add_column("GB", justify="right")
        _rows(table, made.held)
        for moment, parts in made.moments.items():
            table.add_section()
            total = sum(parts.values())
            table.add_row(f"{moment}: on top", _gb(total))
            _rows(table, parts, indent="  ")
        table.add_section()
        table.add_row(f"most, at the moment: {made.fullest}", _gb(made.peak))
        table.add_row(f"of {config.gpu_memory_gb:g} GB less the reserve", _gb(plan.available))
        console.print(table)
    _small(console, "a rank sends in a step", plan.fullest.sent)
    _small(console, "all ranks record in a step", plan.logged)
    _small(console, "in the first machine's own memory", plan.host)
    console.print("assumptions; sizes in bytes")
    assumptions = Table(show_header=False)
    for name, text in plan.assumptions:
        assumptions.add_row(name, text)
    console.print(assumptions)
    _spanning_nodes(plan, console)


def _spanning_nodes(plan: Plan, console: Console) -> None:
    layout, per_node = plan.layout, plan.config.gpus_per_node
    across = [n for n, size in (("tp", layout.tp), ("ep", layout.ep * layout.expert_tp))
              if plan.config.nodes > 1 and size > per_node]  # fmt: skip
    if across:
        console.print(
            f"note: {' and '.join(across)} groups span machines of {per_node} GPUs; what they send "
            "then goes over the network."
        )


def _small(console: Console, title: str, sizes: Bytes) -> None:
    if sizes:
        table = Table()
        table.add_column(title)
        table.add_column("GB", justify="right")
        _rows(table, sizes)
        console.print(table)


def _rows(table: Table, sizes: Bytes, indent: str = "") -> None:
    for name, size in sizes.items():
        table.add_row(indent + name, _gb(size))


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= 0.95 * GB else f"{size / GB:.2g}"
