# SPDX-License-Identifier: Apache-2.0
"""The answer that opens a report and ends a probe: is routing to blame, where, and does it matter.

Three sentences about one run, each with a verdict of a few words, its numbers and their intervals.
"""

from dataclasses import dataclass

import numpy as np

from moe_upgrpo.report.answers import interval, outer, separate
from moe_upgrpo.report.figures import Entry, number, percent, plural
from moe_upgrpo.report.floors import against_floor
from moe_upgrpo.report.notes import alarms, last_seen
from moe_upgrpo.report.runs import Run

# KL(rollout ‖ trainer) per token: values published for MoE models, and where an alarm rings.
USUAL_KL, LARGE_KL = 1e-3, 0.1

ASKED = [
    (name, "all")
    for name in (
        "mismatch",
        "mismatch_any",
        "gap_tail_2",
        "gap_numerics_abs",
        "gap_engine_routing_abs",
        "counterfactual_engine_routing_abs",
    )
]

READ = (
    "Routing is to blame where more routers differ than within either side (the noise floor; a "
    "paired test that flips signs by prompt, p below .01), in "
    "part where arithmetic moves the log-prob of a token more than the engine's other experts do, "
    "mostly where less. It matters hardly up to a KL of "
    f"{USUAL_KL:g} per token between engine and trainer, which is what is published for MoE "
    f"models, somewhat up to {LARGE_KL:g}, and beyond that much. Intervals are 95%. Whether "
    "training would end elsewhere without the mismatch no single run can say: run it again with "
    "--replay R3 and compare."
)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """``verdict`` answers ``question`` in a few words; ``text`` gives the numbers behind it."""

    question: str
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.question} {self.verdict}: {self.text}"


def opening(run: Run) -> list[Sentence]:
    """Answers to the three questions, in their order, for any run that has metrics."""
    asked = (
        ("Is routing to blame?", _blame),
        ("Where?", _where),
        ("Does it matter?", _matter),
    )
    sentences = []
    for question, answer in asked:
        verdict, text = answer(run)
        sentences.append(Sentence(question=question, verdict=verdict, text=f"{text}."))
    return sentences


def _rate(run: Run, quantity: str, metric: str | None, form=percent) -> str | None:
    """A rate of all tokens with its interval, or from the metrics without one; None if neither."""
    if isinstance(rows := run.tokens.ask(quantity), list):
        return interval(rows[0], form)
    value = run.pooled(metric) if metric else None
    return None if value is None else f"{form(value)} (no token log, no interval)"


def _value(run: Run, quantity: str, metric: str) -> float | None:
    if isinstance(rows := run.tokens.ask(quantity), list):
        return rows[0]["rate"]
    return run.pooled(metric)


def _differ(run: Run) -> float | None:
    return run.pooled("mismatch/router_rate")


def _blame(run: Run) -> tuple[str, str]:
    if run.is_dense:
        return "No", "the model has no MoE layer, so that nothing in it is routed"
    if _differ(run) is None:
        return "Not known", "no routes were compared"
    if _differ(run) == 0:
        compared = sum(row.get("mismatch/router_denominator") or 0 for row in run.rows)
        of = f"0 of {compared:,.0f}" if compared else "none of the"
        return "No", f"{of} (token, layer) pairs differ between engine and trainer"
    rate = f"{_rate(run, 'mismatch', 'mismatch/router_rate')} of routers differ"
    found = against_floor(run)
    if found.standing == "stale":
        return "Not told apart", f"{rate}, with an update of the weights between the two sides"
    if found.standing == "below":
        own = f"no more than a side differs from itself ({percent(found.floor)})"
        return "No", f"{rate}, on the analysed steps {percent(found.rate)}: {own}"
    verdict, parts = _parts(run)
    if found.standing == "unmeasured":
        return (verdict or "Not known"), f"{rate}; no noise floor was measured{parts}"
    if found.standing in ("few", "untold"):
        both = f"the noise floor ({percent(found.rate)} against {percent(found.floor)}"
        if found.standing == "few":
            why = f"too few prompts ({found.prompts}) to tell them from {both})"
        else:
            why = f"they cannot be told from {both}; more {found.seen}; {found.flips})"
        return "Not shown", f"{rate}, but at the analysed steps {why}"
    rate += f", {found.times} the noise floor of {percent(found.floor)}"
    if found.standing == "untested":
        rate += ", which no token rows test by prompt"
        return (verdict if run.replay == "R3" and verdict else "Possibly"), f"{rate}{parts}"
    return (verdict or "Possibly"), f"{rate} ({found.flips}){parts}"


def _parts(run: Run) -> tuple[str, str]:
    """Share of the gap due to the engine's other experts: a verdict, if any, and the numbers."""
    kind = "counterfactual" if run.replay == "R3" else "gap"
    names = (f"{kind}_engine_routing", "gap_numerics")
    metrics = [f"{name.replace('_', '/', 1)}/mean_abs" for name in names]
    pairs = list(zip(names, metrics, strict=True))
    routing, numerics = (_value(run, f"{name}_abs", metric) for name, metric in pairs)
    if routing is None or numerics is None:
        return "", "; the log-prob gap was not taken apart, so how much of it is theirs is open"
    shown = [_rate(run, f"{name}_abs", metric, number) for name, metric in pairs]
    text = (
        f"; they move a token's log-prob by {shown[0]} nats in the mean, arithmetic by {shown[1]}"
    )
    if run.replay == "R3":
        return "Not under R3", f"{text}, of which the loss sees the second alone"
    return ("Mostly" if routing >= numerics else "In part"), text


def _where(run: Run) -> tuple[str, str]:
    if run.is_dense or _differ(run) is None:
        return "Not known" if not run.is_dense else "Nowhere", "there is no routing to look at"
    if _differ(run) == 0:
        return "Nowhere", "no layer differs"
    verdict, text = _layers(run)
    parts = [text] if text else []
    if share := _rate(run, "mismatch_any", "mismatch/token_any_rate"):
        parts.append(f"{share} of tokens differ in at least one layer")
    if isinstance(rows := run.tokens.ask("mismatch", "position"), list) and len(rows) > 1:
        a, b = outer(rows)
        if separate(a, b):
            first, last = (percent(row["rate"]) for row in (a, b))
            more = "more" if b["rate"] > a["rate"] else "fewer"
            parts.append(f"{more} at late positions ({first} at the first, {last} at the last)")
    return verdict, "; ".join(parts)


def _layers(run: Run) -> tuple[str, str]:
    """The layers with the most and the fewest mismatches, with intervals where there are rows."""
    if isinstance(rows := run.tokens.ask("mismatch", "layer"), list):
        pass
    elif (rates := run.pooled_by_layer("mismatch/by_layer")) is not None:
        ids = run.layer_ids(len(rates))
        rows = [{"group": i, "rate": float(r)} for i, r in zip(ids, rates, strict=True)]
    else:
        return "Not known", "its rates by layer were not logged"
    rows = [row for row in rows if row["rate"] is not None]
    if not rows:
        return "Not known", "its rates by layer are not numbers"
    if len(rows) == 1:
        return f"Layer {rows[0]['group']}", "it is the only MoE layer"
    ordered = sorted(rows, key=lambda row: -row["rate"])
    top, low = ordered[0], ordered[-1]
    shown = [interval(r, percent) if "low" in r else percent(r["rate"]) for r in (top, low)]
    text = f"layer {top['group']} differs most, {shown[0]}, layer {low['group']} least, {shown[1]}"
    rates = np.array([row["rate"] for row in ordered])
    worst = int((rates.cumsum() < rates.sum() / 2).sum()) + 1
    if len(rows) > 4 and worst <= len(rows) / 4:
        names = ", ".join(str(row["group"]) for row in ordered[:worst][:6])
        kind = f"In {worst} of {len(rows)} layers"
        return kind, f"half of all mismatches are in layers {names}; {text}"
    if "low" in top and (apart := separate(top, low)) is not True:
        # Without an interval for either, as where no mismatch occurred, nothing was compared.
        return "Not told apart" if apart is None else "In all layers alike", text
    return f"Most in layer {top['group']}", text


def _matter(run: Run) -> tuple[str, str]:
    kl = run.pooled("logp_gap/k3")
    # The store has null for what was not a number, and a mean of the other steps would hide it.
    lost = sum(row.get("logp_gap/k3", 0.0) is None for row in run.rows)
    if kl is None and lost:
        return "Not known", f"KL between engine and trainer is no number, at {plural(lost, 'step')}"
    if kl is None:
        return "Not known", "no log-probs were compared, so what mismatches do is not measured"
    verdict = "Hardly" if kl <= USUAL_KL else "Somewhat" if kl <= LARGE_KL else "Much"
    parts = [f"KL between engine and trainer is {number(kl)} per token"]
    if lost:
        verdict = "Much"
        parts[0] += f", and no number at {plural(lost, 'step')}"
    if beyond := _rate(run, "gap_tail_2", None):
        parts.append(f"{beyond} of tokens have probabilities more than 2× apart")
    if text := _consequence(run):
        parts.append(text)
    if loud := [f"{alarm['name']}{last_seen(alarm)}" for alarm in alarms(run)]:
        parts.append(f"alarms rang: {', '.join(loud)}")
    return verdict, "; ".join(parts)


def _consequence(run: Run) -> str:
    """The gap of tokens whose routers differ against that of tokens whose routers agree."""
    rows: list[Entry] | str = run.tokens.ask("gap", "own")
    if not isinstance(rows, list) or len(rows) < 2 or rows[0]["group"][1] != 0:
        return ""
    known = [row for row in rows[1:] if row["rate"] is not None]
    if not known or rows[0]["rate"] is None:
        return ""
    most = max(known, key=lambda row: row["denominator"])
    first, last = most["group"]
    layers = f"{first} layer differs" if last == 1 else f"{first} to {last} layers differ"
    layers = f"{first} layers differ" if first == last > 1 else layers
    return (
        f"mean |gap| is {interval(most, number)} where {layers} and "
        f"{interval(rows[0], number)} where none does"
    )
