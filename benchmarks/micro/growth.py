"""Does a long run keep taking memory? The growth of what its ranks hold, for each step.

    python -m benchmarks.micro.growth                     # 2,000 steps of two ranks, TP2·EP2
    python -m benchmarks.micro.growth --steps 300 --track wandb tensorboard

A job of torchrun with a small model, whose steps do all that a step does: rollouts, routes, update,
token log, metrics, and now and then an analysis, an evaluation, a checkpoint. It is watched from
outside, by /proc. Growth is the slope of a straight line through the resident memory of a rank from
step `--after` on: before it libraries fill their caches, of which oneDNN's holds 1,024 kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

ROOT = Path(__file__).parents[2]
POLL_S = 1.0
SMALL = (
    *("--digits", "1", "--tiny.layers", "2", "--tiny.hidden", "32", "--minibatches", "1"),
    *("--warm-start.probe-problems", "64", "--warm-start.target-pass-at-1", "0.1"),
    *("--prompts", "4", "--group", "2", "--eval-every", "50", "--save-every", "100"),
    "--no-report",
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A job at one moment; values by rank number."""

    step: int
    resident_kb: list[int]
    descriptors: list[int]
    threads: list[int]
    temporary: int  # files in the folder of temporary files
    tracked: int  # files in the trackers' folders


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Samples of a job from a step on, and the files that it left."""

    samples: list[Sample]
    left: list[str]  # temporary files after its end

    def kb_a_step(self, rank: int) -> float:
        steps = [sample.step for sample in self.samples]
        return float(np.polyfit(steps, [s.resident_kb[rank] for s in self.samples], 1)[0])

    def lines(self) -> Iterator[str]:
        first, last = self.samples[0], self.samples[-1]
        yield f"steps {first.step} to {last.step}, {len(self.samples)} samples"
        for rank, (before, after) in enumerate(
            zip(first.resident_kb, last.resident_kb, strict=True)
        ):
            yield (
                f"rank {rank}: {self.kb_a_step(rank):+.1f} kB a step ({before / 1024:.0f} → "
                f"{after / 1024:.0f} MB), descriptors {first.descriptors[rank]} → "
                f"{last.descriptors[rank]}, threads {first.threads[rank]} → {last.threads[rank]}"
            )
        yield (
            f"temporary files {first.temporary} → {last.temporary}, after the run "
            f"{', '.join(self.left) or 'none'}; trackers' files {first.tracked} → {last.tracked}"
        )


def watched(folder: Path, *options: str, steps: int, after: int, ranks: int = 2) -> Growth:
    """Run a job of so many steps in a folder, and watch it from step `after` on.

    Raises RuntimeError where the job fails or was seen less than three times.
    """
    run, temporary = folder / "run", folder / "temporary"
    temporary.mkdir(parents=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), str(ROOT / "examples/train_moe.sh")),
        *("--output-dir", str(run), "--cache-dir", str(folder / "cache"), "--steps", str(steps)),
        *(*SMALL, *options),
    ]
    environment = os.environ | {
        **{"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    samples: list[Sample] = []
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while agent.poll() is None:
                time.sleep(POLL_S)
                step = last_step(run)
                # Not at the last step, after which everything is closed.
                if after <= step < steps and (not samples or step > samples[-1].step):
                    try:
                        samples.append(sampled(agent.pid, ranks, step, run, temporary))
                    except (psutil.Error, ProcessLookupError):  # it has just ended
                        break
            agent.wait()
        finally:
            agent.terminate()
            agent.wait()
    if agent.returncode or len(samples) < 3:
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"status {agent.returncode}, seen {len(samples)} times:\n{said}")
    return Growth(samples=samples, left=sorted(path.name for path in temporary.iterdir()))


def last_step(run: Path) -> int:
    """The last step in the metrics; -1 before the first row."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else -1


def sampled(agent: int, ranks: int, step: int, run: Path, temporary: Path) -> Sample:
    processes = of_ranks(agent, ranks)
    trackers = [path for name in ("wandb", "tensorboard") for path in (run / name).rglob("*")]
    return Sample(
        step=step,
        resident_kb=[p.memory_info().rss // 1024 for p in processes],
        descriptors=[p.num_fds() for p in processes],
        threads=[p.num_threads() for p in processes],
        temporary=sum(1 for _ in temporary.rglob("*")),
        tracked=len(trackers),
    )


def of_ranks(agent: int, ranks: int) -> list[psutil.Process]:
    """The processes of the ranks of a torchrun or of `moe-upgrpo launch`, in their order."""
    found = {}
    for child in psutil.Process(agent).children():
        with suppress(psutil.Error):  # ended since
            found[child.environ().get("RANK")] = child
    missing = [rank for rank in range(ranks) if str(rank) not in found]
    if missing:
        raise ProcessLookupError(f"{ranks} ranks are expected, {missing} are not there")
    return [found[str(rank)] for rank in range(ranks)]


def main(
    steps: int = 2000,
    after: int | None = None,
    ranks: int = 2,
    track: Sequence[str] = ("none",),
) -> None:
    """Print what the ranks of a long run hold more of for each step.

    Args:
        steps: of the run.
        after: the step from which on it is watched. Default: a fifth of the steps.
        ranks: of the run.
        track: trackers that are on: wandb (offline), tensorboard.
    """
    with tempfile.TemporaryDirectory() as folder:
        after = steps // 5 if after is None else after
        options = ("--track", *track)
        for line in watched(Path(folder), *options, steps=steps, after=after, ranks=ranks).lines():
            print(line)


if __name__ == "__main__":
    tyro.cli(main)
