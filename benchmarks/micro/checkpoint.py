"""How long a training state takes to save and load, against a raw write and read of its bytes.

    OMP_NUM_THREADS=1 python -m benchmarks.micro.checkpoint [--megabytes 400] [--repeats 3]

One rank, a made-up Qwen3-MoE in fp32, after one step of Adam: 16 bytes a parameter. Its tensors
have half a MB; with `--layers 2 --experts 4` 4 MB, nearer to those of a large model. Saving covers
what a run saves (tensors, digests, manifest, synced), loading what `--resume` loads (digests
checked, then tensors). Raw: the same files written with a sync of each, and read whole, from and to
memory. The four take turns; each figure is the median, in seconds of the clock and of the
processors (which a busy machine changes less), without Python's garbage collection. Files are read
from the page cache.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.store import RunFolder
from moe_upgrpo.train import resume
from moe_upgrpo.train.found import find
from tests.megatron.measured import make_samples

WIDTH = 512


def make_model(folder: Path, megabytes: float, layers: int, experts: int) -> None:
    """Make a model folder whose training state takes about that many MB, by the experts' width."""
    parameters = megabytes * 1e6 / 16
    expert = int(parameters / (layers * experts * 3 * WIDTH))
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=64,
        moe_intermediate_size=max(8, expert // 8 * 8),
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def write_raw(blobs: dict[str, bytes], folder: Path) -> None:
    folder.mkdir()
    for name, blob in blobs.items():
        with (folder / name).open("wb") as file:
            file.write(blob)
            os.fsync(file.fileno())
    shutil.rmtree(folder)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processors, without Python's garbage collection."""
    gc.collect()
    gc.disable()
    begin, used = time.perf_counter(), time.process_time()
    try:
        call()
        return time.perf_counter() - begin, time.process_time() - used
    finally:
        gc.enable()


def measure(
    megabytes: float, repeats: int, layers: int, experts: int
) -> tuple[dict[str, tuple[float, float]], int]:
    """Seconds for each, of the clock and of the processors, and the checkpoint's bytes."""
    with tempfile.TemporaryDirectory() as name, groups.process_groups(Layout()):
        folder = Path(name)
        make_model(folder / "model", megabytes, layers, experts)
        adam = OptimizerSettings(lr=1e-4)
        actor = MegatronActor(folder / "model", Layout(), optimizer=adam, micro_batch_size=3)
        actor.update(make_samples(), PolicyLossConfig.preset("up-grpo"))
        run = RunFolder.create(folder / "run", {})
        taken: dict[str, list] = {"save": [], "raw write": [], "load": [], "raw read": []}
        nothing = {"behind": None, "reference": None, "ahead": {}}
        for repeat in range(repeats):
            step = repeat + 1
            saved = timed(partial(resume.save, run, step, actor=actor, keep=1, **nothing))
            state = run.checkpoints / f"state-{step:06d}"
            files = [path for path in state.iterdir() if path.is_file()]
            blobs = {path.name: path.read_bytes() for path in files}
            of = {
                "save": saved,
                "raw write": timed(partial(write_raw, blobs, folder / "raw")),
                "load": timed(partial(resume.load, find(run, repeats + 2), actor, None)),
                "raw read": timed(partial(list, map(Path.read_bytes, files))),
            }
            for what, seconds in of.items():
                taken[what].append(seconds)
    medians = {
        what: tuple(map(statistics.median, zip(*found, strict=True)))
        for what, found in taken.items()
    }
    return medians, sum(map(len, blobs.values()))


def main(megabytes: float = 400, repeats: int = 3, layers: int = 4, experts: int = 16) -> None:
    torch.set_num_threads(1)
    found, size = measure(megabytes, repeats, layers, experts)
    print(f"{size / 1e6:,.0f} MB; load {os.getloadavg()}")
    for ours, raw in (("save", "raw write"), ("load", "raw read")):
        for kind, a, b in zip(("clock", "processors"), found[ours], found[raw], strict=True):
            print(f"{ours} {a:.2f} s, {raw} {b:.2f} s of the {kind}: {a / b:.1f} times")


if __name__ == "__main__":
    tyro.cli(main)
