"""Routing mismatch against precision, engine, size, depth, experts, top-k, position and staleness.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.routing_mismatch --cache-dir runs/cache \
        [--vllm-python PYTHON] [--sglang] [--page docs/routing-mismatch.md]

Run from the repository's root. Every metric is the trainer's own (`record`, `train.analysis`,
`routing`): a rollout engine samples, a Megatron actor scores the same tokens with its routers free
and held to the engine's routes. Writes a folder for each axis: runs.parquet (a row for each model,
seed, engine and trainer), sequences.parquet (sums of each sequence; intervals are by prompt),
positions.parquet, layers.parquet and about.json, anew after each run. --axes runs some
of the axes and leaves the others' folders alone; --read computes nothing and makes tables and
figures again; --quick takes seconds on tiny models and shows that it runs, nothing else.

vLLM and SGLang have environments of their own (docs/engines.md). --vllm-python is a Python that has
vLLM and this package; --sglang starts SGLang's server (SGLANG_PYTHON). Engines that are not given
are named in the page as not run.

Sequences of a run: N. MoE layers: L. Experts per token: K.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
import tyro
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from benchmarks.studies.made import processor
from moe_upgrpo import kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import group_advantages
from moe_upgrpo.losses.config import PolicyLossConfig
from moe_upgrpo.losses.kl import k3
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.record import StepRecord, Sums, measured
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.engines import EngineName, EngineWeights, make_engine
from moe_upgrpo.rollout.hf import no_progress_bar
from moe_upgrpo.rollout.sglang import SGLangEngine
from moe_upgrpo.routing import ComparisonKind, RoutingDivergence
from moe_upgrpo.routing.clustering import clustering
from moe_upgrpo.stats import ratio_tails
from moe_upgrpo.tasks.arithmetic import EOS_ID, VOCABULARY, ArithmeticTask
from moe_upgrpo.train import analysis
from moe_upgrpo.train.record import record_without_update
from moe_upgrpo.train.warm_start import WarmStartConfig, tiny_model_config, warm_start

Axis = Literal[
    "precision", "trained", "depth", "experts", "top-k", "position", "size", "engine", "staleness"
]
MODULE = "benchmarks.studies.routing_mismatch"
INITIALIZER_RANGE = 0.06  # of a hidden size of 128: weights this wide make routers that decide
POSITION_BINS = 12
NEVER_SAMPLED = len(VOCABULARY)  # used as the end token: all responses then have one length


@dataclass(frozen=True, kw_only=True)
class Model:
    """The default is the base of the axes: 64 small experts, top-8, 4 layers, 3.4M parameters."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 64
    intermediate: int = 32
    top_k: int = 8
    weights: Literal["random", "trained", "trained, random routers"] = "random"


@dataclass(frozen=True, kw_only=True)
class Side:
    """The engine that sampled."""

    engine: EngineName = "hf"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: EngineWeights = "as-trained"

    @property
    def precision(self) -> str:
        short = {"bfloat16": "bf16", "float32": "fp32"}[self.dtype]
        return "FP8 weights" if self.weights == "fp8" else short


@dataclass(frozen=True, kw_only=True)
class Study:
    """Some models, each at `seeds` seeds, with every engine side against every trainer type."""

    axis: Axis
    models: tuple[tuple[str, Model], ...]  # the setting's name on the axis, and the model
    sides: tuple[Side, ...] = (Side(),)
    trainers: tuple[str, ...] = ("float32",)
    seeds: int = 3
    prompts: int = 16
    samples: int = 2
    prompt_tokens: int = 8
    new_tokens: int = 24
    eos: int = NEVER_SAMPLED


FP32, BF16, FP8 = Side(dtype="float32"), Side(), Side(weights="fp8")
BASE = Model()
DEFAULT = Model(experts=8, intermediate=64, top_k=2)  # the model of `make train`
SIZES = (
    ("4 layers, 8 experts, top-2", DEFAULT),
    ("8 layers, 128 experts, top-8", Model(layers=8, experts=128)),
    ("12 layers, 128 experts, top-8", Model(layers=12, hidden=256, experts=128, intermediate=64)),
    (
        "20 layers, 128 experts, top-8",
        Model(layers=20, hidden=768, heads=12, experts=128, intermediate=96),
    ),
)


def studies(quick: bool) -> list[Study]:
    if quick:
        small = Model(layers=2, hidden=64, heads=2, experts=8, intermediate=32, top_k=2)
        few = dict(seeds=2, prompts=2, samples=2, new_tokens=6)
        return [
            Study(axis="precision", models=(("small", small),), sides=(FP32, BF16, FP8), **few),
            Study(axis="depth", models=(("2", small), ("4", replace(small, layers=4))), **few),
        ]
    warm = ("trained", "trained, random routers")
    both = ("float32", "bfloat16")
    trained = (
        ("64 experts, top-8, trained", replace(BASE, weights=warm[0])),
        ("64 experts, top-8, routers left random", replace(BASE, weights=warm[1])),
        ("8 experts, top-2, trained", replace(DEFAULT, weights=warm[0])),
    )
    return [
        Study(
            axis="precision",
            models=(("64 experts, top-8", BASE), ("8 experts, top-2", DEFAULT)),
            sides=(FP32, BF16, FP8),
            trainers=both,
        ),
        Study(
            axis="trained", models=trained, sides=(BF16, FP8), trainers=both, seeds=1, prompts=48
        ),
        Study(
            axis="depth",
            models=tuple((str(n), replace(BASE, layers=n)) for n in (2, 4, 8, 16, 48)),
            sides=(BF16, FP8),
        ),
        Study(
            axis="experts",
            models=tuple((str(n), replace(BASE, experts=n)) for n in (16, 32, 64, 128, 256)),
            sides=(BF16, FP8),
        ),
        Study(
            axis="top-k",
            # Top-1 is left out: Megatron takes its gates from another softmax.
            models=tuple((str(k), replace(BASE, top_k=k)) for k in (2, 4, 8, 16)),
        ),
        Study(
            axis="position", models=(("256 tokens", BASE),), prompts=8, samples=2, new_tokens=256
        ),
        Study(axis="size", models=SIZES[:-1], sides=(BF16, FP8), trainers=both),
        Study(
            axis="size",
            models=SIZES[-1:],
            sides=(BF16, FP8),
            trainers=both,
            seeds=1,
            samples=1,
            new_tokens=16,
        ),
    ]


# --- models


def saved_model(
    model: Model, seed: int, folder: Path, positions: int, *, eos: int = NEVER_SAMPLED
) -> Path:
    """A random-init checkpoint, written once. Widths are initialised so that products keep the
    scale they have at a hidden size of 128."""
    name = "-".join(str(v) for v in asdict(model).values()) + f"-{seed}-{positions}-{eos}"
    path = folder / name
    if path.exists():
        return path
    config = tiny_model_config(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.heads // 2,
        head_dim=model.hidden // model.heads,
        experts=model.experts,
        expert_intermediate=model.intermediate,
        top_k=model.top_k,
        max_positions=positions,
    )
    config.initializer_range = INITIALIZER_RANGE * (128 / model.hidden) ** 0.5
    config.eos_token_id = eos
    torch.manual_seed(seed)
    with no_progress_bar():
        Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def warm_model(model: Model, cache_dir: Path) -> Path:
    return warm_start(
        ArithmeticTask(2),
        tiny_model_config(
            layers=model.layers,
            hidden=model.hidden,
            experts=model.experts,
            expert_intermediate=model.intermediate,
            top_k=model.top_k,
        ),
        settings=WarmStartConfig(random_router=model.weights != "trained"),
        cache_dir=cache_dir,
        progress=lambda line: print(line, flush=True),
    )


# --- one engine against one trainer


@dataclass(kw_only=True)
class Played:
    """Samples of an engine, and its routes in two passes over the whole sequences."""

    rollouts: list[Rollout]
    passes: list[list[np.ndarray]]
    group: int  # responses to each prompt, one after the other

    @property
    def samples(self) -> list[Sample]:
        return [
            Sample(
                tokens=np.concatenate([r.prompt_ids, r.response_ids]),
                prompt_length=len(r.prompt_ids),
            )
            for r in self.rollouts
        ]


def played(
    engine: Engine, prompts: Sequence[np.ndarray], *, samples: int, new_tokens: int, seed: int
) -> Played:
    rollouts = engine.generate(
        prompts,
        SamplingConfig(max_new_tokens=new_tokens),
        samples_per_prompt=samples,
        seed=seed,
    )
    found = Played(rollouts=rollouts, passes=[], group=samples)
    passes = analysis.engine_passes(engine, found.samples)
    found.passes = [list(one) for one in zip(*passes, strict=True)]
    return found


@dataclass(kw_only=True)
class Measured:
    """A run's row, and its tables: `sequences`, `positions`, `layers`."""

    row: dict
    tables: dict[str, pd.DataFrame]


def sequence_sums(
    divergence: RoutingDivergence, lengths: Sequence[int], comparison: str, *, group: int
) -> pd.DataFrame:
    """Sums over each sequence's response tokens."""
    overlap_NL = divergence.overlap.numpy().astype(np.int64)
    K, L = divergence.top_k, divergence.num_layers
    routers_N = divergence.routers_per_token.numpy()
    starts = np.cumsum([0, *lengths[:-1]])
    return pd.DataFrame(
        {
            "comparison": comparison,
            "sequence": np.arange(len(lengths)),
            "prompt": np.arange(len(lengths)) // group,
            "tokens": np.asarray(lengths),
            "pairs": np.asarray(lengths) * L,
            "slots_compared": np.asarray(lengths) * L * K,
            "routers": np.add.reduceat(routers_N, starts),
            "slots": np.add.reduceat((K - overlap_NL).sum(axis=1), starts),
            "any": np.add.reduceat((routers_N > 0).astype(int), starts),
        }
    )


def gap_sums(gaps: Sequence[np.ndarray], prefix: str = "") -> dict[str, list[float]]:
    """Sums over each sequence's d = log p_train − log p_rollout: Σ|d|, Σ k3, tokens beyond F(2)."""
    gaps = [np.asarray(d_T, np.float64) for d_T in gaps]
    zero = [torch.zeros(len(d_T), dtype=torch.float64) for d_T in gaps]
    return {
        f"{prefix}gap": [float(np.abs(d_T).sum()) for d_T in gaps],
        f"{prefix}k3": [
            float(k3(sampled, torch.from_numpy(d_T)).sum())
            for sampled, d_T in zip(zero, gaps, strict=True)
        ],
        f"{prefix}above_2": [ratio_tails(d_T, (2.0,))[2.0][0] for d_T in gaps],
    }


def compared(
    actor: MegatronActor,
    play: Played,
    *,
    noise: bool,
    updated: Sequence[np.ndarray] | None = None,
    counterpart: Sequence[np.ndarray] | None = None,
    scored: tuple | None = None,
) -> tuple[StepRecord, Measured]:
    """Rollout against trainer, as a step of training records it.

    updated, counterpart: L(θ, native) and L(θ, n(θ_old)) after updates, where the actor has had
    some; `scored` are then its (native, held) scores from before.
    """
    samples = play.samples
    if not samples:
        raise UserError("no sequences: nothing to compare")
    native, held = scored or scores_of(actor, play)
    floors = analysis.NoiseFloor()
    if noise:
        floors = analysis.trainer_noise_floor(actor, samples)
        floors |= analysis.engine_noise_floor(
            play.passes, samples, play.rollouts, num_experts=actor.num_experts
        )
    before = [s.log_probs for s in native]
    step = record_without_update(
        rollouts=play.rollouts,
        old=analysis.OldScores(
            native=native,
            held=held,
            analysed=True,
            counterpart=list(counterpart) if counterpart else before,
        ),
        num_experts=actor.num_experts,
        group=play.group,
        logp_train=updated,
    )
    return step, tabled(step, play, before, held, floors.sums)


def scores_of(actor: MegatronActor, play: Played) -> tuple:
    held = [replace(s, routes=r.routes) for s, r in zip(play.samples, play.rollouts, strict=True)]
    return (
        actor.score(play.samples, record=("routes", "margins", "gates")),
        actor.score(held, record=("routes", "gates")),
    )


def tabled(
    step: StepRecord, play: Played, before: list[np.ndarray], held: Sequence[Scored], floors: Sums
) -> Measured:
    lengths = [len(r.response_ids) for r in play.rollouts]
    ends = np.cumsum(lengths)[:-1]
    rows = step.token_rows()
    free, conditional = step.divergence, step.conditional
    sequences = pd.concat(
        [
            sequence_sums(free, lengths, "free-running", group=play.group).assign(
                **gap_sums(
                    [d - r.logp_rollout for d, r in zip(before, play.rollouts, strict=True)]
                ),
                **gap_sums(
                    [
                        s.log_probs - r.logp_rollout
                        for s, r in zip(held, play.rollouts, strict=True)
                    ],
                    "replayed_",
                ),
                **{
                    name: [float(np.abs(part).sum()) for part in np.split(rows[name], ends)]
                    for name in rows
                    if name.startswith("gap_")
                },
            ),
            sequence_sums(conditional, lengths, "conditional", group=play.group),
        ],
        ignore_index=True,
    )
    position_N = np.concatenate([np.arange(n) for n in lengths])
    bins_N = np.floor(
        np.log2(1 + position_N) if max(lengths) > 64 else position_N * 4 / max(lengths)
    ).astype(int)
    positions = (
        pd.DataFrame(
            {
                "sequence": rows["sequence"],
                "prompt": rows["prompt"],
                "bin": bins_N.clip(max=POSITION_BINS),
                "first": position_N,
                "last": position_N,
                "tokens": 1,
                "pairs": free.num_layers,
                "routers": rows["layers_mismatched"],
                "any": rows["layers_mismatched"] > 0,
                "conditional": rows["layers_mismatched_conditional"],
                "prefix_mismatched": rows["prefix_mismatched"],
            }
        )
        .groupby(["sequence", "prompt", "bin"], as_index=False)
        .agg(
            {"first": "min", "last": "max"}
            | dict.fromkeys(
                ("tokens", "pairs", "routers", "any", "conditional", "prefix_mismatched"), "sum"
            )
        )
    )
    layers = pd.DataFrame(
        {
            "layer": np.arange(free.num_layers),
            "tokens": free.tokens_compared,
            "free_running": free.routers_mismatched_by_layer.numpy(),
            "conditional": conditional.routers_mismatched_by_layer.numpy(),
        }
    )
    found = clustering(free)
    row = {
        name: value
        for name, value in measured(step.sums() | floors).items()
        if name.startswith(("noise/", "mismatch/", "conditional/", "logp_gap/", "gap/"))
        and not isinstance(value, list)
    }
    row |= {
        "any_if_independent": found.token_any_rate_independent,
        "dispersion": found.dispersion,
        "tokens": free.tokens_compared,
        "sequences": len(lengths),
        "margin_median": float(np.median(rows["margin_min"])),
        "margin_median_of_flips": float(
            np.median(rows["margin_min"][rows["layers_mismatched"] > 0])
        )
        if free.tokens_mismatched
        else float("nan"),
    }
    tables = {"sequences": sequences, "positions": positions, "layers": layers}
    return Measured(row=row, tables=tables)


# --- axes


def run_study(study: Study, work: Path, cache_dir: Path) -> Iterator[Measured]:
    positions = max(64, study.prompt_tokens + study.new_tokens)
    for setting, model in study.models:
        folders = [
            saved_model(model, seed, work, positions, eos=study.eos)
            if model.weights == "random"
            else warm_model(model, cache_dir)
            for seed in range(study.seeds)
        ]
        begun = time.process_time()
        plays = {
            (side, seed): play
            for side in study.sides
            for seed, play in enumerate(_plays(study, model, side, folders))
        }
        seconds = time.process_time() - begun
        for seed, folder in enumerate(folders):
            for trainer in study.trainers:
                actor = MegatronActor(folder, Layout(), dtype=trainer)
                for side in study.sides:
                    begun = time.process_time()
                    _, found = compared(actor, plays[side, seed], noise=seed == 0)
                    seconds += time.process_time() - begun
                    found.row |= _about(study.axis, setting, model, seed, side, trainer, actor)
                    found.row["cpu_s"] = seconds
                    seconds = 0.0
                    _report(found.row)
                    yield found
                del actor
                gc.collect()


def _plays(study: Study, model: Model, side: Side, folders: list[Path]) -> list[Played]:
    """Samples of every seed's model from one engine, which gets the weights as from a trainer."""
    if side.engine == "sglang":  # needs more time to start than `make_engine` gives
        engine = SGLangEngine(folders[0], side.dtype, timeout=600, start_timeout=1800)
    else:
        engine = make_engine(
            side.engine,
            folders[0],
            dtype=side.dtype,
            weights=side.weights,
            device=groups.device(),
            max_tokens=study.prompt_tokens + study.new_tokens,
        )
    found = []
    with closing(engine):
        for seed, folder in enumerate(folders):
            if seed:
                engine.update_weights(load_file(folder / "model.safetensors").items(), version=seed)
            found.append(
                played(
                    engine,
                    _prompts(study, model, seed),
                    samples=study.samples,
                    new_tokens=study.new_tokens,
                    seed=seed,
                )
            )
    return found


def _prompts(study: Study, model: Model, seed: int) -> list[np.ndarray]:
    if model.weights == "random":
        rng = np.random.default_rng(seed)
        shape = (study.prompts, study.prompt_tokens)
        return list(rng.integers(3, len(VOCABULARY), size=shape))
    problems = ArithmeticTask(2).training_problems(study.prompts, seed=seed, step=1)
    return [problem.prompt_ids for problem in problems]


def _about(axis, setting, model: Model, seed, side: Side, trainer, actor: MegatronActor) -> dict:
    return asdict(model) | {
        "axis": axis,
        "setting": setting,
        "seed": seed,
        "engine": side.engine,
        "rollout": side.precision,
        "trainer": {"float32": "fp32", "bfloat16": "bf16"}[trainer],
        "parameters": actor.parameter_count(),
        "updates": 0,
    }


def _report(row: dict) -> None:
    print(
        f"{row['axis']}: {row['setting']}, {row['engine']} {row['rollout']} against "
        f"{row['trainer']}, seed {row['seed']}: routers {row['mismatch/router_rate']:.2%}, "
        f"tokens {row['mismatch/token_any_rate']:.1%}, k3 {row['logp_gap/k3']:.1e}, "
        f"{row['cpu_s']:.0f} s of CPU",
        flush=True,
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """A few optimizer steps of GRPO, one for each batch of rollouts of the newest weights."""

    updates: tuple[int, ...] = (1, 2, 4, 8)
    prompts: int = 16
    samples: int = 8
    lr: float = 1e-4
    seeds: int = 3
    max_tokens: int = 8


def run_staleness(models, training: Training, cache_dir: Path) -> Iterator[Measured]:
    """Two axes from one training: the mismatch of an engine that has the trainer's weights after u
    updates ("training step"), and of one that kept those from before them ("staleness")."""
    task, side = ArithmeticTask(2), BF16
    for setting, model in models:
        folder = warm_model(model, cache_dir)
        for seed in range(training.seeds):
            actor = MegatronActor(
                folder, Layout(), optimizer=OptimizerSettings(lr=training.lr, warmup_steps=0)
            )
            engine = make_engine(
                "hf", folder, dtype=side.dtype, device=groups.device(), max_tokens=64
            )

            def play(step, engine=engine, seed=seed):
                problems = task.training_problems(training.prompts, seed=seed, step=step)
                found = played(
                    engine,
                    [p.prompt_ids for p in problems],
                    samples=training.samples,
                    new_tokens=training.max_tokens,
                    seed=1000 * seed + step,
                )
                return problems, found

            problems, found = play(1)
            first = found
            scored = scores_of(actor, first)
            for update in range(training.updates[-1] + 1):
                begun = time.process_time()
                about = _about("training step", setting, model, seed, side, "float32", actor)
                about["updates"] = update
                if update in (0, *training.updates):
                    _, fresh = compared(actor, found, noise=False)
                    fresh.row |= about | {"cpu_s": time.process_time() - begun}
                    _report(fresh.row)
                    yield fresh
                if update in training.updates:
                    stale = _stale(actor, first, scored)
                    stale.row |= about | {
                        "axis": "staleness",
                        "cpu_s": time.process_time() - begun,
                    }
                    yield stale
                if update == training.updates[-1]:
                    break
                rewards = torch.tensor(
                    [
                        task.reward(problems[i // training.samples], r.response_ids)
                        for i, r in enumerate(found.rollouts)
                    ]
                )
                advantages = group_advantages(rewards, training.samples)
                actor.update(
                    [
                        replace(s, advantage=float(a))
                        for s, a in zip(found.samples, advantages, strict=True)
                    ],
                    PolicyLossConfig.preset("grpo"),
                )
                engine.update_weights(actor.export_weights(), version=update + 1)
                problems, found = play(update + 2)
            engine.close()
            del actor
            gc.collect()


def _stale(actor: MegatronActor, first: Played, scored: tuple) -> Measured:
    """The first rollouts, scored before any update, against the present weights."""
    native, _ = scored
    now = actor.score(first.samples, record=("routes",))
    on_old = actor.score(
        [replace(s, routes=n.routes) for s, n in zip(first.samples, native, strict=True)]
    )
    _, found = compared(
        actor,
        first,
        noise=False,
        scored=scored,
        updated=[s.log_probs for s in now],
        counterpart=[s.log_probs for s in on_old],
    )
    lengths = [len(r.response_ids) for r in first.rollouts]
    sides = {
        "engine before updates, trainer after": [r.routes for r in first.rollouts],
        "trainer before updates, trainer after": [s.routes for s in native],
    }
    frames = [found.tables["sequences"].query("comparison == 'free-running'")]
    frames[0] = frames[0].assign(
        **gap_sums(
            [s.log_probs - r.logp_rollout for s, r in zip(now, first.rollouts, strict=True)],
            "stale_",
        )
    )
    for name, routes in sides.items():
        divergence = analysis.compare_responses(
            routes,
            [s.routes for s in now],
            first.samples,
            num_experts=actor.num_experts,
            kind=ComparisonKind.FREE_RUNNING,
        )
        frames.append(sequence_sums(divergence, lengths, name, group=first.group))
    found.tables["sequences"] = pd.concat(frames, ignore_index=True)
    return found


# --- the command


@dataclass
class Arguments:
    output_dir: Path = Path("runs/routing-mismatch")
    cache_dir: Path = Path("runs/cache")
    """Where warm starts are kept."""
    axes: tuple[Axis, ...] = get_args(Axis)
    vllm_python: Path | None = None
    """A Python with vLLM and this package; None: vLLM is left out, and the page says so."""
    sglang: bool = False
    """Start SGLang's server, by the Python that SGLANG_PYTHON names."""
    engine_names: tuple[EngineName, ...] = ("hf",)
    """Names of the axis `engine` that are run in this process."""
    quick: bool = False
    read: bool = False
    """Compute nothing: read the output folder."""
    page: Path | None = None
    """Page with the generated sections to fill; its figures go to img/routing-mismatch beside."""


TABLES = ("runs", "sequences", "positions", "layers")


def engine_study(name: EngineName) -> Study:
    sides = (Side(engine=name, dtype="float32"), Side(engine=name))
    # vLLM accepts no end token from outside the vocabulary.
    return Study(axis="engine", models=((name, BASE),), sides=sides, eos=EOS_ID)


def results(axis: Axis, arguments: Arguments, work: Path) -> Iterator[tuple[str, Measured]]:
    """Runs of an axis, each with the folder that it belongs in."""
    planned = [study for study in studies(arguments.quick) if study.axis == axis]
    if axis == "engine" and not arguments.quick:
        planned += [engine_study(name) for name in arguments.engine_names]
    for study in planned:
        part = f"{axis}-{study.sides[0].engine}" if axis == "engine" else axis
        yield from ((part, one) for one in run_study(study, work, arguments.cache_dir))
    if axis == "staleness" and not arguments.quick:
        models = (
            (
                "64 experts, top-8, routers left random",
                replace(BASE, weights="trained, random routers"),
            ),
            ("8 experts, top-2, trained", replace(DEFAULT, weights="trained")),
        )
        found = run_staleness(models, Training(), arguments.cache_dir)
        yield from ((axis, one) for one in found)


def save(found: list[Measured], folder: Path, about: dict) -> None:
    """Replace the tables of an axis in its folder.

    Raises UserError where there is nothing to write: no success without data.
    """
    if not found:
        raise UserError("no run was made: nothing to save")
    key = ["axis", "setting", "seed", "engine", "rollout", "trainer", "updates"]
    frames = {"runs": pd.DataFrame([one.row for one in found])}
    names = ["/".join(str(one.row[k]) for k in key) for one in found]
    frames["runs"]["run"] = names
    for table in TABLES[1:]:
        frames[table] = pd.concat(
            [one.tables[table].assign(run=run) for one, run in zip(found, names, strict=True)],
            ignore_index=True,
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        if name != "runs":  # sums of 32-bit log-probs
            floats = dict.fromkeys(frame.select_dtypes("float64"), "float32")
            frame = frame.astype(floats)
        frame.to_parquet(folder / f"{name}.parquet", compression="zstd")
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def compute(axis: Axis, arguments: Arguments, work: Path) -> None:
    found, begun, cpu = {}, time.perf_counter(), time.process_time()
    for part, one in results(axis, arguments, work):
        found.setdefault(part, []).append(one)
        about = {
            "cpu": processor(),
            "threads": torch.get_num_threads(),
            "clock_s": round(time.perf_counter() - begun),
            "cpu_s": round(time.process_time() - cpu),
            "runs": len(found[part]),
        }
        save(found[part], arguments.output_dir / part, about)


def main(arguments: Arguments) -> int:
    from benchmarks.studies.routing_mismatch_report import Report

    silence_upstream()
    kernels.pin()
    out = arguments.output_dir
    if not arguments.read:
        with tempfile.TemporaryDirectory() as work, groups.process_groups(Layout()):
            for axis in arguments.axes:
                compute(axis, arguments, Path(work))
        others = {"vllm": arguments.vllm_python}
        others["sglang"] = Path(sys.executable) if arguments.sglang else None
        for name, python in others.items():
            if python and "engine" in arguments.axes:
                command = [str(python), "-m", MODULE, "--axes", "engine"]
                command += ["--engine-names", name, "--output-dir", str(out)]
                subprocess.run(command, check=True)
    report = Report.read(out)
    for name, make in report.sections().items():
        print(f"\n## {name}\n\n{make()}")
    if arguments.page:
        report.fill(arguments.page)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments)))
    except UserError as error:
        sys.exit(f"error: {error}")
