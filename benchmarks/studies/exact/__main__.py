"""Exact bias and variance of every loss on an enumerated mixture-of-experts policy.

    python -m benchmarks.studies.exact [--output-dir runs/exact] [--page docs/exact.md]

Run from the repository's root, with the extras report and dev; about 5 minutes of one core. --quick
takes seconds on a smaller policy and grid; --read makes tables and figures again from an output
folder. Writes cells.parquet (a row for each policy, mismatch, inner step, mode, loss, advantages
and part), conditions.parquet, crossings.parquet, meta.json, summary.json and the figures; --page
fills that page's tables and draws its figures into img/ beside it. Exit status 1 if a check fails
that must hold exactly or to rounding.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import tyro

from benchmarks.studies.exact.report import Report
from benchmarks.studies.exact.study import QUICK, Grid, run_policy
from benchmarks.studies.made import Stopwatch, write_small
from moe_upgrpo import kernels
from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import write_text


@dataclass
class Arguments:
    output_dir: Path = Path("runs/exact")
    policies: int | None = None
    """Random policies, at least 2 (intervals are over them); None: 8, or 2 with --quick."""
    first: int = 0
    """Number of the first policy."""
    quick: bool = False
    read: bool = False
    """Compute nothing: read the output folder's cells."""
    page: Path | None = None
    """Page with the generated sections to fill."""


def computed(arguments: Arguments) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    watch = Stopwatch()
    grid = QUICK if arguments.quick else Grid()
    if arguments.policies is not None:
        grid = replace(grid, policies=arguments.policies)
    pairs = []
    for seed in range(arguments.first, arguments.first + grid.policies):
        begun = time.process_time()
        pairs.append(run_policy(seed, grid))
        print(f"policy {seed}: {time.process_time() - begun:.0f} s of CPU", flush=True)
    cells, conditions = (
        pd.concat(frames, ignore_index=True) for frames in zip(*pairs, strict=True)
    )
    return cells, conditions, watch.made()


def main(arguments: Arguments) -> int:
    if arguments.policies is not None and arguments.policies < 2:
        raise UserError(f"policies: {arguments.policies} given; allowed: at least 2, for intervals")
    kernels.pin()
    out = arguments.output_dir
    if arguments.read:
        report = Report.read(out)
    else:
        cells, conditions, meta = computed(arguments)
        report = Report(cells, conditions, meta)
        out.mkdir(parents=True, exist_ok=True)
        report.draw(out)
        write_small(cells, out / "cells.parquet")
        write_small(report.shown(), out / "shown.parquet")
        write_small(conditions, out / "conditions.parquet")
        write_small(report.crossings, out / "crossings.parquet")
        write_text(out / "meta.json", json.dumps(report.meta, indent=1) + "\n")
        summary = json.dumps(report.summary(), indent=1, allow_nan=False)
        write_text(out / "summary.json", summary + "\n")
    for name, make in report.sections().items():
        print(f"\n## {name}\n\n{make()}")
    if arguments.page:
        report.fill(arguments.page)
    failed = [name for name, check in report.checks.items() if not check["holds"]]
    for name in failed:
        print(f"FAILED: {name}: {report.checks[name]['value']:.3g}")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments)))
    except UserError as error:
        sys.exit(f"error: {error}")
