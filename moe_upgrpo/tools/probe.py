# SPDX-License-Identifier: Apache-2.0
"""Measure how far engine and trainer differ on the same weights, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.tokenizer import keep_vocabulary
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.record import StepRecord, Sums, alarms, measured, routing_sums
from moe_upgrpo.report import load_runs, opening, write_page
from moe_upgrpo.rollout.base import Engine
from moe_upgrpo.routing import RoutingDivergence, compare_routes
from moe_upgrpo.stats import MIN_PROMPTS, Rate, rates
from moe_upgrpo.store import RunFolder, TokenLayout, TokenLogWriter, read_tokens
from moe_upgrpo.store.questions import rate
from moe_upgrpo.tools import pair
from moe_upgrpo.tools.probe_options import ProbeConfig
from moe_upgrpo.tools.route_dumps import read_routes
from moe_upgrpo.train import analysis
from moe_upgrpo.train.record import record_without_update


def probe(config: ProbeConfig) -> None:
    """Print the mismatch and write the report of a run without training."""
    console = Console(highlight=False)
    run = RunFolder(config.folder)
    run.check_free()
    if config.model is None:
        row, found = _compare_dumps(config, run)
    else:
        with groups.process_groups(Layout(), seed=config.seed):
            row = _probe_model(config, run)
        found = _intervals(run)
    raised = alarms.Watch(config.alarm).add_to(row)
    run.append_metrics(row)
    _show(console, row, found)
    for one in raised:
        console.print(f"ALARM {one.short}: {alarms.ALARMS[one.name].means}", soft_wrap=True)
    runs = load_runs([config.folder])
    page = write_page(runs, config.folder / "report.html")
    console.print(f"report: {page}", soft_wrap=True)
    for answer in opening(runs[0]):
        console.print(str(answer), soft_wrap=True)


def _compare_dumps(config: ProbeConfig, run: RunFolder) -> tuple[dict, dict[str, Rate]]:
    rollout, train = read_routes(config.rollout_routes), read_routes(config.train_routes)
    counts = compare_routes(rollout, train, num_experts=config.num_experts)
    about = {"num_experts": config.num_experts, "top_k": counts.top_k}
    about |= {"moe_layers": list(range(counts.num_layers)), "loss": "none (probe of two dumps)"}
    RunFolder.create(run.path, asdict(config) | about | {"alarms": alarms.texts(config.alarm)})
    rollout_NLK = rollout.reshape(-1, *rollout.shape[-2:])
    found = _intervals_of_dumps(counts, config.dump_samples)
    return {"step": 1} | measured(routing_sums(counts, [rollout_NLK])), found


def _intervals(run: RunFolder) -> dict[str, Rate]:
    """The figures that have an interval, by metric, from the token rows."""
    table = read_tokens(run.tokens)
    names = {"logp_gap/mean_abs": "gap"}
    if TokenLayout.of(table.schema).num_layers:
        names |= {"mismatch/router_rate": "mismatch", "mismatch/token_any_rate": "mismatch_any"}
    return {metric: rate(table, quantity)[0] for metric, quantity in names.items()}


def _intervals_of_dumps(counts: RoutingDivergence, group: int | None) -> dict[str, Rate]:
    """Intervals of two dumps, where `group` says which of their sequences share a prompt."""
    if group is None:
        return {}
    shape = list(counts.valid.shape)
    if len(shape) == 1 or shape[0] % group:
        raise UserError(
            f"--dump-samples {group}: dumps of whole sequences [B, tokens, layers, top-k] are "
            f"needed, B a multiple of {group}; their tokens are {shape}."
        )
    tokens_PT = counts.routers_per_token.numpy().reshape(shape[0] // group, -1)
    compared = np.full((len(tokens_PT), 1), tokens_PT.shape[1], float)
    pairs = {
        "mismatch/router_rate": (tokens_PT, counts.num_layers),
        "mismatch/token_any_rate": (tokens_PT > 0, 1),
    }
    return {
        name: rates(differ.sum(axis=1, keepdims=True), compared * each, groups=[name])[0]
        for name, (differ, each) in pairs.items()
    }


def _probe_model(config: ProbeConfig, run: RunFolder) -> dict:
    actor = pair.start_actor(config)
    prompts = pair.read_prompts(config, actor)
    engine = pair.start_engine(config, prompts, server_log=run.path / "engine.log")
    with closing(engine):
        step, noise = _step(config, prompts, actor, engine)
    RunFolder.create(
        run.path,
        asdict(config)
        | {"alarms": alarms.texts(config.alarm)}
        | {
            "loss": "none (probe)",
            "layout": str(actor.layout),
            "world_size": 1,
            "moe_layers": actor.layer_ids,
            "num_experts": actor.num_experts,
            "top_k": actor.top_k,
            "parameters": actor.parameter_count(),
        },
    )
    keep_vocabulary(run.path, config.model, trust_remote_code=config.trust_remote_code)
    log = TokenLogWriter(
        run.tokens,
        rank=0,
        layer_ids=actor.layer_ids,
        top_k=actor.top_k,
        num_experts=actor.num_experts,
    )
    log.write_prompts(1, step.prompts())
    log.write(1, step.token_rows())
    # Nothing was rewarded or updated: figures about that would only look like a result.
    without = ("reward/", "advantage/", "ratio/", "staleness/", "gap/update", "gap/routing_shift")
    return {"step": 1} | {
        name: value
        for name, value in (measured(step.sums() | noise) | step.maxima()).items()
        if not name.startswith(without)
    }


def _step(
    config: ProbeConfig, prompts: Sequence[np.ndarray], actor: MegatronActor, engine: Engine
) -> tuple[StepRecord, Sums]:
    """The record that a training step would make, without its update, and the noise floors."""
    rollouts, samples = pair.sampled(config, prompts, engine)
    native = actor.score(samples, record=("routes", "margins", "gates"))
    old = analysis.OldScores(native=native, held=None)
    noise = analysis.trainer_noise_floor(actor, samples)
    if actor.layer_ids:
        held = [replace(s, routes=r.routes) for s, r in zip(samples, rollouts, strict=True)]
        old = analysis.OldScores(
            native=native,
            held=actor.score(held, record=("routes", "gates")),
            analysed=True,
            counterpart=[s.log_probs for s in native],  # nothing was updated
        )
        passes = list(zip(*analysis.engine_passes(engine, samples), strict=True))
        noise |= analysis.engine_noise_floor(
            passes, samples, rollouts, num_experts=actor.num_experts
        )
    record = record_without_update(
        rollouts=rollouts,
        old=old,
        group=config.samples,
        num_experts=actor.num_experts,
        noise=noise,
    )
    return record, noise.sums


def _between(found: Rate | None, form: str) -> str:
    """An interval, or why there is none."""
    if found is None:
        return ""
    if found.prompts < MIN_PROMPTS:
        return f"none: {found.prompts} of {MIN_PROMPTS} prompts"
    if np.isnan(found.low):
        return "none: nothing seen" if not found.numerator else "none: all differ"
    return f"{found.low:{form}} to {found.high:{form}}"


def _show(console: Console, row: dict, found: dict[str, Rate]) -> None:
    if "mismatch/router_rate" in row:
        tokens, pairs = sum(row["mismatch/histogram"]), row["mismatch/router_denominator"]
        table = Table("mismatch", "rate", "95% interval", "of", box=None)

        def add(text: str, metric: str, of: str) -> None:
            table.add_row(text, f"{row[metric]:.3%}", _between(found.get(metric), ".3%"), of)

        add("routers that differ", "mismatch/router_rate", f"{pairs:,.0f}")
        add("expert slots that differ", "mismatch/slot_rate", "the same")
        add("tokens that differ in any layer", "mismatch/token_any_rate", f"{tokens:,}")
        for layer, share in enumerate(row["mismatch/by_layer"]):
            table.add_row(f"  MoE layer {layer}", f"{share:.3%}", "", f"{tokens:,}")
        console.print(table)
        if not found:
            console.print(
                "no intervals: they are by prompt, and --dump-samples says how many sequences of "
                "a dump answer one.",
                soft_wrap=True,
            )
    else:
        console.print("a dense model: no routes to compare")
    if "conditional/router_rate" in row:
        trainer, engine = (
            max(row[f"noise/{side}_{kind}/router_rate"] for kind in ("repeat", "batch_shape"))
            for side in ("trainer", "engine")
        )
        console.print(
            f"noise floor: trainer {trainer:.3%}, engine {engine:.3%} of routers; held to the "
            f"rollout's routes, {row['conditional/router_rate']:.3%} would still choose otherwise "
            "(conditional)",
            soft_wrap=True,
        )
    if "logp_gap/k3" in row:
        parts = ""
        if "gap/numerics/mean_abs" in row:
            numerics, routing = (
                row[f"gap/{term}/mean_abs"] for term in ("numerics", "engine_routing")
            )
            parts = f"; of it numerics {numerics:.2e}, routing {routing:.2e}"
        console.print(
            f"log-prob gap mean |d| {row['logp_gap/mean_abs']:.2e} (95% interval "
            f"{_between(found['logp_gap/mean_abs'], '.2e')}), k3 {row['logp_gap/k3']:.2e}"
            f"{parts}",
            soft_wrap=True,
        )
