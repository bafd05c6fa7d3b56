"""The calibration table of `moe-upgrpo diagnose`, and how well its rule predicts a model left out.

    OMP_NUM_THREADS=1 python -m benchmarks.diagnose.calibrate [--cache-dir runs/cache]

Run from the repository's root. Measures models whose experts, top-k and layers vary together, adds
the rows of benchmarks/results/routing-mismatch at weights that both sides share, writes
moe_upgrpo/tools/diagnose/calibration.json and prints the rule. --read measures nothing and prints
the rule of the existing table; --quick uses two tiny models, and writes nothing.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from benchmarks.studies import routing_mismatch
from benchmarks.studies.routing_mismatch import BF16, FP8, FP32, Model, Study
from moe_upgrpo import __version__, kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.tools.diagnose import expected

RESULTS = Path("benchmarks/results/routing-mismatch")
TABLE = Path("moe_upgrpo/tools/diagnose/calibration.json")
SHAPES = (  # layers, experts, top-k
    (2, 8, 2),
    (4, 8, 4),
    (8, 8, 2),
    (2, 16, 2),
    (8, 16, 4),
    (4, 32, 2),
    (2, 32, 8),
    (8, 32, 4),
    (8, 64, 2),
    (2, 128, 2),
    (4, 128, 4),
    (6, 128, 8),
)


@dataclass
class Arguments:
    cache_dir: Path = Path("runs/cache")
    """Where warm starts are kept."""
    read: bool = False
    quick: bool = False


def shapes(quick: bool) -> Study:
    if quick:
        few = Model(layers=2, hidden=64, heads=2, experts=8, intermediate=32, top_k=2)
        models = (("2, 8, 2", few), ("2, 8, 4", replace(few, top_k=4)))
        return Study(axis="size", models=models, sides=(BF16, FP32), seeds=1, prompts=2)
    models = tuple(
        (f"{layers}, {experts}, {top_k}", Model(layers=layers, experts=experts, top_k=top_k))
        for layers, experts, top_k in SHAPES
    )
    return Study(axis="size", models=models, sides=(BF16, FP8, FP32), seeds=2)


def table_row(row: dict, source: str) -> dict:
    """Turn a row of the routing mismatch study into one of the calibration table."""
    names = ("weights", "layers", "hidden", "experts", "top_k")
    return {
        "engine": row["engine"],
        "precision": {"FP8 weights": "fp8"}.get(row["rollout"], row["rollout"]),
        "trainer": row["trainer"],
        "layers": int(row["layers"]),
        "experts": int(row["experts"]),
        "top_k": int(row["top_k"]),
        "trained": row["weights"] == "trained",
        "margin": float(f"{row['margin_median']:.4g}"),
        "differ": round(row["mismatch/router_numerator"]),
        "pairs": round(row["mismatch/router_denominator"]),
        "gap": float(f"{row['logp_gap/mean_abs']:.4g}"),
        "model": ", ".join(str(row[name]) for name in names),
        "source": source,
    }


def measured(study: Study, cache_dir: Path) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as work, groups.process_groups(Layout()):
        for found in routing_mismatch.run_study(study, Path(work), cache_dir):
            yield table_row(found.row, "benchmarks.diagnose.calibrate")


def earlier() -> Iterator[dict]:
    """The rows of the routing mismatch study at weights that both sides share."""
    found = 0
    runs = pd.read_parquet(RESULTS / "runs.parquet")
    for row in runs[runs["updates"] == 0].to_dict("records"):
        found += 1
        of_folder = {"engine": f"engine-{row['engine']}", "training step": "staleness"}
        yield table_row(row, f"routing-mismatch/{of_folder.get(row['axis'], row['axis'])}")
    if not found:
        raise UserError(f"{RESULTS} holds no rows to reuse")


def rule_lines() -> Iterator[str]:
    """The rule in words: coefficients and the error of a model left out."""
    names = ["log E", "log K", "log L", "FP8", "bf16 trainer"]
    for with_margin in (False, True):
        of = expected.rule(with_margin)
        terms = [*names, *(["log m"] if with_margin else ["trained", "trained · FP8"])]
        first, *others = of.coefficients
        parts = [
            f"{'−' if value < 0 else '+'} {abs(value):.2f} {name}"
            for name, value in zip(terms, others, strict=True)
        ]
        yield f"log r = {first:.2f} {' '.join(parts)}".replace("-", "−")
        yield (
            f"  {of.rows} rows of {len(of.misses)} models; one left out is missed by a factor of "
            f"{np.exp(of.error()):.2f} (median {np.exp(np.median(of.misses)):.2f}, largest "
            f"{np.exp(of.misses.max()):.2f})"
        )
    big = expected.expected_rate(128, 8, 48, "bf16", trainer="bf16", trained=True)
    yield (
        "128 experts, top-8, 48 layers, trained, bf16 on both sides: "
        f"{big.low:.1%} to {big.high:.1%} "
        "(published for Qwen3-30B-A3B, arXiv 2510.11370: about 10%)"
    )


def main(arguments: Arguments) -> None:
    if arguments.quick:
        print(*measured(shapes(quick=True), arguments.cache_dir), sep="\n")
        return
    if not arguments.read:
        rows = [*earlier(), *measured(shapes(quick=False), arguments.cache_dir)]
        lines = ",\n".join(json.dumps(row) for row in rows)
        TABLE.write_text(
            f'{{"version": {json.dumps(__version__)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8"
        )
        expected.table.cache_clear()
    print(*rule_lines(), sep="\n")


if __name__ == "__main__":
    kernels.pin()
    silence_upstream()
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
