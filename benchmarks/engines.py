"""The engines in process on one tiny model: start-up, memory, tokens per second, weight updates.

    OMP_NUM_THREADS=1 python benchmarks/engines.py

A random model of 1.0M parameters (the tiny model of `make train`), one thread. In every round each
engine samples the same prompts and takes the same weights, in turn, so that ratios are of
neighbours in time. vLLM's routes are switched on and off in the running engine. Printed: medians
over the rounds, with the quartiles of ratios. Seconds are CPU seconds of the one thread, which
other processes on the machine do not stretch; at the start they are the clock's. Loading vLLM
counts as its start-up; transformers was loaded before.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.rollout import SamplingConfig
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.rollout.vllm import VLLMEngine
from moe_upgrpo.train.warm_start import tiny_model_config


def started(make: Callable) -> tuple:
    """The engine, the seconds it took to start and the MiB that the process grew by."""
    process = psutil.Process()
    before, begin = process.memory_info().rss, time.perf_counter()
    engine = make()
    seconds = time.perf_counter() - begin
    return engine, seconds, (process.memory_info().rss - before) / 2**20


@contextmanager
def without_routes(engine: VLLMEngine):
    """vLLM as it is without `enable_return_routed_experts`: nothing captured, kept or returned."""
    core = engine._llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    routers = [m.router for m in runner.model.modules() if hasattr(m, "router")]
    saved = core.scheduler.aux_output_connector, runner.routes_connector
    captures = [router.capture_fn for router in routers]
    core.scheduler.aux_output_connector = runner.routes_connector = None
    for router in routers:
        router.set_capture_fn(None)
    engine._moe_rows = lambda completion, rows: np.zeros((rows, 0, 0), np.uint8)
    try:
        yield
    finally:
        core.scheduler.aux_output_connector, runner.routes_connector = saved
        for router, capture in zip(routers, captures, strict=True):
            router.set_capture_fn(capture)
        del engine._moe_rows


def main(
    rounds: int = 15, prompts: int = 16, samples: int = 8, new_tokens: int = 16, dtype="bfloat16"
) -> None:
    silence_upstream()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(tiny_model_config()).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    problems = [rng.integers(2, 14, size=8) for _ in range(prompts)]
    sampling = SamplingConfig(max_new_tokens=new_tokens)

    def generate(engine, seed: int) -> float:
        """Sampled tokens per second."""
        begin = time.process_time()
        rollouts = engine.generate(problems, sampling, samples_per_prompt=samples, seed=seed)
        seconds = time.process_time() - begin
        return sum(len(r.response_ids) for r in rollouts) / seconds

    def update(engine, version: int) -> float:
        begin = time.process_time()
        engine.update_weights(weights.items(), version=version)
        return time.process_time() - begin

    engines = {
        "hf": started(lambda: HFEngine(folder, dtype, "cpu")),
        "vllm": started(lambda: VLLMEngine(folder, dtype, max_model_len=8 + new_tokens)),
    }
    speed = {"hf": [], "vllm": [], "vllm without routes": []}
    updates = {"hf": [], "vllm": []}
    for turn in range(rounds + 2):
        now = {name: generate(engine, turn) for name, (engine, *_) in engines.items()}
        vllm = engines["vllm"][0]
        with without_routes(vllm):
            now["vllm without routes"] = generate(vllm, turn)
        took = {name: update(engine, turn) for name, (engine, *_) in engines.items()}
        if turn >= 2:  # the first rounds warm up
            for name, value in now.items():
                speed[name].append(value)
            for name, value in took.items():
                updates[name].append(value)

    print(f"{prompts} prompts x {samples} samples of up to {new_tokens} tokens, {dtype}")
    for name, (_, seconds, mib) in engines.items():
        print(
            f"{name}: start {seconds:.1f} s, {mib:.0f} MiB; "
            f"{statistics.median(speed[name]):.0f} tokens/s; "
            f"update {1000 * statistics.median(updates[name]):.0f} ms"
        )
    for what, one, other in (
        ("vllm / hf, tokens per second", "vllm", "hf"),
        ("vllm without / with routes, tokens per second", "vllm without routes", "vllm"),
    ):
        ratios = [a / b for a, b in zip(speed[one], speed[other], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{what}: {median:.2f} (quartiles {low:.2f} to {high:.2f}, {rounds} rounds)")
    vllm.close()


if __name__ == "__main__":
    tyro.cli(main)
