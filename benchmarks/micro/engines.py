"""The engines on one tiny model: start-up, memory, tokens per second, weight updates.

    OMP_NUM_THREADS=1 python benchmarks/micro/engines.py

A random model of 1.0M parameters (the tiny model of `make train`), one thread in each process. In
every round each engine samples the same prompts and takes the same weights, in turn, so that ratios
are of neighbours in time. Printed: medians over the rounds, with the quartiles of ratios.

CPU seconds are those of the engine's processes and this one together; other programs on the machine
stretch them less than wall-clock seconds. Memory is the growth of this process plus that of the
engine's own processes, counting shared pages once; both once the engine has started. Loading vLLM
counts as its start-up; transformers was loaded before.

Routes on and off: vLLM's are switched in the running engine. An SGLang server keeps capturing even
what a request does not ask for, so there is a third case: a server started without routes. SGLang
runs in an environment of its own (docs/engines.md); `--engines hf vllm` leaves it out.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import psutil
import torch
import tyro
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo import kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.rollout import SamplingConfig
from moe_upgrpo.rollout.base import Engine
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.rollout.sglang import SGLangEngine, Transfer
from moe_upgrpo.rollout.vllm import VLLMEngine
from moe_upgrpo.train.warm_start import tiny_model_config

Seconds = list[float]  # of CPU, of the clock
RATIOS = (
    ("vllm", "hf"),
    ("sglang", "hf"),
    ("vllm, routes off", "vllm"),
    ("sglang, routes not asked for", "sglang"),
    ("sglang, started without routes", "sglang"),
)


def server_processes(engine: Engine) -> list[psutil.Process]:
    """Processes of a server that the engine started; none where it runs in this process."""
    server = getattr(engine, "_server", None)
    if server is None:
        return []
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


@contextmanager
def timed(engine: Engine) -> Iterator[Seconds]:
    """Put CPU seconds and wall-clock seconds into the list that it yields, when it ends."""
    processes, seconds = server_processes(engine), []

    def now() -> tuple[float, float]:
        times = [process.cpu_times() for process in processes]
        return time.process_time() + sum(t.user + t.system for t in times), time.perf_counter()

    begin = now()
    yield seconds
    seconds += (after - before for before, after in zip(begin, now(), strict=True))


def started(make: Callable[[], Engine]) -> tuple[Engine, float, float]:
    """The engine, the wall-clock seconds that it took and the MiB that it holds."""
    here = psutil.Process()
    before, begin = here.memory_info().rss, time.perf_counter()
    engine = make()
    seconds = time.perf_counter() - begin
    held = here.memory_info().rss - before
    held += sum(process.memory_full_info().pss for process in server_processes(engine))
    return engine, seconds, held / 2**20


@contextmanager
def without_routes(engine: VLLMEngine) -> Iterator[None]:
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


@contextmanager
def not_asked_for(engine: SGLangEngine) -> Iterator[None]:
    """Send requests like those of a dense model, and expect no routes back."""
    kept, engine.moe_layer_ids = engine.moe_layer_ids, ()
    try:
        yield
    finally:
        engine.moe_layer_ids = kept


def main(
    engines: tuple[Literal["hf", "vllm", "sglang"], ...] = ("hf", "vllm", "sglang"),
    rounds: int = 15,
    prompts: int = 16,
    samples: int = 8,
    new_tokens: int = 16,
    dtype="bfloat16",
) -> None:
    silence_upstream()
    kernels.pin()
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(tiny_model_config()).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    problems = [rng.integers(2, 14, size=8) for _ in range(prompts)]
    sampling = SamplingConfig(max_new_tokens=new_tokens)

    makers = {
        "hf": lambda: HFEngine(folder, dtype, "cpu"),
        "vllm": lambda: VLLMEngine(folder, dtype, max_model_len=8 + new_tokens),
        "sglang": lambda: SGLangEngine(folder, dtype, start_timeout=900),
    }
    running = {name: started(makers[name]) for name in engines}
    variants = {name: (engine, nullcontext) for name, (engine, *_) in running.items()}
    if "vllm" in running:
        variants["vllm, routes off"] = (running["vllm"][0], without_routes)
    if "sglang" in running:
        variants["sglang, routes not asked for"] = (running["sglang"][0], not_asked_for)
        name = "sglang, started without routes"
        running[name] = started(
            lambda: SGLangEngine(
                folder, dtype, start_timeout=900, enable_return_routed_experts=False
            )
        )
        variants[name] = (running[name][0], not_asked_for)

    version = 0
    for turn in range(rounds + 2):
        if turn in (0, 2):  # the first two warm up
            # Tokens per second and seconds, of CPU and of the clock.
            speeds, updates = {name: [] for name in variants}, {}
        for name, (engine, mode) in variants.items():
            with mode(engine), timed(engine) as seconds:
                rollouts = engine.generate(
                    problems, sampling, samples_per_prompt=samples, seed=turn
                )
            tokens = sum(len(rollout.response_ids) for rollout in rollouts)
            speeds[name].append([tokens / s for s in seconds])
        for name in engines:
            engine = running[name][0]
            for way in get_args(Transfer) if name == "sglang" else ("",):
                version += 1
                if way:
                    engine.transfer = way
                with timed(engine) as seconds:
                    engine.update_weights(weights.items(), version=version)
                updates.setdefault(f"{name} {way}".strip(), []).append(seconds)

    def medians(pairs: list[list[float]]) -> list[float]:
        return [statistics.median(side) for side in zip(*pairs, strict=True)]

    print(
        f"{prompts} prompts x {samples} samples of up to {new_tokens} tokens, {dtype}, "
        f"{rounds} rounds"
    )
    print("\n| engine | start | memory | tokens per CPU second | per second |")
    print("| --- | --- | --- | --- | --- |")
    for name, pairs in speeds.items():
        _, start, held = running.get(name, (None, None, None))
        row = [name, f"{start:.1f} s", f"{held:.0f} MiB"] if start else [name, "", ""]
        print("|", " | ".join(row + [f"{speed:,.0f}" for speed in medians(pairs)]), "|")
    print("\n| weight update | CPU | clock |\n| --- | --- | --- |")
    for name, pairs in updates.items():
        print("|", " | ".join([name, *(f"{1000 * s:.0f} ms" for s in medians(pairs))]), "|")
    print("\n| tokens per CPU second | ratio | quartiles |\n| --- | --- | --- |")
    for one, other in RATIOS:
        if one in speeds and other in speeds:
            pairs = zip(speeds[one], speeds[other], strict=True)
            low, median, high = statistics.quantiles([a / b for (a, _), (b, _) in pairs], n=4)
            print(f"| {one} / {other} | {median:.2f} | {low:.2f} to {high:.2f} |")
    for engine, *_ in running.values():
        engine.close()


if __name__ == "__main__":
    tyro.cli(main)
