"""The figures from the token log: questions with intervals by sequence, and clustering.

Shape suffixes: N rows (tokens), L MoE layers, M numbers of mismatched layers, 0..L.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_upgrpo.report.figures import Format, finite, number, percent
from moe_upgrpo.report.runs import Run
from moe_upgrpo.store import overlap_array
from moe_upgrpo.store.questions import clustering, rate

# Of sequences; the ends of a 95% interval are then the 12th smallest and largest.
RESAMPLES = 500
Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """`rate` of each of ``quantities`` (name, label) in the groups of ``by``.

    ``finding`` puts the entries of one run, which has some, into words.
    """

    key: str
    title: str
    quantities: tuple[tuple[str, str], ...]
    by: str
    read: str
    finding: Callable[[list[Entry]], str]
    is_share: bool = False

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        entries = []
        for run in runs:
            if run.tokens.table is None:
                continue
            dense = not run.tokens.layout.num_layers
            for name, label in self.quantities:
                if dense and (self.by == "own" or name.startswith("mismatch")):
                    continue
                rows = rate(run.tokens.table, name, by=self.by, resamples=RESAMPLES)
                answer = {"rows": [_finite(asdict(row)) for row in rows]}
                entries.append({"run": run.label, "quantity": name, "label": label} | answer)
        return entries

    def says(self, run: Run, entries: list[Entry]) -> str:
        return self.finding(entries) if entries else nothing(run)


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Tokens by their number of mismatched layers, against independent layers."""

    key: str
    title: str
    read: str

    def data(self, runs: Sequence[Run]) -> list[Entry]:
        return [
            {"run": run.label}
            | histogram(run)
            | {
                "clustering": [
                    _finite(asdict(row))
                    for row in clustering(run.tokens.table, resamples=RESAMPLES)
                ]
            }
            for run in runs
            if run.tokens.table is not None and run.tokens.layout.num_layers
        ]

    def says(self, run: Run, entries: list[Entry]) -> str:
        if not entries:
            return nothing(run)
        rows = {row["group"]: row for row in entries[0]["clustering"]}
        if not rows["any_layer"]["numerator"]:
            return "no token differs in any layer."
        text = (
            f"{interval(rows['any_layer'], percent)} of tokens differ in at least one layer, "
            f"{interval(rows['any_layer_independent'], percent)} if layers were independent"
        )
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


def nothing(run: Run) -> str:
    """Why a run has no entry."""
    return run.tokens.note if run.tokens.table is None else "the model has no MoE layer."


def histogram(run: Run) -> Entry:
    """Tokens with m mismatched layers, as found and for independent layers of the same rates.

    The independent share of m is that of a sum of L Bernoulli draws with the layers' rates r_l
    (Poisson binomial): the coefficients of Π_l (1 − r_l + r_l x). Numbers of layers beyond the
    largest found are left out.
    """
    table, layout = run.tokens.table, run.tokens.layout
    rates_L = (overlap_array(table) < layout.top_k).mean(axis=0)
    independent_M = np.ones(1)
    for r in rates_L:
        independent_M = np.convolve(independent_M, [1 - r, r])
    tokens_M = np.bincount(table["layers_mismatched"].to_numpy())
    return {
        "layers": list(range(len(tokens_M))),
        "tokens": tokens_M.tolist(),
        "shares": (tokens_M / table.num_rows).tolist(),
        "independent": independent_M[: len(tokens_M)].tolist(),
    }


def _finite(row: Entry) -> Entry:
    """An interval of a single sequence is null."""
    return {key: finite(value) for key, value in row.items()}


def interval(row: Entry, form: Format) -> str:
    """'1.2% (1% to 1.4%)'; without a second sequence, or anything seen, there is no interval."""
    if row["rate"] is None:
        return "not a number"
    if row["numerator"] == 0:
        return f"{form(0.0)} (none seen)"
    if row["low"] is None:
        return f"{form(row['rate'])} (one sequence, no interval)"
    return f"{form(row['rate'])} ({form(row['low'])} to {form(row['high'])})"


def _bin(group: Any) -> str:
    low, high = group
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _by_own(what: str, index: int, form: Format) -> Callable[[list[Entry]], str]:
    """What tokens have that agree everywhere, and those that differ in more and more layers."""

    def finding(entries: list[Entry]) -> str:
        rows = entries[index]["rows"]
        parts = []
        for row in [*rows[:2], rows[-1]] if len(rows) > 2 else rows:
            one = row["denominator"] == 1
            of = f"{row['denominator']:,.0f} token{'s' * (not one)} that"
            where = f"in {_bin(row['group'])}" if row["group"][1] else "in no layer"
            parts.append(f"{interval(row, form)} for the {of} differ{'s' * one} {where}")
        text = f"{what} is {', '.join(parts)}"
        return text + ("; there are no others." if len(rows) == 1 else ".")

    return finding


def _by_position(entries: list[Entry]) -> str:
    rows = entries[0]["rows"]
    if len(rows) == 1:
        return f"{interval(rows[0], percent)} of routers differ; all tokens are at one position."
    first, last = rows[0], rows[-1]
    return (
        f"{interval(first, percent)} of routers differ at position {_bin(first['group'])} and "
        f"{interval(last, percent)} at {_bin(last['group'])}{_apart(first, last)}."
    )


def _apart(a: Entry, b: Entry) -> str:
    """Whether two intervals overlap, where there are two: resampling makes none of no event."""
    if not (a["numerator"] and b["numerator"]) or None in (a["low"], b["low"]):
        return ""
    separate = a["high"] < b["low"] or b["high"] < a["low"]
    return ": the intervals lie apart" if separate else ": the intervals overlap"


def _by_sign(entries: list[Entry]) -> str:
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

TOKEN_FIGURES: list[Answers | Clustering] = [
    Answers(
        key="gap_by_own",
        title="Log-prob gap by the token's own mismatches",
        quantities=(("gap", "mean |gap|"),),
        by="own",
        read="Mean |gap| of tokens whose routes differ in that many MoE layers, in nats; bars are "
        "95% intervals by sequence. A slope shows where the gap is, not what made it: such tokens "
        "are often uncertain ones too.",
        finding=_by_own("mean |gap|", 0, number),
    ),
    Answers(
        key="gap_tails_by_own",
        title="Tails of the gap by the token's own mismatches",
        quantities=tuple((f"gap_tail_{tau}", f"> {tau}×") for tau in _TAILS),
        by="own",
        read="Share of tokens that trainer and engine, at equal weights, give probabilities more "
        "than that factor apart, either way.",
        finding=_by_own("the share beyond 1.1×", 0, percent),
        is_share=True,
    ),
    Answers(
        key="ratio_tails_by_own",
        title="Tails of the importance ratio by the token's own mismatches",
        quantities=tuple((f"ratio_tail_{tau}", f"> {tau}×") for tau in _TAILS),
        by="own",
        read="Share of tokens whose ratio, trainer after the update to trainer before it, is "
        "further than that factor from 1 at the last optimizer visit.",
        finding=_by_own("the share beyond 1.1×", 0, percent),
        is_share=True,
    ),
    Answers(
        key="mismatch_by_position",
        title="Routing mismatch by position",
        quantities=(("mismatch", "routers"), ("mismatch_any", "tokens, any layer")),
        by="position",
        read="Share of (token, layer) pairs and of tokens that differ, by the position in prompt "
        "and response; each mark holds about equally many tokens. A rise means that differences "
        "accumulate along the sequence, or that later tokens are harder to route.",
        finding=_by_position,
        is_share=True,
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
        "tail or were clipped; bars are 95% intervals by sequence.",
        finding=_by_sign,
        is_share=True,
    ),
    Clustering(
        key="clustering",
        title="Mismatched layers of a token, against independence",
        read="Share of tokens by the number of layers they differ in; hollow marks: independent "
        "layers of the same rates. Above them on the right, mismatches come together in tokens.",
    ),
]
