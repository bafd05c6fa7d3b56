"""Stress studies on the enumerated policy: what breaks a loss, by training from sampled groups.

    python -m benchmarks.studies.stress [--output-dir runs/stress] [--page docs/stress.md]

Run from the repository's root, with the extras report and dev; about 8 minutes of CPU on one core.
--quick takes seconds on a smaller policy and grid; --read makes tables and figures again from an
output folder. Writes curves.parquet (a row for each run and update), fallen.parquet, meta.json,
summary.json and the figures; --page fills that page's tables and draws its figures into img/.

The definitions, fixed before the runs (a pilot of three losses at seeds that are not used here, 8
to a cell, showed the learning rates at which anything happens and the size of a gradient):

- Collapsed: after some update the exact P(right) of the trainer's policy is below half of the best
  so far (the start counts), or something is not finite. KL from the start is no criterion: a
  policy that is nearly always right is several nats away from a start that rarely is.
- Lost: collapsed, and still below half of its best at the end.
- Exploded: a gradient norm, before any clipping, above 100 times the run's first.
- Gradient clipping: the norm of the gradient, per sequence, bounded by 1, which is about what it
  is at the start; Adam (.9, .999), constant learning rate.
- Own learning rate: for the other studies, the one of the sweep, with clipping, at which the mean
  over updates and seeds of P(right) is largest. Those studies have other seeds than the sweep.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import tyro

from benchmarks.studies.exact.policy import Sizes
from benchmarks.studies.made import Stopwatch, write_small
from benchmarks.studies.stress.fallen import DEPTHS, fallen
from benchmarks.studies.stress.report import Report, runs_of
from benchmarks.studies.stress.runs import Model, Plan, Run, make_start, train
from moe_upgrpo import kernels
from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import write_text

MAX_NORM = 1.0
PAIRED = ("grpo", "gspo", "tic-grpo", "up-grpo", "up-gspo", "up-tic", "reinforce")


@dataclass(frozen=True, kw_only=True)
class Studies:
    sizes: Sizes = field(default_factory=lambda: Sizes(layers=2, length=3))
    seeds: int = 12
    """Numbers of each cell."""
    right: float = 0.2
    """P(right) at the start, where it is not what is studied."""
    losses: tuple[str, ...] = (*PAIRED, "dapo", "no-upper-clip", "symmetric-ratio")
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    plan: Plan = field(default_factory=Plan)
    fewer_losses: tuple[str, ...] = PAIRED
    """For false positives and the share of positives."""
    false_positives: tuple[float, ...] = (0.05, 0.1, 0.2)
    right_shares: tuple[float, ...] = (0.02, 0.1, 0.5, 0.9)
    lags: tuple[int, ...] = (0, 1, 2, 4, 8)
    stale_losses: tuple[str, ...] = (*PAIRED, "symmetric-ratio")
    stale_plan: Plan = field(default_factory=lambda: Plan(updates=48, inner_steps=4))
    fallen_depths: tuple[int, ...] = DEPTHS
    fallen_losses: tuple[str, ...] = (
        *PAIRED,
        "dapo",
        "no-upper-clip",
        "symmetric-ratio",
        "cispo",
        "aspo",
        "topr",
        "sequence-is",
    )


QUICK = Studies(
    sizes=Sizes(tokens=3, length=3, layers=2, experts=4, hidden=4, expert_width=2),
    seeds=2,
    losses=("grpo", "up-grpo", "gspo", "up-gspo", "symmetric-ratio"),
    learning_rates=(1e-2, 1e-1),
    plan=Plan(updates=2, inner_steps=2, groups=2),
    fewer_losses=("grpo", "up-grpo"),
    false_positives=(0.2,),
    right_shares=(0.1, 0.5),
    lags=(0, 2),
    stale_losses=("grpo", "up-grpo"),
    stale_plan=Plan(updates=3, inner_steps=1, groups=2),
    fallen_depths=(1, 2),
    fallen_losses=("grpo", "up-grpo", "gspo", "symmetric-ratio", "sequence-is"),
)


@dataclass
class Arguments:
    output_dir: Path = Path("runs/stress")
    seeds: int | None = None
    """Runs of each cell, at least 2; None: 12, or 2 with --quick."""
    quick: bool = False
    read: bool = False
    """Compute nothing: read the output folder's data."""
    page: Path | None = None
    """Page with the generated sections to fill."""


def collapse_runs(model: Model, studies: Studies) -> Iterator[pd.DataFrame]:
    starts = [make_start(model, seed, right=studies.right) for seed in range(studies.seeds)]
    runs = [
        Run(start=start, learning_rate=rate, max_norm=bound, columns={"study": "collapse"})
        for rate in studies.learning_rates
        for bound in (math.inf, MAX_NORM)
        for start in starts
    ]
    for loss in studies.losses:
        yield train(model, loss, runs, studies.plan)


def own_learning_rates(sweep: pd.DataFrame) -> dict[str, float]:
    """loss → the learning rate with the largest mean P(right), with clipping."""
    found = sweep[sweep["clipped"] & (sweep["update"] > 0)]
    mean = found.groupby(["loss", "learning_rate"])["reward"].mean().unstack()
    return mean.idxmax(axis=1).to_dict()


def other_runs(model: Model, studies: Studies, rates: dict[str, float]) -> Iterator[pd.DataFrame]:
    """False positives, share of positives, staleness."""
    seeds = range(100, 100 + studies.seeds)
    starts = [make_start(model, seed, right=studies.right) for seed in seeds]
    erring = [("none", 0.0, starts)]
    for rate in studies.false_positives:
        erring.append(("at random", rate, starts))
        always = [make_start(model, s, right=studies.right, accepted=rate) for s in seeds]
        erring.append(("always the same", rate, always))
    shares = {
        share: [make_start(model, seed, right=share) for seed in seeds]
        for share in studies.right_shares
    }
    for loss in studies.fewer_losses:
        common = {"learning_rate": rates[loss], "max_norm": MAX_NORM}
        runs = [
            Run(
                start=start,
                false_positives=rate if kind == "at random" else 0.0,
                columns={"study": "false positives", "kind": kind, "rate": rate},
                **common,
            )
            for kind, rate, of_kind in erring
            for start in of_kind
        ]
        runs += [
            Run(start=start, columns={"study": "positives", "share": share}, **common)
            for share, of_share in shares.items()
            for start in of_share
        ]
        yield train(model, loss, runs, studies.plan)
    for loss in studies.stale_losses:
        for lag, recomputed in [(lag, False) for lag in studies.lags] + [(max(studies.lags), True)]:
            plan = replace(studies.stale_plan, lag=lag, recomputed=recomputed)
            columns = {"study": "staleness", "lag": lag, "recomputed": recomputed}
            runs = [
                Run(start=start, learning_rate=rates[loss], max_norm=MAX_NORM, columns=columns)
                for start in starts
            ]
            yield train(model, loss, runs, plan)


def computed(studies: Studies) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    cpu, watch = time.process_time(), Stopwatch()
    model = Model(studies.sizes)
    sweep = pd.concat(collapse_runs(model, studies), ignore_index=True)
    print(f"sweep: {time.process_time() - cpu:.0f} s of CPU", flush=True)
    rates = own_learning_rates(sweep)
    others = pd.concat(other_runs(model, studies, rates), ignore_index=True)
    print(f"training: {time.process_time() - cpu:.0f} s of CPU", flush=True)
    starts = [
        make_start(model, seed, right=studies.right) for seed in range(200, 200 + studies.seeds)
    ]
    down = fallen(model, starts, studies.fallen_losses, depths=studies.fallen_depths)
    meta = {
        "seeds": studies.seeds,
        "own_learning_rates": rates,
        **watch.made(),
    }
    return pd.concat([sweep, others], ignore_index=True), down, meta


def main(arguments: Arguments) -> int:
    if arguments.seeds is not None and arguments.seeds < 2:
        raise UserError(f"seeds: {arguments.seeds} given; allowed: at least 2, for intervals")
    kernels.pin()
    out = arguments.output_dir
    if arguments.read:
        report = Report.read(out)
    else:
        studies = QUICK if arguments.quick else Studies()
        if arguments.seeds is not None:
            studies = replace(studies, seeds=arguments.seeds)
        curves, down, meta = computed(studies)
        out.mkdir(parents=True, exist_ok=True)
        report = Report(runs_of(curves), down, meta)
        write_small(curves, out / "curves.parquet")
        write_small(report.runs, out / "runs.parquet")
        write_small(down, out / "fallen.parquet")
        write_text(out / "meta.json", json.dumps(meta, indent=1) + "\n")
        write_text(out / "summary.json", json.dumps(report.summary(), indent=1) + "\n")
        report.draw(out)
    for name, make in report.sections().items():
        print(f"\n## {name}\n\n{make()}")
    if arguments.page:
        report.fill(arguments.page)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments)))
    except UserError as error:
        sys.exit(f"error: {error}")
