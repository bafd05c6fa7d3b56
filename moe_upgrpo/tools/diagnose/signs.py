# SPDX-License-Identifier: Apache-2.0
"""Shares of a difference that are no fault: near ties, a side's own noise, arithmetic, an update.

They show in margins and in the columns of a token log, without a model. Each takes an `Evidence`
and returns its findings; None or nothing where the evidence does not tell.
"""

from __future__ import annotations

import numpy as np

from moe_upgrpo.tools.diagnose import matching
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding

_FLOORS = {
    "noise_engine_repeat": ("not-repeatable", "the same pass of the engine twice"),
    "noise_trainer_repeat": ("not-repeatable", "the same pass of the trainer twice"),
    "noise_engine_batch_shape": (
        "batch-shape",
        "the engine's sampling against one pass over the whole sequence",
    ),
    "noise_trainer_batch_shape": ("batch-shape", "the trainer's sequences in other batches"),
}
_TERMS = {
    "gap_numerics": ("arithmetic", "engine and trainer on the same experts"),
    "gap_staleness": ("stale-weights", "older weights against the ones of the update"),
    "gap_engine_routing": ("engine-routing", "the trainer on its own experts and the engine's"),
    "gap_update": ("update", "the weights after the update on the experts of before"),
    "gap_routing_shift": ("routing-shift", "the experts after the update on its weights"),
}
_LARGE = 0.3
"""If near ties explain less than this part, margins show that rounding is not the only cause."""


def numerics(evidence: Evidence) -> list[Finding]:
    """Causes that are no faults, the largest share of each measure first."""
    found = [near_ties(evidence), carried_on(evidence), *floors(evidence), *terms(evidence)]
    known = [one for one in found if one is not None]
    return sorted(known, key=lambda one: (one.measure != "routers", -(one.share or 0)))


def near_ties(evidence: Evidence) -> Finding | None:
    """Mismatches at small margins: how many more there are than at margins above the median.

    Rounding exchanges experts that nearly tie; a fault does so at any margin.
    """
    read = _margins(evidence)
    if read is None:
        return None
    margins, differ = read
    median = float(np.median(np.concatenate([x.ravel() for x in margins])))
    before = [float(x.sum()) for x in differ]
    # As many as there would be if all margins were like those above the median.
    after = [2.0 * float((d & (m > median)).sum()) for d, m in zip(differ, margins, strict=True)]
    if not sum(before):
        return None
    share = matching.explained(evidence, before, after)
    low = 1 - sum(after) / 2 / sum(before)
    tied = sum(int((d & (m == 0)).sum()) for d, m in zip(differ, margins, strict=True))
    ties = f", {tied:,} of them exact ties" if tied else ""
    cause = "top-k-ties" if tied > 0.5 * sum(before) else "near-ties"
    unit = "tokens" if evidence.margins is None else "routers"
    said = f"{low:.1%} of the {unit} that differ lie at margins below the median{ties}"
    return Finding(cause=cause, kind="numerics", measure="routers", shown_by=said, **share)


def _margins(evidence: Evidence) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Margins and where the sets differ, by router, or by token with its smallest margin."""
    if evidence.margins is not None and evidence.rollout_routes and matching.fit(evidence):
        differ = matching.differing(evidence)
        margins = [
            np.asarray(m)[rows][: len(d)]
            for m, rows, d in zip(evidence.margins, evidence.response, differ, strict=True)
        ]
        if all(m.shape == d.shape for m, d in zip(margins, differ, strict=True)):
            return margins, differ
        return None
    smallest, layers = (evidence.columns.get(n) for n in ("margin_min", "layers_mismatched"))
    if smallest is None or layers is None:
        return None
    known = [np.isfinite(m) for m in smallest]
    if not any(k.any() for k in known):
        return None
    return (
        [m[k] for m, k in zip(smallest, known, strict=True)],
        [x[k] > 0 for x, k in zip(layers, known, strict=True)],
    )


def large_margins(evidence: Evidence, rate: float) -> Finding | None:
    """A fault without a name: experts are exchanged at any margin, which rounding does not do.

    Each router's own margin tells it: with many layers, a token's smallest margin says little.
    """
    found = None if evidence.margins is None else near_ties(evidence)
    if found is None or rate < 0.05 or found.share is None or found.share >= _LARGE:
        return None
    return Finding(
        cause="not-rounding", kind="fault", share=None, measure="routers", shown_by=found.shown_by
    )


def carried_on(evidence: Evidence) -> Finding | None:
    """Mismatches that vanish in a pass with the engine's experts: earlier flips passed on."""
    found = _paired(evidence, "layers_mismatched_conditional")
    if found is None:
        return None
    layers, own = found
    before, after = (
        _sums(layers),
        _sums([np.minimum(a, b) for a, b in zip(own, layers, strict=True)]),
    )
    if not sum(before):
        return None
    share = matching.explained(evidence, before, after)
    said = (
        f"held to the engine's experts in the layers before, {sum(after):,.0f} of "
        f"{sum(before):,.0f} routers still choose others"
    )
    return Finding(cause="carried-on", kind="numerics", measure="routers", shown_by=said, **share)


def floors(evidence: Evidence) -> list[Finding]:
    """Share of the mismatch that a side also has with itself."""
    found = []
    for name, (cause, done) in _FLOORS.items():
        pair = _paired(evidence, name)
        if pair is None:
            continue
        before, own = (_sums(x) for x in pair)
        if not sum(before) or not sum(own):
            continue
        after = [max(b - o, 0) for b, o in zip(before, own, strict=True)]
        share = matching.explained(evidence, before, after)
        said = f"{done}: {sum(own):,.0f} routers differ, of {sum(before):,.0f} between the sides"
        found.append(
            Finding(cause=cause, kind="numerics", measure="routers", shown_by=said, **share)
        )
    return found


def terms(evidence: Evidence) -> list[Finding]:
    """Share of each term of the decomposition in everything that moves the log-prob gap."""
    known = {n: evidence.columns[n] for n in _TERMS if n in evidence.columns}
    flat = {n: np.concatenate(x) for n, x in known.items()}
    known = {n: x for n, x in known.items() if np.isfinite(flat[n]).any()}
    if len(known) < 2:
        return []
    size = {n: [float(np.nansum(np.abs(x))) for x in of] for n, of in known.items()}
    whole = [sum(values) for values in zip(*size.values(), strict=True)]
    if not sum(whole):
        return []
    found = []
    for name, sums in size.items():
        cause, done = _TERMS[name]
        without = [w - s for w, s in zip(whole, sums, strict=True)]
        mean = float(np.nanmean(np.abs(flat[name])))
        said = f"{done}: {mean:.3g} nats in the mean"
        share = matching.explained(evidence, whole, without)
        found.append(Finding(cause=cause, kind="numerics", measure="gap", shown_by=said, **share))
    return found


def replay_unused(evidence: Evidence, replay: str) -> Finding | None:
    """A replay of the engine's routes that changes no log-prob although routers differ."""
    name = "counterfactual_engine_routing"
    pair = _paired(evidence, name)
    if replay != "R3" or pair is None:
        return None
    layers, moved = pair
    differ = sum(_sums(layers))
    if differ < 10 or any(np.any(x != 0) for x in moved):
        return None
    said = f"{differ:,.0f} routers differ, and held to the engine's experts no log-prob changes"
    return Finding(cause="replay-not-used", kind="fault", share=None, measure="gap", shown_by=said)


def _paired(evidence: Evidence, name: str) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Mismatched layers and another column, at the tokens that have both."""
    layers, other = evidence.columns.get("layers_mismatched"), evidence.columns.get(name)
    if layers is None or other is None:
        return None
    known = [np.isfinite(a) & np.isfinite(b) for a, b in zip(layers, other, strict=True)]
    if not any(k.any() for k in known):
        return None
    return (
        [x[k] for x, k in zip(layers, known, strict=True)],
        [x[k] for x, k in zip(other, known, strict=True)],
    )


def _sums(values: list[np.ndarray]) -> list[float]:
    return [float(x.sum()) for x in values]
