"""How far an engine and the trainer differ on the same weights, without any training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.report import write_report
from moe_upgrpo.rollout.base import SamplingConfig
from moe_upgrpo.rollout.engines import EngineName, make_engine
from moe_upgrpo.routing import RoutingCounts, compare_routes
from moe_upgrpo.store import RunFolder, TokenLogWriter
from moe_upgrpo.train import alarms, analysis, record


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Compare a rollout engine with the Megatron trainer on one checkpoint, or two route dumps."""

    model: Path | None = None
    """Hugging Face checkpoint folder (qwen3_moe) with its tokenizer."""
    prompts: Path | None = None
    """Text file, one prompt a line."""
    samples: int = 8
    """Responses to each prompt."""
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    engine: EngineName = "hf"
    """Rollout engine: hf (transformers), vllm or sglang."""
    engine_url: str | None = None
    """A running server of vllm or sglang, http://HOST:PORT. None: sglang's is started here."""
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trainer."""
    micro_batch: int = 64
    output_dir: Path = Path("runs/probe")
    """Where the report goes; must not hold another run."""
    rollout_routes: Path | None = None
    """In place of a model: expert ids [tokens, layers, top-k] of the rollout, as .npy, and ..."""
    train_routes: Path | None = None
    """... of the trainer: row t of both belongs to the same token."""
    num_experts: int | None = None
    """Experts in each layer; needed with the two dumps."""

    def __post_init__(self):
        dumps = (self.rollout_routes, self.train_routes, self.num_experts)
        of_model = (self.model, self.prompts)
        if not (all(dumps) and not any(of_model)) and not (all(of_model) and not any(dumps)):
            raise UserError(
                "give either --model and --prompts, or --rollout-routes, --train-routes and "
                "--num-experts."
            )
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: at least 1 is needed.")


def probe(config: ProbeConfig) -> None:
    """Print the mismatch and write the report of a run without training."""
    console = Console(highlight=False)
    run = RunFolder(config.output_dir)
    run.check_free()
    if config.model is None:
        counts = _compare_dumps(config)
        about = {"num_experts": config.num_experts, "top_k": counts.top_k}
        about |= {"moe_layers": list(range(counts.num_layers))}
        RunFolder.create(run.path, asdict(config) | {"loss": "none (probe of two dumps)"} | about)
        row = {"step": 1} | record.measured(record.routing_sums(counts))
        run.append_metrics(row)
        _show(console, counts)
    else:
        with groups.process_groups(Layout(), seed=config.seed):
            counts, row = _probe_model(config, run)
        _show(console, counts, row)
    write_report([config.output_dir], config.output_dir / "report.html")
    console.print(f"report: {config.output_dir / 'report.html'}", soft_wrap=True)


def _compare_dumps(config: ProbeConfig) -> RoutingCounts:
    def load(path: Path) -> torch.Tensor:
        try:
            return torch.from_numpy(np.load(path))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not an .npy array of expert ids: {error}") from None

    return compare_routes(
        load(config.rollout_routes), load(config.train_routes), num_experts=config.num_experts
    )


def _probe_model(config: ProbeConfig, run: RunFolder) -> tuple[RoutingCounts, dict]:
    try:
        prompts = [line for line in config.prompts.read_text().splitlines() if line]
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise UserError(f"{config.prompts} or the tokenizer of {config.model}: {error}") from None
    if not prompts:
        raise UserError(f"{config.prompts} holds no prompt: one a line is needed.")
    sampling = SamplingConfig(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    actor = MegatronActor(
        config.model,
        Layout(),
        dtype=config.dtype,
        temperature=config.temperature,
        micro_batch_size=config.micro_batch,
    )
    prompt_ids = [np.array(tokenizer(prompt).input_ids) for prompt in prompts]
    engine = make_engine(
        config.engine,
        config.model,
        dtype=config.engine_dtype,
        device=groups.device(),
        max_tokens=max(map(len, prompt_ids)) + config.max_new_tokens,
        seed=config.seed,
        url=config.engine_url,
    )
    rollouts = engine.generate(
        prompt_ids,
        sampling,
        samples_per_prompt=config.samples,
        seed=config.seed,
    )
    samples = [
        Sample(
            tokens=np.concatenate([r.prompt_ids, r.response_ids]), prompt_length=len(r.prompt_ids)
        )
        for r in rollouts
    ]
    if not actor.layer_ids:
        raise UserError(f"{config.model} is a dense model: it has no routes to compare.")
    native = actor.score(samples, record=("routes", "margins", "gates"))
    held = [replace(s, routes=r.routes) for s, r in zip(samples, rollouts, strict=True)]
    old = analysis.OldScores(
        native=native,
        held=actor.score(held, record=("routes", "gates")),
        analysed=True,
        counterpart=[s.log_probs for s in native],  # nothing was updated
    )
    passes = list(zip(*analysis.engine_passes(engine, samples), strict=True))
    noise = analysis.trainer_noise_floor(actor, samples) | analysis.engine_noise_floor(
        passes, samples, rollouts, num_experts=actor.num_experts
    )
    nothing = np.zeros(len(rollouts), np.float32)
    step = record.StepRecord(
        first_sequence=0,
        group=config.samples,
        replay="none",
        weight_version=0,
        rollouts=rollouts,
        rewards=nothing,
        advantages=nothing,
        old=old,
        reference=None,
        updates=[],
        logp_train=[s.log_probs for s in native],
        clipped=[np.zeros(len(s.log_probs), bool) for s in native],
        gradient_weight=[np.zeros(len(s.log_probs), np.float32) for s in native],
        noise=noise,
        num_experts=actor.num_experts,
        updates_counted=0,
    )
    RunFolder.create(
        run.path,
        asdict(config)
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
    TokenLogWriter(
        run.tokens,
        rank=0,
        layer_ids=actor.layer_ids,
        top_k=actor.top_k,
        num_experts=actor.num_experts,
    ).write(1, step.token_rows())
    # Nothing was rewarded or updated: what says so would only look like a result.
    row = {"step": 1} | {
        name: value
        for name, value in (record.measured(step.sums()) | step.maxima()).items()
        if not name.startswith(
            ("reward/", "ratio/", "staleness/", "gap/update", "gap/routing_shift")
        )
    }
    run.append_metrics(row)
    engine.close()
    return step.divergence, row


def _show(console: Console, counts: RoutingCounts, row: dict | None = None) -> None:
    table = Table("mismatch", "rate", "of", box=None)
    for name, rate, of in (
        ("routers that differ", counts.router_mismatch_rate, counts.routers_compared),
        ("expert slots that differ", counts.slot_mismatch_rate, counts.slots_compared),
        ("tokens that differ in any layer", counts.token_any_rate, counts.tokens_compared),
    ):
        table.add_row(name, f"{rate:.3%}", f"{of:,}")
    for layer, rate in enumerate(counts.router_mismatch_by_layer.tolist()):
        table.add_row(f"  MoE layer {layer}", f"{rate:.3%}", f"{counts.tokens_compared:,}")
    console.print(table)
    if row is None:
        return
    floors = {
        side: max(row[f"noise/{side}_{kind}/router_rate"] for kind in ("repeat", "batch_shape"))
        for side in ("trainer", "engine")
    }
    console.print(
        f"noise floor: trainer {floors['trainer']:.3%}, engine {floors['engine']:.3%} of routers; "
        f"held to the rollout's routes, {row['conditional/router_rate']:.3%} would still choose "
        f"otherwise (conditional)\nlog-prob gap mean |d| "
        f"{row['logp_gap/mean_abs']:.2e}, k3 {row['logp_gap/k3']:.2e}; of it numerics "
        f"{row['gap/numerics/mean_abs']:.2e}, routing {row['gap/engine_routing/mean_abs']:.2e}",
        soft_wrap=True,
    )
    for name in ("mismatch-above-noise", "large-log-prob-gap"):
        if alarms.ALARMS[name].fires(row):
            console.print(f"ALARM {name}: {alarms.ALARMS[name].means}", soft_wrap=True)
