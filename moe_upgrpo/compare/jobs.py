# SPDX-License-Identifier: Apache-2.0
"""A comparison's runs as jobs of a cluster, one for each; examples/compare_at_scale.sh calls it.

    python -m moe_upgrpo.compare.jobs PLAN FOLDER [--start RUN | --end RUN | --crashed RUN]

Without a run, it lists those to be done now, one a line. Several machines may start the same run.
FOLDER is that of `moe-upgrpo compare`, which makes the report once no run is left.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from moe_upgrpo.compare.plan import Comparison, Run, read_plan
from moe_upgrpo.compare.run import (
    choose_rates,
    data_file,
    is_trained,
    keep,
    train_words,
    write_plan,
)
from moe_upgrpo.errors import UserError
from moe_upgrpo.store import read_metrics

CRASHED = "ended by its own numbers (exit status 3); the job's log says where"


def to_do(plan: Comparison, folder: Path) -> list[Run]:
    """List what can run now: the runs that choose learning rates, then the compared."""
    tuning = [run for run in plan.tuning() if not data_file(folder, run).exists()]
    runs = tuning or plan.runs(choose_rates(plan, folder))
    return [run for run in runs if not data_file(folder, run).exists()]


def start(plan: Comparison, folder: Path, key: str) -> list[str]:
    """The options of `train` for the run `key`; none if it is done."""
    if _done(folder, key):
        return []
    run = _named(plan, folder, key)
    if is_trained(folder, run):
        end(plan, folder, key)
        return []
    return train_words(plan, folder, run)


def end(plan: Comparison, folder: Path, key: str, *, crashed: bool = False) -> None:
    """Keep the run's data. UserError if it is not at its last step, unless it `crashed`."""
    if _done(folder, key):
        return
    run = _named(plan, folder, key)
    path, steps = folder / "runs" / run.key, plan.config(run).run.steps
    rows = read_metrics(path)
    last = rows[-1]["step"]
    if last < steps and not crashed:
        raise UserError(
            f"{path} is at step {last} of {steps}: start it again to go on. If its loss ended it, "
            "with exit status 3, as the log would say, --crashed keeps it as such."
        )
    if last == steps and crashed:
        raise UserError(f"{path} has done its {steps} steps: --end keeps it.")
    try:
        keep(folder, run, rows, crashed=CRASHED if crashed else None, seconds=None)
    except FileNotFoundError:  # another machine of the job kept it at the same moment
        if not _done(folder, key):
            raise


def _done(folder: Path, key: str) -> bool:
    return (folder / "data" / f"{key}.parquet").exists()


def _named(plan: Comparison, folder: Path, key: str) -> Run:
    """The run called `key`. Raises UserError if there is none, or if it waits for others."""
    known = {run.key: run for run in to_do(plan, folder)}
    if key not in known:
        raise UserError(f"{key} is not a run to be done now: {', '.join(known) or 'none is'}.")
    return known[key]


@dataclass(kw_only=True)
class Arguments:
    """List what is to be done of a comparison whose runs are jobs of a cluster, one for each."""

    plan: Positional[Path]
    """YAML file of the comparison: examples/compare."""
    folder: Positional[Path]
    """Its folder, the --output of moe-upgrpo compare."""
    start: str | None = None
    """A run: print the options of train that start or continue it, one a line."""
    end: str | None = None
    """A run that has done its last step: keep its data."""
    crashed: str | None = None
    """A run that its own loss ended: keep its data as that of a crashed one."""


def main(arguments: Arguments) -> None:
    plan, folder = read_plan(arguments.plan), arguments.folder
    write_plan(plan, folder)
    if arguments.start:
        lines = start(plan, folder, arguments.start)
    elif arguments.end or arguments.crashed:
        end(plan, folder, arguments.end or arguments.crashed, crashed=arguments.end is None)
        lines = []
    else:
        lines = [run.key for run in to_do(plan, folder)]
    sys.stdout.write("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except UserError as error:
        sys.exit(f"error: {error}")
