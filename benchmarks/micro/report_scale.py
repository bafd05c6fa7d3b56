"""How long a report takes, and how much memory, for runs of many token rows or many steps.

    python -m benchmarks.micro.report_scale rows 100000 1000000 10000000
    python -m benchmarks.micro.report_scale steps 4000 100000

Each run is made up (of 16 MoE layers, 10,000 token rows a step; with ``steps`` without token rows)
and reported on in a process of its own. Prints a table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_upgrpo.store import RunFolder, TokenLogWriter

LAYERS, EXPERTS, TOP_K = 16, 64, 8
SEQUENCES, LENGTH, GROUP = 100, 100, 4


def columns(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The rows of one step: 25 prompts of 4 responses of 100 tokens."""
    N = SEQUENCES * LENGTH
    overlap = TOP_K - (rng.random((N, LAYERS)) < 0.03).astype(np.uint8)
    own = (overlap < TOP_K).sum(axis=1)
    by_sequence = own.reshape(SEQUENCES, LENGTH)
    sequence = np.repeat(np.arange(SEQUENCES), LENGTH)
    logp = -rng.random(N)
    advantage = np.repeat(rng.standard_normal(SEQUENCES), LENGTH)
    return {
        "sequence": sequence,
        "prompt": sequence // GROUP,
        "position": np.tile(np.arange(LENGTH), SEQUENCES) + 20,
        "token_id": rng.zipf(1.5, N) % 151_936,
        "reward": (advantage > 0).astype(float),
        "advantage": advantage,
        "logp_rollout": logp + 0.01 * (1 + own) * rng.standard_normal(N),
        "logp_old": logp,
        "logp_train": logp,
        "ratio": np.exp(0.05 * rng.standard_normal(N)),
        "clipped": rng.random(N) < 0.01,
        "layers_mismatched": own,
        "overlap": overlap,
        "prefix_mismatched": (by_sequence.cumsum(axis=1) - by_sequence).ravel(),
        "margin_min": rng.exponential(0.02, N),
        "gradient_weight": np.abs(advantage),
    }


def metrics(step: int, rng: np.random.Generator) -> dict:
    """A row of metrics.jsonl such as training writes, analysed at every 20th step."""
    row = {"step": step, "mismatch/by_layer": rng.uniform(0.02, 0.04, LAYERS).tolist()}
    row |= {"mismatch/histogram": [6000, 3000, 800, 200] + [0] * (LAYERS - 3)}
    row |= {"mismatch/router_denominator": SEQUENCES * LENGTH * LAYERS}
    row |= {"mismatch/router_numerator": 4800, "tokens/sampled": SEQUENCES * LENGTH}
    shares = (
        "mismatch/router_rate",
        "mismatch/slot_rate",
        "mismatch/token_any_rate",
        "reward/mean",
    )
    others = ("reward/std", "entropy/mean", "kl/warm_start", "grad_norm", "clip/positive")
    others += ("clip/negative", "logp_gap/mean_abs", "logp_gap/k3", "logp_gap/max_abs")
    others += ("response/length_mean", "time/generate", "time/update", "time/total", "ratio/max")
    row |= dict(
        zip((*shares, *others), rng.random(len(shares) + len(others)).tolist(), strict=True)
    )
    row |= {f"loss/{i}": float(i) for i in range(20)} | {"alarms": [], "staleness/mean": 0.0}
    if step % 20 == 0:
        for kind in (
            "trainer_repeat",
            "trainer_batch_shape",
            "engine_repeat",
            "engine_batch_shape",
        ):
            row |= {f"noise/{kind}/router_rate": 0.001}
            row |= {f"noise/{kind}/histogram": [9900, 100] + [0] * (LAYERS - 1)}
            row |= {f"noise/{kind}/by_layer": [0.001] * LAYERS}
    return row


def make(path: Path, steps: int, *, tokens: bool) -> None:
    """Make a run folder up: 16 different steps, again and again."""
    rng = np.random.default_rng(0)
    about = {"moe_layers": list(range(LAYERS)), "top_k": TOP_K, "num_experts": EXPERTS}
    run = RunFolder.create(path, about | {"loss": "made up", "steps": steps})
    run.metrics_path.write_text(
        "".join(json.dumps(metrics(step, rng)) + "\n" for step in range(1, steps + 1)),
        encoding="utf-8",
    )
    if tokens:
        writer = TokenLogWriter(
            run.tokens, rank=0, layer_ids=range(LAYERS), top_k=TOP_K, num_experts=EXPERTS
        )
        made = [columns(rng) for _ in range(16)]
        for step in range(1, steps + 1):
            writer.write(step, made[step % len(made)])


def measure(path: Path) -> dict[str, float]:
    """Report on a run; seconds of clock and processor, and the process's peak memory in GB."""
    begin, busy = time.perf_counter(), time.process_time()
    from moe_upgrpo.report import write_report

    page = write_report([path], path / "report.html")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": time.perf_counter() - begin,
        "processor": time.process_time() - busy,
        "gb": peak,
        "kb": page.stat().st_size / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rows", "steps", "measure"))
    parser.add_argument("sizes", nargs="+")
    parser.add_argument("--folder", type=Path, help="where the runs are made; default: aside")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        print(json.dumps(measure(Path(arguments.sizes[0]))))
        return
    print(f"{arguments.what:>12} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'page KB':>8}")
    for size in map(int, arguments.sizes):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "run"
            tokens = arguments.what == "rows"
            make(path, size // (SEQUENCES * LENGTH) if tokens else size, tokens=tokens)
            command = [sys.executable, "-m", "benchmarks.micro.report_scale", "measure", str(path)]
            found = json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, encoding="utf-8", env=os.environ
                ).stdout
            )
        print(
            f"{size:12,} {found['seconds']:8.1f} {found['processor']:8.1f} {found['gb']:8.2f} "
            f"{found['kb']:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
