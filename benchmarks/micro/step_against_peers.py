"""CPU time of a whole RL step for each sampled token, beside TRL's GRPOTrainer and plain PyTorch.

    python -m benchmarks.micro.step_against_peers [--only mixed] [--rounds 5]

The same random Qwen3-MoE, batch and number of processes, one thread each, fp32, rewards at random
(what is sampled does not matter here), no reference model: rollout by transformers, old log-probs
where there are several optimizer steps, update. Ours records, compares and logs the routes of both
sides beside it, which the others do not. The plain loop is the practical limit; with mixed lengths
it sorts too. In each round every side runs once, in turn. Of a run the median over its steps but
the first ones; printed are medians and quartiles over the rounds, in CPU microseconds a token, all
ranks summed, and the ratios of one round's runs. What waits costs no CPU time: see `time/waiting`
for that. On a machine that is busy with something else nothing is printed.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import tyro

from benchmarks.micro.peers import Step, Work, read_steps
from moe_upgrpo.errors import UserError

ROOT = Path(__file__).parents[2]
WARM_UP = 2
BUSY = 0.15
"""Share of the cores that others may take before and between the runs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: a model and a batch.

    model: what `tiny_model_config` takes. vocabulary: None is the arithmetic task's. ours: layouts
    (tp, ep) of one and two ranks. options: further ones of ours.
    """

    model: dict[str, int] = field(default_factory=dict)
    vocabulary: int | None = None
    prompts: int
    group: int = 8
    new_tokens: int
    minibatches: int = 1
    micro_batch: int | None = None
    sort: bool = False
    options: tuple[str, ...] = ()


ROWS = {
    "small": Row(prompts=32, new_tokens=16),
    "four-steps": Row(prompts=32, new_tokens=16, minibatches=4),
    # Logits of 128 tokens that are almost equal end a response after 111 tokens on average.
    "mixed": Row(
        model={"max_positions": 320},
        vocabulary=128,
        prompts=8,
        new_tokens=256,
        micro_batch=16,
        sort=True,
        options=("--micro-batch-tokens", "2048"),
    ),
    "16-experts": Row(
        model={"hidden": 256, "heads": 8, "experts": 16, "expert_intermediate": 224}
        | {"max_positions": 128},
        prompts=8,
        new_tokens=64,
    ),
    "64-experts": Row(
        model={"hidden": 256, "heads": 8, "experts": 64, "expert_intermediate": 256} | {"top_k": 8},
        prompts=8,
        new_tokens=16,
    ),
}
OURS = {
    "ours": (1, 1, 1),
    "ours, DP2": (2, 1, 1),
    "ours, EP2": (2, 1, 2),
    "ours, TP2·EP2": (4, 2, 2),
}
"""Ranks, tp and ep."""
PEERS = {"TRL": ("trl", 1), "TRL, 2": ("trl", 2), "plain": ("plain", 1), "plain, 2": ("plain", 2)}
"""Program and ranks."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Rows and sides to run (all without), and how often."""

    only: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    rounds: int = 5
    steps: int = 7
    """RL steps of a run, the first of which warm up."""

    def __post_init__(self):
        for given, known in ((self.only, ROWS), (self.sides, OURS | PEERS)):
            if unknown := [name for name in given if name not in known]:
                raise UserError(f"{unknown[0]!r} is none of {', '.join(known)}.")
        if self.rounds < 1 or self.steps <= WARM_UP + 1:
            raise UserError(f"At least 1 round and {WARM_UP + 2} steps are needed.")


def save_model(row: Row, folder: Path) -> float:
    """Write the row's random model with the task's tokenizer; millions of parameters."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    from moe_upgrpo.tasks import arithmetic
    from moe_upgrpo.train.warm_start import tiny_model_config

    config = tiny_model_config(**row.model)
    if row.vocabulary:
        config.vocab_size = row.vocabulary
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    arithmetic.save_tokenizer(folder)
    return sum(p.numel() for p in model.parameters()) / 1e6


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    set_here = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | set_here | (environment or {}),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode:
        raise UserError(f"{' '.join(command[:6])} … failed:\n{result.stderr[-3000:]}")


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]


def ours(row: Row, work: Work, folder: Path, ranks: int, tp: int, ep: int) -> list[Step]:
    from moe_upgrpo.store import read_metrics

    options = {
        "model": work.model,
        "engine": "hf",
        "engine-dtype": "float32",
        "output-dir": str(folder),
        "steps": str(work.steps),
        "tp": str(tp),
        "ep": str(ep),
        "prompts": str(work.prompts),
        "group": str(work.group),
        "minibatches": str(work.minibatches),
        "max-new-tokens": str(work.new_tokens),
        "loss": "grpo",
        "analyse-every": "0",
        "eval-every": "1000000",
        "eval-problems": "2",
        "eval-samples": "1",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    flags = ["--no-reference-kl", "--no-report", *row.options]
    run([*torchrun(ranks), "-m", "moe_upgrpo", "train", *words, *flags])
    rows = [one for one in read_metrics(folder) if "time/total" in one]
    return [(one["tokens/sampled"], one["time/cpu"], one["time/total"]) for one in rows]


def peer(work: Work, program: str, ranks: int) -> list[Step]:
    run([*torchrun(ranks), "-m", f"benchmarks.micro.peers.{program}", work.as_json()])
    return read_steps(Path(work.out))


def cpu_per_token(steps: list[Step]) -> float:
    """CPU microseconds a sampled token, of the median step after the warm-up."""
    return statistics.median(1e6 * cpu / tokens for tokens, cpu, _ in steps[WARM_UP:])


def check_idle() -> None:
    """Raise UserError where others use the machine."""
    if (busy := psutil.cpu_percent(interval=1.0) / 100) > BUSY:
        raise UserError(
            f"The machine is busy: {busy:.0%} of its cores are used by others, {BUSY:.0%} are "
            "allowed. Figures of a busy machine say nothing; run this again when it is idle."
        )


def one_round(
    row: Row, model: Path, scratch: Path, sides: tuple[str, ...], steps: int
) -> dict[str, float]:
    """Each side's CPU microseconds a token."""
    work = Work(
        model=str(model),
        out=str(scratch / "steps.json"),
        steps=steps,
        prompts=row.prompts,
        group=row.group,
        new_tokens=row.new_tokens,
        minibatches=row.minibatches,
        micro_batch=row.micro_batch,
        sort=row.sort,
    )
    found = {}
    for side in sides:
        if side in OURS:
            taken = ours(row, work, scratch / f"run-{side.replace(' ', '')}", *OURS[side])
        else:
            program, ranks = PEERS[side]
            # TRL cannot sort by length.
            taken = peer(replace(work, sort=row.sort and program == "plain"), program, ranks)
        found[side] = cpu_per_token(taken)
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high)


def lines(rounds: list[dict[str, float]]) -> list[str]:
    """A line for each side: µs a token, and its ratio to TRL and the plain loop of its size."""
    shown = []
    for side in rounds[0]:
        middle, low, high = quartiles([one[side] for one in rounds])
        text = f"  {side:<14} {middle:8,.0f} µs a token ({low:,.0f} to {high:,.0f})"
        two = side in OURS and OURS[side][0] > 1
        for other in ("TRL, 2", "plain, 2") if two else ("TRL", "plain"):
            if side in OURS and other in rounds[0]:
                middle, low, high = quartiles([one[side] / one[other] for one in rounds])
                text += f"; {middle:.2f} of {other} ({low:.2f} to {high:.2f})"
        shown.append(text)
    return shown


def main(arguments: Arguments) -> int:
    sides = arguments.sides or (*OURS, *PEERS)
    check_idle()
    print(
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
        f"load {os.getloadavg()[0]:.2f}; {arguments.rounds} rounds of {arguments.steps} steps"
    )
    for name in arguments.only or ROWS:
        row = ROWS[name]
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch, "model")
            millions = save_model(row, model)
            rounds = []
            for i in range(arguments.rounds):
                check_idle()
                folder = Path(scratch, str(i))
                folder.mkdir()
                rounds.append(one_round(row, model, folder, sides, arguments.steps))
        print(
            f"{name}: {millions:.1f}M parameters, {row.prompts} × {row.group} responses of at most "
            f"{row.new_tokens} tokens, {row.minibatches} optimizer steps",
            *lines(rounds),
            sep="\n",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments)))
    except UserError as error:
        sys.exit(str(error))
