"""Padded micro-batches beside packed ones, in one process: what is computed, and the time it takes.

    OMP_NUM_THREADS=1 python -m benchmarks.micro.packing [--model 10M] [--rounds 7]

64 sequences of lognormal lengths up to 256 tokens, the same in all. "counted": micro-batches of 16
in the order drawn. "budget": --micro-batch-tokens 4096, sorted by length. "packed": the same with
--packing. Each round scores and updates once with each in turn; printed are the share of the rows
of a forward that are real tokens, and the processor time as ratios to "counted" of the same round:
medians with their quartiles. `train` is the model of `make train`, `10M` ten million parameters.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.micro.beside import TEN_MILLION
from benchmarks.studies.exact.report import table
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.warm_start import tiny_model_config

LONGEST, MEDIAN, SIGMA = 256, 95, 0.6  # a mean of about 110
PROMPT = 6
LOSS = PolicyLossConfig.preset("up-grpo")


def made_samples(sequences: int, vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(np.log(MEDIAN), SIGMA, sequences))
    samples = []
    for length in np.clip(drawn, PROMPT + 1, LONGEST).astype(int):
        old = np.full(length - PROMPT, -1.0, np.float32)
        samples.append(
            Sample(
                tokens=rng.integers(2, vocabulary, length),
                prompt_length=PROMPT,
                old_log_probs=old,
                rollout_log_probs=old,
                advantage=float(rng.normal()),
            )
        )
    return samples


def main(
    model: Literal["train", "10M"] = "train",
    rounds: int = 7,
    sequences: int = 64,
    micro_batch: int = 16,
    tokens: int = 16 * LONGEST,
) -> None:
    silence_upstream()
    config = tiny_model_config()
    if model == "10M":
        config = Qwen3MoeConfig(**TEN_MILLION, norm_topk_prob=True, eos_token_id=1)
    config.max_position_embeddings = LONGEST
    limits = {
        "counted": {"micro_batch_size": micro_batch},
        "budget": {"micro_batch_tokens": tokens},
        "packed": {"micro_batch_tokens": tokens, "packing": True},
    }
    samples = made_samples(sequences, config.vocab_size)
    lengths = [len(sample.tokens) for sample in samples]
    with tempfile.TemporaryDirectory() as folder, groups.process_groups(Layout()):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
        settings = OptimizerSettings(lr=0.0)
        actors = {
            name: MegatronActor(Path(folder), Layout(), optimizer=settings, **limit)
            for name, limit in limits.items()
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds + 1):
            for name, actor in actors.items():
                for call in ("score", "update"):
                    begin = time.process_time()
                    actor.score(samples) if call == "score" else actor.update(samples, LOSS)
                    seconds.setdefault((name, call), []).append(time.process_time() - begin)
        shares = {
            name: sum(lengths) / sum(i.tokens_BS.numel() for i in _inputs(actor, samples))
            for name, actor in actors.items()
        }
    print(
        f"{sequences} sequences of {np.mean(lengths):.0f} tokens, {max(lengths)} at most; {model}"
    )
    rows = []
    for name in limits:
        cells = [name, f"{shares[name]:.2f}"]
        for call in ("score", "update"):
            pairs = zip(seconds[name, call][1:], seconds["counted", call][1:], strict=True)
            ratios = [mine / counted for mine, counted in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        rows.append(cells)
    print(table(["", "real rows", "score", "update"], rows))


def _inputs(actor: MegatronActor, samples: list[Sample]) -> list:
    return actor._work(samples, actor.limit).inputs


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
