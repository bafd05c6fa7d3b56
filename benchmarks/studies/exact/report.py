"""Results of the grid: checks that must hold, tables, figures. Computes no gradient.

Figures of a table are means over policies with a 95% t interval, unless it says otherwise. Biases
are relative to the length of the whole target, also those of one sign's part, and variances and
MSEs to its square: so the parts of both signs can be compared.
"""

import json
import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.studies.exact.estimators import UP_OF
from benchmarks.studies.exact.study import NONE
from benchmarks.studies.made import draw_all, marked, said, subplots
from docs.sections import fill
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import compare_paired

TARGETS = ("train", "deployed")
MODES = ("recomputed", "bypass", "R2", "R3")
SAMPLES = (64, 1024, 16384)
ROUNDING = 1e-9
PAIRS = (
    ("up-grpo", "grpo"),
    ("up-gspo", "gspo"),
    ("up-tic", "tic-grpo"),
    ("up-grpo", "grpo+token-tis"),
    ("up-grpo", "up-grpo+token-tis"),
    ("up-grpo", "topr"),
    ("up-grpo", "reinforce"),
    ("up-grpo", "symmetric-ratio"),
    ("up-grpo", "sequence-is"),
    ("grpo", "sequence-is"),
)
SECTIONS = (
    "run",
    "checks",
    "conditions",
    "steps",
    "first-step",
    "positives",
    "steps-by-loss",
    "crossings",
    "up",
    "modes",
    "old-policy",
    "groups",
    "losses",
)
ON_PAGE = ("run", "checks", "conditions", "positives", "steps-by-loss")
COMMAND = "python -m benchmarks.studies.exact"
DRAWN = {
    "grpo": "tab:blue",
    "up-grpo": "tab:orange",
    "gspo": "tab:green",
    "up-gspo": "tab:red",
    "reinforce": "tab:purple",
    "symmetric-ratio": "tab:brown",
    "grpo+token-tis": "tab:cyan",
    "sequence-is": "black",
}


def with_errors(cells: pd.DataFrame) -> pd.DataFrame:
    """Adds relative_T, and mse_T_n = (bias² + variance/n)/|target|² for each target T and n.

    The target is the whole one for every part: the parts' targets are multiples of ∇J, so that its
    length is the sum of theirs, and the largest of the three.
    """
    columns = {}
    norms = with_whole_norms(cells)
    for target in TARGETS:
        norm = norms[f"norm_{target}"]
        columns[f"relative_{target}"] = cells[f"bias_{target}"] / norm
        for n in SAMPLES:
            error = cells[f"bias_{target}"] ** 2 + cells["variance"] / n
            columns[f"mse_{target}_{n}"] = error / norm**2
    columns["relative_old"] = cells["bias_old"] / norms["norm_old"]
    columns["relative_variance"] = cells["variance"] / norms["norm_train"] ** 2
    return cells.assign(**columns)


def with_whole_norms(cells: pd.DataFrame) -> pd.DataFrame:
    place = ["policy", "mismatch", "inner_step", "mode", "advantages", "estimator"]
    norms = cells.groupby(place, sort=False)[[f"norm_{t}" for t in (*TARGETS, "old")]]
    return norms.transform("max")


def select(cells: pd.DataFrame, **wanted) -> pd.DataFrame:
    """Rows where every named column is (one of) the given; an error where there are none."""
    for column, value in wanted.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        cells = cells[cells[column].isin(values)]
    if cells.empty:
        raise UserError(f"no cells with {wanted}; allowed: what the grid holds")
    return cells


def crossing(bias: tuple[float, float], variance: tuple[float, float]) -> float:
    """n at which bias²  + variance/n of two estimators are equal; NaN where one is never worse.

    n = (v₁ − v₂)/(b₂² − b₁²): below it the one of lower variance is better, above it the other.
    """
    above, below = variance[0] - variance[1], bias[1] ** 2 - bias[0] ** 2
    return above / below if above * below > 0 else math.nan


def crossings(cells: pd.DataFrame) -> pd.DataFrame:
    """For every pair, condition and part: n, who has the lower error at few and many samples."""
    index = ["policy", "mismatch", "inner_step", "mode", "part"]
    fixed = select(cells, advantages="fixed").set_index(["estimator", *index])
    frames = []
    for first, second in PAIRS:
        if not {first, second} <= set(fixed.index.levels[0]):
            continue
        a, b = fixed.loc[first], fixed.loc[second]
        for target in TARGETS:
            bias = f"bias_{target}"
            # the rounding between two orders of a sum is no difference
            scale = ROUNDING * a[f"norm_{target}"]
            more_bias, more_variance = a[bias] - b[bias], a["variance"] - b["variance"]
            more_bias = more_bias.where(more_bias.abs() > scale, 0.0)
            more_variance = more_variance.where(more_variance.abs() > ROUNDING * b["variance"], 0.0)
            few = np.where(more_variance != 0, more_variance, more_bias)
            many = np.where(more_bias != 0, more_bias, more_variance)
            pairs = zip(a[bias], b[bias], a["variance"], b["variance"], strict=True)
            at = np.array([crossing((p, q), (v, w)) for p, q, v, w in pairs])
            frame = pd.DataFrame(
                {
                    "n": np.where(few * many < 0, at, math.nan),
                    "few": np.select([few < 0, few > 0], [first, second], "same"),
                    "many": np.select([many < 0, many > 0], [first, second], "same"),
                },
                index=a.index,
            )
            frames.append(frame.reset_index().assign(first=first, second=second, target=target))
    return pd.concat(frames, ignore_index=True)


def checks(cells: pd.DataFrame) -> dict[str, dict]:
    """Checks that hold exactly or to rounding for any policy: name -> value, bound, holds."""
    trained = select(cells, part="all")
    start = select(trained, inner_step=1, mode=["recomputed", "R2", "R3"])
    on_policy = select(trained, inner_step=1, mismatch=NONE, mode="recomputed")
    plain = on_policy[on_policy["off_likelihood"] == 0]
    unbiased = select(trained, estimator="sequence-is", mode=["recomputed", "bypass"])
    ups = [name for name in UP_OF if name in set(cells["estimator"])]
    right = select(cells, part="right", estimator=ups)
    by_part = cells.pivot_table(
        index=["policy", "mismatch", "inner_step", "mode", "estimator", "part"],
        columns="advantages",
        values="relative_train",
    )
    found = {
        "inner step 1, old log-probs of the trainer: largest |c of UP-GRPO − c of GRPO|": (
            select(start, estimator="up-grpo")["off_grpo"].max(),
            0.0,
        ),
        "every UP loss, every cell, right sequences: largest |c − 1|": (
            right["off_likelihood"].max(),
            0.0,
        ),
        "no mismatch, inner step 1: largest relative bias of a loss with c = 1": (
            plain["relative_train"].max(),
            ROUNDING,
        ),
        "sequence-is, `recomputed` and `bypass`, every cell: largest relative bias": (
            unbiased["relative_train"].max(),
            ROUNDING,
        ),
        "fixed baseline against groups, every cell: largest difference of relative bias": (
            by_part.max(axis=1).sub(by_part.min(axis=1)).max(),
            ROUNDING,
        ),
    }
    return {
        name: {"value": float(value), "bound": bound, "holds": bool(value <= bound)}
        for name, (value, bound) in found.items()
    }


# --- text


def number(x: float) -> str:
    if not math.isfinite(x):
        return "–"
    if abs(x) < ROUNDING:
        return "0"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.2g}" if abs(x) < 100 else f"{x:.0f}"


def mean_interval(values: pd.Series) -> str:
    """Mean ± half of the 95% t interval."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return number(values.mean())
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    if values.max() < ROUNDING:
        return "0"
    return f"{number(values.mean())} ± {number(half)}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in cells
    )


def code(name: str) -> str:
    return f"`{name}`"


def names_in(frame: pd.DataFrame, column: str) -> list:
    return list(dict.fromkeys(frame[column]))


class Report:
    """Tables and figures of one run; `mismatch` and `step` are the ones examined most closely.

    Made from all cells, or from those that `shown` chose, with the checks that `meta` has of all.
    """

    def __init__(self, cells: pd.DataFrame, conditions: pd.DataFrame, meta: dict):
        self.cells, self.conditions = with_errors(cells), conditions
        if "checks" not in meta:
            meta = meta | {"cells": len(cells), "checks": checks(self.cells)}
        self.meta, self.checks = meta, meta["checks"]
        self._looked_at: set[int] = set()
        self._made: dict[str, str] = {}
        self.mismatches = names_in(conditions, "mismatch")
        self.steps = names_in(conditions, "inner_step")
        self.policies = conditions["policy"].nunique()
        self.mismatch = "noise 10%"
        self.step = 16
        self.fixed = select(self.cells, advantages="fixed")

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Read the cells that a page shows, of a folder that the command or `shown` filled."""
        frames = (pd.read_parquet(folder / f"{name}.parquet") for name in ("shown", "conditions"))
        return cls(*frames, json.loads((folder / "meta.json").read_text(encoding="utf-8")))

    def shown(self) -> pd.DataFrame:
        """The cells that a section or a figure looks at, a fiftieth of all.

        Their norms are those of the whole target, so the other parts are not needed for them.
        """
        for make in (*self.sections().values(), self._draw_bias, self._draw_mse):
            make()
        norms = with_whole_norms(self.cells)
        own = [name for name in self.cells if not name.startswith(("relative_", "mse_"))]
        return self.cells.assign(**norms).loc[sorted(self._looked_at), own]

    def _at(self, cells: pd.DataFrame | None = None, **wanted) -> pd.DataFrame:
        wanted = {"mode": "recomputed", "part": "all", "mismatch": self.mismatch} | wanted
        found = select(self.fixed if cells is None else cells, **wanted)
        self._looked_at.update(found.index)
        return found

    @cached_property
    def crossings(self) -> pd.DataFrame:
        return crossings(self.cells)

    def run_table(self) -> str:
        return f"{self.meta['cells']:,} cells, {self.policies} policies. {said(self.meta)}"

    def checks_table(self) -> str:
        rows = [
            [name, f"{c['value']:.1e}", f"{c['bound']:.0e}", "holds" if c["holds"] else "**fails**"]
            for name, c in self.checks.items()
        ]
        return table(["check", "found", "allowed", ""], rows)

    def conditions_table(self) -> str:
        start = select(self.conditions, inner_step=self.steps[0])
        rows = []
        for name in self.mismatches:
            one = select(start, mismatch=name)
            rates = (one["router_mismatch"] * 100).map(lambda x: f"{x:.2g}")
            rows.append(
                [
                    name,
                    f"{one['router_mismatch'].mean():.2%}",
                    f"{min(rates, key=float)} to {max(rates, key=float)}",
                    mean_interval(one["kl_rollout"]),
                    number(one["kl_rollout"].median()),
                    f"{one['right_rollout'].mean():.3f}",
                ]
            )
        heads = [
            "rollout",
            "router mismatch",
            "range, %",
            "KL(μ ‖ π_old) per token",
            "median",
            "P(right)",
        ]
        return table(heads, rows)

    def steps_table(self) -> str:
        rows = []
        for step in self.steps:
            one = select(self.conditions, inner_step=step, mismatch=NONE)
            cut = [
                self._at(inner_step=step, mismatch=NONE, estimator=e)["without_gradient"].mean()
                for e in ("grpo", "gspo")
            ]
            rows.append(
                [
                    step,
                    mean_interval(one["kl_update"]),
                    f"{one['router_shift'].mean():.1%}",
                    f"{one['right_train'].mean():.3f}",
                    *(f"{x:.1%}" for x in cut),
                ]
            )
        heads = ["inner step", "KL(π_old ‖ π_θ) per token", "routers moved by the updates"]
        heads += ["P(right)", "tokens clipped: GRPO", "GSPO"]
        return table(heads, rows)

    def first_step_table(self) -> str:
        lines = {
            "GRPO, UP-GRPO, every loss with c = 1": ("recomputed", "up-grpo"),
            "the same, routes replayed (R3)": ("R3", "up-grpo"),
            "TOPR": ("recomputed", "topr"),
            "UP-GRPO, token TIS on the wrong ones": ("recomputed", "up-grpo+token-tis"),
            "GRPO + token TIS": ("recomputed", "grpo+token-tis"),
            "GRPO + sequence TIS": ("recomputed", "grpo+sequence-tis"),
            "sequence IS": ("recomputed", "sequence-is"),
            "GRPO, bypass": ("bypass", "grpo"),
            "UP-GRPO, bypass": ("bypass", "up-grpo"),
        }
        blocks = []
        for target in TARGETS:
            rows = [
                [
                    label,
                    *(
                        mean_interval(
                            self._at(mode=mode, estimator=name, inner_step=1, mismatch=m)[
                                f"relative_{target}"
                            ]
                        )
                        for m in self.mismatches
                    ),
                ]
                for label, (mode, name) in lines.items()
            ]
            blocks.append(
                f"Against the {POLICY[target]}:\n\n" + table(["", *self.mismatches], rows)
            )
        return "\n\n".join(blocks)

    def positives_table(self) -> str:
        """Compute UP's right side only, over all mismatches and steps."""
        rows = []
        for step in self.steps:
            for target in TARGETS:
                values = [
                    mean_interval(
                        self._at(estimator="up-grpo", part="right", inner_step=step, mismatch=m)[
                            f"relative_{target}"
                        ]
                    )
                    for m in self.mismatches
                ]
                rows.append([step, POLICY[target], *values])
        return table(["inner step", "target", *self.mismatches], rows)

    def losses_table(self) -> str:
        """Show every estimator at the central cell."""
        rows = []
        every = self._at(inner_step=self.step, part=["all", "right", "wrong"])
        for name in names_in(every, "estimator"):
            of = {p: select(every, estimator=name, part=p) for p in ("right", "wrong", "all")}
            whole = of["all"]
            rows.append(
                [
                    code(name),
                    mean_interval(of["right"]["relative_train"]),
                    mean_interval(of["wrong"]["relative_train"]),
                    mean_interval(whole["relative_train"]),
                    mean_interval(whole["relative_deployed"]),
                    f"{whole['cosine_train'].mean():.2f}",
                    *(number(of[p]["relative_variance"].median()) for p in of),
                    *(number(whole[f"mse_train_{n}"].median()) for n in SAMPLES),
                ]
            )
        heads = ["loss", "bias: right", "wrong", "all", "all, deployed", "cosine"]
        heads += ["variance: right", "wrong", "all", *(f"MSE, n = {n:,}" for n in SAMPLES)]
        return table(heads, rows)

    def steps_by_loss_table(self) -> str:
        """Bias, variance and MSE by inner step, for a few losses."""
        rows = []
        for name in [n for n in DRAWN if n in set(self.fixed["estimator"])]:
            row = [code(name)]
            for step in self.steps:
                one = self._at(inner_step=step, estimator=name)
                row.append(
                    f"{mean_interval(one['relative_train'])}; "
                    f"{number(one['relative_variance'].median())}; "
                    f"{number(one['mse_train_1024'].median())}"
                )
            rows.append(row)
        return table(["loss", *(f"inner step {step}" for step in self.steps)], rows)

    def up_table(self) -> str:
        """UP-X against X: log10 of the MSE's ratio, paired over policies, Holm over the losses."""
        blocks = []
        for mismatch in (NONE, self.mismatch):
            ratios: dict[str, dict[int, float]] = {
                "no change": dict.fromkeys(range(self.policies), 0.0)
            }
            bias = {}
            for up, base in UP_OF.items():
                one = self._at(mismatch=mismatch, inner_step=self.step, estimator=[up, base])
                wide = one.pivot(index="policy", columns="estimator")
                logs = np.log10(wide["mse_train_1024"][up] / wide["mse_train_1024"][base])
                ratios[up] = {int(k): float(v) for k, v in logs.items()}
                cut = self._at(mismatch=mismatch, inner_step=self.step, estimator=up, part="wrong")
                bias[up] = (
                    wide["relative_train"][base].mean(),
                    wide["relative_train"][up].mean(),
                    int((wide["relative_train"][up] < wide["relative_train"][base]).sum()),
                    cut["without_gradient"].mean(),
                )
            rows = [
                [
                    code(c.method),
                    *(number(x) for x in bias[c.method][:2]),
                    f"{bias[c.method][2]} of {self.policies}",
                    f"{bias[c.method][3]:.0%}",
                    f"{10**c.difference:.2f} ({10**c.low:.2f} to {10**c.high:.2f})",
                    f"{c.p_holm:.2g}",
                ]
                for c in compare_paired(ratios, baseline="no change")
            ]
            heads = ["UP-X", "bias of X", "of UP-X", "UP-X lower in", "wrong tokens clipped"]
            heads += ["MSE at n = 1,024: UP-X / X", "p (Holm)"]
            blocks.append(f"{mismatch}:\n\n" + table(heads, rows))
        return "\n\n".join(blocks)

    def crossings_table(self) -> str:
        blocks = []
        names = sorted({name for pair in PAIRS for name in pair})
        found = crossings(self._at(inner_step=self.steps, estimator=names))
        for target in TARGETS:
            rows = []
            for first, second in PAIRS:
                row = [f"{code(first)} / {code(second)}"]
                for step in self.steps:
                    at = dict(first=first, second=second, target=target, inner_step=step)
                    row.append(outcome(select(found, **at)))
                rows.append(row)
            heads = ["pair", *(f"inner step {step}" for step in self.steps)]
            blocks.append(f"Against the {POLICY[target]}:\n\n" + table(heads, rows))
        return "\n\n".join(blocks)

    def modes_table(self) -> str:
        names = ("grpo", "up-grpo", "gspo", "up-gspo", "sequence-is")
        rows = []
        for name in names:
            for mode in MODES:
                row = [code(name), mode]
                for step in (1, self.step):
                    one = self._at(estimator=name, mode=mode, inner_step=step)
                    row += [mean_interval(one[f"relative_{t}"]) for t in TARGETS]
                    row.append(number(one["relative_variance"].median()))
                rows.append(row)
        heads = ["loss", "mode"]
        for step in (1, self.step):
            heads += [f"step {step}: bias, trainer", "bias, deployed", "variance"]
        return table(heads, rows)

    def old_policy_table(self) -> str:
        """Which policy's gradient a loss estimates without any mismatch."""
        rows = []
        for name in ("grpo", "up-grpo", "symmetric-ratio", "reinforce", "tic-grpo", "sequence-is"):
            row = [code(name)]
            for step in self.steps[1:]:
                one = self._at(estimator=name, inner_step=step, mismatch=NONE)
                row += [mean_interval(one["relative_train"]), mean_interval(one["relative_old"])]
            rows.append(row)
        heads = ["loss"]
        for step in self.steps[1:]:
            heads += [f"step {step}: from ∇J(θ)", "from ∇J(θ_0)"]
        return table(heads, rows)

    def groups_table(self) -> str:
        rows = []
        for name in ("grpo", "up-grpo", "gspo", "sequence-is"):
            row = [code(name)]
            for scheme in names_in(self.cells, "advantages"):
                at = dict(estimator=name, advantages=scheme, inner_step=self.step)
                one = self._at(self.cells, **at)
                row += [
                    mean_interval(one["relative_train"]),
                    number(one["relative_variance"].median()),
                ]
            rows.append(row)
        heads = ["loss"]
        for scheme in names_in(self.cells, "advantages"):
            heads += [f"{scheme}: bias", "variance"]
        return table(heads, rows)

    def sections(self) -> dict[str, Callable[[], str]]:
        return {name: partial(self._section, name) for name in SECTIONS}

    def _section(self, name: str) -> str:
        if name not in self._made:
            self._made[name] = getattr(self, f"{name.replace('-', '_')}_table")()
        return self._made[name]

    def summary(self) -> dict:
        """Checks, and for every estimator and condition the means over policies."""
        keys = ["mode", "mismatch", "inner_step", "advantages", "part", "estimator"]
        values = ["relative_train", "relative_deployed", "relative_variance", "mse_train_1024"]
        whole = select(self.fixed, part="all")
        means = whole.groupby(keys, sort=False)[values].mean().reset_index()
        crossed = self.crossings.groupby(
            ["first", "second", "target", "part", "mode", "mismatch", "inner_step"], sort=False
        )["n"].agg(["median", "count"])
        return {
            "policies": self.policies,
            "checks": self.checks,
            "conditions": self.conditions.groupby(["mismatch", "inner_step"], sort=False)
            .mean()
            .reset_index()
            .to_dict("records"),
            "crossings": crossed.dropna().reset_index().to_dict("records"),
            "means": means.to_dict("records"),
        }

    def fill(self, page: Path) -> None:
        """Fill the page's sections, and draw its figures into img/ beside it."""
        every = self.sections()
        fill(page, marked({name: every[name] for name in ON_PAGE}, COMMAND))
        self.draw(page.parent / "img")

    # --- figures

    def draw(self, folder: Path) -> None:
        """exact-bias.svg and exact-mse.svg."""
        draw_all(folder, "exact", {"exact-bias": self._draw_bias, "exact-mse": self._draw_mse})

    def _draw_bias(self):
        """Relative bias at inner step 1 against the measured mismatch; bias against inner step."""
        figure, axes = subplots(1, 3, figsize=(11, 3.2), sharey=True)
        noisy = [m for m in self.mismatches if m.startswith("noise")]
        start = select(self.conditions, inner_step=1).groupby("mismatch")["router_mismatch"].mean()
        lines = {
            "c = 1: UP-GRPO, GRPO": ("recomputed", "up-grpo", "tab:orange"),
            "c = 1, R3": ("R3", "up-grpo", "tab:red"),
            "TOPR": ("recomputed", "topr", "tab:purple"),
            "GRPO + token TIS": ("recomputed", "grpo+token-tis", "tab:cyan"),
            "GRPO + sequence TIS": ("recomputed", "grpo+sequence-tis", "black"),
        }
        for axis, target in zip(axes, TARGETS, strict=False):
            for label, (mode, name, colour) in lines.items():
                chosen = [
                    self._at(mode=mode, estimator=name, inner_step=1, mismatch=m)[
                        f"relative_{target}"
                    ].mean()
                    for m in noisy
                ]
                chosen = [x if x > ROUNDING else math.nan for x in chosen]
                axis.plot([start[m] for m in noisy], chosen, "o-", ms=3, color=colour, label=label)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="router mismatch rate (noise)",
                title=f"inner step 1, against the {POLICY[target]}",
            )
            axis.legend(fontsize=6.5, frameon=False)
        axes[0].set_ylabel("relative bias, mean over policies")
        for name, colour in DRAWN.items():
            chosen = [
                self._at(estimator=name, inner_step=k)["relative_train"].mean() for k in self.steps
            ]
            chosen = [x if x > ROUNDING else math.nan for x in chosen]
            axes[2].plot(self.steps, chosen, "o-", ms=3, color=colour, label=name)
        axes[2].set(
            xscale="log",
            xlabel="inner step",
            title=f"{self.mismatch}, against the trainer's policy",
        )
        axes[2].set_xticks(self.steps, [str(k) for k in self.steps])
        axes[2].minorticks_off()
        axes[2].legend(fontsize=6.5, frameon=False)
        return figure

    def _draw_mse(self):
        """MSE against the number of samples, a panel for each inner step."""
        figure, axes = subplots(1, len(self.steps), figsize=(11, 3), sharey=True, squeeze=False)
        n = np.logspace(1, 7, 25)
        for axis, step in zip(axes[0], self.steps, strict=True):
            for name, colour in DRAWN.items():
                one = self._at(estimator=name, inner_step=step)
                bias2 = one["relative_train"].to_numpy()[:, None] ** 2
                error = np.median(bias2 + one["relative_variance"].to_numpy()[:, None] / n, axis=0)
                axis.plot(n, error, color=colour, lw=1.2, label=name)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="samples n",
                title=f"{self.mismatch}, inner step {step}",
            )
        axes[0][0].set_ylabel("MSE / |∇J|², median")
        axes[0][0].legend(fontsize=6.5, frameon=False)
        return figure


POLICY = {"train": "trainer's policy", "deployed": "deployed policy"}


def outcome(here: pd.DataFrame) -> str:
    """Which is better at few samples, which at many, and where they cross: counts and a median."""
    parts = []
    for (few, many), group in here.groupby(["few", "many"], sort=False):
        count = f" [{len(group)}]" if len(group) < len(here) else ""
        if few == many:
            parts.append(("same" if few == "same" else code(few)) + count)
        else:
            parts.append(f"{code(few)} to {number(group['n'].median())}, then {code(many)}{count}")
    return "; ".join(parts)
