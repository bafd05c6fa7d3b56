"""Evidence on the papers' claims: the words of a comparison or page, and how a claim is judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import binomtest

from benchmarks.studies.stress.report import Report
from moe_upgrpo.compare.data import RunData
from moe_upgrpo.compare.measures import evaluations
from moe_upgrpo.compare.report import Loaded, numbers
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import compare_paired
from moe_upgrpo.stats.margins import Claimed, Difference, judge, together

ROOT = Path(__file__).parents[2]
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided at this scale"
EQUAL, UNTESTED = "equal within the margin", "not tested"
SHOWN = "shown, not judged"
WORDS = {"holds": HOLDS, "fails": FAILS, "equal": EQUAL, "open": OPEN}
COMPARE = "moe-upgrpo compare examples/compare/{}.yaml"
EXACT = "python -m benchmarks.studies.exact"
STRESS = "python -m benchmarks.studies.stress"
STRESS_SEEDS = 12
UP = {"up-grpo": ("grpo", "dapo"), "up-gspo": ("gspo",)}
"""UP losses, and those that they replace the positive branch of; DAPO as the papers' baseline."""
CONFOUNDED = {("up-grpo", "dapo"): "dual clip 3 and 10"}
"""Pairs that differ in more than the claim is about, and in what."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two arms' difference in words; `why_not`: the reason if it is not judged."""

    text: str
    difference: Difference
    why_not: str = ""

    @property
    def shown(self) -> str:
        return f"{self.text[:-1]}; not judged: {self.why_not})" if self.why_not else self.text


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A row: `contrasts` for the claim to judge, or the `verdict` of whoever read the page."""

    where: str
    what: str
    command: str
    contrasts: Sequence[Contrast] = ()
    verdict: str = SHOWN

    @property
    def effect(self) -> str:
        return self.what + "; ".join(c.shown for c in self.contrasts)

    @property
    def judged(self) -> list[Difference]:
        return [c.difference for c in self.contrasts if not c.why_not]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A comparison that was run, by the name of its config."""

    loaded: Loaded

    def __post_init__(self):
        object.__setattr__(self, "numbers", numbers(self.loaded))

    @property
    def name(self) -> str:
        return self.loaded.plan["name"]

    @property
    def where(self) -> str:
        seeds = len(self.numbers["progress"]["full_seeds"])
        return f"trained, `{self.name}`, {seeds} of {len(self.loaded.plan['seeds'])} seeds"

    def loss(self, arm: str) -> str:
        return self.loaded.plan["arms"][arm]["loss"]

    def rate(self, arm: str) -> float:
        return self.loaded.by_arm[arm][0].about.lr

    def contrasts(self, measure: str) -> Iterator[dict]:
        """Contrasts of an UP loss with one that it is compared with."""
        if measure == "primary":
            rows = self.numbers["primary"]
        else:
            found = {e["measure"]: e["contrasts"] for e in self.numbers["exploratory"]}
            rows = found.get(measure, [])
        return (r for r in rows if self.loss(r["other"]) in UP.get(self.loss(r["arm"]), ()))

    def evidence(
        self, measure: str, what: str, unit: Callable[[float], str], scale: float = 1
    ) -> Evidence:
        """The contrasts of a measure, multiplied by `scale`. `what`: the measure in words."""
        rows = list(self.contrasts(measure))
        if not rows:
            raise UserError(f"{self.name}: no contrast of {measure}.")
        contrasts = []
        for row in rows:
            times = self.rate(row["arm"]) / self.rate(row["other"])
            losses = self.loss(row["arm"]), self.loss(row["other"])
            why_not = CONFOUNDED.get(losses, "")
            if times != 1:
                why_not = f"at {times:.2g} times the learning rate"
            text = f"{row['arm']} − {row['other']} {unit(row['difference'])} "
            text += f"({unit(row['low'])} to {unit(row['high'])})"
            value, high = scale * row["difference"], scale * row["high"]
            found = Difference.of_interval(value, high, row["seeds"] - 1)
            contrasts.append(Contrast(text=text, difference=found, why_not=why_not))
        return self._of(f"{what}: ", contrasts)

    def rises(self, measure: str, what: str, unit: Callable[[float], str]) -> Evidence:
        """UP's own change, by its interval over seeds."""
        arms = next(a["values"] for a in self.numbers["arms"] if a["measure"] == measure)
        contrasts = []
        for arm in (arm for arm in arms if self.loss(arm["arm"]) in UP):
            text = f"{arm['arm']} {unit(arm['mean'])} ({unit(arm['low'])} to {unit(arm['high'])})"
            seeds = len(self.loaded.by_arm[arm["arm"]])
            found = Difference.of_interval(arm["mean"], arm["high"], seeds - 1)
            contrasts.append(Contrast(text=text, difference=found))
        return self._of(f"{what}: ", contrasts)

    def collapses(self, losses: Sequence[str]) -> Evidence:
        """Runs whose held-out pass@1 ends below half of the warm start's, or that crashed.

        Counted, not judged: with 3 to 10 runs of an arm, 5 points are out of sight.
        """
        cells = []
        for loss in losses:
            arms = [arm for arm in self.loaded.plan["arms"] if self.loss(arm) == loss]
            fallen = {arm: sum(map(_collapsed, self.loaded.by_arm[arm])) for arm in arms}
            runs, count = sum(len(self.loaded.by_arm[arm]) for arm in arms), sum(fallen.values())
            if not runs:
                continue
            ends = binomtest(count, runs).proportion_ci(method="wilson")
            cell = f"{loss} {count} of {runs} ({ends.low:.0%} to {ends.high:.0%}"
            if len(arms) > 1 and count:
                cell += ": " + ", ".join(f"{arm} {n}" for arm, n in fallen.items() if n)
            cells.append(cell + ")")
        if not cells:
            raise UserError(f"{self.name}: no run of {', '.join(losses)}.")
        return self._of("collapsed: " + "; ".join(cells), ())

    def _of(self, what: str, contrasts: Sequence[Contrast]) -> Evidence:
        return Evidence(
            where=self.where,
            what=what,
            contrasts=contrasts,
            command=COMPARE.format(self.name),
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, and its rows judged together: Holm's correction is over all their contrasts.

    margin: the smallest difference that would matter, in the unit of the contrasts; why: in words.
    """

    text: str
    source: str
    evidence: Sequence[Evidence]
    claimed: Claimed = "more"
    margin: float | None = None
    why: str = ""
    verdicts: list[str] = field(init=False)
    verdict: str = field(init=False)

    def __post_init__(self):
        said = [one.verdict for one in self.evidence]
        judged = [d for one in self.evidence for d in one.judged]
        if not judged:
            decided = {v for v in said if v != SHOWN}
            verdict = decided.pop() if len(decided) == 1 else OPEN
        else:
            found = judge(judged, self.claimed, self.margin)
            verdict, left = WORDS[together(found, self.claimed)], list(found)
            for i, one in enumerate(self.evidence):
                if mine := [left.pop(0) for _ in one.judged]:
                    said[i] = WORDS[together(mine, self.claimed)]
        object.__setattr__(self, "verdicts", said)
        object.__setattr__(self, "verdict", verdict)

    @property
    def heading(self) -> str:
        margin = f"; margin: {self.why}" if self.why else ""
        return f"{self.text} ({self.source}{margin})"


def _collapsed(run: RunData) -> bool:
    by_step = list(evaluations(run, "eval/pass@1").values())
    return run.about.status == "crashed" or by_step[-1] < by_step[0] / 2


def quoted(page: str, words: str, verdict: str, effect: str | None = None) -> Evidence:
    """Evidence that another page states in these words. Raises UserError where it does not."""
    if words not in (ROOT / "docs" / page).read_text(encoding="utf-8"):
        raise UserError(f"docs/{page} does not say {words!r} any more: write the verdict anew.")
    return _enumerated(page, effect or words, verdict=verdict)


def _enumerated(page: str, what: str, **more) -> Evidence:
    exact = page == "exact.md"
    return Evidence(
        where=f"[{'enumerated' if exact else 'enumerated policy, trained'}](docs/{page})",
        what=what,
        command=EXACT if exact else STRESS,
        **more,
    )


_INTERVAL = re.compile(r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)")


def stressed(column: str, what: str, pairs: Sequence[tuple[str, str]], scale: float = 1):
    """Contrasts of the table of pairs in docs/stress.md: over 12 seeds, at equal learning rates."""
    lines = (ROOT / "docs/stress.md").read_text(encoding="utf-8").splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("| difference | collapsed "))
    place = [cell.strip() for cell in lines[head].split("|")].index(column)
    contrasts = []
    for arm, other in pairs:
        start = f"| `{arm}` − `{other}` |"
        row = next((line for line in lines[head:] if line.startswith(start)), None)
        if row is None or not (found := _INTERVAL.search(row.split("|")[place])):
            raise UserError(f"docs/stress.md has no {column!r} of {arm} − {other}: write it anew.")
        value, low, high = (float(x) for x in found.groups())
        shown = [x.replace("-", "−") for x in found.groups()]
        contrasts.append(
            Contrast(
                text=f"{arm} − {other} {shown[0]} ({shown[1]} to {shown[2]})",
                difference=Difference.of_interval(
                    scale * value, scale * value + scale * (high - low) / 2, STRESS_SEEDS - 1
                ),
            )
        )
    return _enumerated("stress.md", f"{what}: ", contrasts=contrasts)


def untested(what: str) -> Evidence:
    return Evidence(where="–", what=what, command="–", verdict=UNTESTED)


def swept(arm: str, other: str) -> Evidence:
    """Collapses over the whole sweep of learning rates, the same for both, seed by seed."""
    runs = Report.read(ROOT / "benchmarks/results/stress").sweep
    runs = runs[runs["loss"].isin([arm, other])]
    shares = 100.0 * runs.groupby(["loss", "seed"])["collapsed"].mean().unstack("loss")
    results = {name: shares[name].to_dict() for name in (arm, other)}
    (found,) = compare_paired(results, baseline=other)
    shown = [f"{x:+.1f}".replace("-", "−") for x in (found.difference, found.low, found.high)]
    contrast = Contrast(
        text=f"{arm} − {other} {shown[0]} ({shown[1]} to {shown[2]})",
        difference=Difference.of_interval(found.difference, found.high, found.seeds - 1),
    )
    return _enumerated("stress.md", "points of runs: ", contrasts=[contrast])


PAIRS = (("up-grpo", "grpo"), ("up-gspo", "gspo"), ("up-tic", "tic-grpo"))
