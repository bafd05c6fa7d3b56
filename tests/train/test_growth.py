"""A long run takes no more memory with each step, and no descriptors, threads or files.

Of glibc's heap: other C libraries have no call that gives memory back. Not covered: what the
libraries' own caches hold, which have limits of their own.
"""

from functools import partial
from pathlib import Path

import numpy as np

from tests.ranks import run_command
from tests.train.test_launch import options

BLOCKS, BLOCK_KB = 256, 64


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4


def leave_holes(step: int, kept: list) -> None:
    """Free some 16 MB in blocks whose beginnings stay, too small for those of the next step."""
    blocks = [np.ones(BLOCK_KB * 1024 + 4096 * step, np.uint8) for _ in range(BLOCKS)]
    for block in blocks:
        block.resize(2048, refcheck=False)  # in place: what is behind it is free
    kept += blocks


def leaves_holes(file: Path) -> None:
    """Have each step of this process's job leave holes, and its memory at its start noted."""
    from moe_upgrpo.train import loop

    kept, begin = [], loop.seed_global_generators

    def beginning(seed: int, step: int, rank: int) -> None:
        with file.open("a", encoding="utf-8") as noted:
            noted.write(f"{resident_kb()}\n")
        leave_holes(step, kept)
        begin(seed, step, rank)

    loop.seed_global_generators = beginning


def test_a_step_keeps_no_memory_that_it_freed(cache, tmp_path):
    """Else the heap of a real run grew by 250 to 400 kB a step."""
    steps = 16
    noted = tmp_path / "resident"
    more = ("--steps", str(steps), "--eval-every", "100", "--save-every", "0")
    result = run_command(
        "train", *options(tmp_path / "r", cache, *more), first=partial(leaves_holes, noted)
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kb = [int(line) for line in noted.read_text(encoding="utf-8").splitlines()]
    assert len(kb) == steps
    # Of thirteen steps, 208 MB; the first have caches to fill, and some holes are kept.
    assert kb[-1] - kb[2] < 5 * BLOCKS * BLOCK_KB
