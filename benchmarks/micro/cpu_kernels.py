"""The cost of repeatable kernels on this CPU, and whether they are needed on it.

    python -m benchmarks.micro.cpu_kernels [--rounds 7]

One process for each value of MKL_CBWR, all running at once and asked in turn, so that other work on
the machine affects all of them alike. Processor time of fp32 products (rows × inputs × outputs; the
first four are those of `make train`) and of an optimizer step of `make train`'s model on 64
sequences, as ratios to no value at all: medians over rounds. The last column counts products of the
same numbers whose result differs at another address.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import tyro
from transformers import Qwen3MoeForCausalLM

from benchmarks.micro.collectives import made_samples
from benchmarks.studies.exact.report import table
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.test_kernels import changed_by_address

VALUES = ("", "AVX2", "AVX512,STRICT")  # empty: MKL chooses freely
PRODUCTS = ((640, 128, 128), (640, 128, 32), (40, 128, 64), (40, 64, 128), (1024, 1024, 1024))
TASK_S = 0.1  # of processor time for each figure of a round


def worker(connection, folder: Path) -> None:
    """Answer with seconds of processor time for each task, until told to stop."""
    silence_upstream()
    torch.set_num_threads(1)
    tasks = {}
    for rows, inputs, outputs in PRODUCTS:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        name = f"{rows} × {inputs} × {outputs}"
        tasks[name] = partial(torch.nn.functional.linear, x, weight)
    with groups.process_groups(Layout()):
        actor = MegatronActor(folder, Layout(), optimizer=OptimizerSettings())
        loss = PolicyLossConfig.preset("up-grpo")
        tasks["optimizer step"] = partial(actor.update, made_samples(), loss)
        for task in tasks.values():
            task()
        connection.send(list(tasks))
        while name := connection.recv():
            calls, begin = 0, time.process_time()
            while time.process_time() - begin < TASK_S or not calls:
                tasks[name]()
                calls += 1
            connection.send((time.process_time() - begin) / calls)
        connection.send(changed_by_address())


def main(rounds: int = 7) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(tiny_model_config()).save_pretrained(folder)
        workers = []
        for value in VALUES:
            os.environ["MKL_CBWR"] = value
            here, there = context.Pipe()
            process = context.Process(target=worker, args=(there, folder), daemon=True)
            process.start()
            there.close()  # so that a dead worker's end is noticed
            workers.append((here, process))
        (names, *_) = [here.recv() for here, _ in workers]
        ratios = {(value, name): [] for value in VALUES for name in names}
        for _ in range(rounds):
            for name in names:
                seconds = []
                for here, _ in workers:
                    here.send(name)
                    seconds.append(here.recv())
                for value, found in zip(VALUES, seconds, strict=True):
                    ratios[value, name].append(found / seconds[0])
        rows = []
        for value, (here, process) in zip(VALUES, workers, strict=True):
            here.send("")
            changed, tried = here.recv()
            process.join()
            medians = [f"{statistics.median(ratios[value, name]):.2f}" for name in names]
            rows.append([value or "none", *medians, f"{changed:,} of {tried:,}"])
    print(table(["MKL_CBWR", *names, "changed by address"], rows))


if __name__ == "__main__":
    tyro.cli(main)
