# SPDX-License-Identifier: Apache-2.0
"""Faults that log-probs alone show: another temperature, unit, token, truncation or weights.

Each takes an `Evidence` with the log-probs of both sides, and returns what it explains of the gap,
or None; see `faults.LOG_PROBS`. Differences are log p_train − log p_rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_upgrpo.tools.diagnose import matching
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding

LEAST_GAP = 1e-3
"""Mean |gap| in nats below which no fault is looked for: rounding is of this size."""
_LEAST = 0.6
_TO_TELL = 48  # the fewest tokens in which a fault is looked for
_CLOSE = 1e-6


def gaps(evidence: Evidence) -> list[np.ndarray]:
    """Differences at the response tokens, B × [T], without those where a side has no number."""
    return [d[np.isfinite(d)] for d in _differences(evidence)]


def _differences(evidence: Evidence) -> list[np.ndarray]:
    pairs = zip(evidence.logp_train, evidence.logp_rollout, strict=True)
    found = []
    for train, rollout in pairs:
        common = min(len(train), len(rollout))
        with np.errstate(invalid="ignore"):
            found.append(np.asarray(train[:common], float) - np.asarray(rollout[:common], float))
    return found


def mean_gap(evidence: Evidence) -> float:
    found = np.concatenate(gaps(evidence))
    return float(np.abs(found).mean()) if len(found) else 0.0


def _finding(
    evidence: Evidence, cause: str, after: Sequence[np.ndarray], done: str, *, least: float = _LEAST
) -> Finding | None:
    """The finding from the gap that remains after a change of one side; `after` holds absolute gaps
    for each sequence."""
    # Per token, because a shift leaves fewer of them.
    scale = [len(g) / max(len(x), 1) for g, x in zip(gaps(evidence), after, strict=True)]
    before = [float(np.abs(x).sum()) for x in gaps(evidence)]
    left = [float(x.sum()) * s for x, s in zip(after, scale, strict=True)]
    share = matching.explained(evidence, before, left)
    if share["share"] < least:
        return None
    tokens = sum(len(x) for x in gaps(evidence))
    said = f"{done}: mean |gap| {sum(before) / tokens:.3g} → {sum(left) / tokens:.3g} nats"
    return Finding(cause=cause, kind="fault", measure="gap", shown_by=said, **share)


def constant(evidence: Evidence) -> Finding | None:
    """A side whose log-probs are all the same number, such as 0: they were never written."""
    for side, who in (("logp_rollout", "engine"), ("logp_train", "trainer")):
        values = [np.asarray(x, float) for x in getattr(evidence, side)]
        flat = np.concatenate(values)
        flat = flat[np.isfinite(flat)]
        if len(flat) < 8:
            continue
        numbers, times = np.unique(flat, return_counts=True)
        value, share = numbers[times.argmax()], times.max() / len(flat)
        other = "logp_train" if side == "logp_rollout" else "logp_rollout"
        theirs = np.concatenate(
            [
                np.asarray(y[: len(x)], float)
                for x, y in zip(values, getattr(evidence, other), strict=True)
            ]
        )
        there = theirs[np.concatenate(values)[: len(theirs)] == value]
        there = there[np.isfinite(there)]
        # Tokens with equal contexts have equal log-probs, on the other side too.
        if share < 0.02 or len(there) < 8 or there.std() < 0.3 * np.nanstd(theirs):
            continue
        after = [
            np.where(v[: len(d)] == value, 0, np.abs(d))[np.isfinite(d)]
            for v, d in zip(values, _differences(evidence), strict=True)
        ]
        done = f"{share:.1%} of tokens left out whose log-prob of the {who} is {value:.3g}"
        if found := _finding(evidence, "constant-log-probs", after, done, least=0.1):
            return found
    return None


def shifted(evidence: Evidence) -> Finding | None:
    """Log-probs of the token before or after: shifted by one row they agree."""
    best = None
    for shift in (1, -1, 2, -2):
        after = []
        for train, rollout in zip(evidence.logp_train, evidence.logp_rollout, strict=True):
            t, r = np.asarray(train, float), np.asarray(rollout, float)
            t, r = (t[shift:], r) if shift > 0 else (t, r[-shift:])
            common = min(len(t), len(r))
            d = np.abs(t[:common] - r[:common])
            after.append(d[np.isfinite(d)])
        if sum(map(len, after)) < _TO_TELL:
            continue
        done = f"log-probs shifted by {shift:+d}"
        found = _finding(evidence, "log-probs-off-by-one", after, done)
        if found and (best is None or found.share > best.share):
            best = found
    return best


def _both(evidence: Evidence) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probs of trainer and engine where both are numbers below 0."""
    known = []
    for train, rollout in zip(evidence.logp_train, evidence.logp_rollout, strict=True):
        common = min(len(train), len(rollout))
        t, r = (np.asarray(x[:common], float) for x in (train, rollout))
        ok = np.isfinite(t) & np.isfinite(r)
        known.append((np.minimum(t[ok], 0), np.minimum(r[ok], 0)))
    return [t for t, _ in known], [r for _, r in known]


def unit(evidence: Evidence) -> Finding | None:
    """Log-probs that agree after a division: another base of the logarithm, or a mean of them."""
    train, rollout = _both(evidence)
    t, r = np.concatenate(train), np.concatenate(rollout)
    if len(t) < _TO_TELL or not (t @ t > 0 and r @ r > 0):
        return None
    factor = float(t @ r / (t @ t))
    if abs(np.log(abs(factor) or _CLOSE)) < 0.02:
        return None
    after = [np.abs(a - b / factor) for a, b in zip(train, rollout, strict=True)]
    base = next((n for n, b in (("2", 2), ("10", 10)) if abs(factor * np.log(b) - 1) < 0.02), None)
    what = f" (a logarithm to base {base})" if base else ""
    done = f"the engine's log-probs divided by {factor:.4g}{what}"
    return _finding(evidence, "log-prob-unit", after, done, least=0.7)


def temperature(evidence: Evidence) -> Finding | None:
    """Log-probs at another temperature: on the scale of log p − log(1 − p) they lie on a line.

    Logits divided by T divide log p_a − log p_b of any two tokens by T. Up to a constant, this also
    divides the log-odds of one token against the rest, where the rest are alike. The slope is
    1 / T, with T the engine's temperature if the trainer's log-probs are at temperature 1.
    """
    train, rollout = _both(evidence)
    t, r = np.concatenate(train), np.concatenate(rollout)
    x, y = _log_odds(t), _log_odds(r)
    if len(x) < _TO_TELL or x.std() == 0:
        return None
    weight = np.sqrt(np.clip(-np.expm1(t) * np.exp(t), 1e-6, None))
    if len(fitted := np.polyfit(x, y, 1, w=weight)) and not 0.05 < fitted[0] < 20:
        return None
    slope, constant = fitted
    if abs(np.log(slope)) < 0.05:
        return None
    after = [
        np.abs(a - _log_p((_log_odds(b) - constant) / slope))
        for a, b in zip(train, rollout, strict=True)
    ]
    relation = f"log-odds of the engine are {slope:.3g} times the trainer's"
    done = f"{relation}, as at a temperature {1 / slope:.3g} times the trainer's; taken out"
    return _finding(evidence, "other-temperature", after, done)


def _log_odds(logp: np.ndarray) -> np.ndarray:
    p = np.clip(np.exp(logp), 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def _log_p(log_odds: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -log_odds)


def truncated(evidence: Evidence) -> Finding | None:
    """Log-probs of a truncated distribution: one side's are never below the other's.

    top-p and top-k leave some tokens out and give their probability to the others, so the gap is
    the logarithm of the probability kept: between log p and 0, for top-p = p.
    """
    found = np.concatenate(gaps(evidence))
    if len(found) < 32:
        return None
    large = found[np.abs(found) > 0.5 * np.abs(found).mean()]
    # Positive: the trainer's log-probs are those of a truncated distribution.
    sign = 1.0 if np.median(large) > 0 else -1.0
    one_sided = float((sign * large > 0).mean())
    if len(large) < 16 or one_sided < 0.97:
        return None
    kept = float(np.exp(-np.quantile(sign * found, 0.99)))
    if kept < 0.3:
        return None
        # Rounding goes both ways: what lies beyond 0 is half of it.
    after = [np.where(sign * g < 0, 2 * np.abs(g), 0) for g in gaps(evidence)]
    done = (
        f"{one_sided:.1%} of the larger gaps have one sign and leave at least {kept:.2f} of the "
        f"probability to the {'trainer' if sign > 0 else 'engine'}, as top-p or top-k sampling "
        "does; taken out"
    )
    return _finding(evidence, "truncated-sampling", after, done)


def unrelated(evidence: Evidence) -> Finding | None:
    """Log-probs that are unrelated to each other: they belong to other tokens."""
    train, rollout = _both(evidence)
    t, r = np.concatenate(train), np.concatenate(rollout)
    if len(t) < 32 or t.std() == 0 or r.std() == 0:
        return None
    correlation = float(np.corrcoef(t, r)[0, 1])
    if correlation > 0.3:
        return None
    done = f"log-probs of the two sides have a correlation of {correlation:.2f} under no shift more"
    return Finding(cause="unrelated-tokens", kind="fault", share=1.0, measure="gap", shown_by=done)


def staleness(evidence: Evidence) -> Finding | None:
    """Tokens sampled with older weights, which have a larger gap than the others."""
    stale = evidence.columns.get("staleness")
    if stale is None:
        return None
    flat = np.concatenate(stale)
    if not (np.nan_to_num(flat) > 0).any():
        return None
    size = [np.abs(x) for x in _differences(evidence)]
    old = [np.nan_to_num(s) > 0 for s in stale]
    fresh_gap = [x[~o] for x, o in zip(size, old, strict=True)]
    steps = int(np.nanmax(flat))
    if not sum(map(len, fresh_gap)):
        said = f"all tokens are of weights {int(np.nanmin(flat[flat > 0]))} to {steps} steps old"
        return Finding(
            cause="stale-weights", kind="numerics", share=None, measure="gap", shown_by=said
        )
    level = float(np.nanmean(np.concatenate(fresh_gap)))
    after = [
        np.where(o, np.minimum(x, level), x)[np.isfinite(x)] for x, o in zip(size, old, strict=True)
    ]
    done = f"tokens up to {steps} steps stale taken as far apart as fresh ones"
    found = _finding(evidence, "stale-weights", after, done, least=0.2)
    return found
