"""Tables and figures of the stress studies; computes no gradient.

± is half of the 95% t interval over seeds. Counts have Wilson's 95% interval. A difference is of
the same seeds, with its 95% interval; "*" marks p < .05 after Holm's correction over its table.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.studies.exact.report import code, names_in, number, select, table
from benchmarks.studies.made import draw_all, marked, said, subplots
from benchmarks.studies.stress.fallen import weight_on_positive
from benchmarks.studies.stress.runs import collapsed, exploded
from docs.sections import fill
from moe_upgrpo.stats import compare_paired, holm

PAIRS = (
    ("up-grpo", "grpo"),
    ("up-gspo", "gspo"),
    ("up-tic", "tic-grpo"),
    ("up-grpo", "reinforce"),
    ("up-grpo", "dapo"),
    ("up-grpo", "no-upper-clip"),
    ("up-grpo", "symmetric-ratio"),
)
MATCHED = 0.8
"""P(right) at which KL and entropy are compared."""
COLOURS = {
    "grpo": "tab:blue",
    "up-grpo": "tab:orange",
    "gspo": "tab:green",
    "up-gspo": "tab:red",
    "tic-grpo": "tab:olive",
    "up-tic": "tab:pink",
    "reinforce": "tab:purple",
    "no-upper-clip": "tab:gray",
    "symmetric-ratio": "tab:brown",
    "sequence-is": "black",
}
CELL = ["study", "loss", "learning_rate", "clipped", "kind", "rate", "share", "lag", "recomputed"]


def runs_of(curves: pd.DataFrame) -> pd.DataFrame:
    """A row for each run. mean, final and best are of P(right); `at_matched` where it first is .8.

    A run that never reaches it has no figure there.
    """
    rows = []
    keys = [key for key in CELL if key in curves] + ["seed"]
    for place, run in curves.groupby(keys, sort=False, dropna=False):
        run = run.sort_values("update")
        reward, trained = run["reward"].to_numpy(), run.iloc[1:]
        fell = collapsed(reward, bool(trained["finite"].all()))
        norms = np.concatenate([trained["first_norm"].iloc[:1], trained["largest_norm"]])
        rows.append(
            dict(zip(keys, place, strict=True))
            | {
                "collapsed": fell,
                "lost": fell and not reward[-1] >= 0.5 * reward.max(),
                "exploded": exploded(norms),
                "finite": bool(trained["finite"].all()),
                "mean": reward[1:].mean(),
                "final": reward[-1],
                "best": reward.max(),
                "engine": run["engine_reward"].iloc[-1],
                "kl": run["kl"].iloc[-1],
                "entropy": run["entropy"].iloc[-1],
                "kl_at_matched": at_matched(reward, run["kl"].to_numpy()),
                "entropy_at_matched": at_matched(reward, run["entropy"].to_numpy()),
                "largest_weight": trained["largest_weight"].max(),
                "norm_ratio": norms.max() / norms[norms > 0][0] if (norms > 0).any() else 1.0,
                "wrong_pull": trained["wrong_pull"].sum() / max(trained["pull"].sum(), 1e-300),
                "informative": trained["informative"].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def at_matched(reward: np.ndarray, values: np.ndarray) -> float:
    """The value, between two updates in proportion, where the reward first reaches `MATCHED`."""
    if reward.max() < MATCHED:
        return np.nan
    after = int(np.argmax(reward >= MATCHED))
    if after == 0:
        return float(values[0])
    part = (MATCHED - reward[after - 1]) / (reward[after] - reward[after - 1])
    return float(values[after - 1] + part * (values[after] - values[after - 1]))


def wilson(hits: int, total: int) -> tuple[float, float]:
    interval = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return interval.low, interval.high


def counted(flags: Iterable[bool]) -> str:
    """Hits, total and Wilson's interval: 3/12 (9 to 53%)."""
    flags = list(flags)
    low, high = wilson(sum(flags), len(flags))
    return f"{sum(flags)}/{len(flags)} ({100 * low:.0f} to {100 * high:.0f}%)"


def half(values: pd.Series) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def plus_minus(values: pd.Series, digits: int = 3) -> str:
    known = values.dropna()
    if len(known) < 2:
        return "–"
    few = "" if len(known) == len(values) else f" [{len(known)}]"
    return f"{known.mean():.{digits}f} ± {half(known):.{digits}f}{few}"


class Report:
    def __init__(self, runs: pd.DataFrame, fallen: pd.DataFrame, meta: dict):
        self.runs, self.fallen, self.meta = runs, fallen, meta
        self.rates = meta["own_learning_rates"]
        self.depths = sorted(set(fallen["k"]))
        self.sweep = select(self.runs, study="collapse")
        own = self.sweep["loss"].map(self.rates) == self.sweep["learning_rate"]
        self.own = self.sweep[own & self.sweep["clipped"]]
        self.losses = names_in(self.sweep, "loss")
        self.learning_rates = sorted(set(self.sweep["learning_rate"]))

    @classmethod
    def read(cls, folder: Path) -> "Report":
        runs, fallen = (pd.read_parquet(folder / f"{name}.parquet") for name in ("runs", "fallen"))
        return cls(runs, fallen, json.loads((folder / "meta.json").read_text(encoding="utf-8")))

    # --- tables

    def run_table(self) -> str:
        by_study = self.runs.groupby("study", sort=False)
        rows = [
            [name, f"{len(part):,}", part["seed"].nunique(), int((~part["finite"]).sum())]
            for name, part in by_study
        ]
        rows.append(["fallen positives", "–", self.fallen["seed"].nunique(), "–"])
        rates = ", ".join(f"{code(name)} {rate:g}" for name, rate in self.rates.items())
        return (
            table(["study", "training runs", "seeds of a cell", "not finite"], rows)
            + f"\n\n{said(self.meta)}\n\nOwn learning rates: {rates}."
        )

    def collapse_table(self) -> str:
        blocks = []
        for clipped, title in ((False, "Without gradient clipping"), (True, "With it")):
            rows = []
            for loss in self.losses:
                cells = [
                    select(self.sweep, loss=loss, clipped=clipped, learning_rate=rate)["collapsed"]
                    for rate in self.learning_rates
                ]
                rows.append([code(loss), *(counted(flags) for flags in cells)])
            heads = ["loss", *(f"{rate:g}" for rate in self.learning_rates)]
            blocks.append(f"{title}, by learning rate:\n\n" + table(heads, rows))
        return "\n\n".join(blocks)

    def collapse_by_loss_table(self) -> str:
        rows = []
        for loss in self.losses:
            of = select(self.sweep, loss=loss)
            shares = of.groupby("seed")[["collapsed"]].mean()
            worst = of[~of["clipped"]]
            rows.append(
                [
                    code(loss),
                    *(
                        f"{int(half_of['collapsed'].sum())}/{len(half_of)}"
                        for half_of in (worst, of[of["clipped"]])
                    ),
                    plus_minus(100 * shares["collapsed"], 1) + "%",
                    f"{int(of['lost'].sum())}/{len(of)}",
                    f"{int(of['exploded'].sum())}/{len(of)}",
                    number(worst["norm_ratio"].median()),
                    number(worst["norm_ratio"].max()),
                    number(worst["largest_weight"].median()),
                    number(worst["largest_weight"].max()),
                ]
            )
        heads = ["loss", "collapsed: not clipped", "clipped", "share, over seeds"]
        heads += ["lost", "exploded"]
        heads += ["largest / first norm: median", "most", "largest c on a positive: median", "most"]
        return table(heads, rows)

    def reward_table(self) -> str:
        blocks = []
        for clipped, title in ((False, "Without gradient clipping"), (True, "With it")):
            rows = []
            for loss in self.losses:
                row = [code(loss)]
                for rate in self.learning_rates:
                    cell = select(self.sweep, loss=loss, clipped=clipped, learning_rate=rate)
                    row.append(f"{plus_minus(cell['final'])}; {plus_minus(cell['best'])}")
                rows.append(row)
            heads = ["loss", *(f"{rate:g}" for rate in self.learning_rates)]
            blocks.append(f"{title}, final; best:\n\n" + table(heads, rows))
        return "\n\n".join(blocks)

    def own_table(self) -> str:
        rows = []
        for loss in self.losses:
            of = select(self.own, loss=loss)
            rows.append(
                [
                    code(loss),
                    f"{self.rates[loss]:g}",
                    *(plus_minus(of[name]) for name in ("mean", "final", "best", "engine")),
                    *(plus_minus(of[name], 2) for name in ("kl", "entropy")),
                    *(plus_minus(of[f"{name}_at_matched"], 2) for name in ("kl", "entropy")),
                ]
            )
        heads = [
            "loss",
            "rate",
            "mean",
            "final",
            "best",
            "final, engine",
            "KL, end",
            "entropy, end",
        ]
        heads += [f"KL at {MATCHED:g}", f"entropy at {MATCHED:g}"]
        return table(heads, rows)

    def pairs_table(self) -> str:
        """UP against others over the sweep and at the own learning rate."""
        share = self.sweep.assign(share=100.0 * self.sweep["collapsed"])
        views = {
            "collapsed over the sweep, points": (share, "share"),
            "P(right), mean over the sweep": (self.sweep, "mean"),
            "mean, own rate": (self.own, "mean"),
            "final, own rate": (self.own, "final"),
            "best, own rate": (self.own, "best"),
            f"KL at {MATCHED:g}": (self.own, "kl_at_matched"),
            f"entropy at {MATCHED:g}": (self.own, "entropy_at_matched"),
            "entropy at the end": (self.own, "entropy"),
        }
        pairs = [pair for pair in PAIRS if set(pair) <= set(self.losses)]
        return self._differences(pairs, views)

    def _differences(self, pairs, views: dict[str, tuple[pd.DataFrame, str]]) -> str:
        cells = {}
        for pair in pairs:
            for title, (runs, column) in views.items():
                wide = (
                    select(runs, loss=list(pair))
                    .groupby(["seed", "loss"])[column]
                    .mean()
                    .unstack()
                    .dropna()
                )
                if len(wide) < 2 or set(wide.columns) != set(pair):
                    continue
                results = {name: wide[name].to_dict() for name in pair}
                (cells[pair, title],) = compare_paired(results, baseline=pair[1])
        adjusted = dict(zip(cells, holm([c.p_value for c in cells.values()]), strict=True))
        rows = []
        for pair in pairs:
            row = [" − ".join(map(code, pair))]
            for title in views:
                found = cells.get((pair, title))
                if found is None:
                    row.append("–")
                    continue
                star = "*" if adjusted[pair, title] < 0.05 else ""
                difference, low, high = map(signed, (found.difference, found.low, found.high))
                row.append(f"{difference} ({low} to {high}){star}")
            rows.append(row)
        return table(["difference", *views], rows)

    def false_positives_table(self) -> str:
        runs = select(self.runs, study="false positives")
        cells = runs[["kind", "rate"]].drop_duplicates().sort_values(["kind", "rate"])
        cells = [("none", 0.0)] + [
            (kind, rate) for kind, rate in cells.itertuples(index=False) if kind != "none"
        ]
        heads = [kind if kind == "none" else f"{kind}, {rate:.0%}" for kind, rate in cells]
        blocks = []
        for title, column in (
            ("True P(right) at the end", "final"),
            ("Share of Σ|A·c| over positives that is on wrong responses", "wrong_pull"),
        ):
            rows = [
                [
                    code(loss),
                    *(
                        plus_minus(select(runs, loss=loss, kind=kind, rate=rate)[column])
                        for kind, rate in cells
                    ),
                ]
                for loss in names_in(runs, "loss")
            ]
            blocks.append(f"{title}:\n\n" + table(["loss", *heads], rows))
        blocks.append(
            "Difference of the true P(right) at the end:\n\n"
            + self._differences(
                [pair for pair in PAIRS if set(pair) <= set(runs["loss"])],
                {
                    head: (select(runs, kind=kind, rate=rate), "final")
                    for head, (kind, rate) in zip(heads, cells, strict=True)
                },
            )
        )
        return "\n\n".join(blocks)

    def positives_table(self) -> str:
        runs = select(self.runs, study="positives")
        shares = sorted(set(runs["share"]))
        rows = []
        for loss in names_in(runs, "loss"):
            row = [code(loss)]
            for share in shares:
                of = select(runs, loss=loss, share=share)
                row.append(
                    f"{plus_minus(of['mean'])}; {plus_minus(of['final'])}; "
                    f"{int(of['collapsed'].sum())}/{len(of)}"
                )
            rows.append(row)
        first = select(runs, loss=names_in(runs, "loss")[0])
        informative = [
            f"{select(first, share=share)['informative'].mean():.0%}" for share in shares
        ]
        heads = [f"{share:.0%} right" for share in shares]
        rows.append(["groups with both rewards in the first batch", *informative])
        text = "Mean; final; collapsed:\n\n" + table(["loss", *heads], rows)
        views = {
            head: (select(runs, share=share), "mean")
            for head, share in zip(heads, shares, strict=True)
        }
        pairs = [pair for pair in PAIRS if set(pair) <= set(runs["loss"])]
        return text + "\n\nDifference of the mean:\n\n" + self._differences(pairs, views)

    def _stale(self) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        runs = select(self.runs, study="staleness")
        recomputed = runs["recomputed"].astype(bool)
        lags = sorted(set(runs["lag"]))
        views = {f"{lag:.0f}": runs[(runs["lag"] == lag) & ~recomputed] for lag in lags}
        views[f"{lags[-1]:.0f}, π_old recomputed"] = runs[recomputed]
        return runs, views

    def staleness_table(self) -> str:
        runs, views = self._stale()
        rows = []
        for loss in names_in(runs, "loss"):
            row = [code(loss)]
            for view in views.values():
                of = select(view, loss=loss)
                row.append(
                    f"{plus_minus(of['mean'])}; {plus_minus(of['final'])}; "
                    f"{int(of['collapsed'].sum())}/{len(of)}"
                )
            rows.append(row)
        text = "Mean; final; collapsed:\n\n" + table(["loss", *views], rows)
        pairs = [pair for pair in PAIRS if set(pair) <= set(runs["loss"])]
        for column in ("mean", "final"):
            views_of = {title: (view, column) for title, view in views.items()}
            text += f"\n\nDifference of the {column}:\n\n" + self._differences(pairs, views_of)
        return text

    def weights_table(self) -> str:
        """c of one positive of three tokens, all at e^-k, or its first only."""
        rows = []
        for loss in names_in(self.fallen, "loss"):
            row = [code(loss)]
            for k in self.depths:
                every = weight_on_positive(loss, [-k, -k, -k])[0]
                first, other, _ = weight_on_positive(loss, [-k, 0, 0])
                row.append(f"{number(every)}; {number(first)}, {number(other)}")
            rows.append(row)
        return table(["loss", *(f"r = e^-{k}" for k in self.depths)], rows)

    def fallen_table(self) -> str:
        blocks = []
        for title, column in (
            ("Mean c on the fallen half", "weight"),
            ("Bias of the right side, over the length of the whole target", "bias_right"),
            ("Bias of all", "bias"),
            ("Cosine of all with ∇J", "cosine"),
            ("P/P_old of the fallen half after 16 steps", "fall_after"),
            ("P(right) after 16 steps", "reward_after"),
        ):
            rows = [
                [
                    code(loss),
                    *(
                        f"{number(of.mean())} ± {number(half(of))}"
                        for k in self.depths
                        for of in [select(self.fallen, loss=loss, k=k)[column]]
                    ),
                ]
                for loss in names_in(self.fallen, "loss")
            ]
            if column.endswith("_after"):
                start = column.removesuffix("_after")
                one = select(self.fallen, loss=names_in(self.fallen, "loss")[0])
                of_k = [select(one, k=k)[start] for k in self.depths]
                rows.append(["before", *(f"{number(v.mean())} ± {number(half(v))}" for v in of_k)])
            blocks.append(
                f"{title}:\n\n" + table(["loss", *(f"e^-{k}" for k in self.depths)], rows)
            )
        return "\n\n".join(blocks)

    def sections(self) -> dict[str, Callable[[], str]]:
        return {name: getattr(self, f"{name.replace('-', '_')}_table") for name in SECTIONS}

    def summary(self) -> dict:
        keys = [key for key in CELL if key in self.runs]
        figures = ["mean", "final", "best", "wrong_pull", "collapsed", "lost", "exploded"]
        cells = self.runs.groupby(keys, sort=False, dropna=False)[figures].mean()
        by_loss = self.fallen.groupby(["loss", "k"], sort=False).mean(numeric_only=True)
        text = cells.reset_index().to_json(orient="records")
        return {
            "meta": self.meta,
            "cells": pd.io.json.ujson_loads(text),
            "fallen": by_loss.drop(columns="seed").reset_index().to_dict("records"),
        }

    def fill(self, page: Path) -> None:
        """Fill the page's sections, and draw its figures into img/ beside it."""
        every = self.sections()
        fill(page, marked({name: every[name] for name in ON_PAGE}, COMMAND))
        self.draw(page.parent / "img")

    # --- figures

    def draw(self, folder: Path) -> None:
        """stress-collapse, stress-verifier, stress-data and stress-fallen, as svg."""
        figures = {
            "collapse": self._draw_collapse,
            "verifier": self._draw_verifier,
            "data": self._draw_data,
            "fallen": self._draw_fallen,
        }
        draw_all(folder, "stress", {f"stress-{name}": draw for name, draw in figures.items()})

    def _lines(self, axis, runs: pd.DataFrame, x: str, column: str, *, log: bool = False) -> None:
        """Mean and t interval against x, a line for each loss, moved sideways a little."""
        losses = [loss for loss in COLOURS if loss in set(runs["loss"])]
        for i, loss in enumerate(losses):
            grouped = select(runs, loss=loss).groupby(x)[column]
            mean = grouped.mean()
            at = _beside(mean.index.to_numpy(dtype=float), i, len(losses), log)
            bars = grouped.apply(half)
            axis.errorbar(at, mean, bars, color=COLOURS[loss], lw=1, ms=2.5, marker="o", label=loss)
        if log:
            axis.set_xscale("log")

    def _draw_collapse(self):
        figure, axes = subplots(2, 2, figsize=(10, 6), sharex=True, sharey="row")
        losses = [loss for loss in COLOURS if loss in self.losses]
        seeds = self.sweep["seed"].nunique()
        for column, clipped in enumerate((False, True)):
            here = select(self.sweep, clipped=clipped)
            for i, loss in enumerate(losses):
                flags = select(here, loss=loss).groupby("learning_rate")["collapsed"]
                share = flags.mean()
                bounds = np.array([wilson(int(f.sum()), len(f)) for _, f in flags]).T
                at = _beside(share.index.to_numpy(), i, len(losses), True)
                bars = np.abs(bounds - share.to_numpy())
                axes[0][column].errorbar(
                    at, share, bars, color=COLOURS[loss], lw=1, ms=2.5, marker="o", label=loss
                )
            self._lines(axes[1][column], here, "learning_rate", "final", log=True)
            axes[0][column].set_title(
                f"{'with' if clipped else 'without'} gradient clipping, {seeds} runs a point"
            )
            axes[1][column].set_xlabel("learning rate")
        axes[0][0].set_ylabel("share collapsed, Wilson 95%")
        axes[1][0].set_ylabel("P(right) at the end, t 95%")
        axes[0][0].legend(fontsize=6.5, frameon=False)
        return figure

    def _draw_verifier(self):
        runs = select(self.runs, study="false positives")
        figure, axes = subplots(1, 3, figsize=(11, 3.2))
        for axis, kind in zip(axes, ("at random", "always the same"), strict=False):
            self._lines(axis, select(runs, kind=["none", kind]), "rate", "final")
            axis.set(title=f"wrong ones rewarded {kind}", ylabel="true P(right) at the end")
        self._lines(axes[2], select(runs, kind=["none", "always the same"]), "rate", "wrong_pull")
        axes[2].set(title="always the same", ylabel="share of the positive pull on wrong ones")
        for axis in axes:
            axis.set_xlabel(
                f"share of wrong responses rewarded ({self.meta['seeds']} runs a point)"
            )
        axes[0].legend(fontsize=6.5, frameon=False)
        return figure

    def _draw_data(self):
        figure, axes = subplots(1, 2, figsize=(9, 3.4))
        positives = select(self.runs, study="positives")
        self._lines(axes[0], positives, "share", "mean", log=True)
        axes[0].set(xlabel="P(right) at the start", ylabel="P(right), mean over updates")
        _, views = self._stale()
        fresh = pd.concat(list(views.values())[:-1])
        self._lines(axes[1], fresh, "lag", "mean")
        axes[1].set(xlabel="staleness, updates", ylabel="P(right), mean over updates")
        for axis in axes:
            axis.set_title(f"{self.meta['seeds']} runs a point, t 95%")
            axis.legend(fontsize=6.5, frameon=False)
        return figure

    def _draw_fallen(self):
        figure, axes = subplots(1, 3, figsize=(11, 3.2))
        for axis, (column, label) in zip(
            axes,
            {
                "weight": "mean c on the fallen half",
                "bias_right": "bias of the right side / |target|",
                "reward_after": "P(right) after 16 steps",
            }.items(),
            strict=True,
        ):
            drawn = select(self.fallen, loss=list(COLOURS))
            if column == "bias_right":
                drawn = select(
                    drawn, loss=[x for x in names_in(drawn, "loss") if x != "sequence-is"]
                )
            self._lines(axis, drawn, "k", column)
            axis.set(xlabel="k: positives fallen to e^-k", ylabel=label)
            axis.set_xticks(self.depths)
        axes[2].legend(fontsize=6.5, frameon=False)
        axes[1].set_title(f"{self.meta['seeds']} policies, t 95%")
        return figure


def _beside(at: np.ndarray, i: int, count: int, log: bool) -> np.ndarray:
    shift = (i - (count - 1) / 2) / count
    return at * 1.5**shift if log else at + 0.15 * shift * np.diff(np.sort(at)).min(initial=1.0)


def signed(x: float) -> str:
    return f"{x:+.3f}" if abs(x) < 1 else f"{x:+.2f}" if abs(x) < 10 else f"{x:+.0f}"


SECTIONS = (
    "run",
    "collapse",
    "collapse-by-loss",
    "reward",
    "own",
    "pairs",
    "false-positives",
    "positives",
    "staleness",
    "weights",
    "fallen",
)
ON_PAGE = ("run", "collapse-by-loss", "pairs")
COMMAND = "python -m benchmarks.studies.stress"
