"""Throughput against staleness: the queue of `--staleness N` with a simulated engine and trainer.

    python -m benchmarks.micro.staleness [--figure staleness.svg]

No model is run and nothing is measured of one: engine and trainer only sleep, the engine for a
lognormal time of a mean of `--generate` seconds (its spread is `--sigma`: long responses are rare),
the trainer for `--update` seconds. The queue, its thread and the order of its weights are the
trainer's own (`moe_upgrpo.train.rollouts`). Printed for each N: steps a second over those of N = 0
with the same draws, the share of the time in which each side worked, and the staleness that the
batches had. No N can be above "at most": the slower side's work alone.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro

from benchmarks.studies.exact.report import table
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout.base import Rollout, SamplingConfig
from moe_upgrpo.tasks import ArithmeticTask
from moe_upgrpo.train.place import Place
from moe_upgrpo.train.rollouts import Rollouts
from moe_upgrpo.train.stopping import Stopping


class SimulatedEngine:
    """Sleeps as long as it is told for each batch, and answers every prompt with one token."""

    def __init__(self, seconds: np.ndarray):
        self.weight_version, self._seconds, self.worked = 0, iter(seconds), 0.0

    def generate(self, prompts, sampling, *, samples_per_prompt, seed):
        seconds = next(self._seconds)
        time.sleep(seconds)
        self.worked += seconds
        return [
            Rollout(
                prompt_ids=prompt,
                response_ids=np.ones(1, np.int64),
                logp_rollout=np.zeros(1, np.float32),
                routes=np.zeros((len(prompt), 0, 0), np.uint8),
                weight_version=self.weight_version,
                finished=True,
            )
            for prompt in prompts
            for _ in range(samples_per_prompt)
        ]

    def update_weights(self, named_tensors, *, version):
        self.weight_version = version


class SimulatedActor:
    """Weights that are nothing."""

    def export_weights(self):
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Setting:
    staleness: tuple[int, ...] = (0, 1, 2, 4, 8)
    steps: int = 100
    generate: float = 0.05
    update: float = 0.05
    sigma: float = 0.8
    seed: int = 0
    figure: Path | None = None
    """An SVG of the table."""


@dataclass
class Found:
    """Seconds that a run of one N took, and that either side worked; the versions behind."""

    seconds: float
    generated: float
    updated: float
    behind: list[int] = field(default_factory=list)


def run(setting: Setting, staleness: int) -> Found:
    """The steps of the trainer's loop that concern the queue, with sleeps for the work."""
    draws = np.random.default_rng(setting.seed).normal(size=setting.steps)
    # The mean of exp(σz) is exp(σ²/2).
    seconds = setting.generate * np.exp(setting.sigma * draws - setting.sigma**2 / 2)
    engine = SimulatedEngine(seconds)
    sampler = Rollouts(
        task=ArithmeticTask(),
        engine=engine,
        sampling=SamplingConfig(max_new_tokens=1),
        place=Place(),
        stopping=Stopping(1),
        seed=setting.seed,
        steps=setting.steps,
        prompts=1,
        group=2,
        staleness=staleness,
    )
    found = Found(0.0, 0.0, setting.steps * setting.update)
    begin = time.perf_counter()
    for step in range(1, setting.steps + 1):
        batch = sampler.batch(step)
        found.behind.append(step - 1 - batch.rollouts[0].weight_version)
        sampler.generate_ahead(step)
        time.sleep(setting.update)
        sampler.update_engine(SimulatedActor(), step)
    sampler.settle()
    return replace(found, seconds=time.perf_counter() - begin, generated=engine.worked)


def main(setting: Setting) -> None:
    with groups.process_groups(Layout()):
        found = {n: run(setting, n) for n in setting.staleness}
    first = found[setting.staleness[0]]
    gains = {n: first.seconds / one.seconds for n, one in found.items()}
    most = first.seconds / max(first.generated, first.updated)
    print(
        f"simulated: {setting.steps} steps, generation of {setting.generate:g} s in the mean "
        f"(sigma {setting.sigma:g}), updates of {setting.update:g} s; at most {most:.2f}"
    )
    rows = [
        [
            str(n),
            f"{gains[n]:.2f}",
            f"{one.generated / one.seconds:.0%}",
            f"{one.updated / one.seconds:.0%}",
            f"{np.mean(one.behind):.2f}",
        ]
        for n, one in found.items()
    ]
    print(table(["staleness", "throughput", "engine works", "trainer works", "behind"], rows))
    if setting.figure:
        draw(setting.figure, gains, most)


def draw(path: Path, gains: dict[int, float], most: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(gains), list(gains.values()), marker="o")
    axes.axhline(most, linestyle=":", color="gray", label="the slower side alone")
    axes.set(xlabel="staleness, steps", ylabel="throughput over staleness 0", xticks=list(gains))
    axes.set_title("simulated engine and trainer", fontsize="medium")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(tyro.cli(Setting, description=__doc__))
