"""Layers of a real model's shapes against `moe-upgrpo plan`, and a training run."""

from __future__ import annotations

import shutil

import numpy as np
import torch

from benchmarks.gpu import models
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import device, peak_bytes, seconds
from benchmarks.gpu.parity import LOSS
from moe_upgrpo.megatron import groups, memory, plan
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import MicroBatch
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.store import read_metrics
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.loop import train
from moe_upgrpo.train.warm_start import tiny_model_config

PLAN_LIMIT = 0.25  # of the predicted peak


def large_layers(job) -> Outcome:
    """Tokens/s and peak memory of a score and an update, and what plan's arithmetic says."""
    hf = models.config(job.sizes.layer)
    folder = models.checkpoint(
        hf, job.scratch / "large", dtype=torch.bfloat16, device=str(device())
    )
    figures, lines, faults = {}, [], []
    given = {"dtype": "bfloat16"}
    (stage,) = plan.stages(hf, Layout(), 1)
    model = memory.Sizes.of(hf)
    expected = sum(memory.weights(stage, Layout(), 1, **given).values())
    with groups.process_groups(Layout()):
        before = _held()
        actor = MegatronActor(
            folder,
            Layout(),
            dtype="bfloat16",
            micro_batch_size=1,
            recompute="full",
            optimizer=OptimizerSettings(),
        )
        random = np.random.default_rng(0)
        for length in job.sizes.lengths:
            sample = Sample(
                tokens=random.integers(2, model.vocab, length),
                prompt_length=length // 8,
                rollout_log_probs=np.zeros(length - length // 8, np.float32),
                advantage=1.0,
            )
            batch = MicroBatch(sequences=1, length=length)
            kept = memory.activations(model, Layout(), stage, batch, recompute="full", **given)
            space = memory.working_space(model, Layout(), batch, **given)
            calls = {
                "score": lambda sample=sample: actor.score([sample]),
                "update": lambda sample=sample: actor.update([sample], LOSS),
            }
            for what, call in calls.items():
                call()  # the optimizer's state is made in its first step
                head = memory.head(model, Layout(), batch, purpose=what, **given)
                predicted = max(head, space) + sum(kept.values()) * (what == "update")
                measured = peak_bytes(call)
                speed = length / seconds(call, 1)
                figures[f"{what} {length}"] = {
                    "tokens/s": round(speed),
                    "on top, GB": measured / 1e9,
                    "on top by plan, GB": predicted / 1e9,
                }
                lines.append(
                    f"{what} of {length:,}: {speed:,.0f} tokens/s, {measured / 1e9:.3g} GB on top, "
                    f"plan {predicted / 1e9:.3g}"
                )
                if job.on_card and measured > (1 + PLAN_LIMIT) * predicted:
                    faults.append(f"{what} of {length}: more memory than plan says")
        if before is not None:
            held = _held() - before
            figures["held"] = {"GB": held / 1e9, "by plan, GB": expected / 1e9}
            lines.insert(0, f"held {held / 1e9:.3g} GB, plan {expected / 1e9:.3g}")
            if held > 1.05 * expected:
                faults.append("the model and its optimizer hold more than plan says")
    shutil.rmtree(folder)
    return Outcome(line="; ".join(lines), figures=figures, faults=tuple(faults))


def _held() -> int | None:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def run(job) -> Outcome:
    """`moe-upgrpo train` in one process: from the carried warm start, else from random weights."""
    carried = next(iter(sorted(job.carried.glob("cache/warm-start-*"))), None)
    model = carried
    if model is None:
        model = models.checkpoint(tiny_model_config(), job.scratch / "arithmetic")
        arithmetic.save_tokenizer(model)
    config = TrainConfig.of(
        model=model,
        steps=job.sizes.train_steps,
        prompts=job.sizes.train_prompts,
        group=4,
        minibatches=2,
        analyse_every=1,
        eval_every=job.sizes.train_steps,
        eval_problems=8,
        save_every=job.sizes.train_steps,
        report=False,
        output_dir=job.scratch / "run",
    )
    rows = [row for row in read_metrics(train(config)) if row["step"]]
    last = rows[-1]
    names = ("tokens_per_second", "time/generate", "time/update", "time/total", "grad_norm")
    figures = {"start": "warm start" if carried else "random weights"}
    figures |= {name: last[name] for name in names}
    faults = [] if len(rows) == config.run.steps else [f"{len(rows)} of {config.run.steps} steps"]
    if not all(row["grad_norm"] > 0 for row in rows) and (job.on_card and carried):
        faults.append("no gradient")
    return Outcome(
        line=f"{len(rows)} steps from {figures['start']}: {last['tokens_per_second']:,.0f} "
        f"tokens/s in the last, of {last['time/total']:.2g} s ({last['time/generate']:.2g} "
        f"generating, {last['time/update']:.2g} updating)",
        figures=figures,
        faults=tuple(faults),
    )
