"""Accuracies that `make train` reaches on several CPUs and seeds, from the run folders it left.

    bash examples/train_moe.sh --seed S --cache-dir runs/cache-CPU --output-dir runs/CPU-S   # each
    python -m benchmarks.micro.cpus runs/*-[0-9]

Each CPU needs its own warm start (--cache-dir). A machine can imitate an older CPU with
MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.studies.exact.report import table
from moe_upgrpo.errors import UserError
from moe_upgrpo.store import read_config, read_environment, read_metrics

FIGURES = ("eval/greedy", "eval/pass@1", "eval/pass@4")


def kernels_of(environment: dict) -> str:
    """The CPU and the kernels of a run, as the table names them."""
    cpu = environment.get("cpu")
    if cpu is None:
        return "not recorded"
    limits = "".join(f", {name}={value}" for name, value in sorted(cpu["limits"].items()))
    return f"{cpu['model']}: MKL {cpu['mkl']}, ATen {cpu['aten']}{limits}"


def make_table(runs: list[Path]) -> str:
    """Rows of CPUs, and the range over all; UserError for runs that cannot be compared fairly."""
    if not runs:
        raise UserError("no run given; usage: python -m benchmarks.micro.cpus RUN [RUN …].")
    by_cpu = defaultdict(list)
    for path in runs:
        config, rows = read_config(path), read_metrics(path)
        if rows[-1]["step"] != config["steps"] or FIGURES[0] not in rows[-1]:
            raise UserError(f"{path} ends at step {rows[-1]['step']} of {config['steps']}.")
        by_cpu[kernels_of(read_environment(path))].append((config["seed"], rows[0], rows[-1]))
    shown = []
    for cpu, found in sorted(by_cpu.items()):
        found.sort(key=lambda run: run[0])
        shown.append([cpu, ", ".join(str(seed) for seed, *_ in found)])
        for figure in FIGURES:
            before = spread([first[figure] for _, first, _ in found])
            after = ", ".join(number(last[figure]) for *_, last in found)
            shown[-1].append(f"{before} → {after}")
    every = [run for found in by_cpu.values() for run in found]
    shown.append([f"all {len(by_cpu)}", f"{len(every)} runs"])
    for figure in FIGURES:
        begin, end = (spread([run[side][figure] for run in every]) for side in (1, 2))
        shown[-1].append(f"{begin} → {end}")
    return table(["CPU and kernels", "seeds", *(f.removeprefix("eval/") for f in FIGURES)], shown)


def number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def spread(values: list[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    print(make_table([Path(path) for path in sys.argv[1:]]))
