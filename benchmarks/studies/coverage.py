"""How often the intervals by prompt hold what is true, and how often the paired test is wrong.

    python -m benchmarks.studies.coverage [--page docs/intervals.md]

Coverage: P prompts with G responses each. A prompt has a rate of its own, beta-distributed about
the true one with a standard deviation of `effect` times it (less for rates near 1, where that
cannot be), and each of its responses between half and one and a half times `pairs` (token, layer)
pairs. `stats.rates` gives a 95% interval from the P sums; the share of data sets whose interval
holds the true rate should be 95%. Beside it the same over sequences, as if they were independent.

Test: two passes with the same rates; how often `stats.sign_flip_test` calls one above the other at
p < .01, and how often Fisher's exact test on tokens does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import fisher_exact

from benchmarks.studies.exact.report import table
from docs.sections import fill
from moe_upgrpo.stats import ratio_interval, sign_flip_test

EFFECT = 0.7
"""Standard deviation of a prompt's rate, of the rate."""


@dataclass(frozen=True, kw_only=True)
class Case:
    prompts: int
    responses: int
    rate: float
    pairs: int = 1000
    effect: float = EFFECT


def cases() -> Iterator[Case]:
    for rate, prompts, responses in product((0.001, 0.01, 0.1, 0.5), (8, 16, 32, 64), (2, 8, 16)):
        yield Case(prompts=prompts, responses=responses, rate=rate)


def drawn(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Events and pairs of each response, [P, G]."""
    shape = case.prompts, case.responses
    chances_P = prompt_rates(case, rng)
    pairs_PG = rng.integers(case.pairs // 2, case.pairs * 3 // 2 + 1, shape)
    return rng.binomial(pairs_PG, chances_P[:, None]), pairs_PG


def prompt_rates(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Beta(r c, (1 − r) c), of variance r (1 − r) / (c + 1); c at least 2, a flat one at r = .5."""
    together = max((1 - case.rate) / case.rate / case.effect**2 - 1, 2.0)
    return rng.beta(case.rate * together, (1 - case.rate) * together, case.prompts)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    case: Case
    by_prompt: float
    by_sequence: float
    without: float  # share of data sets without an interval


def coverage(case: Case, *, sets: int, seed: int = 0) -> Coverage:
    rng = np.random.default_rng([seed, case.prompts, case.responses, round(1e6 * case.rate)])
    held, by_sequence, without = [], [], 0
    for _ in range(sets):
        events_PG, pairs_PG = drawn(case, rng)
        _, low, high = ratio_interval(events_PG.sum(axis=1), pairs_PG.sum(axis=1))
        if np.isnan(low):
            without += 1
            continue
        held.append(low <= case.rate <= high)
        _, low, high = ratio_interval(events_PG.ravel(), pairs_PG.ravel())
        by_sequence.append(low <= case.rate <= high)
    return Coverage(
        case=case,
        by_prompt=float(np.mean(held)),
        by_sequence=float(np.mean(by_sequence)),
        without=without / sets,
    )


def false_alarms(case: Case, *, sets: int, alpha: float = 0.01) -> tuple[float, float]:
    """Shares of data sets in which the paired test by prompt and Fisher's on tokens say p < alpha.

    As if real prompts were halved at random: two prompts make a pair, and nothing differs.
    """
    rng = np.random.default_rng(case.prompts)
    paired, tokens = 0, 0
    double = Case(
        prompts=2 * case.prompts, responses=case.responses, rate=case.rate, effect=case.effect,
        pairs=case.pairs,
    )  # fmt: skip
    for _ in range(sets):
        events_PG, pairs_PG = drawn(double, rng)
        events_P, pairs_P = (x.sum(axis=1)[rng.permutation(len(x))] for x in (events_PG, pairs_PG))
        (a, b), (n, m) = (np.split(x, 2) for x in (events_P, pairs_P))
        paired += sign_flip_test(a / n - b / m) < alpha
        found = [[x.sum(), y.sum() - x.sum()] for x, y in ((a, n), (b, m))]
        tokens += fisher_exact(found, alternative="greater").pvalue < alpha
    return paired / sets, tokens / sets


def coverage_table(sets: int) -> str:
    rows = []
    for rate, prompts in product((0.001, 0.01, 0.1, 0.5), (8, 16, 32, 64)):
        of_rate = [c for c in cases() if (c.rate, c.prompts) == (rate, prompts)]
        found = [coverage(case, sets=sets) for case in of_rate]
        row = [f"{rate:.1%}", str(prompts)]
        row += [f"{one.by_prompt:.1%}" for one in found]
        rows.append([*row, f"{min(one.by_sequence for one in found):.0%}"])
    heads = ["rate", "prompts", *(f"{g} responses" for g in (2, 8, 16)), "by sequence, least"]
    return table(heads, rows)


def spread_table(sets: int) -> str:
    rows = []
    for effect in (EFFECT, 1.4, 2.0):
        row = [f"{effect:.0%}"]
        for prompts in (8, 16, 32, 64):
            case = Case(prompts=prompts, responses=8, rate=0.01, effect=effect)
            row.append(f"{coverage(case, sets=sets).by_prompt:.1%}")
        rows.append(row)
    return table(["spread of prompts", *(f"{p} prompts" for p in (8, 16, 32, 64))], rows)


def flips_table(sets: int) -> str:
    rows = []
    for prompts, responses in ((8, 8), (16, 8), (64, 8)):
        case = Case(prompts=prompts, responses=responses, rate=0.01, pairs=100)
        paired, tokens = false_alarms(case, sets=sets)
        rows.append([str(prompts), f"{paired:.1%}", f"{tokens:.1%}"])
    return table(["pairs of prompts", "sign flips", "Fisher's exact test"], rows)


def main(sets: int = 4000, page: Path | None = None) -> None:
    """Print the tables, or fill them into a page's sections `coverage`, `spread` and `flips`."""
    sections = {
        "coverage": coverage_table(sets),
        "spread": spread_table(sets),
        "flips": flips_table(sets),
    }
    for name, made in sections.items():
        print(f"## {name}\n\n{made}\n")
    if page:
        makers = {name: lambda made=made: made for name, made in sections.items()}
        fill(page, makers)


if __name__ == "__main__":
    tyro.cli(main)
