"""The claims of the papers, one row each: what was tested, the effect with its interval, a verdict.

    python -m benchmarks.verdicts --pages docs/verdicts.md README.md

fills the pages' sections `verdicts`. What was trained is computed from the comparisons' kept data
(benchmarks/results/compare); what was enumerated is quoted from the pages that its own commands
fill, and a quotation that is no longer there is an error.

The verdict of a trained contrast: a paired difference on the claimed side of zero with p < .05
after Holm's correction over the comparison's contrasts says *holds*; one on the other side *does
not hold*; anything else is *undecided at this scale*. A claim holds if all that was tested says so,
and does not if anything says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from scipy.stats import binomtest

from benchmarks.exact.report import filled
from moe_upgrpo.compare.data import RunData
from moe_upgrpo.compare.measures import evaluations
from moe_upgrpo.compare.report import Loaded, load, numbers
from moe_upgrpo.errors import UserError

ROOT = Path(__file__).parents[1]
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided at this scale"
COMPARE = "moe-upgrpo compare examples/compare/{}.yaml"
EXACT = "python -m benchmarks.exact"
STRESS = "python -m benchmarks.exact.stress"
UP = {"up-grpo": ("grpo", "dapo"), "up-gspo": ("gspo",)}
"""UP losses, and those that they replace the positive branch of; DAPO as the papers' baseline."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    where: str
    effect: str
    verdict: str
    command: str


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
        """Those of an UP loss with one that it is compared with."""
        if measure == "primary":
            rows = self.numbers["primary"]
        else:
            found = {e["measure"]: e["contrasts"] for e in self.numbers["exploratory"]}
            rows = found.get(measure, [])
        return (r for r in rows if self.loss(r["other"]) in UP.get(self.loss(r["arm"]), ()))

    def evidence(
        self, measure: str, what: str, *, side: int, unit: Callable[[float], str]
    ) -> Evidence:
        """`side`: of zero, that is claimed. `what`: is measured, in words."""
        rows = list(self.contrasts(measure))
        if not rows:
            raise UserError(f"{self.name}: no contrast of {measure}.")
        said = {"higher": side, "lower": -side, "not told apart": 0}
        signs = [said[row["verdict"]] for row in rows]
        verdict = FAILS if -1 in signs else HOLDS if all(s == 1 for s in signs) else OPEN
        effect = "; ".join(
            f"{row['arm']} − {row['other']} {unit(row['difference'])} "
            f"({unit(row['low'])} to {unit(row['high'])}"
            + self._rates(row["arm"], row["other"])
            + ")"
            for row in rows
        )
        return self._of(f"{what}: {effect}", verdict)

    def _rates(self, arm: str, other: str) -> str:
        """Said where the tuning left the two with different learning rates."""
        times = self.rate(arm) / self.rate(other)
        return "" if times == 1 else f"; at {times:.2g} times the learning rate"

    def rises(self, measure: str, what: str, unit: Callable[[float], str]) -> Evidence:
        """Whether UP's own figure is above zero, by its interval over seeds."""
        arms = next(a["values"] for a in self.numbers["arms"] if a["measure"] == measure)
        ours = [arm for arm in arms if self.loss(arm["arm"]) in UP]
        if all(arm["low"] > 0 for arm in ours):
            verdict = HOLDS
        else:
            verdict = FAILS if any(arm["high"] < 0 for arm in ours) else OPEN
        effect = "; ".join(
            f"{a['arm']} {unit(a['mean'])} ({unit(a['low'])} to {unit(a['high'])})" for a in ours
        )
        return self._of(f"{what}: {effect}", verdict)

    def collapses(self) -> Evidence:
        """Runs whose held-out pass@1 ends below half of the warm start's, or that crashed."""
        cells, any_up = [], False
        for loss in (*UP, "grpo", "gspo"):
            arms = [arm for arm in self.loaded.plan["arms"] if self.loss(arm) == loss]
            fallen = {arm: sum(map(_collapsed, self.loaded.by_arm[arm])) for arm in arms}
            runs, count = sum(len(self.loaded.by_arm[arm]) for arm in arms), sum(fallen.values())
            if not runs:
                continue
            any_up |= loss in UP and count > 0
            ends = binomtest(count, runs).proportion_ci(method="wilson")
            cell = f"{loss} {count} of {runs} ({ends.low:.0%} to {ends.high:.0%}"
            if len(arms) > 1 and count:
                cell += ": " + ", ".join(f"{arm} {n}" for arm, n in fallen.items() if n)
            cells.append(cell + ")")
        return self._of("; ".join(cells), FAILS if any_up else OPEN)

    def _of(self, effect: str, verdict: str) -> Evidence:
        return Evidence(
            where=self.where, effect=effect, verdict=verdict, command=COMPARE.format(self.name)
        )


@dataclass(frozen=True, kw_only=True)
class Claim:
    text: str
    source: str
    evidence: Sequence[Evidence]

    @property
    def verdict(self) -> str:
        said = {one.verdict for one in self.evidence}
        return FAILS if FAILS in said else HOLDS if said == {HOLDS} else OPEN


def _collapsed(run: RunData) -> bool:
    by_step = list(evaluations(run, "eval/pass@1").values())
    return run.about.status == "crashed" or by_step[-1] < by_step[0] / 2


def quoted(page: str, words: str, verdict: str, effect: str | None = None) -> Evidence:
    """Evidence that another page states in these words. Raises UserError where it does not."""
    if words not in (ROOT / "docs" / page).read_text(encoding="utf-8"):
        raise UserError(f"docs/{page} does not say {words!r} any more: write the verdict anew.")
    exact = page == "exact.md"
    return Evidence(
        where=f"[{'enumerated' if exact else 'enumerated policy, trained'}](docs/{page})",
        effect=effect or words,
        verdict=verdict,
        command=EXACT if exact else STRESS,
    )


def claims(trained: Sequence[Trained]) -> list[Claim]:
    """Every claim with all that was found on it.

    What was trained under stress, where a run is meant to break, says something of collapse alone.
    """
    exact, stress = "exact.md", "stress.md"

    usual = [t for t in trained if t.name != "stress"]

    def compared(measure: str, what: str, side: int, unit=_points) -> list[Evidence]:
        return [t.evidence(measure, what, side=side, unit=unit) for t in usual]

    none = "| every UP loss, every cell, right sequences: largest \\|c − 1\\| | 0.0e+00 |"
    bias = "| 1 | trainer's policy | 0 | 0.035 ± 0.042 | 0.052 ± 0.05 | 0.21 ± 0.22 |"
    return [
        Claim(
            text="Positives: the gradient is advantage-weighted SFT",
            source="000 §3.2",
            evidence=[
                quoted(
                    exact,
                    none,
                    HOLDS,
                    "largest difference of the coefficient from 1: 0, in every cell",
                ),
            ],
        ),
        Claim(
            text="No collapse without the upper clip",
            source="001 §2",
            evidence=[
                quoted(
                    stress,
                    "18 of 360 runs of the three UP losses collapse, 2 of them for good; of the "
                    "three losses they come from 22, 11 for good. UP-GRPO against GRPO: −4.2 "
                    "points (−10 to +2.2), UP-GSPO against GSPO: +2.5 (−.4 to +5.4)",
                    FAILS,
                    "18 of 360 runs of the three UP losses collapse, 22 of 360 of those they "
                    "come from; points of runs: UP-GRPO − GRPO −4.2 (−10 to +2.2), "
                    "UP-GSPO − GSPO +2.5 (−.4 to +5.4)",
                ),
                *(t.collapses() for t in trained),
            ],
        ),
        Claim(
            text="KL stays stable",
            source="000 §4.1",
            evidence=[
                quoted(
                    stress,
                    "UP-GRPO's KL from the start is GRPO's (+.08, −.15 to +.31)",
                    OPEN,
                    "at P(right) = .8, UP-GRPO − GRPO +.08 nats (−.15 to +.31)",
                ),
                *compared("kl_at_reward", "nats at matched reward", -1, _nats),
            ],
        ),
        Claim(
            text="Entropy rises",
            source="000 §4.1",
            evidence=[
                quoted(
                    stress,
                    "at P(right) = .8 no difference (−.09, −.32 to +.15)",
                    OPEN,
                    "at P(right) = .8, UP-GRPO − GRPO −.09 nats (−.32 to +.15)",
                ),
                *(t.rises("entropy_change", "nats, end − beginning", _nats) for t in usual),
            ],
        ),
        Claim(
            text="Higher peak accuracy",
            source="000 §4.1, .511 against .477 on AIME 2024",
            evidence=[
                quoted(
                    stress,
                    "no difference (+.000, −.002 to +.003)",
                    OPEN,
                    "best P(right) +.000 (−.002 to +.003); all losses come near 1",
                ),
                *compared("eval/pass@1/best", "points of the best pass@1", 1),
            ],
        ),
        Claim(
            text="Positives are immune to routing mismatch",
            source="000 §3.3, 001 §4.3",
            evidence=[
                quoted(
                    exact,
                    bias,
                    FAILS,
                    "bias of UP's positive side, first step, relative: "
                    ".035 ± .042 at 1% mismatch, .21 ± .22 at 10%, .47 ± .46 at 30%, as GRPO's; "
                    "0 without mismatch",
                ),
            ],
        ),
        Claim(
            text="Negatives are plug-and-play: UP-X at least as good as X",
            source="001 §4.4",
            evidence=[
                quoted(
                    exact,
                    "UP-X has a lower bias than X where X clips positives hard",
                    OPEN,
                    "lower bias where X clips positives hard (GSPO in 8 of 8 policies, GRPO "
                    "in 7), higher where X only weighs them (CISPO, DPPO, SAPO)",
                ),
                *compared("primary", "points of the mean pass@1", 1),
            ],
        ),
    ]


def committed() -> list[Path]:
    """Comparisons of ten seeds whose results are in the repository, and the one of stress."""
    folder, names = ROOT / "benchmarks/results/compare", ("small", "many-experts", "fp8", "stress")
    return [folder / name for name in names if (folder / name / "plan.json").exists()]


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _nats(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def table(found: Sequence[Claim], *, below: str) -> str:
    """`below`: what leads from the page to the repository's root, for links."""
    lines = [
        "| claim | tested | effect (95% interval) | verdict | repeat |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in found:
        for i, one in enumerate(claim.evidence):
            name = f"{claim.text} ({claim.source})" if i == 0 else ""
            where = one.where.replace("(docs/", f"({below}")
            verdict = f"**{claim.verdict}**" if len(claim.evidence) == 1 else one.verdict
            lines.append(f"| {name} | {where} | {one.effect} | {verdict} | `{one.command}` |")
        if len(claim.evidence) > 1:
            lines.append(f"| | *together* | | **{claim.verdict}** | |")
    return "\n".join(lines)


def short(found: Sequence[Claim]) -> str:
    """A row for each claim: its verdict, and the first evidence that decides it."""
    lines = ["| claim | verdict | because |", "| --- | --- | --- |"]
    for claim in found:
        one = next((e for e in claim.evidence if e.verdict == claim.verdict), claim.evidence[-1])
        lines.append(f"| {claim.text} | {claim.verdict} | {one.effect} ({one.where}) |")
    return "\n".join(lines)


def main(
    pages: tuple[Path, ...] = (),
    results: tuple[Path, ...] = (),
) -> None:
    """Print the verdict table, or fill it into pages.

    Args:
        pages: with a section `verdicts`; README.md gets the short form.
        results: folders of comparisons; default: those in benchmarks/results/compare.
    """
    found = claims([Trained(loaded=load(folder)) for folder in results or committed()])
    print(table(found, below="docs/"))
    for page in pages:
        made = short(found) if page.name == "README.md" else table(found, below="")
        page.write_text(
            filled(page.read_text(encoding="utf-8"), {"verdicts": lambda made=made: made}),
            encoding="utf-8",
        )


if __name__ == "__main__":
    tyro.cli(main)
