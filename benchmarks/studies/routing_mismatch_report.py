"""Tables and figures of `studies.routing_mismatch`, from its Parquet files. Computes no model.

A rate is a ratio of sums over the prompts of all seeds, its 95% interval is by prompt, and "seeds
a to b" are the smallest and largest rates of a single seed's model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.studies.exact.report import table
from benchmarks.studies.made import draw_all, marked, subplots, write_small
from benchmarks.studies.routing_mismatch import MODULE, TABLES, studies
from docs.sections import fill
from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import Rate, rates
from moe_upgrpo.store.files import write_text

# name of a figure -> its numerator and its denominator in sequences.parquet
MEASURES = {
    "routers": ("routers", "pairs"),
    "slots": ("slots", "slots_compared"),
    "tokens with any": ("any", "tokens"),
    "routers per token": ("routers", "tokens"),
    "mean abs gap": ("gap", "tokens"),
    "k3": ("k3", "tokens"),
    "F(2)": ("above_2", "tokens"),
    "k3, replayed": ("replayed_k3", "tokens"),
    "stale k3": ("stale_k3", "tokens"),
    "stale F(2)": ("stale_above_2", "tokens"),
    **{
        name: (f"gap_{name}", "tokens")
        for name in ("numerics", "engine_routing", "update", "routing_shift")
    },
}
SHARES = ("routers", "slots", "tokens with any", "F(2)", "stale F(2)")
HEADS = ("routers", "slots", "tokens with any", "routers per token", "mean abs gap", "k3", "F(2)")
BEFORE, AFTER = "engine before updates, trainer after", "trainer before updates, trainer after"
ENGINES = ("hf", "vllm", "sglang")
ENGINE_NAMES = {"hf": "HF transformers", "vllm": "vLLM", "sglang": "SGLang"}
PUBLISHED_RATE = 0.10  # of routers: R3, arXiv 2510.11370


def shown(value: float, share: bool) -> str:
    if not share:
        return "0" if value == 0 else f"{value:.2g}" if value < 0.01 else f"{value:.3g}"
    return f"{value:.1%}" if value >= 0.1 else f"{value:.2%}"


@dataclass(frozen=True)
class Figure:
    """A rate over all seeds, and the least and the largest of a single seed."""

    name: str
    rate: Rate
    seeds: tuple[float, float]
    count: int  # of seeds

    @property
    def text(self) -> str:
        share = self.name in SHARES
        if self.rate.numerator == 0:
            return f"0 of {self.rate.denominator:,.0f}"
        value = shown(self.rate.rate, share)
        if np.isnan(self.rate.low):
            return f"{value} ({self.rate.prompts} prompts: no interval)"
        parts = f"{shown(self.rate.low, share)} to {shown(self.rate.high, share)}"
        if self.count > 1:
            low, high = (shown(x, share) for x in self.seeds)
            parts += f"; seeds {low} to {high}"
        return f"{value} ({parts})"


def figure(sequences: pd.DataFrame, name: str) -> Figure:
    """Figures of all rows given, of every (run, prompt).

    Raises UserError where there is no row: no figure without data.
    """
    if sequences.empty:
        raise UserError(f"no sequences for {name!r}: nothing was measured")
    above, below = MEASURES[name]
    rate = by_prompt(sequences, above, below, share=name in SHARES)
    of_runs = sequences.groupby("run")[[above, below]].sum()
    by_seed = of_runs[above] / of_runs[below]
    return Figure(name, rate, (by_seed.min(), by_seed.max()), len(by_seed))


def by_prompt(rows: pd.DataFrame, above: str, below: str, *, share: bool) -> Rate:
    """The ratio of two columns' sums, with its interval over the prompts of every run."""
    sums = rows.groupby(["run", "prompt"])[[above, below]].sum().astype(float)
    scale = "share" if share else "magnitude"
    numerators, denominators = (sums[[name]].to_numpy() for name in (above, below))
    [rate] = rates(numerators, denominators, groups=[above], scale=scale)
    return rate


@dataclass
class Report:
    runs: pd.DataFrame
    sequences: pd.DataFrame
    positions: pd.DataFrame
    layers: pd.DataFrame
    about: dict[str, dict]

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Rows of all axes in an output folder; UserError where there is none."""
        parts = sorted(path.parent for path in folder.glob("*/about.json"))
        kept = [folder] if (folder / "about.json").exists() else parts
        if not kept:
            raise UserError(f"{folder} holds no axis: run {MODULE} first")
        frames = {
            name: pd.concat(
                [pd.read_parquet(part / f"{name}.parquet") for part in kept], ignore_index=True
            )
            for name in TABLES
        }
        about = [json.loads((part / "about.json").read_text(encoding="utf-8")) for part in kept]
        if kept != [folder]:
            about = [{part.name: one for part, one in zip(parts, about, strict=True)}]
        return cls(**frames, about=about[0])

    def write(self, folder: Path) -> None:
        """Write all axes into one file for each table; `read` reads these too."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            write_small(getattr(self, name), folder / f"{name}.parquet")
        write_text(folder / "about.json", json.dumps(self.about, indent=1) + "\n")

    # --- selections

    def of(self, runs: pd.DataFrame, comparison: str = "free-running") -> pd.DataFrame:
        chosen = self.sequences["run"].isin(set(runs["run"]))
        return self.sequences[chosen & (self.sequences["comparison"] == comparison)]

    def groups(self, *axes: str) -> list[tuple[dict, pd.DataFrame]]:
        """Runs of the axes that differ only in their seed, grouped, in the order they were made."""
        keys = ["axis", "setting", "engine", "rollout", "trainer", "updates"]
        chosen = self.runs[self.runs["axis"].isin(axes)]
        found = chosen.groupby(keys, sort=False)
        return [(dict(zip(keys, key, strict=True)), runs) for key, runs in found]

    def rate(self, runs: pd.DataFrame, name: str, comparison: str = "free-running") -> Figure:
        return figure(self.of(runs, comparison), name)

    def value(self, runs: pd.DataFrame, name: str) -> str:
        """The figure without its interval."""
        above, below = MEASURES[name]
        sums = self.of(runs)[[above, below]].sum()
        return shown(sums[above] / sums[below], name in SHARES)

    def row(self, runs: pd.DataFrame) -> list[str]:
        """The columns that the axes' tables share."""
        row = []
        for name in HEADS:
            with_interval = name in ("routers", "tokens with any")
            row.append(self.rate(runs, name).text if with_interval else self.value(runs, name))
        frame = self.of(runs, "conditional")
        row.append(shown(frame["routers"].sum() / frame["pairs"].sum(), True))
        return [*row, self.value(runs, "k3, replayed")]

    # --- tables

    def axis_table(self, axis: str) -> str:
        rows = []
        for about, runs in self.groups(axis):
            row = [about["setting"], f"{runs['parameters'].iloc[0] / 1e6:,.1f}M"]
            row += [about["rollout"], about["trainer"], str(runs["seed"].nunique())]
            rows.append(row + self.row(runs))
        first = ["setting", "parameters", "rollout", "trainer", "seeds"]
        return table([*first, *ROW], rows) if rows else NONE

    def precision_table(self) -> str:
        return self.axis_table("precision")

    def trained_table(self) -> str:
        return self.axis_table("trained")

    def depth_table(self) -> str:
        return self.axis_table("depth")

    def experts_table(self) -> str:
        return self.axis_table("experts")

    def top_k_table(self) -> str:
        return self.axis_table("top-k")

    def size_table(self) -> str:
        return self.axis_table("size")

    def engines_table(self) -> str:
        missing = [n for n in ENGINES if n not in set(self._engines["engine"])]
        note = ""
        if missing:
            names = ", ".join(ENGINE_NAMES[n] for n in missing)
            note = f"\n\nNot run: {names}. No figure here says anything of them."
        if self._engines.empty:
            return note.strip()
        rows = []
        for about, runs in self.groups("engine"):
            row = [ENGINE_NAMES[about["engine"]], about["rollout"], str(runs["seed"].nunique())]
            row += self.row(runs)
            row += [shown(runs[f"noise/engine_{kind}/router_rate"].max(), True) for kind in KINDS]
            rows.append(row)
        heads = ["engine", "rollout", "seeds", *ROW]
        heads += [f"engine's noise: {kind.replace('_', ' ')}" for kind in KINDS]
        return table(heads, rows) + note

    @property
    def _engines(self) -> pd.DataFrame:
        return self.runs[self.runs["axis"] == "engine"]

    def noise_table(self) -> str:
        rows = []
        for about, runs in self.groups("precision", "size"):
            runs = runs.dropna(subset=["noise/trainer_repeat/router_rate"])
            row = [about["setting"], about["rollout"], about["trainer"]]
            for side in ("trainer", "engine"):
                for kind in KINDS:
                    row.append(shown(runs[f"noise/{side}_{kind}/router_rate"].max(), True))
            row.append(shown(runs["noise/trainer_batch_shape/k3"].max(), False))
            row.append(self.value(runs, "routers"))
            row.append(self.value(runs, "k3"))
            rows.append(row)
        heads = ["model", "rollout", "trainer", "trainer: repeat", "trainer: batch shape"]
        heads += ["engine: repeat", "engine: batch shape", "k3 of trainer: batch shape"]
        return table([*heads, "engine against trainer", "its k3"], rows)

    def clustering_table(self) -> str:
        rows = []
        for about, runs in self.groups("depth", "size", "trained"):
            if self.rate(runs, "routers").rate.numerator == 0:
                continue
            spread = runs["dispersion"].dropna()
            row = [about["axis"], about["setting"], about["rollout"], about["trainer"]]
            row.append(self.rate(runs, "tokens with any").text)
            row.append(shown(float(np.average(runs["any_if_independent"])), True))
            row.append(f"{spread.mean():.2f} ({spread.min():.2f} to {spread.max():.2f})")
            rows.append(row)
        heads = ["axis", "setting", "rollout", "trainer", "tokens with any"]
        return table([*heads, "were layers independent", "dispersion (seeds)"], rows)

    def decomposition_table(self) -> str:
        rows = []
        for about, runs in self.groups("precision", "engine", "trained"):
            row = [about["setting"], ENGINE_NAMES[about["engine"]]]
            row += [about["rollout"], about["trainer"]]
            row += [self.rate(runs, name).text for name in ("numerics", "engine_routing")]
            row.append(self.value(runs, "mean abs gap"))
            rows.append(row)
        heads = ["model", "engine", "rollout", "trainer", "numerics", "engine routing"]
        return table([*heads, "whole gap"], rows)

    def position_table(self) -> str:
        rows = []
        for _, frame in self._of_position.groupby("bin"):
            share = by_prompt(frame, "routers", "pairs", share=True)
            tokens = frame["tokens"].sum()
            span = f"{frame['first'].min() + 1} to {frame['last'].max() + 1}"
            row = [span, Figure("routers", share, (0, 0), 1).text]
            row.append(shown(frame["any"].sum() / tokens, True))
            row.append(shown(frame["conditional"].sum() / frame["pairs"].sum(), True))
            row.append(f"{frame['prefix_mismatched'].sum() / tokens:.0f}")
            rows.append(row)
        if not rows:
            return "Not run."
        heads = ["response token", "routers", "tokens with any", "conditional: routers"]
        return table([*heads, "mismatches before it"], rows)

    @property
    def _of_position(self) -> pd.DataFrame:
        chosen = set(self.runs.loc[self.runs["axis"] == "position", "run"])
        return self.positions[self.positions["run"].isin(chosen)]

    def staleness_table(self) -> str:
        rows = []
        for about, runs in self.groups("staleness"):
            row = [about["setting"], str(about["updates"]), str(runs["seed"].nunique())]
            row += [self.rate(runs, name, AFTER).text for name in ("slots", "routers")]
            row.append(self.rate(runs, "routers", BEFORE).text)
            row += [self.value(runs, name) for name in ("stale k3", "stale F(2)")]
            row += [self.value(runs, name) for name in TERMS]
            rows.append(row)
        heads = ["model", "updates", "seeds", "trainer before and after: slots", "routers"]
        heads += ["old engine, new trainer: routers", "k3", "F(2)"]
        return table([*heads, *(name.replace("_", " ") for name in TERMS)], rows) if rows else NONE

    def training_step_table(self) -> str:
        rows = []
        for about, runs in self.groups("training step"):
            row = [about["setting"], str(about["updates"]), str(runs["seed"].nunique())]
            rows.append(row + self.row(runs))
        return table(["model", "updates", "seeds", *ROW], rows) if rows else NONE

    def finding_table(self) -> str:
        """Which settings reach the published rate of routers, by their interval's lower end."""
        found = {}
        axes = ("precision", "trained", "depth", "experts", "top-k", "size")
        for about, runs in self.groups(*axes):
            if about["rollout"] == about["trainer"] == "fp32":
                continue
            share = self.rate(runs, "routers")
            name = about["setting"]
            if about["axis"] in UNITS:
                name = UNITS[about["axis"]].format(name)
            key = runs["weights"].iloc[0], about["rollout"], about["trainer"]
            found.setdefault(key, []).append((share.rate.rate, f"{name}: {share.text}", share))
        rows = []
        for (weights, rollout, trainer), shares in sorted(found.items()):
            above = [one for one in shares if one[2].rate.low >= PUBLISHED_RATE]
            row = [weights, rollout, trainer, f"{len(above)} of {len(shares)}"]
            rows.append([*row, min(shares)[1], max(shares)[1]])
        heads = ["weights", "rollout", "trainer", "settings at 10% or above"]
        return table([*heads, "lowest", "highest"], rows) if rows else NONE

    def published_table(self) -> str:
        rows = [[what, value, source, here(self)] for what, value, source, here in PUBLISHED]
        return table(["quantity", "published", "source", "nearest here"], rows)

    def runs_table(self) -> str:
        rows = [
            [name, str(one["runs"]), f"{one['cpu_s']:,} s", f"{one['clock_s']:,} s"]
            for name, one in self.about.items()
        ]
        rows.append(
            ["all", *(f"{sum(one[k] for one in self.about.values()):,}" for k in ("runs", "cpu_s"))]
        )
        rows[-1][-1] += " s"
        rows[-1].append("")
        made = set(zip(self.runs["axis"], self.runs["setting"], strict=True))
        planned = [(one.axis, name) for one in studies(quick=False) for name, _ in one.models]
        left_out = [f"{axis} {name}" for axis, name in planned if (axis, name) not in made]
        note = f"\n\nPlanned and not run: {'; '.join(left_out)}." if left_out else ""
        cpus = " and ".join(sorted({one["cpu"] for one in self.about.values()}))
        heads = ["axis", "runs", "CPU, this process", "clock"]
        return table(heads, rows) + f"\n\nHardware: {cpus}, one thread." + note

    def sections(self) -> dict[str, Callable[[], str]]:
        return {name: getattr(self, f"{name.replace('-', '_')}_table") for name in SECTIONS}

    def nearest(self, axis: str, setting: str, rollout: str, trainer: str) -> pd.DataFrame:
        for about, runs in self.groups(axis):
            if (about["setting"], about["rollout"], about["trainer"]) == (
                setting,
                rollout,
                trainer,
            ):
                return runs
        return self.runs.iloc[:0]

    # --- figures

    def fill(self, page: Path) -> None:
        """Fill the page's sections, and draw its figures into img/routing-mismatch beside it."""
        every = self.sections()
        fill(page, marked({name: every[name] for name in ON_PAGE}, f"python -m {MODULE}"))
        self.draw(page.parent / "img" / "routing-mismatch")

    def draw(self, folder: Path) -> None:
        figures = {
            "axes": self._draw_axes,
            "layers": self._draw_layers,
            "staleness": self._draw_staleness,
        }
        draw_all(folder, "mismatch", figures)

    @cached_property
    def _colours(self) -> dict[str, str]:
        return {"bf16": "tab:blue", "FP8 weights": "tab:red", "fp32": "tab:grey"}

    def _draw_axes(self):
        """Share of routers and of tokens against depth, experts, top-k and position."""
        drawn, axes = subplots(1, 4, figsize=(12, 3), sharey=True)
        for axis, name in zip(axes[:3], ("depth", "experts", "top-k"), strict=True):
            groups = self.groups(name)
            for rollout in dict.fromkeys(about["rollout"] for about, _ in groups):
                chosen = [(a, r) for a, r in groups if a["rollout"] == rollout]
                x = [int(about["setting"]) for about, _ in chosen]
                for measure, line in (("routers", "o-"), ("tokens with any", "s:")):
                    found = [self.rate(runs, measure).rate for _, runs in chosen]
                    self._line(axis, x, found, line, f"{rollout}, {measure}", rollout)
            title = {"depth": "MoE layers", "experts": "experts, top-8", "top-k": "top-k of 64"}
            axis.set(xlabel=title[name])
            if groups:
                axis.set(xscale="log")
                axis.set_xticks(x, [str(n) for n in x])
                axis.minorticks_off()
        x, found = [], []
        for _, frame in self._of_position.groupby("bin"):
            x.append((frame["first"].min() + frame["last"].max()) / 2 + 1)
            found.append(by_prompt(frame, "routers", "pairs", share=True))
        axes[3].set(xlabel="position in the response")
        if found:
            self._line(axes[3], x, found, "o-", "bf16, routers", "bf16")
            axes[3].set(xscale="log")
        axes[0].set(ylim=(0, 1))
        for axis in axes:
            axis.axhline(PUBLISHED_RATE, color="black", lw=0.6, ls="--")
        axes[0].set_ylabel("share that differs (dashed: 10%)")
        if self._deepest:
            handles = axes[0].get_legend_handles_labels()
            axes[3].legend(*handles, fontsize=7, frameon=False)
        return drawn

    def _line(self, axis, x, found: list[Rate], style: str, label: str, rollout: str) -> None:
        y = np.array([[one.rate, one.low, one.high] for one in found]).reshape(-1, 3)
        y = np.where(np.isnan(y), y[:, :1], y)  # no interval, no bar
        reach = np.abs(y[:, 1:] - y[:, :1]).T
        colour = self._colours[rollout]
        axis.errorbar(x, y[:, 0], yerr=reach, fmt=style, ms=3, lw=1, color=colour, label=label)

    def _draw_layers(self):
        """Each layer's share of routers in the deepest model, free-running and conditional."""
        drawn, axis = subplots(figsize=(5, 3))
        groups = [(a, r) for a, r in self.groups("depth") if a["setting"] == self._deepest]
        for about, runs in groups:
            chosen = self.layers[self.layers["run"].isin(set(runs["run"]))]
            by_layer = chosen.groupby("layer")[["free_running", "conditional", "tokens"]].sum()
            for column, line in (("free_running", "-"), ("conditional", ":")):
                share = by_layer[column] / by_layer["tokens"]
                label = f"{about['rollout']}, {column.replace('_', '-')}"
                colour = self._colours[about["rollout"]]
                axis.plot(share.index, share, line, color=colour, label=label)
        axis.set(xlabel="MoE layer", ylabel="share of routers that differ")
        if groups:
            axis.legend(fontsize=6, frameon=False)
        return drawn

    @property
    def _deepest(self) -> str:
        depths = self.runs.loc[self.runs["axis"] == "depth", "setting"].astype(int)
        return str(depths.max()) if len(depths) else ""

    def _draw_staleness(self):
        drawn, axis = subplots(figsize=(5, 3))
        groups = self.groups("staleness")
        settings = list(dict.fromkeys(about["setting"] for about, _ in groups))
        for setting, colour in zip(settings, ("tab:blue", "tab:orange"), strict=False):
            chosen = [(a["updates"], r) for a, r in groups if a["setting"] == setting]
            for comparison, line, label in (
                (AFTER, "o-", "trainer before and after"),
                (BEFORE, "s:", "old engine, new trainer"),
            ):
                found = [self.rate(runs, "routers", comparison).rate for _, runs in chosen]
                y = [one.rate for one in found]
                reach = np.nan_to_num(
                    [[o.rate - o.low for o in found], [o.high - o.rate for o in found]]
                )
                x = [updates for updates, _ in chosen]
                name = f"{setting}: {label}"
                axis.errorbar(x, y, yerr=reach, fmt=line, ms=3, lw=1, color=colour, label=name)
        axis.set(xlabel="optimizer updates", ylabel="share of routers that differ")
        if groups:
            axis.legend(fontsize=6, frameon=False)
        return drawn


UNITS = {"depth": "{} layers", "experts": "{} experts, top-8", "top-k": "64 experts, top-{}"}
ROW = (*HEADS, "conditional: routers", "k3, replayed")
KINDS = ("repeat", "batch_shape")
NONE = "Not run."
TERMS = ("numerics", "engine_routing", "update", "routing_shift")
SECTIONS = (
    "finding",
    "published",
    "precision",
    "noise",
    "engines",
    "decomposition",
    "depth",
    "clustering",
    "experts",
    "top-k",
    "position",
    "size",
    "trained",
    "training-step",
    "staleness",
    "runs",
)


def _deepest(name: str):
    axis, rollout, trainer = "depth", "bf16", "fp32"

    def here(report: Report) -> str:
        setting = report._deepest
        runs = report.nearest(axis, setting, rollout, trainer)
        if runs.empty:
            return "not run"
        where = f"{rollout} against {trainer}, {UNITS[axis].format(setting)}"
        return f"{report.value(runs, name)} ({where})"

    return here


def _after_one_update(report: Report) -> str:
    for about, runs in report.groups("staleness"):
        if about["updates"] == 1 and about["setting"].startswith("64"):
            return f"{report.rate(runs, 'slots', AFTER).text} ({about['setting']})"
    return "not run"


# The sources are the papers' own; (C) is GSPO and the IcePop blog, read second-hand.
PUBLISHED = (
    (
        "experts changed by one gradient update, same sample, Qwen3-30B-A3B-Base, 48 layers",
        "about 10%",
        "GSPO, arXiv 2507.18071, §5.3",
        _after_one_update,
    ),
    (
        "routers that differ, rollout and trainer",
        "about 10%",
        "R3, arXiv 2510.11370",
        _deepest("routers"),
    ),
    (
        "tokens with at least one layer that differs",
        "94%",
        "R3",
        _deepest("tokens with any"),
    ),
    (
        "routers that differ in a token, mean",
        "about 6",
        "R3",
        _deepest("routers per token"),
    ),
    (
        "KL of rollout and trainer, MoE",
        "1.535e-3",
        "R3",
        _deepest("k3"),
    ),
    (
        "the same with the routes replayed",
        "7.5e-4",
        "R3",
        _deepest("k3, replayed"),
    ),
    (
        "log-prob gap, with replay about a tenth of it",
        "1e-3 to 1e-4",
        "arXiv 2512.07710",
        _deepest("mean abs gap"),
    ),
    (
        "tokens with a ratio above 2",
        "MoE about 10 times dense",
        "R3",
        _deepest("F(2)"),
    ),
    (
        "noise floor: KL of two forwards of Megatron",
        "8.4e-4",
        "R3",
        lambda report: "the section on the noise floor",
    ),
)
ON_PAGE = ("finding", "published", "engines", "staleness", "runs")
