# SPDX-License-Identifier: Apache-2.0
"""The power to see a difference between two ways of training: problems, samples, seeds.

The run with training seed s is right on problem i with the chance

    p_i + a_i + u_s + v_si,    a_i only in the second arm,

p_i the chance of the first arm, over problems of mean μ and standard deviation `problems`; a_i the
second arm's gain on problem i, of mean δ and deviation `gain`; u_s the amount by which a seed moves
all problems (`seed`), v_si that by which it moves one (`seed_problem`). An evaluation draws n
samples of each of N problems. The closed forms take the terms as independent and additive and the
mean as normal, after E. Miller, Adding Error Bars to Evals (arXiv 2411.00640, 2024), with training
seeds added; benchmarks/studies/power.py shows by simulation what that costs where difficulties are
bimodal and gains are not additive. All figures are shares, not percent.

Shape suffixes: S seeds (runs of an arm), N problems.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from scipy import optimize, stats

from moe_upgrpo.errors import UserError

Question = Literal["these", "such"]
"""Whether a figure is about these problems alone, or about problems like them."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean accuracy and the standard deviations around it; see the module."""

    accuracy: float
    problems: float
    gain: float
    seed: float
    seed_problem: float

    def __post_init__(self) -> None:
        if not 0 < self.accuracy < 1:
            raise UserError(f"accuracy={self.accuracy}: between 0 and 1 is needed.")
        for name in ("problems", "gain", "seed", "seed_problem"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: 0 or more is needed.")
        if self.problems**2 > self.accuracy * (1 - self.accuracy):
            raise UserError(
                f"problems={self.problems}: chances of mean {self.accuracy} have a standard "
                f"deviation of at most {math.sqrt(self.accuracy * (1 - self.accuracy)):.3f}."
            )

    @property
    def within(self) -> float:
        """E[p(1 − p)], the variance of one sample: μ(1 − μ) less the variance of the chances."""
        chances = self.problems**2 + self.seed**2 + self.seed_problem**2
        return max(0.0, self.accuracy * (1 - self.accuracy) - chances)


@dataclass(frozen=True, kw_only=True)
class Design:
    """N problems, n samples of each in an evaluation, S training runs of each arm."""

    problems: int
    samples: int
    seeds: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name}={getattr(self, field.name)}: at least 1 is needed.")


def variances(design: Design, spread: Spread, *, paired: bool = True) -> dict[str, float]:
    """The parts of the variance of (mean avg@n of the second arm − that of the first).

    sampling 2w/(N n S), w = E[p(1 − p)]; seed_problem 2v²/(N S); seeds 2u²/S; problems g²/N where
    both arms answer the same problems, (2τ² + g²)/N where each has N of its own. "problems" counts
    only where the question is about such problems, not just these (`standard_error`).
    """
    n, s = design.problems, design.seeds
    own = 0 if paired else 2 * spread.problems**2
    return {
        "sampling": 2 * spread.within / (n * design.samples * s),
        "seed_problem": 2 * spread.seed_problem**2 / (n * s),
        "seeds": 2 * spread.seed**2 / s,
        "problems": (own + spread.gain**2) / n,
    }


def standard_error(
    design: Design, spread: Spread, *, question: Question, paired: bool = True
) -> float:
    """The standard error of the difference of two arms' avg@n; `variances` gives its parts."""
    parts = variances(design, spread, paired=paired)
    if question == "these":
        del parts["problems"]
    return math.sqrt(sum(parts.values()))


def degrees_of_freedom(design: Design, spread: Spread, *, question: Question) -> float:
    """Degrees of freedom of the paired t-test (`paired_test`) at the variances of `spread`.

    These problems: S − 1. Such problems: Satterthwaite's, V²/(V_seeds²/(S − 1) + V_problems²/(N −
    1)), V_seeds the part of V that differs from seed to seed, V_problems that from problem to
    problem. 0 with one seed: the effect of a seed cannot be seen.
    """
    parts = variances(design, spread)
    by_seed = parts["sampling"] + parts["seed_problem"] + parts["seeds"]
    if question == "these" or design.seeds == 1:
        return float(design.seeds - 1)
    by_problem = parts["sampling"] + parts["seed_problem"] + parts["problems"]
    return _satterthwaite(
        by_seed + parts["problems"], (by_seed, design.seeds - 1), (by_problem, design.problems - 1)
    )


def _satterthwaite(total: float, *parts: tuple[float, int]) -> float:
    return total**2 / sum(variance**2 / df for variance, df in parts if variance)


def power(
    difference: float, standard_error: float, *, df: float = math.inf, alpha: float = 0.05
) -> float:
    """The chance that a two-sided t-test at `alpha` finds a difference that exists.

    P(|T| > t), T noncentral t with `df` degrees of freedom and noncentrality difference /
    standard_error, t the two-sided critical value: T² is noncentral F(1, df). Normal where df is
    infinite. At difference 0 it is alpha.
    """
    shift = difference / standard_error
    if math.isinf(df):
        critical = stats.norm.isf(alpha / 2)
        return float(stats.norm.sf(critical - shift) + stats.norm.cdf(-critical - shift))
    if shift == 0:
        return alpha
    return float(stats.ncf.sf(stats.t.isf(alpha / 2, df) ** 2, 1, df, shift**2))


def power_of(
    difference: float,
    design: Design,
    spread: Spread,
    *,
    question: Question,
    alpha: float = 0.05,
) -> float:
    """`power` of the paired test of a design. UserError with one seed, which has no such test."""
    if design.seeds == 1:
        raise UserError("seeds=1: one run of each arm has no spread over runs; 2 are needed.")
    df = degrees_of_freedom(design, spread, question=question)
    se = standard_error(design, spread, question=question)
    return power(difference, se, df=df, alpha=alpha)


def seeds_needed(
    difference: float,
    spread: Spread,
    *,
    problems: int,
    samples: int,
    question: Question,
    wanted: float = 0.8,
    most: int = 1000,
) -> int | None:
    """The fewest runs of each arm with power `wanted`; None where `most` are not enough."""

    def reached(seeds: int) -> bool:
        design = Design(problems=problems, samples=samples, seeds=seeds)
        return power_of(difference, design, spread, question=question) >= wanted

    if not reached(most):
        return None
    low, high = 1, most  # one seed has no test; `most` are enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def detectable(design: Design, spread: Spread, *, question: Question, wanted: float = 0.8) -> float:
    """The difference that a design finds with power `wanted`. UserError with one seed."""
    error = standard_error(design, spread, question=question)

    def missing(errors: float) -> float:
        found = power_of(errors * error, design, spread, question=question)
        return found - wanted

    return error * float(optimize.brentq(missing, 0, 1000))


def problems_needed(
    difference: float, gain: float, *, wanted: float = 0.8, alpha: float = 0.05
) -> int:
    """The fewest such problems with power `wanted`, if samples and seeds cost nothing.

    The t-test of N gains of standard deviation g: standard error g/√N, N − 1 degrees of freedom.
    With fewer no number of samples and seeds is enough.
    """
    z = stats.norm.isf(alpha / 2) + stats.norm.ppf(wanted)
    problems = max(2, math.floor((z * gain / difference) ** 2))  # a t-test needs no fewer
    while power(difference, gain / math.sqrt(problems), df=problems - 1, alpha=alpha) < wanted:
        problems += 1
    return problems


def false_positives(design: Design, spread: Spread, *, alpha: float = 0.05) -> float:
    """Rate at which a paired test over problems, one run per method, tells equal methods apart.

    The test sees what differs from problem to problem, sampling + seed_problem, but not u_s, which
    moves all problems of a run together: 2Φ(−z·√(seen/(seen + 2u²))), with no gain anywhere.
    """
    parts = variances(design, spread)
    seen = parts["sampling"] + parts["seed_problem"]
    share = seen / (seen + parts["seeds"])
    return float(2 * stats.norm.cdf(-stats.norm.isf(alpha / 2) * math.sqrt(share)))


def expected_maximum(count: int) -> float:
    """E max of `count` independent standard normals, ∫ z·K·φ(z)·Φ(z)^(K−1) dz.

    The best of K evaluations of a policy is, on average, this many standard errors above its
    accuracy.
    """
    if count < 1:
        raise UserError(f"count={count}: at least 1 is needed.")
    z = np.linspace(-9, 9, 4001)
    density = count * stats.norm.pdf(z) * stats.norm.cdf(z) ** (count - 1)
    return float(np.trapezoid(z * density, z))


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A difference of accuracies with its standard error for three questions, and two tests.

    `se_problems`: these two sets of runs on other such problems; `se_seeds`: these problems with
    other seeds; `se_both`: other problems and other seeds. The last two are NaN with one seed.
    """

    problems: int
    seeds: int
    difference: float
    se_problems: float
    se_seeds: float
    se_both: float
    df_both: float
    p_these: float
    """These problems, other seeds: t with S − 1 degrees of freedom."""
    p_such: float
    """Other problems too: t with `df_both`."""


def paired_test(first_SN: np.ndarray, second_SN: np.ndarray) -> PairedTest:
    """Compare two arms run by run and problem by problem.

    With d_si = second − first, V_s = the variance of its S row means over S, V_p = that of its N
    column means over N, V_r = its two-way residuals' mean square over N·S: se_problems = √V_p,
    se_seeds = √V_s, se_both = √(V_s + V_p − V_r), because both hold the residual part once (the
    variance of a mean under two crossed random factors; Cornfield and Tukey, Ann. Math. Stat. 27,
    1956). se_both is never taken below the larger of the two.

    Args:
        first_SN, second_SN: share of right samples of each run on each problem; the same seeds and
            problems in both, in the same order.

    Raises:
        UserError: other shapes, fewer than two problems, or a share outside [0, 1].
    """
    first_SN, second_SN = _shares(first_SN), _shares(second_SN)
    if first_SN.shape != second_SN.shape:
        raise UserError(
            f"the arms have {first_SN.shape} and {second_SN.shape} seeds x problems; a paired test "
            "needs the same of both."
        )
    difference_SN = second_SN - first_SN
    seeds, problems = difference_SN.shape
    by_seed, by_problem, rest = _mean_squares(difference_SN)
    v_s, v_p, v_r = (ms / (seeds * problems) for ms in (by_seed, by_problem, rest))
    mean = float(difference_SN.mean())
    se_both = df_both = p_these = p_such = math.nan
    if seeds > 1:
        both = max(v_s + v_p - v_r, v_s, v_p)
        se_both = math.sqrt(both)
        df_both = _satterthwaite(both, (v_s, seeds - 1), (v_p, problems - 1)) if both else math.nan
        p_these = _p_value(mean, math.sqrt(v_s), seeds - 1)
        p_such = _p_value(mean, se_both, df_both)
    return PairedTest(
        problems=problems,
        seeds=seeds,
        difference=mean,
        se_problems=math.sqrt(v_p),
        se_seeds=math.sqrt(v_s),
        se_both=se_both,
        df_both=df_both,
        p_these=p_these,
        p_such=p_such,
    )


def _p_value(difference: float, standard_error: float, df: float) -> float:
    if standard_error == 0:  # the t-test would divide by it
        return float(difference == 0)
    return float(2 * stats.t.sf(abs(difference) / standard_error, df))


def spread_of(correct_SN: np.ndarray, samples: int, second_SN: np.ndarray | None = None) -> Spread:
    """The spread that evaluations of several runs show, by moments (two-way random effects).

    With y = c/n of run s on problem i, and the mean squares of its two-way table:
    E MS_rest = v² + w/n, E MS_seeds = E MS_rest + N u², E MS_problems = E MS_rest + S τ², and w by
    y(1 − y)·n/(n − 1). A part that comes out negative is 0.

    With `second_SN` the differences run by run are taken apart instead, with twice u², v² and w and
    with g² for τ²: `seed` and `seed_problem` are then what the two runs of a seed do *not* share,
    since a start or an order of data that both have does not change the difference. `problems` is
    the rest, so that `within` is w; `gain` is 0 without `second_SN`.

    Args:
        correct_SN: right samples of each run on each problem, of `samples`.
        second_SN: the same of the other arm, run by run.

    Raises:
        UserError: fewer than two seeds, problems or samples, counts outside 0..n, or an arm that is
            always or never right.
    """
    if samples < 2:
        raise UserError(f"samples={samples}: at least 2 of each problem are needed.")
    y_SN = _shares(np.asarray(correct_SN, dtype=float) / samples)
    if len(y_SN) < 2:
        raise UserError("seeds=1: the spread over runs needs at least 2 of them.")
    parts, within = _parts(y_SN, y_SN, samples)
    gain = 0.0
    if second_SN is not None:
        second = _shares(np.asarray(second_SN, dtype=float) / samples)
        difference, within = _parts(second - y_SN, np.stack([y_SN, second]), samples, arms=2)
        gain, parts = difference["problems"], difference | {"problems": 0.0}
        accuracy = float(y_SN.mean())
        rest = accuracy * (1 - accuracy) - within - parts["seed"] ** 2 - parts["seed_problem"] ** 2
        parts["problems"] = _root(rest)
    return Spread(accuracy=float(y_SN.mean()), gain=gain, **parts)


def _parts(
    table_SN: np.ndarray, shares: np.ndarray, samples: int, *, arms: int = 1
) -> tuple[dict[str, float], float]:
    """Standard deviations of a table of `arms` arms' shares or their difference, and w of one."""
    seeds, problems = table_SN.shape
    by_seed, by_problem, rest = _mean_squares(table_SN)
    within = float((shares * (1 - shares)).mean()) * samples / (samples - 1)
    return {
        "problems": _root((by_problem - rest) / seeds),
        "seed": _root((by_seed - rest) / problems / arms),
        "seed_problem": _root(rest / arms - within / samples),
    }, within


def _root(variance: float) -> float:
    return math.sqrt(max(0.0, variance))


def _mean_squares(table_SN: np.ndarray) -> tuple[float, float, float]:
    """Variances of seeds, problems and rest of a two-way table; NaN where one seed leaves none."""
    seeds, problems = table_SN.shape
    rows_S, columns_N = table_SN.mean(axis=1), table_SN.mean(axis=0)
    by_problem = seeds * float(columns_N.var(ddof=1))
    if seeds == 1:
        return math.nan, by_problem, math.nan
    rest_SN = table_SN - rows_S[:, None] - columns_N + table_SN.mean()
    rest = float((rest_SN**2).sum()) / ((seeds - 1) * (problems - 1))
    return problems * float(rows_S.var(ddof=1)), by_problem, rest


def _shares(shares_SN: np.ndarray) -> np.ndarray:
    shares_SN = np.asarray(shares_SN, dtype=float)
    if shares_SN.ndim != 2 or shares_SN.shape[0] < 1 or shares_SN.shape[1] < 2:
        raise UserError(
            f"[seeds, problems] with at least two problems is needed, got {list(shares_SN.shape)}."
        )
    if not ((shares_SN >= 0) & (shares_SN <= 1)).all():
        raise UserError("shares of right samples must lie between 0 and 1.")
    return shares_SN
