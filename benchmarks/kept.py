"""All that is made of the kept results: the comparisons' reports, the studies' pages and figures.

    make results                                   everything: two minutes of one core
    python -m benchmarks.kept --only compare/fp8 power     some of it
    python -m benchmarks.kept --keep fp8           the data of runs/compare/fp8

benchmarks/results holds data alone. Reports are written to runs/results/compare/NAME, pages and
their figures where they are, in docs/.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.studies import power, verdicts
from benchmarks.studies.exact.report import Report as ExactReport
from benchmarks.studies.made import as_page
from benchmarks.studies.routing_mismatch_report import Report as RoutingReport
from benchmarks.studies.stress.report import Report as StressReport
from moe_upgrpo.compare import data, report
from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import write_text

RESULTS = Path("benchmarks/results")
SUMMARY = RESULTS / "summary.json"

# What a report reads of a compared run. Of a run that chose a learning rate, the evaluations stay.
COLUMNS = {
    "clip/negative",
    "clip/positive",
    "entropy/mean",
    "eval/greedy",
    "eval/maj@4",
    "eval/pass@1",
    "eval/pass@4",
    "eval/problems",
    "grad_norm",
    "kl/warm_start",
    "logp_gap/k3",
    "logp_gap/mean_abs",
    "loss/gradient_share_positive",
    "loss/positive_beyond_upper_fraction",
    "loss/ratio_effective_sample_size",
    "mismatch/histogram",
    "mismatch/router_denominator",
    "mismatch/router_numerator",
    "mismatch/router_rate",
    "mismatch/token_any_rate",
    "reward/correct_rate",
    "step",
    "tokens/sampled",
    "tokens/visited",
}


def comparisons() -> list[str]:
    """Their names, compare/NAME: a study may be called NAME too."""
    return sorted(f"compare/{path.parent.name}" for path in RESULTS.glob("compare/*/plan.json"))


def numbers(folder: Path) -> dict[str, Any]:
    """All figures of a comparison's report, in their JSON form."""
    return json.loads(json.dumps(report._finite(report.numbers(report.load(folder)))))


def keep(source: Path, target: Path) -> None:
    """Write the data of a comparison that was run to one file, with everything its report reads.

    Raises UserError if the report made from the file would differ.
    """
    runs = data.read_all(source) + data.read_all(source, tuning=True)
    target.mkdir(parents=True, exist_ok=True)
    data.write_together(target / data.TOGETHER, [slim(run) for run in runs])
    for file in source.glob("*.json"):
        if file.name != "report.json":
            shutil.copyfile(file, target / file.name)
    if numbers(target) != numbers(source):
        raise UserError(f"{target}: its report is another than that of {source}; see COLUMNS.")


def slim(run: data.RunData) -> data.RunData:
    def wanted(name: str) -> bool:
        return name in COLUMNS and (not run.about.tuning or name.startswith(("eval/", "step")))

    rows = [{name: row.get(name) for name in row if wanted(name)} for row in run.rows]
    if run.about.tuning:
        rows = [row for row in rows if any(x is not None for n, x in row.items() if n != "step")]
    return replace(run, rows=rows)


def summary(name: str) -> dict[str, Any]:
    """The parts of report.json that pages quote."""
    found = numbers(RESULTS / name)
    return {part: found[part] for part in ("progress", "primary", "matched_reward", "arms")}


def write_summary(names: Sequence[str]) -> None:
    kept = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else {}
    write_text(SUMMARY, json.dumps(kept | {name: summary(name) for name in names}) + "\n")


def study(name: str, report_of: Any, target: Path, docs: Path) -> None:
    """The page and its figures, and every table in TARGET/NAME.md."""
    made = report_of.read(RESULTS / name)
    made.fill(docs / f"{name}.md")
    write_text(target / f"{name}.md", as_page(made.sections()))


STUDIES = {"exact": ExactReport, "stress": StressReport, "routing-mismatch": RoutingReport}


def make(name: str, target: Path, docs: Path) -> None:
    if name in STUDIES:
        study(name, STUDIES[name], target, docs)
    elif name == "power":
        power.fill_page(docs / "power.md")
    elif name == "verdicts":
        verdicts.main(pages=(docs / "verdicts.md",))
    else:
        report.write_report(RESULTS / name, target / name)


@dataclass
class Arguments:
    only: tuple[str, ...] = ()
    """Names of comparisons (compare/NAME) and studies; nothing: all."""
    keep: tuple[str, ...] = ()
    """Names of comparisons in runs/compare whose data are to be kept."""
    output_dir: Path = Path("runs/results")
    docs: Path = Path("docs")


def main(arguments: Arguments) -> None:
    if arguments.keep:
        for name in arguments.keep:
            keep(Path("runs/compare") / name, RESULTS / "compare" / name)
        write_summary([f"compare/{name}" for name in arguments.keep])
        return
    # Verdicts quote the pages of the studies.
    names = [*comparisons(), *STUDIES, "power", "verdicts"]
    if unknown := sorted({*arguments.only} - {*names}):
        raise UserError(f"--only {' '.join(unknown)}: allowed are {', '.join(names)}.")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not arguments.only or name in arguments.only:
            print(name, flush=True)
            make(name, arguments.output_dir, arguments.docs)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
