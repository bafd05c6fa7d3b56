"""Fills the tables of docs/losses.md from the code and draws docs/img/losses.svg.

    python -m docs.make_loss_page

The text between `<!-- begin NAME -->` and `<!-- end NAME -->` is generated; the rest is written by
hand. tests/losses/test_docs.py fails when the page is not up to date.
"""

import dataclasses
from pathlib import Path

import torch

from docs.sections import fill
from moe_upgrpo.losses import (
    ADVANTAGES,
    AGGREGATIONS,
    BRANCHES,
    GLOSSARY,
    PRESETS,
    PolicyLossConfig,
    gradient_coefficients,
)
from moe_upgrpo.losses.config import BASELINES
from moe_upgrpo.losses.correction import WEIGHTS

DOCS = Path(__file__).parent
PAGE, FIGURE = DOCS / "losses.md", DOCS / "img" / "losses.svg"
P_OLD = 0.05  # for DPPO, whose clip is on probabilities; r up to 20

# title -> presets drawn; one token per sequence, so r = s = R
PANELS: dict[str, list[str]] = {
    "UP-GRPO": ["up-grpo"],
    "GRPO, DAPO": ["grpo", "dapo"],
    "ablations": ["no-upper-clip", "symmetric-ratio"],
    "GSPO (r is s)": ["gspo"],
    "TIC-GRPO (r is R)": ["tic-grpo", "tic-grpo-min"],
    "GMPO (r is ρ)": ["gmpo"],
    "CISPO": ["cispo"],
    "VESPO (r is ∏π/μ)": ["vespo"],
    "COPG, FIPO": ["copg", "fipo"],
    "DRO, IPO; |A| = 1, π_old = .05": ["dro", "ipo"],
    "hinge": ["hinge-ratio", "hinge-log"],
    "hinge, π_old = .05": ["hinge-probability", "hinge-root"],
    "DPPO, π_old = .05": ["dppo-tv", "dppo-kl"],
    "TOPR (r is ∏π/μ)": ["topr"],
    "ASPO": ["aspo"],
    "SAPO": ["sapo"],
    "r^γ, REINFORCE": ["is-reshape", "reinforce"],
}


def table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in cells)


def code(name: str) -> str:
    return f"`{name}`"


def presets_table() -> str:
    default = PolicyLossConfig()
    rows = []
    for name, config in PRESETS.items():
        if name.startswith("up-") and name != "up-grpo":
            continue
        read = {*BRANCHES[config.positive].fields, *BRANCHES[config.negative].fields}
        extra = [f for f in ("off_policy_limit", "router_shift_floor") if getattr(config, f)]
        fields = [f.name for f in dataclasses.fields(default) if f.name in read] + extra
        numbers = ", ".join(f"{f} {getattr(config, f)}" for f in fields)
        up = "up-" + name.replace("-grpo", "")
        up = up if name in BASELINES and up in PRESETS else ""
        rows.append(
            [
                code(name),
                code(up) if up else "",
                code(config.positive),
                code(config.negative),
                config.aggregation,
                numbers,
            ]
        )
    return table(["preset", "with UP", "A > 0", "A <= 0", "aggregation", "numbers"], rows)


def branches_table() -> str:
    rows = [
        [
            code(name),
            *branch.c,
            branch.aggregations[0] + (" (or any)" if len(branch.aggregations) > 1 else " only"),
            "yes" if branch.up else "",
            ", ".join(map(code, (*branch.fields, *branch.arguments))),
            branch.source,
        ]
        for name, branch in BRANCHES.items()
    ]
    heads = ["branch", "c for A > 0", "c for A < 0", "aggregation", "under UP", "reads", "source"]
    return table(heads, rows)


def pairs_table() -> str:
    """For each branch, the others that share no aggregation with it, in groups of equal answers."""
    answers: dict[tuple[str, ...], list[str]] = {}
    for name, branch in BRANCHES.items():
        with_ = tuple(
            other
            for other, one in BRANCHES.items()
            if not set(one.aggregations) & set(branch.aggregations)
        )
        answers.setdefault(with_, []).append(name)
    rows = [
        [", ".join(map(code, names)), ", ".join(map(code, without)) or "none"]
        for without, names in answers.items()
    ]
    return table(["branch, for either sign", "does not go with"], rows)


def advantages_table() -> str:
    rows = []
    for name, one in ADVANTAGES.items():
        needs = [
            text
            for text, needed in (
                ("several rewards", one.several),
                ("lengths", one.lengths),
                ("sums over the ranks", one.sums is not None),
                ("π and Σπ² of each token", one.of_tokens is not None),
            )
            if needed
        ]
        rows.append([code(name), one.formula, ", ".join(needs), one.source])
    return table(["kind", "formula", "needs", "source"], rows)


def aggregations_table() -> str:
    rows = [[code(n), a.formula, code(a.denominator), a.source] for n, a in AGGREGATIONS.items()]
    return table(["aggregation", "weight of a token", "denominator", "source"], rows)


def corrections_table() -> str:
    rows = []
    for name, weight in WEIGHTS.items():
        bounds = ["" if bound is None else str(bound) for bound in (weight.low, weight.high)]
        formula = (weight.rule.__doc__ or "").split(":")[0].rstrip(".")
        rows.append([code(name), weight.level, formula, *bounds])
    return table(["weight", "ρ of a", "rule", "low", "high"], rows)


def metrics_table() -> str:
    rows = [[code(name), d.formula, d.normaliser] for name, d in GLOSSARY.items()]
    return table(["metric", "formula", "normaliser"], rows)


SECTIONS = {
    "presets": presets_table,
    "branches": branches_table,
    "pairs": pairs_table,
    "aggregations": aggregations_table,
    "corrections": corrections_table,
    "advantages": advantages_table,
    "metrics": metrics_table,
}


def coefficients(preset: str, ratios: torch.Tensor, sign: float) -> torch.Tensor:
    """c(r) of a preset at one sign of A."""
    old = torch.full((len(ratios), 1), P_OLD, dtype=torch.float64).log()
    lp = old + ratios.log()[:, None]
    ones = torch.ones_like(lp)
    config = PRESETS[preset]
    return gradient_coefficients(lp, old, sign * ones, ones, config=config)[:, 0]


def draw() -> None:
    """One small panel per family: c against r, A > 0 wide and blue, A < 0 thin and orange."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "losses", "svg.fonttype": "none", "font.size": 8, "axes.titlesize": 9}
    )
    rows = -(-len(PANELS) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.35 * rows), sharex=True, sharey=True)
    ratios = torch.logspace(-1, 1, 401, dtype=torch.float64)
    for panel, (axis, (title, presets)) in enumerate(zip(axes.flat, PANELS.items(), strict=False)):
        axis.axvline(1, color="0.85", lw=0.8)
        axis.axhline(1, color="0.85", lw=0.8)
        for style, preset in zip(("-", "--"), presets, strict=False):
            # the wide line stays visible where both signs have one c
            for sign, colour, width in ((1.0, "#8fbbdb", 3.0), (-1.0, "tab:orange", 1.2)):
                label = f"{preset}, A {'>' if sign > 0 else '<'} 0"
                c = coefficients(preset, ratios, sign)
                axis.plot(ratios, c, style, color=colour, lw=width, label=label)
        axis.set(title=title, xscale="log", ylim=(-1.4, 5.2), xlim=(0.1, 10))
        axis.set_xticks([0.1, 0.5, 1, 2, 5, 10], ["0.1", "0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.legend(fontsize=6.5, frameon=False, loc="upper left", handlelength=1.6)
        if panel % 4 == 0:
            axis.set_ylabel("c")
        if panel >= len(PANELS) - 4:
            axis.set_xlabel("r")
            axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(PANELS) :]:
        axis.remove()
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    fill(PAGE, SECTIONS)
    draw()
