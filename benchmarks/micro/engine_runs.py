"""Whole runs with the real engines: does accuracy rise, and how large is the mismatch?

    OMP_NUM_THREADS=1 python benchmarks/micro/engine_runs.py --output-dir runs/engines

Runs of `make train`'s size (UP-GRPO, 60 steps, two ranks), one after the other: vLLM in process at
TP1·EP2 and TP2·EP2, without replay and with R3, and a vLLM and an SGLang server at TP2·EP2. vLLM
must be installed in this environment, SGLang in its own (`make test-engines` sets up both). One run
each: the figures say that it works, not which is better. Exit status 1 where accuracy did not rise.
`--runs` names some of them; the vLLM server is given the model of the first run in `--output-dir`.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tyro

from moe_upgrpo import kernels
from moe_upgrpo.rollout.server_key import new_key
from moe_upgrpo.rollout.vllm_guard import VARIABLE
from moe_upgrpo.store import read_config, read_metrics

ROOT = Path(__file__).parents[2]
RUNS = {
    f"{engine}-tp{tp}-ep{ep}-{replay}": (
        *("--engine", engine, "--tp", str(tp), "--ep", str(ep), "--replay", replay),
    )
    for engine, tp, ep, replay in (
        ("vllm", 1, 2, "none"),
        ("vllm", 1, 2, "R3"),
        ("vllm", 2, 2, "none"),
        ("vllm", 2, 2, "R3"),
        ("sglang", 2, 2, "none"),
    )
}
SERVED = "vllm-server-tp2-ep2-none"
RUNS[SERVED] = RUNS["vllm-tp2-ep2-none"]


@contextmanager
def vllm_server(model: str, log: Path) -> Iterator[str]:
    """The URL of a vLLM server in bf16."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"-m vllm.entrypoints.openai.api_server --model {model} --dtype bfloat16 --enforce-eager "
        "--skip-tokenizer-init --enable-scale-out --logprobs-mode processed_logprobs "
        f"--enable-return-routed-experts --kv-cache-memory-bytes {256 << 20} "
        f"--host 127.0.0.1 --port {port} --middleware moe_upgrpo.rollout.vllm_guard.RequireKey"
    )
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault(VARIABLE, new_key())  # the trainers', too
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [sys.executable, *command.split()],
            env=os.environ | settings | {"TORCHDYNAMO_DISABLE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            if server.poll() is not None:
                sys.exit(f"the vLLM server ended; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def start(name: str, folder: Path, more: list[str]) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--nproc-per-node", "2", "examples/train_moe.sh", *RUNS[name]]
    command += ["--output-dir", str(folder), *more]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if status.returncode:
        sys.exit(f"{name} failed; see {log}")


def main(
    output_dir: Path,
    steps: int = 60,
    cache_dir: Path = Path("runs/cache"),
    runs: tuple[str, ...] = tuple(RUNS),
) -> None:
    kernels.pin()  # the server inherits it
    output_dir = output_dir.absolute()
    output_dir.mkdir(parents=True, exist_ok=True)
    print("| run | greedy, before → after | pass@1 | routers that differ | k3 | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    rose = True
    for name in runs:
        more = ["--steps", str(steps), "--cache-dir", str(cache_dir)]
        if name == SERVED:
            model = read_config(output_dir / next(iter(RUNS)))["model"]  # of the first run
            with vllm_server(model, output_dir / "vllm-server.log") as url:
                start(name, output_dir / name, [*more, "--model", model, "--engine-url", url])
        else:
            start(name, output_dir / name, more)
        rows = read_metrics(output_dir / name)
        first, last = rows[0], rows[-1]
        steps_rows = rows[1:]
        differ, compared = (
            sum(row[f"mismatch/router_{part}"] for row in steps_rows)
            for part in ("numerator", "denominator")
        )
        tokens = sum(row["tokens/sampled"] for row in steps_rows)
        seconds = sum(row["time/total"] for row in steps_rows)
        k3 = np.mean([row["logp_gap/k3"] for row in steps_rows])
        print(
            f"| {name} | {first['eval/greedy']:.3f} → {last['eval/greedy']:.3f} | "
            f"{first['eval/pass@1']:.3f} → {last['eval/pass@1']:.3f} | "
            f"{differ / compared:.2%} | {k3:.1e} | {tokens / seconds:,.0f} |",
            flush=True,
        )
        rose = rose and last["eval/greedy"] > first["eval/greedy"]
    sys.exit(not rose)


if __name__ == "__main__":
    tyro.cli(main)
