"""Faults put into a running engine, by the cause named; two bisections, as a picture.

    OMP_NUM_THREADS=1 python -m benchmarks.diagnose.engines [--figure docs/img/diagnose-knobs.svg]

Run from the repository's root: minutes on a CPU. Prints tables in Markdown: each fault in each of
some random models, with the cause named first and the part of the difference that mending it
removed; pairs without a fault; and the time of a whole diagnosis of the 1M-parameter model of
`make train`, which `--only time` prints alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from benchmarks.diagnose.engine_faults import CLEAN, ENGINE_FAULTS, EngineFault, options
from benchmarks.studies.made import draw_all, subplots
from moe_upgrpo import kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.rollout.hf import HFEngine, no_progress_bar
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.tools.diagnose.bisection import MEASURES, Bisection, as_table
from moe_upgrpo.tools.diagnose.differences import Measure
from moe_upgrpo.tools.diagnose.examine import Examined, examine
from moe_upgrpo.train.warm_start import tiny_model_config

INITIALIZER_RANGE = 0.06  # of a hidden size of 128: weights this wide make routers that decide
SHAPES = {
    "4 layers, 8 experts, top-2": {},
    "3 layers, 16 experts, top-4": dict(layers=3, experts=16, expert_intermediate=32, top_k=4),
    "4 layers, 64 experts, top-8": dict(experts=64, expert_intermediate=32, top_k=8),
}
MILLION = "4 layers, 8 experts, top-2"
BISECTED = "4 layers, 64 experts, top-8"


@dataclass
class Arguments:
    only: Literal["all", "faults", "knobs", "time"] = "all"
    prompts: int = 16
    figure: Path | None = None
    """Where the picture of the bisection goes."""


def saved_model(folder: Path, *, seed: int = 0, **sizes) -> Path:
    """A random Qwen3-MoE (dense Qwen3 with experts=0) with the arithmetic tokenizer."""
    config = tiny_model_config(**sizes)
    config.initializer_range = INITIALIZER_RANGE
    torch.manual_seed(seed)
    with no_progress_bar():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    arithmetic.save_tokenizer(folder)
    return folder


def write_prompts(file: Path, count: int) -> Path:
    """Additions, one a line, all different."""
    rng = np.random.default_rng(0)
    lines = {f"{a}+{b}=" for a, b in rng.integers(1, 99, (4 * count, 2))}
    file.write_text("\n".join(sorted(lines)[:count]) + "\n", encoding="utf-8")
    return file


def examined(fault: EngineFault, model: Path, prompts: Path, **given) -> Examined:
    """The diagnosis of a sound engine with the fault put into it."""
    engine = fault.inject(HFEngine(model, fault.dtype, "cpu"))
    return examine(
        options(model, prompts, engine_dtype=fault.dtype, **given),
        server_log=prompts.with_name("engine.log"),
        engine=engine,
    )


def rows_of_faults(folder: Path, prompts: Path, faults: dict[str, EngineFault]) -> Iterator[list]:
    """A row for each fault: the cause named first, in how many models, and its share."""
    models = {name: saved_model(folder / name, **sizes) for name, sizes in SHAPES.items()}
    for name, fault in faults.items():
        found = [examined(fault, model, prompts) for model in models.values()]
        named = [_first(one, fault) for one in found]
        right = sum(cause == fault.cause for cause in named)
        shares = [
            ""
            if not one.findings or one.findings[0].share is None
            else f"{one.findings[0].share:.0%}"
            for one in found
        ]
        causes = ", ".join(sorted({cause or "no fault" for cause in named}))
        yield [name, causes, f"{right} of {len(found)}", ", ".join(shares)]


def _first(of: Examined, fault: EngineFault) -> str | None:
    """The cause named first; for a pair without a fault, only the first fault."""
    found = of.findings if fault.cause else [f for f in of.findings if f.kind == "fault"]
    return found[0].cause if found else None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(table_row(cells) for cells in (heads, ["---"] * len(heads), *rows))


def table_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def bisections(folder: Path, prompts: Path) -> dict[str, Bisection]:
    """Turn the knobs of a bf16 engine, and of one that also has weights rounded to FP8."""
    model = saved_model(folder / "bisected", **SHAPES[BISECTED])
    found = {}
    for name, weights in (("bf16", "as-trained"), ("bf16, weights rounded to FP8", "fp8")):
        result = examine(options(model, prompts), server_log=folder / "engine.log", weights=weights)
        assert result.bisection is not None
        found[name] = result.bisection
    return found


def drawing(found: dict[str, Bisection]) -> Figure:
    """Draw the share of mismatch and gap that each knob removes, with its interval."""
    drawn, axes = subplots(1, len(found), figsize=(8, 2.9), sharex=True)
    colours: dict[Measure, str] = {"routers": "#1f5fa8", "gap": "#c8641e"}
    for axis, (name, of) in zip(axes, found.items(), strict=True):
        turned = sorted(of.turned, key=lambda one: max(e.share or 0 for e in one.effects.values()))
        for at, measure in enumerate(MEASURES):
            known = [
                (y, one.effects[measure])
                for y, one in enumerate(turned)
                if measure in one.effects and one.effects[measure].share is not None
            ]
            heights = [y + 0.15 - 0.3 * at for y, _ in known]
            shares = [100 * e.share for _, e in known]
            ends = [
                [100 * (e.share - (e.share if e.low is None else e.low)) for _, e in known],
                [100 * ((e.share if e.high is None else e.high) - e.share) for _, e in known],
            ]
            label = {"routers": "routers that differ", "gap": "mean |log-prob gap|"}[measure]
            axis.errorbar(
                shares,
                heights,
                xerr=np.maximum(ends, 0),
                fmt="o",
                ms=3,
                lw=1,
                color=colours[measure],
                label=label,
            )
        axis.set_yticks(range(len(turned)), [one.knob.name for one in turned])
        axis.axvline(0, color="#999999", lw=0.8)
        axis.set_xlim(-60, 105)
        base = f"{of.base['routers']:.1%} of routers, floor {of.floor['routers']:.2%}"
        axis.set_title(f"{name}\n{base}", fontsize=8)
        axis.set_xlabel("taken away, % (95% interval by prompt)")
    axes[0].legend(fontsize=7, loc="lower right")
    return drawn


def timed(folder: Path, prompts: Path) -> str:
    """Seconds for a whole diagnosis of the 1M-parameter model, including all knobs."""
    model = saved_model(folder / "million", **SHAPES[MILLION])
    begun, cpu = time.monotonic(), time.process_time()
    found = examine(options(model, prompts), server_log=folder / "engine.log")
    assert found.bisection is not None and found.bisection.turned
    return (
        f"A whole diagnosis of the 1M-parameter model ({len(found.bisection.turned)} knobs turned, "
        f"{len(found.evidence.prompt)} responses): {time.monotonic() - begun:.0f} s, "
        f"{time.process_time() - cpu:.0f} s of CPU, beside whatever else ran."
    )


def main(arguments: Arguments) -> None:
    wants = ("faults", "knobs", "time") if arguments.only == "all" else (arguments.only,)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        prompts = write_prompts(folder / "prompts.txt", arguments.prompts)
        if "time" in wants:
            print(timed(folder, prompts), flush=True)
        if "knobs" in wants:
            found = bisections(folder, write_prompts(folder / "more.txt", 2 * arguments.prompts))
            for name, of in found.items():
                shown = as_table(of)
                print(f"\n{name}. {shown['says']}\n")
                print(table(shown["columns"], shown["rows"]), flush=True)
            if arguments.figure:
                file = arguments.figure
                draw_all(file.parent, "diagnose", {file.stem: partial(drawing, found)})
        if "faults" in wants:
            totals = []
            heads = ["put into the engine", "named first", "right", "explained, by model"]
            print(f"\nModels: {'; '.join(SHAPES)}.\n\n{table(heads, [])}")
            for what, faults in (
                ("are named first", ENGINE_FAULTS),
                ("pairs without a fault are said to have none", CLEAN),
            ):
                counts = []
                for row in rows_of_faults(folder, prompts, faults):
                    print(table_row(row), flush=True)
                    counts.append([int(n) for n in row[2].split(" of ")])
                right, of = np.sum(counts, axis=0)
                totals.append(f"{right} of {of} {what}")
            print(f"\n{', and '.join(totals)}.")


if __name__ == "__main__":
    kernels.pin()
    silence_upstream()
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
