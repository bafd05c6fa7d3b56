"""How much of an optimizer step the ranks spend waiting for one another.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/micro/collectives.py --tp 2 --ep 2

Prints the median time of one `MegatronActor.update` of the default tiny model (64 sequences of 10
tokens, as in `make train`), and the share of it spent waiting in collectives, by Python's profiler
on rank 0 (which slows the rest, so the share is a lower bound).
"""

import cProfile
import os
import pstats
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo import kernels
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.warm_start import tiny_model_config

SEQUENCES, REPEATS = 64, 15


def made_samples(share: int = 1) -> list[Sample]:
    """`make train`'s mini-batch, or one of `share` equal parts of it."""
    rng = np.random.default_rng(0)
    ones = np.full(4, -1.0, np.float32)
    return [
        Sample(
            tokens=rng.integers(0, 32, 10),
            prompt_length=6,
            old_log_probs=ones,
            rollout_log_probs=ones,
            advantage=1.0,
        )
        for _ in range(SEQUENCES // share)
    ]


def measure(layout: Layout, model_dir: Path) -> tuple[float, float]:
    with groups.process_groups(layout):
        actor = MegatronActor(model_dir, layout, optimizer=OptimizerSettings())
        samples = made_samples(groups.data_parallel()[1])
        loss = PolicyLossConfig.preset("up-grpo")
        seconds = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            actor.update(samples, loss)
            seconds.append(time.perf_counter() - begin)
        with cProfile.Profile() as profile:
            for _ in range(REPEATS):
                actor.update(samples, loss)
        stats = pstats.Stats(profile)
        waiting = sum(
            row[2] for key, row in stats.stats.items() if "distributed_c10d.wait" in key[2]
        )
        return statistics.median(seconds[3:]), waiting / stats.total_tt


def main(tp: int = 1, ep: int = 1) -> None:
    warnings.filterwarnings("ignore")
    kernels.pin()
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    layout = Layout(tp=tp, ep=ep)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(tiny_model_config()).save_pretrained(folder)
        seconds, waiting = measure(layout, Path(folder))
    if rank == 0:
        print(
            f"{layout} on {ranks} rank(s): update {seconds * 1e3:.0f} ms (median of "
            f"{REPEATS - 3}), waiting {waiting:.0%}"
        )


if __name__ == "__main__":
    tyro.cli(main)
