"""How many problems, samples and seeds a difference between two losses needs.

    python benchmarks/studies/power.py [--page docs/power.md]
    python benchmarks/studies/power.py --runs RUN … [--second RUN …]   the spread of your runs

About half a minute of one core. The first prints the tables of docs/power.md; --page fills them in.
The second takes evaluations of runs of one arm that differ by their seed alone (docs/data.md), and
of another arm's runs with the same seeds in the same order: the spread that they show, the paired
test, and what a 3-point difference would need with it. The formulas: moe_upgrpo/stats/power.py.
Without --runs the spreads are assumptions (`SPREADS`); the simulation breaks those of the formulas.

Shape suffixes: R repetitions of an experiment, S seeds, N problems.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from scipy import stats
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, wherever this is started

from benchmarks.studies.made import as_page, marked
from docs.sections import fill
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import power
from moe_upgrpo.stats.power import Design, Spread
from moe_upgrpo.store import read_evaluations

DELTA = 0.03
# Assumed, in shares. τ makes AIME's chances two-humped: seven problems in ten below .2 or above .8,
# were they Beta-distributed.
SPREADS = {
    "small": Spread(accuracy=0.5, problems=0.39, gain=0.06, seed=0.005, seed_problem=0.05),
    "middle": Spread(accuracy=0.5, problems=0.39, gain=0.12, seed=0.01, seed_problem=0.10),
    "large": Spread(accuracy=0.5, problems=0.39, gain=0.20, seed=0.02, seed_problem=0.15),
}
MATH = {"accuracy": 0.85, "problems": 0.28}
# problems, samples of each, what is other than AIME's
SETS = {
    "AIME 2024": (30, 32, {}),
    "AIME 2024 + 2025": (60, 32, {}),
    "MATH-500": (500, 4, MATH),
}
# Peak of one run each: arXiv 2607.06987 and seed 001; the second from a secondary source.
PUBLISHED = {
    "UP-DAPO − DAPO, Qwen3-14B-Base": (0.4771, 0.5115),
    "UP-GSPO − GSPO, Qwen3-30B-A3B-Base": (0.5271, 0.5573),
}
REPETITIONS = 4000
EXAMPLE = Path(__file__).with_name("power_example.npz")


def table(heads: list[str], rows: list[list]) -> str:
    cells = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def points(share: float) -> str:
    return f"{100 * share:.1f}"


def spreads() -> str:
    """The assumptions, and what they make of one run on AIME 2024."""
    rows = []
    for name, spread in SPREADS.items():
        found = power.variances(Design(problems=30, samples=32, seeds=1), spread)
        run = sum(found[part] for part in ("sampling", "seed_problem", "seeds")) / 2
        assumed = (getattr(spread, n) for n in ("problems", "gain", "seed", "seed_problem"))
        rows.append([name, *map(points, assumed), points(run**0.5)])
    heads = ["spread", "τ, between problems", "g, of a problem's gain", "u, a seed on all problems"]
    heads += ["v, a seed on one problem", "so avg@32 of AIME 2024 from run to run"]
    return table(heads, rows)


def parts() -> str:
    """Standard deviation that each part alone gives the difference, one run each."""
    rows = []
    for name, (problems, samples, other) in SETS.items():
        for label, spread in SPREADS.items():
            spread = replace(spread, **other)
            design = Design(problems=problems, samples=samples, seeds=1)
            found = power.variances(design, spread)
            apart = power.variances(design, spread, paired=False)
            rows.append(
                [
                    f"{name}, n = {samples}",
                    label,
                    *(points(found[p] ** 0.5) for p in ("sampling", "seed_problem", "seeds")),
                    points(power.standard_error(design, spread, question="these")),
                    points(found["problems"] ** 0.5),
                    points(apart["problems"] ** 0.5),
                ]
            )
    heads = ["problems", "spread", "sampling", "seed on a problem", "seed on all"]
    heads += ["these problems: all of it", "such problems add", "… not paired"]
    return table(heads, rows)


def needed() -> str:
    """Runs of each arm for 80% power, the power of some, and what five find with 80%."""
    rows = []
    for name, (problems, samples, other) in SETS.items():
        for label, spread in SPREADS.items():
            spread = replace(spread, **other)
            given = {"problems": problems, "samples": samples}
            seeds = {
                q: power.seeds_needed(DELTA, spread, question=q, **given) for q in ("these", "such")
            }
            powers = [
                power.power_of(DELTA, Design(seeds=s, **given), spread, question="these")
                for s in (3, 5, 10)
            ]
            five = Design(seeds=5, **given)
            seen = (power.detectable(five, spread, question=q) for q in ("these", "such"))
            least = power.problems_needed(DELTA, spread.gain)
            such = seeds["such"] or f"never: {least} problems at least"
            percent = (f"{p:.0%}" for p in powers)
            rows.append([name, label, seeds["these"], *percent, such, *map(points, seen)])
    heads = ["problems", "spread", "**runs of each arm, these problems**"]
    heads += ["power of 3", "of 5", "of 10", "**runs, such problems**"]
    heads += ["points that 5 runs find, these", "such"]
    return table(heads, rows)


def samples() -> str:
    """The gain of more samples."""
    rows = []
    for n in (1, 4, 8, 32, 128, 512):
        row = [n, f"{30 * n:,}"]
        for spread in SPREADS.values():
            design = Design(problems=30, samples=n, seeds=1)
            error = power.standard_error(design, spread, question="these")
            seeds = power.seeds_needed(DELTA, spread, problems=30, samples=n, question="these")
            row += [points(error), seeds]
        rows.append(row)
    heads = ["n", "responses an evaluation"]
    for name in SPREADS:
        heads += [f"{name}: points, one run each", "runs"]
    return table(heads, rows)


def published() -> str:
    """The published differences against their standard errors, were the spreads known."""
    rows = []
    for name, (first, second) in PUBLISHED.items():
        difference = second - first
        for label, spread in SPREADS.items():
            spread = replace(spread, accuracy=(first + second) / 2)
            design = Design(problems=30, samples=32, seeds=1)
            sampling = power.variances(design, spread)["sampling"] ** 0.5
            errors = [
                sampling,
                *(power.standard_error(design, spread, question=q) for q in ("these", "such")),
            ]
            cells = [
                f"±{points(1.96 * e)}, p = {2 * stats.norm.sf(difference / e):.2g}" for e in errors
            ]
            wrong = power.false_positives(design, spread)
            rows.append([name, points(difference), label, *cells, f"{wrong:.0%}"])
    heads = ["difference", "points", "spread", "these two models", "these methods, these problems"]
    heads += ["these methods, such problems", "test over problems, equal methods: p < .05"]
    return table(heads, rows)


def peak() -> str:
    """The gain of the best of K evaluations over the accuracy of one and the same policy."""
    counts = (1, 5, 10, 20, 40)
    rows = []
    for name, (problems, n, other) in SETS.items():
        spread = replace(SPREADS["middle"], **other)
        design = Design(problems=problems, samples=n, seeds=1)
        error = (power.variances(design, spread)["sampling"] / 2) ** 0.5
        rows.append([name, *(points(error * power.expected_maximum(k)) for k in counts)])
    return table(["points, by sampling alone", *(f"best of {k}" for k in counts)], rows)


@dataclass(frozen=True, kw_only=True)
class World:
    """Runs that break the formulas: two humps of difficulty and everything added to log-odds.

    A problem is hard (log-odds about −4), easy (4) or neither (0), a third each; so gains and seeds
    move some problems and not others, and the variance of a gain depends on the problem. Seeds have
    heavy tails (t with 4 degrees of freedom). All scales are of log-odds.
    """

    gain: float = 0.9
    seed: float = 0.10
    seed_problem: float = 0.75

    def problems(self, rng, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-odds of the first arm, and what the second adds to each but for a constant."""
        humps = rng.choice([-4.0, 0.0, 4.0], size=shape)
        return humps + rng.normal(size=shape), self.gain * rng.normal(size=shape)

    def chances(self, rng, logits_RN: np.ndarray, seeds: int) -> np.ndarray:
        """`[R, S, N]`: of runs with these log-odds."""
        of_all = rng.standard_t(4, size=(*logits_RN.shape[:1], seeds, 1)) / 2**0.5
        of_one = rng.normal(size=(logits_RN.shape[0], seeds, logits_RN.shape[1]))
        return expit(logits_RN[:, None, :] + self.seed * of_all + self.seed_problem * of_one)

    def shift(self, rng, delta: float) -> float:
        """The constant that makes the mean gain δ, by bisection on many problems."""
        base_N, gain_N = (x[0] for x in self.problems(rng, 1, 400_000))
        seeds_N = self.seed_problem * rng.normal(size=base_N.shape)
        before = expit(base_N + seeds_N).mean()
        low, high = -3.0, 3.0
        for _ in range(40):
            middle = (low + high) / 2
            gained = expit(base_N + seeds_N + gain_N + middle).mean() - before
            low, high = (middle, high) if gained < delta else (low, middle)
        return low

    def spread(self, rng, shift: float) -> Spread:
        """The same in the formulas' terms: moments of the chances of many problems and seeds."""
        base_RN, gain_RN = self.problems(rng, 1, 20_000)
        arms = [self.chances(rng, x_RN, 400)[0] for x_RN in (base_RN, base_RN + gain_RN + shift)]
        means = [arm_SN.mean(axis=0) for arm_SN in arms]
        # The arms differ a little; the formulas have one figure for both.
        of_seed = np.mean([arm_SN.mean(axis=1).var() for arm_SN in arms])
        of_one = np.mean([(arm_SN - arm_SN.mean(axis=0)).var() for arm_SN in arms])
        return Spread(
            accuracy=float(np.mean(arms)),
            problems=float(np.mean([mean_N.var() for mean_N in means]) ** 0.5),
            gain=float((means[1] - means[0]).std()),
            seed=float(of_seed**0.5),
            seed_problem=float((of_one - of_seed) ** 0.5),
        )

    def expected(self, logits_RN: np.ndarray) -> np.ndarray:
        """Chances `[R, N]` over seeds, all of whose deviations are taken as normal."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(21)
        scale = (self.seed**2 + self.seed_problem**2) ** 0.5
        return expit(logits_RN[..., None] + scale * nodes) @ (weights / weights.sum())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Shares of repetitions in which a test at .05 finds a difference of DELTA, and of 0."""

    error: float  # of the difference, over the repetitions
    power: float
    false: float


def trials(
    world: World, shift: float, design: Design, *, repetitions: int, seed: int
) -> dict[power.Question, Trial]:
    """The paired test of many simulated comparisons.

    Of these problems: what is found is moved by what is true of the problems drawn, to DELTA and to
    0. Of such problems: by what is true of all.
    """
    rng = np.random.default_rng(seed)
    base_RN, gain_RN = world.problems(rng, repetitions, design.problems)
    logits = (base_RN, base_RN + gain_RN + shift)
    first_RSN, second_RSN = (
        rng.binomial(design.samples, world.chances(rng, x_RN, design.seeds)) / design.samples
        for x_RN in logits
    )
    tests = [power.paired_test(*pair) for pair in zip(first_RSN, second_RSN, strict=True)]
    found_R = np.array([test.difference for test in tests])
    before_RN, after_RN = map(world.expected, logits)
    questions = {
        "these": (
            (after_RN - before_RN).mean(axis=1),
            [test.se_seeds for test in tests],
            design.seeds - 1,
        ),
        "such": (DELTA, [test.se_both for test in tests], [test.df_both for test in tests]),
    }
    results = {}
    for question, (truth, errors, df) in questions.items():
        limit_R = stats.t.isf(0.025, np.asarray(df)) * np.asarray(errors)
        off_R = found_R - truth
        results[question] = Trial(
            error=float(off_R.std()),
            power=float((np.abs(off_R + DELTA) > limit_R).mean()),
            false=float((np.abs(off_R) > limit_R).mean()),
        )
    return results


WORLD = World(gain=1.0, seed=0.12, seed_problem=0.8)
DESIGNS = [(30, 32, 3), (30, 32, 5), (30, 32, 10), (60, 32, 5), (200, 8, 5)]


def simulation() -> str:
    """The closed forms against simulated comparisons in a world that breaks what they assume."""
    rng = np.random.default_rng(0)
    shift = WORLD.shift(rng, DELTA)
    spread = WORLD.spread(rng, shift)
    rows = []
    for number, sizes in enumerate(DESIGNS):
        design = Design(**dict(zip(("problems", "samples", "seeds"), sizes, strict=True)))
        found = trials(WORLD, shift, design, repetitions=REPETITIONS, seed=number + 1)
        for question, trial in found.items():
            error = power.standard_error(design, spread, question=question)
            expected = power.power_of(DELTA, design, spread, question=question)
            rows.append(
                [
                    *sizes,
                    question,
                    f"{points(error)} / {points(trial.error)}",
                    f"{expected:.0%} / {trial.power:.0%}",
                    f"5% / {trial.false:.1%}",
                ]
            )
    heads = ["N", "n", "S", "problems", "standard error: formula / simulated", "power", "p < .05"]
    heads[-1] += " of equal methods"
    about = (
        f"The simulated world has, in the formulas' terms: accuracy {spread.accuracy:.2f}, τ "
        f"{points(spread.problems)}, g {points(spread.gain)}, u {points(spread.seed)}, v "
        f"{points(spread.seed_problem)} points. {REPETITIONS:,} comparisons a row.\n\n"
    )
    return about + table(heads, rows)


RIVAL = 0.3  # share of the wrong samples that give the same wrong answer


def metrics() -> str:
    """avg, maj and best of the same samples: what δ makes of each, and how noisy each is."""
    rng = np.random.default_rng(7)
    shift, n, runs = WORLD.shift(rng, DELTA), 32, 40
    base_RN, gain_RN = WORLD.problems(rng, REPETITIONS // runs, 30)
    found = []
    for logits_RN in (base_RN, base_RN + gain_RN + shift):
        chances_RSN = WORLD.chances(rng, logits_RN, runs)
        again = [_scores(rng, chances_RSN, n) for _ in range(2)]
        found.append({k: np.stack([scores[k] for scores in again]) for k in again[0]})
    before, after = found
    rows = []
    for name in before:
        moved = float((after[name] - before[name]).mean())
        # Of the two evaluations of the same run, and of different runs on the same problems.
        sampling = float((np.diff(before[name], axis=0).var() / 2) ** 0.5)
        run = float(before[name].var(axis=2, ddof=1).mean() ** 0.5)
        seeds = next(
            s for s in range(2, 1000) if power.power(moved, run * (2 / s) ** 0.5, df=s - 1) >= 0.8
        )
        rows.append([f"{name}@{n}", points(moved), points(sampling), points(run), seeds])
    heads = ["AIME 2024", "3 points of avg are", "sampling alone", "run to run", "runs of each arm"]
    return table(heads, rows)


def _scores(rng, chances_RSN: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Means over problems `[R, S]`; the rival is the most frequent wrong answer."""
    right = rng.binomial(n, chances_RSN)
    rival = rng.binomial(n - right, RIVAL)
    majority = (right > rival) + 0.5 * ((right == rival) & (right > 0))
    scores = {"avg": right / n, "maj": majority, "best": right > 0}
    return {name: score.mean(axis=-1) for name, score in scores.items()}


def correct_counts(runs: list[Path]) -> tuple[np.ndarray, int, list[str]]:
    """Right samples `[S, N]` of the last step that all runs evaluated; samples; the prompts."""
    tables = [read_evaluations(run).to_pandas() for run in runs]
    common = set.intersection(*(set(t.step) for t in tables))
    if not common:
        raise UserError(f"{', '.join(map(str, runs))} have no evaluated step in common.")
    step = max(common)
    tables = [t[t.step == step] for t in tables]
    for run, one in zip(runs, tables, strict=True):
        if list(one.prompt) != list(tables[0].prompt) or set(one.samples) != set(tables[0].samples):
            raise UserError(f"{run} was evaluated on other problems, or otherwise, than {runs[0]}.")
    print(f"step {step}: {len(runs)} runs, {len(tables[0])} problems")
    counts = np.array([t.correct for t in tables])
    return counts, int(tables[0].samples.iloc[0]), list(tables[0].prompt)


def found_in(counts: np.ndarray, n: int, others: np.ndarray | None) -> str:
    """The spread of real runs, their paired test, and what 3 points would need with it."""
    spread = power.spread_of(counts, n, others)
    names = ["problems", "seed", "seed_problem"] + (["gain"] if others is not None else [])
    lines = [
        f"{counts.shape[0]} runs, {counts.shape[1]} problems, {n} samples of each, accuracy "
        f"{spread.accuracy:.3f}",
        "spread, points: " + ", ".join(f"{name} {points(getattr(spread, name))}" for name in names),
    ]
    if others is not None:
        test = power.paired_test(counts / n, others / n)
        means = [(table_SN / n).mean(axis=1) for table_SN in (counts, others)]
        alone = " and ".join(points(mean_S.std(ddof=1)) for mean_S in means)
        lines.append(
            f"from run to run: {alone} points for either arm; their difference with the same seed "
            f"{points((means[1] - means[0]).std(ddof=1))}"
        )
        lines.append(
            f"second − first: {points(test.difference)} points; standard error "
            f"{points(test.se_seeds)} for these problems, p = {test.p_these:.2g}; "
            f"{points(test.se_both)} for such problems, p = {test.p_such:.2g}"
        )
    for question in ("these", "such") if others is not None else ("these",):
        seeds = power.seeds_needed(
            DELTA, spread, problems=counts.shape[1], samples=n, question=question
        )
        lines.append(
            f"{points(DELTA)} points with 80% power, {question} problems: "
            f"{seeds or 'over 1000'} runs of each"
        )
    return "\n".join(f"- {line}" for line in lines)


def of_runs(arguments: Arguments) -> str:
    counts, n, prompts = correct_counts(list(arguments.runs))
    others = None
    if arguments.second:
        others, other_n, other_prompts = correct_counts(list(arguments.second))
        if (other_n, other_prompts, len(others)) != (n, prompts, len(counts)):
            raise UserError("--second: as many runs, problems and samples as --runs are needed.")
    if arguments.save:
        arms = [counts] if others is None else [counts, others]
        np.savez_compressed(arguments.save, correct=np.array(arms, np.int16), samples=n)
    return found_in(counts, n, others)


def example() -> str:
    """The same of runs of ours, whose counts are kept beside this file."""
    with np.load(EXAMPLE) as kept:
        return found_in(kept["correct"][0], int(kept["samples"]), kept["correct"][1])


SECTIONS = {
    "spreads": spreads,
    "example": example,
    "parts": parts,
    "needed": needed,
    "samples": samples,
    "published": published,
    "peak": peak,
    "metrics": metrics,
    "simulation": simulation,
}
ON_PAGE = ("spreads", "example", "needed", "published", "peak", "metrics")


def fill_page(page: Path) -> None:
    """Fill the page's sections; the others are printed."""
    on_page = {name: SECTIONS[name] for name in ON_PAGE}
    fill(page, marked(on_page, "python -m benchmarks.studies.power"))


@dataclass
class Arguments:
    runs: tuple[Path, ...] = ()
    """Run folders of one arm, a seed each."""
    second: tuple[Path, ...] = ()
    """Run folders of another arm, with the same seeds in the same order."""
    save: Path | None = None
    """File (.npz) to keep the counts of --runs and --second in."""
    page: Path | None = None
    """Page with the generated sections to fill."""


def main(arguments: Arguments) -> None:
    if arguments.runs:
        print(of_runs(arguments))
        return
    if arguments.second or arguments.save:
        raise UserError("--second and --save go with --runs.")
    print(as_page(SECTIONS))
    if arguments.page:
        fill_page(arguments.page)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
