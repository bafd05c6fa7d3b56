"""The same RL step in other programs, each run on its own; `benchmarks.micro.step_against_peers`.

Each is run by torchrun with a `Work` as JSON, and writes a list of (tokens, CPU seconds of all
ranks, seconds), one for each RL step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's folder and the batch of an RL step.

    minibatches: optimizer steps on a batch. micro_batch: sequences in a forward pass; None: all.
    sort: micro-batches are formed of sequences of similar length.
    """

    model: str
    out: str
    steps: int
    prompts: int
    group: int
    new_tokens: int
    minibatches: int = 1
    micro_batch: int | None = None
    sort: bool = False

    def as_json(self) -> str:
        return json.dumps(asdict(self))


Step = tuple[float, float, float]  # sampled tokens, CPU seconds of all ranks, seconds


def write_steps(work: Work, steps: list[Step]) -> None:
    Path(work.out).write_text(json.dumps(steps), encoding="utf-8")


def read_steps(path: Path) -> list[Step]:
    return [tuple(step) for step in json.loads(path.read_text(encoding="utf-8"))]
