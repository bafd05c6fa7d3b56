"""The claims of the papers, one row each: what was tested, the effect with its interval, a verdict.

    python -m benchmarks.studies.verdicts --pages docs/verdicts.md

fills the pages' sections `verdicts`. What was trained is computed from the comparisons' kept data
(benchmarks/results/compare); what was enumerated is read from the pages that its own commands fill,
and what is no longer there is an error.

A claim has a margin, the smallest difference that would matter. Each contrast of two arms at equal
learning rates is tested three ways, Holm's correction over the claim's contrasts: within the margin
*equal within the margin*, else *holds* or *does not hold* (`moe_upgrpo.stats.margins`). A row, and
a claim, is what more than half of its contrasts show and none contradicts. No contrast of arms at
unequal learning rates, or that differ in something else too, is judged; it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from benchmarks.studies.evidence import (
    FAILS,
    HOLDS,
    OPEN,
    PAIRS,
    ROOT,
    SHOWN,
    UP,
    Claim,
    Evidence,
    Trained,
    quoted,
    stressed,
    swept,
    untested,
)
from docs.sections import fill
from moe_upgrpo.compare.report import load


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def nats(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def claims(trained: Sequence[Trained]) -> list[Claim]:
    """Every claim with all the evidence on it.

    Training under stress, where a run is meant to break, and `relatives`, three seeds each, are
    evidence on collapse only.
    """
    exact = "exact.md"
    usual = [t for t in trained if t.name not in ("stress", "relatives")]
    relatives = [t for t in trained if t.name == "relatives"]

    def compared(measure: str, what: str, unit=points, scale: float = 100) -> list[Evidence]:
        return [t.evidence(measure, what, unit, scale) for t in usual]

    none = "| every UP loss, every cell, right sequences: largest \\|c − 1\\| | 0.0e+00 |"
    bias = "| 1 | trainer's policy | 0 | 0.035 ± 0.042 | 0.052 ± 0.05 | 0.21 ± 0.22 |"
    nobody_ran = "UP-DAPO − DAPO, the paper's own pair: nobody ran it"
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
            text="No collapse without the upper clip: UP-X collapses no more often than X",
            source="001 §2",
            claimed="not more",
            margin=5,
            why="5 points of runs, one run in twenty lost",
            evidence=[
                stressed("collapsed over the sweep, points", "points of runs", PAIRS),
                quoted(
                    "stress.md",
                    "18 of 360 runs of the three UP losses collapse, 2 of them for good; of the "
                    "three losses they come from 22, 11 for good",
                    SHOWN,
                ),
                *(t.collapses((*UP, "grpo", "gspo")) for t in (*usual, *_stress(trained))),
            ],
        ),
        Claim(
            text="Removing the upper clip alone collapses",
            source="001 §2",
            claimed="more",
            margin=5,
            why="5 points of runs",
            evidence=[
                quoted(
                    "stress.md",
                    "| `no-upper-clip` | 16/60 | 17/60 | 27.5 ± 19.0% |",
                    SHOWN,
                    "`no-upper-clip` collapses in 33 of 120 runs of the sweep",
                ),
                swept("no-upper-clip", "grpo"),
                *(t.collapses(("no-upper-clip", "grpo")) for t in relatives),
            ],
        ),
        Claim(
            text="KL stays stable: no more than the baseline's",
            source="000 §4.1",
            claimed="not more",
            margin=0.05,
            why=".05 nats at matched reward, a third of GRPO's own .13 to .18",
            evidence=[
                stressed("KL at 0.8", "nats at P(right) = .8", PAIRS),
                *compared("kl_at_reward", "nats at matched reward", nats, 1),
            ],
        ),
        Claim(
            text="Entropy rises",
            source="000 §4.1",
            claimed="more",
            margin=0.02,
            why=".02 nats, a fifth of what GRPO's falls by in `small`",
            evidence=[
                *(t.rises("entropy_change", "nats, end − beginning", nats) for t in usual),
            ],
        ),
        Claim(
            text="Higher peak accuracy",
            source="000 §4.1, .511 against .477 on AIME 2024",
            claimed="more",
            margin=1,
            why="1 point, less than a third of the published 3.4",
            evidence=[
                stressed("best, own rate", "best P(right)", PAIRS, scale=100),
                *compared("eval/pass@1/best", "points of the best pass@1"),
                untested(nobody_ran),
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
                    "bias of UP's positive side, first step, relative, exact in each of 8 "
                    "policies, mean ± half of its interval over them: "
                    ".035 ± .042 at 1% mismatch, .21 ± .22 at 10%, .47 ± .46 at 30%, as GRPO's; "
                    "0 without mismatch",
                ),
            ],
        ),
        Claim(
            text="Negatives are plug-and-play: UP-X at least as good as X",
            source="001 §4.4",
            claimed="not less",
            margin=1,
            why="1 point of mean pass@1, as for the peak",
            evidence=[
                quoted(
                    exact,
                    "UP-X has a lower bias than X where X clips positives hard",
                    SHOWN,
                    "lower bias where X clips positives hard (GSPO in 8 of 8 policies, GRPO "
                    "in 7), higher where X only weighs them (CISPO, DPPO, SAPO)",
                ),
                *compared("primary", "points of the mean pass@1"),
                untested(nobody_ran),
            ],
        ),
        Claim(
            text="GRPO's update is the gradient at the old policy, not at the current one",
            source="002",
            evidence=[
                quoted(
                    exact,
                    "| GRPO estimates the gradient at the old policy (002) | not visible here |",
                    OPEN,
                    "clipped GRPO is as far from ∇J(θ_0) as from ∇J(θ)",
                ),
            ],
        ),
        Claim(
            text="Updates from the old policy's gradient, without importance sampling, do as well "
            "as GRPO",
            source="002, its ablation",
            evidence=[untested("a fixed old policy: no run of it is kept")],
        ),
        Claim(
            text="TIC-GRPO's estimate of the current gradient is unbiased",
            source="002",
            evidence=[
                quoted(
                    exact,
                    "| TIC-GRPO is unbiased (seed 002) | only unclipped, and only if μ is in the "
                    "ratio |",
                    FAILS,
                    "exact without clipping and with μ in the ratio; the clipped loss as published "
                    "is biased, with or without mismatch",
                ),
            ],
        ),
        Claim(
            text="TIC-GRPO converges faster than GRPO",
            source="002",
            evidence=[untested("TIC-GRPO − GRPO: no comparison of the two was planned")],
        ),
    ]


def _stress(trained: Sequence[Trained]) -> list[Trained]:
    return [t for t in trained if t.name == "stress"]


def committed() -> list[Path]:
    """Comparisons whose results are in the repository and that say something of a claim."""
    folder = ROOT / "benchmarks/results/compare"
    names = ("small", "many-experts", "fp8", "stress", "relatives")
    return [folder / name for name in names if (folder / name / "plan.json").exists()]


def table(found: Sequence[Claim], *, below: str) -> str:
    """`below`: what leads from the page to the repository's root, for links."""
    lines = [
        "| claim | tested | effect (95% interval) | verdict | repeat |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in found:
        for i, (one, said) in enumerate(zip(claim.evidence, claim.verdicts, strict=True)):
            name = claim.heading if i == 0 else ""
            where = one.where.replace("(docs/", f"({below}")
            verdict = f"**{claim.verdict}**" if len(claim.evidence) == 1 else said
            command = one.command if one.command == "–" else f"`{one.command}`"
            lines.append(f"| {name} | {where} | {one.effect} | {verdict} | {command} |")
        if len(claim.evidence) > 1:
            lines.append(f"| | *together* | | **{claim.verdict}** | |")
    return "\n".join(lines)


def main(
    pages: tuple[Path, ...] = (),
    results: tuple[Path, ...] = (),
) -> None:
    """Print the verdict table, or fill it into pages.

    Args:
        pages: with a section `verdicts`.
        results: folders of comparisons; default: those in benchmarks/results/compare.
    """
    found = claims([Trained(loaded=load(folder)) for folder in results or committed()])
    print(table(found, below="docs/"))
    for page in pages:
        fill(page, {"verdicts": table(found, below="")})


if __name__ == "__main__":
    tyro.cli(main)
