# SPDX-License-Identifier: Apache-2.0
"""The figures from the token log: questions answered with intervals by prompt, and clustering.

Shape suffixes: N rows (tokens), L MoE layers, M numbers of mismatched layers, 0..L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_upgrpo.report.figures import Entry, Format, Panels, number, percent, plural
from moe_upgrpo.report.routing import FLOOR_SIDES
from moe_upgrpo.report.runs import Run
from moe_upgrpo.report.tokens import as_entry
from moe_upgrpo.stats import MIN_PROMPTS
from moe_upgrpo.store.questions import GROUPINGS

# Tokens that differ; with fewer, one cannot tell whether their layers flip together.
_MIN_DIFFERING = 10
_SIGNS = (("positive", ">"), ("negative", "<"))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """`rate` of each of ``quantities`` (name, label) in the groups of ``by``.

    ``floor`` is the last part of the noise floor's metrics, noise/KIND/``floor``: the larger of the
    two sides' is drawn as a line.
    """

    key: str
    title: str
    quantities: tuple[tuple[str, str], ...]
    by: str
    is_share: bool = False
    floor: str | None = None
    read: str = ""
    says: Callable[[Run, list[Entry]], str] = lambda run, entries: ""

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        entries = []
        for run in runs:
            answered = [run.tokens.ask(name, self.by) for name, _ in self.quantities]
            for (name, label), rows in zip(self.quantities, answered, strict=True):
                if isinstance(rows, list):
                    about = {"run": run.label, "quantity": name, "label": label, "by": self.by}
                    entries.append(about | {"floor": False, "rows": rows})
            if any(isinstance(rows, list) for rows in answered):
                entries += self._floors(run)
        return entries

    def why_not(self, run: Run) -> str | None:
        """Why a run lacks some or all of the quantities."""
        reasons = (run.tokens.ask(name, self.by) for name, _ in self.quantities)
        return next((reason for reason in reasons if isinstance(reason, str)), None)

    def _floors(self, run: Run) -> list[Entry]:
        entries = []
        for side, kinds in FLOOR_SIDES.items() if self.floor and not run.stale_steps else ():
            found = {kind: run.pooled(f"noise/{kind}/{self.floor}") for kind in kinds}
            found = {kind: value for kind, value in found.items() if value is not None}
            if found:
                kind = max(found, key=found.get)
                about = {"run": run.label, "metric": f"noise/{kind}/{self.floor}"}
                label = f"floor: {side}"
                entries.append(about | {"label": label, "floor": True, "value": found[kind]})
        return entries

    def finding(self, run: Run, entries: list[Entry]) -> str:
        return self.says(run, entries)


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Tokens by their number of mismatched layers, compared with independent layers."""

    key: str
    title: str
    read: str

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        return [
            {"run": run.label}
            | histogram(run)
            | {"clustering": [as_entry(row) for row in run.tokens.clustered().rows()]}
            for run in runs
            if run.tokens.layout is not None and run.tokens.layout.num_layers
        ]

    def finding(self, run: Run, entries: list[Entry]) -> str:
        if not entries:
            return nothing(run)
        rows = {row["group"]: row for row in entries[0]["clustering"]}
        any_layer = rows["any_layer"]
        if not any_layer["numerator"]:
            return f"0 of {any_layer['denominator']:,.0f} tokens compared differ in any layer."
        text = (
            f"{interval(any_layer, percent)} of tokens differ in at least one layer, "
            f"{interval(rows['any_layer_independent'], percent)} if layers were independent"
        )
        if any_layer["numerator"] < _MIN_DIFFERING:
            few = int(any_layer["numerator"])
            return f"{text}; too few ({few}) to say whether they come together."
        if rows["dispersion"]["rate"] is not None:
            text += (
                "; the variance of a token's mismatched layers is "
                f"{interval(rows['dispersion'], number)} times that of independent ones"
            )
        if rows["consecutive_tokens"]["rate"] is not None:
            text += (
                ", and those of neighbouring tokens are correlated by "
                f"{interval(rows['consecutive_tokens'], number)}"
            )
        return text + "."


def nothing(run: Run, column: str = "overlap") -> str:
    """Why a run has no entry for a figure that reads ``column``."""
    if run.tokens.layout is None:
        return run.tokens.note
    if not run.tokens.layout.num_layers:
        return "the model has no MoE layer."
    return f"the token log has no column {column}."


def histogram(run: Run) -> Entry:
    """Tokens with m mismatched layers, as measured and for independent layers of the same rates.

    The independent share of m is that of a sum of L Bernoulli draws with the layers' rates r_l
    (Poisson binomial): the coefficients of Π_l (1 − r_l + r_l x). Numbers of layers above the
    largest measured are left out.
    """
    sums = run.tokens.clustered()
    independent_M = np.ones(1)
    for r in sums.rates_by_layer():
        independent_M = np.convolve(independent_M, [1 - r, r])
    tokens_M = sums.tokens_M
    return {
        "layers": list(range(len(tokens_M))),
        "tokens": tokens_M.tolist(),
        "shares": (tokens_M / tokens_M.sum()).tolist(),
        "independent": independent_M[: len(tokens_M)].tolist(),
    }


def interval(row: Entry, form: Format) -> str:
    """'1.2% (1% to 1.4%)'; no interval with few prompts, or where none or all were counted."""
    if row["rate"] is None:
        return "not a number"
    if row["numerator"] == 0:
        return f"{form(0.0)} (none seen)"
    if row["prompts"] < MIN_PROMPTS:
        return f"{form(row['rate'])} ({plural(row['prompts'], 'prompt')}: too few for an interval)"
    if row["low"] is None:
        return f"{form(row['rate'])} (in all)"
    return f"{form(row['rate'])} ({form(row['low'])} to {form(row['high'])})"


def _bin(group: Any) -> str:
    low, high = (f"{x:,}" if isinstance(x, int) else number(x) for x in group)
    return low if low == high else f"{low} to {high}"


def _named(by: str, group: Any) -> str:
    if by == "prefix":
        return f"after {_bin(group)} mismatches"
    layers = _bin(group)
    if by == "context":
        return f"at positions {layers}"
    return f"that differ in {layers} layer{'s' * (layers != '1')}" if group[1] else "that agree"


def outer(rows: list[Entry]) -> tuple[Entry, Entry]:
    """The first group, and the last one that has an interval (else the last)."""
    known = [row for row in rows[1:] if row["low"] is not None]
    return rows[0], (known or rows)[-1]


def _within(end: Entry, rows: list[Entry]) -> Entry | None:
    """The first of ``rows`` whose group overlaps ``end``'s: each quantity has its own bins."""
    (low, high) = end["group"]
    return next((r for r in rows if r["group"][0] <= high and r["group"][1] >= low), None)


def _contrast(by: str) -> Callable[[Run, dict[str, list[Entry]]], str]:
    """Every quantity at the two ends of a grouping."""

    def says(run: Run, panels: dict[str, list[Entry]]) -> str:
        answers = [e for entries in panels.values() for e in entries if not e["floor"]]
        if not answers:
            return nothing(run, GROUPINGS[by][0])
        rows = answers[0]["rows"]
        first, last = outer(rows)
        groups = [
            f"{row['denominator']:,.0f} tokens {_named(by, row['group'])}" for row in (first, last)
        ]
        parts = []
        for entry in answers:
            quantity = entry["quantity"]
            if "_tail_" in quantity and not quantity.endswith("_1.1"):
                continue
            form = number if quantity == "gap" or quantity.startswith("gradient") else percent
            a, b = _within(first, entry["rows"]), _within(last, entry["rows"][::-1])
            texts = [interval(row, form) if row else "no such token" for row in (a, b)]
            both = texts[0] if a is b else " → ".join(texts)
            parts.append(f"{_WORDS.get(quantity, entry['label'])} {both}")
        if first is last:
            return f"{groups[0]}, and no others: {'; '.join(parts)}."
        return f"{groups[0]} → {groups[1]}: {'; '.join(parts)}."

    return says


def _says_where(run: Run, panels: dict[str, list[Entry]]) -> str:
    if not any(panels.values()):
        return nothing(run)
    parts = []
    for entries in panels.values():
        for entry in entries:
            if entry["floor"]:
                continue
            by, rows = entry["by"], entry["rows"]
            if by in ("layer", "token"):
                rows = sorted(rows, key=lambda row: row["rate"] or 0)
                name = "layer" if by == "layer" else "token id"
                ends = [f"{interval(row, percent)} at {row['group']}" for row in rows]
                if len(rows) > 1 and rows[-1]["numerator"]:
                    parts.append(f"by {name} from {ends[0]} to {ends[-1]}")
            elif len(rows) > 1:
                a, b = outer(rows)
                where = [row["group"] if by == "step" else _bin(row["group"]) for row in (a, b)]
                parts.append(
                    f"by {by} {interval(a, percent)} at {where[0]} and {interval(b, percent)} at "
                    f"{where[1]}{_apart(a, b)}"
                )
    total = next(e for entries in panels.values() for e in entries if not e["floor"])["rows"]
    differ, compared = (int(sum(row[k] for row in total)) for k in ("numerator", "denominator"))
    if not differ:
        return f"0 of {compared:,} (token, layer) pairs compared differ."
    share = percent(differ / compared)
    parts.insert(0, f"{differ:,} of {compared:,} (token, layer) pairs differ, {share}")
    return f"{'; '.join(parts)}."


def separate(a: Entry, b: Entry) -> bool | None:
    """Whether two intervals lie apart; None unless there are two: without events there is none."""
    if not (a["numerator"] and b["numerator"]) or None in (a["low"], b["low"]):
        return None
    return a["high"] < b["low"] or b["high"] < a["low"]


def _apart(a: Entry, b: Entry) -> str:
    found = separate(a, b)
    texts = {True: ": the intervals lie apart", False: ": the intervals overlap", None: ""}
    return texts[found]


def _by_sign(run: Run, entries: list[Entry]) -> str:
    if not entries:
        return nothing(run)
    parts = []
    for entry in entries:
        rows = {row["group"]: row for row in entry["rows"]}
        if not {"positive", "negative"} <= rows.keys():
            return f"there are only tokens of {' and '.join(rows)} advantage."
        a, b = rows["positive"], rows["negative"]
        both = f"{interval(a, percent)} against {interval(b, percent)}"
        parts.append(f"{entry['label']}, {both}{_apart(a, b)}")
    return f"positive against negative tokens. {'. '.join(p[0].upper() + p[1:] for p in parts)}."


_TAILS = ("1.1", "1.5", "2", "5")
_WORDS = {"gap_tail_1.1": "gap beyond 1.1×", "ratio_tail_1.1": "ratio beyond 1.1×"}
_WORDS |= {"clipped": "clipped"}
_WORDS |= {f"gradient_weight_{s}": f"gradient weight of A {c} 0" for s, c in _SIGNS}


def _consequences(by: str) -> tuple[Answers, ...]:
    """Possible consequences of mismatches: the gap, the ratio, clipping, and gradient weights."""
    return (
        Answers(
            key=f"gap_by_{by}",
            title="mean |gap|, nats",
            quantities=(("gap", "mean |gap|"),),
            by=by,
            floor="logp_mean_abs",
        ),
        Answers(
            key=f"gap_tails_by_{by}",
            title="tails of the gap",
            quantities=tuple((f"gap_tail_{tau}", f"> {tau}×") for tau in _TAILS),
            by=by,
            is_share=True,
        ),
        Answers(
            key=f"ratio_tails_by_{by}",
            title="tails of the importance ratio",
            quantities=tuple((f"ratio_tail_{tau}", f"> {tau}×") for tau in _TAILS),
            by=by,
            is_share=True,
        ),
        Answers(
            key=f"clipped_by_{by}",
            title="clip fraction",
            quantities=(("clipped", "clipped"),),
            by=by,
            is_share=True,
        ),
        Answers(
            key=f"gradient_weight_by_{by}",
            title="mean gradient weight of each branch",
            quantities=tuple(
                (f"gradient_weight_{sign}", f"advantage {compares} 0") for sign, compares in _SIGNS
            ),
            by=by,
        ),
    )


def _mismatch(by: str, title: str) -> Answers:
    return Answers(
        key=f"mismatch_by_{by}",
        title=title,
        quantities=(("mismatch", "routers"),),
        by=by,
        is_share=True,
        floor="router_rate",
    )


_READ_CONSEQUENCES = (
    "Gap tails: share of tokens that trainer, before its update, and engine give probabilities "
    "more than that factor apart, either way. Ratio tails: share whose ratio, trainer after the "
    "update to trainer before it, is further than that factor from 1. Clipped: the loss's rule "
    "took the gradient. Gradient weight: |A| times the loss's coefficient of ∇log π times its "
    "aggregation's weight."
)

TOKEN_FIGURES: list[Answers | Clustering | Panels] = [
    Panels(
        key="mismatch_where",
        title="Where routers differ, free-running",
        parts=(
            _mismatch("layer", "by MoE layer"),
            _mismatch("step", "by step"),
            _mismatch("position", "by position in prompt and response"),
            _mismatch("margin", "by the token's smallest top-k margin"),
            _mismatch("token", "by token id, the most frequent first"),
            _mismatch("prefix", "by mismatches before the token"),
        ),
        read="Share of (token, layer) pairs that differ; a bar is the 95% interval, a mark of a "
        "bin holds about equally many tokens, a grey line is the larger noise floor of a side. A "
        "rise along position or prefix means that differences accumulate, or that later tokens "
        "are harder to route; a fall with the margin, that close calls flip.",
        says=_says_where,
    ),
    Panels(
        key="by_own",
        title="What goes with the token's own mismatches",
        parts=_consequences("own"),
        read="Tokens by the number of MoE layers in which they differ (bins double from 3 on). "
        f"{_READ_CONSEQUENCES} A slope shows where it happens, not what made it: such tokens are "
        "often uncertain ones too.",
        says=_contrast("own"),
    ),
    Panels(
        key="by_prefix",
        title="What goes with the mismatches before the token",
        parts=_consequences("prefix"),
        read="The same by the number of (token, layer) mismatches in all rows before, prompt "
        "included: attention carries earlier flips forward. A slope here and none above speaks for "
        "the context; but a longer prefix is also a later position.",
        says=_contrast("prefix"),
    ),
    Panels(
        key="by_context",
        title="Long contexts: gap and mismatch by position",
        parts=(
            Answers(
                key="gap_by_context",
                title="mean |gap|, nats",
                quantities=(("gap", "mean |gap|"),),
                by="context",
                floor="logp_mean_abs",
            ),
            _mismatch("context", "routers that differ"),
        ),
        read="By position in prompt and response, in bins that double up to 32,768. A rise says "
        "that differences pile up along the context, or that later tokens are harder to route.",
        says=_contrast("context"),
    ),
    Answers(
        key="by_sign",
        title="Positive against negative tokens",
        quantities=(
            ("mismatch_any", "differs in any layer"),
            ("gap_tail_1.1", "gap beyond 1.1×"),
            ("ratio_tail_1.1", "ratio beyond 1.1×"),
            ("clipped", "clipped"),
        ),
        by="sign",
        read="Share of the tokens with positive, negative and zero advantage that differ, lie in a "
        "tail or were clipped; bars are 95% intervals by prompt.",
        says=_by_sign,
        is_share=True,
    ),
    Clustering(
        key="clustering",
        title="Mismatched layers of a token, against independence",
        read="Share of tokens by the number of layers they differ in; hollow marks: independent "
        "layers of the same rates. Above them on the right, mismatches come together in tokens.",
    ),
]

# Every question of the figures and the opening, all answered together.
ASKED = [
    (name, part.by)
    for figure in TOKEN_FIGURES
    for part in getattr(figure, "parts", [figure])
    if isinstance(part, Answers)
    for name, _ in part.quantities
]
