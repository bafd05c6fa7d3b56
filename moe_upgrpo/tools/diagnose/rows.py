# SPDX-License-Identifier: Apache-2.0
"""Faults of rows: at the wrong token, in the wrong sequence, never written, written again.

Each takes an `Evidence` whose sides fit, and returns what it explains, or None; see
`faults.ROUTES`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_upgrpo.routing.sets import ascending, unequal
from moe_upgrpo.tools.diagnose import matching
from moe_upgrpo.tools.diagnose.evidence import Evidence
from moe_upgrpo.tools.diagnose.matching import Explained, empty, unlike

SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_PAIRED = 256  # with up to so many sequences, each is compared with each other


def padding_side(evidence: Evidence) -> Explained | None:
    """Empty rows at the beginning on one side and at the end on the other."""
    rollout, train, moved = [], [], 0
    for a, b in zip(evidence.rollout_routes, evidence.train_routes, strict=True):
        ends = [_filled(x) for x in (a, b)]
        (first_a, last_a), (first_b, last_b) = ends
        opposite = len(a) == len(b) and last_a - first_a == last_b - first_b < len(a)
        if opposite and first_a != first_b:
            moved += 1
            a, b = a[first_a:last_a], b[first_b:last_b]
        rollout.append(a)
        train.append(b)
    if not moved:
        return None
    mended = replace(
        evidence,
        rollout_routes=rollout,
        train_routes=train,
        response=[
            rows if len(now) == len(then) else slice(0, len(now))
            for rows, now, then in zip(
                evidence.response, rollout, evidence.rollout_routes, strict=True
            )
        ],
        margins=None,
        left_out=None,
    )
    return matching.explains(
        evidence,
        mended,
        cause="padding-side",
        shown_by=f"the padding of {moved} of {len(rollout)} sequences taken from either end",
    )


def _filled(routes: np.ndarray) -> tuple[int, int]:
    """First row that is not empty throughout, and the one after the last such row."""
    rows = (~empty(routes).all(axis=1)).nonzero()[0]
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, len(routes))


def zero_rows(evidence: Evidence) -> Explained | None:
    """Rows that one side never wrote although the other did."""
    lost, sizes = [], [0, 0]
    for a, b in zip(evidence.rollout_routes, evidence.train_routes, strict=True):
        common = min(len(a), len(b))
        both = [empty(x[:common]) for x in (a, b)]
        sizes[0] += int((both[0] & ~both[1]).sum())
        sizes[1] += int((both[1] & ~both[0]).sum())
        marked = np.zeros(a.shape[:2], bool)
        marked[:common] = both[0] | both[1]
        lost.append(marked)
    if evidence.rollout_routes[0].shape[-1] == 1 and not any(sizes):
        return _zeros_of_top_1(evidence)
    mended = matching.leave_out(evidence, lost)
    if not any(sizes) or not any(x.any() for x in matching.differing(evidence)):
        return None
    who = "engine" if sizes[0] >= sizes[1] else "trainer"
    done = f"{sum(sizes):,} routers left out whose rows the {who} never wrote"
    return matching.explains(evidence, mended, cause="zero-filled-rows", shown_by=done, least=1e-9)


def _zeros_of_top_1(evidence: Evidence) -> Explained | None:
    """Tokens that one side sends to expert 0 in all layers, or layers that send all tokens there,
    much more often than the other does."""
    for side, other in (("rollout_routes", "train_routes"), ("train_routes", "rollout_routes")):
        mine, theirs = ([x[..., 0] == 0 for x in getattr(evidence, s)] for s in (side, other))
        marks = []
        if mine[0].shape[1] > 2:
            tokens = [[x.all(axis=1) for x in of] for of in (mine, theirs)]
            n, m = (sum(int(x.sum()) for x in of) for of in tokens)
            if n >= 5 and n > 5 * m + 0.005 * sum(map(len, tokens[0])):
                marks = [
                    np.repeat(x[:, None], y.shape[1], 1)
                    for x, y in zip(tokens[0], mine, strict=True)
                ]
        if not marks:
            shares = [np.concatenate(of).mean(axis=0) for of in (mine, theirs)]
            layers = (shares[0] > 0.99) & (shares[1] < 0.9)
            marks = [np.broadcast_to(layers, x.shape).copy() for x in mine] if layers.any() else []
        if marks:
            who = "engine" if side == "rollout_routes" else "trainer"
            return matching.explains(
                evidence,
                matching.leave_out(evidence, marks),
                cause="zero-filled-rows",
                shown_by=f"tokens and layers left out that the {who} sends to expert 0 throughout",
                least=0.02,
            )
    return None


def row_shift(evidence: Evidence) -> Explained | None:
    """Rows at the wrong token: all of them, those of some sequences, or from some row on."""
    shifted = [_shifted(evidence, i) for i in range(len(evidence.response))]
    moved = [shift for *_, shift, _ in shifted if shift]
    if not moved:
        return None
    mended = replace(
        evidence,
        rollout_routes=[x[0] for x in shifted],
        train_routes=[x[1] for x in shifted],
        response=[slice(0, len(x[0])) for x in shifted],
        left_out=[x[2] for x in shifted],
        margins=None,
    )
    values, times = np.unique(moved, return_counts=True)
    usual = int(values[times.argmax()])
    late = sum(start > 0 for *_, shift, start in shifted if shift)
    told = sum(shift is not None for *_, shift, _ in shifted)
    # With few rows, those from a later one on may agree better by chance.
    whole = sum(shift == usual and start == 0 for *_, shift, start in shifted)
    everywhere = whole >= 0.8 * told
    which = "rows" if everywhere else f"rows of {len(moved)} of {told} sequences"
    if late and not everywhere:
        which += ", some from a later row on,"
    cause = "row-off-by-one" if everywhere and abs(usual) == 1 else "rows-shifted"
    cause = cause if everywhere else "rows-of-some-sequences-shifted"
    return matching.explains(
        evidence, mended, cause=cause, shown_by=f"{which} shifted by {usual:+d}", least=0.1
    )


def _shifted(evidence: Evidence, i: int) -> tuple:
    """The shift of a sequence, and its first shifted row, that make most sets agree.

    Returns both sides' response rows, the routers left out, the shift (0: none; None: too short to
    tell) and the row where it begins.
    """
    pair = evidence.rollout_routes[i], evidence.train_routes[i]
    common = min(map(len, pair))
    rows = evidence.response[i]
    start, stop, _ = rows.indices(common)
    a, b = (ascending(x) for x in pair)
    whole = np.zeros(a.shape[:2], bool) if evidence.left_out is None else evidence.left_out[i]
    plain = a[start:stop], b[start:stop], whole[start:stop], 0, 0
    T = stop - start
    now_T = (unlike(*plain[:2]) & ~plain[2]).sum(axis=1)
    if T < 4:
        return *plain[:3], None, 0  # too short to tell
    if now_T.mean() < 0.2 * a.shape[1]:
        return plain
    best, found = 0.5 * now_T.sum(), plain
    for shift in SHIFTS:
        at = np.arange(start, stop) + shift
        inside = (at >= 0) & (at < len(b))
        moved = b[np.clip(at, 0, len(b) - 1)]
        then_TL = unlike(plain[0], moved) & ~plain[2]
        then_T = np.where(inside, then_TL.sum(axis=1), now_T.mean())
        # Rows before `first` stay; those from it on are shifted.
        cost = np.concatenate([[0], now_T.cumsum()]) + np.concatenate(
            [then_T[::-1].cumsum()[::-1], [0]]
        )
        first = 0 if cost[0] <= cost.min() + 0.02 * now_T.sum() else int(cost.argmin())
        if cost[first] < best and T - first >= 4:
            best = cost[first]
            later = np.arange(T) >= first
            train = np.where(later[:, None, None], moved, plain[1])
            unknown = plain[2] | (later & ~inside)[:, None]
            found = plain[0], train, unknown, shift, first
    return found


def pairing(evidence: Evidence) -> Explained | None:
    """Routes of another sequence: each side's sequences are matched by their sets."""
    pairs = matching.sides(evidence)
    # Short sequences hardly tell which is which.
    long = [i for i, pair in enumerate(pairs) if min(map(len, pair)) >= 4][:_PAIRED]
    B = len(long)
    if B < 2 or matching.rate(evidence) < 0.05:
        return None
    rows = min(48, min(len(pairs[i][0]) for i in long))
    layers = np.unique(np.linspace(0, pairs[0][0].shape[1] - 1, 4).astype(int))
    rollout, train = (np.stack([pairs[i][side][:rows][:, layers] for i in long]) for side in (0, 1))
    cost = np.array([unequal(r, train).mean(axis=(1, 2)) for r in rollout])
    # Where sequences match equally well, such as equal responses, each keeps its own.
    cost[np.arange(B), np.arange(B)] -= 1e-6
    _, assigned = linear_sum_assignment(cost)
    moved = [i for i in range(B) if cost[i, assigned[i]] < 0.5 * cost[i, i]]
    if not moved:
        return None
    a, b = list(evidence.rollout_routes), list(evidence.train_routes)
    response = list(evidence.response)
    for i in moved:
        mine, theirs = pairs[long[i]][0], pairs[long[assigned[i]]][1]
        common = min(len(mine), len(theirs))
        at = long[i]
        a[at], b[at], response[at] = mine[:common], theirs[:common], slice(0, common)
    left_out = [np.zeros(x.shape[:2], bool) for x in a]
    mended = replace(
        evidence, rollout_routes=a, train_routes=b, response=response, left_out=left_out,
        margins=None,
    )  # fmt: skip
    first = moved[0]
    done = (
        f"{len(moved)} of {B} sequences held against another one's routes (sequence "
        f"{long[first]} against {long[assigned[first]]})"
    )
    return matching.explains(evidence, mended, cause="wrong-pairing", shown_by=done, least=0.1)


def repeated(evidence: Evidence) -> Explained | None:
    """Rows that repeat the previous token's or another sequence's while the other side's do not."""
    for side, who in ((0, "engine"), (1, "trainer")):
        tokens, marks = _repeated_tokens(evidence, side)
        sequences, more = _repeated_sequences(evidence, side)
        if not tokens and not sequences:
            continue
        mended = matching.without_tokens(
            evidence, [a | b for a, b in zip(marks, more, strict=True)]
        )
        parts = [f"{tokens:,} tokens left out whose rows of the {who} are the last's"] * bool(
            tokens
        )
        parts += [
            f"{sequences} sequences left out that hold the {who}'s rows of the one before"
        ] * bool(sequences)
        found = matching.explains(
            evidence, mended, cause="repeated-rows", shown_by=", ".join(parts), least=0.05
        )
        if found:
            return found
    return None


def _repeated_tokens(evidence: Evidence, side: int) -> tuple[int, list[np.ndarray]]:
    """Tokens that repeat the row before, where that row matches the other side's previous row and
    not its current one; none where this is rare, or no rarer with the sides exchanged.

    In text that repeats itself, the row also matches the current one.
    """
    pairs = matching.sides(evidence)
    marks = [_again(pair[side], pair[1 - side]) for pair in pairs]
    stale, control = (
        sum(int(x.sum()) for x in found)
        for found in (marks, [_again(pair[1 - side], pair[side]) for pair in pairs])
    )
    if stale < 8 or stale < 0.01 * sum(map(len, marks)) or stale <= 4 * control:
        return 0, [x & False for x in marks]
    return stale, marks


def _again(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Tokens that repeat the row before while the other side has moved on [T]."""
    again = np.zeros(len(mine), bool)
    again[1:] = ~unlike(mine[1:], mine[:-1]).any(axis=1)
    # A run of equal rows comes from its first token.
    source = np.maximum.accumulate(np.where(again, 0, np.arange(len(mine))))
    own, first = (unlike(mine, x).mean(axis=1) for x in (theirs, theirs[source]))
    return again & (own >= 0.5) & (first <= 0.5 * own)


def _repeated_sequences(evidence: Evidence, side: int) -> tuple[int, list[np.ndarray]]:
    """Whole sequences that hold the previous sequence's rows, while the other side's do not."""
    pairs = matching.sides(evidence)
    marks = [np.zeros(len(a), bool) for a, _ in pairs]
    for i in range(1, len(pairs)):
        common = min(len(pairs[i][0]), len(pairs[i - 1][0]))
        if common < 4:
            continue
        mine, theirs = pairs[i][side][:common], pairs[i][1 - side][:common]
        before = [pairs[i - 1][s][:common] for s in (side, 1 - side)]
        own, first = (float(unlike(mine, x).mean()) for x in (theirs, before[1]))
        marks[i][:common] = not unlike(mine, before[0]).any() and own > 0.3 and first < 0.5 * own
    return sum(bool(x.any()) for x in marks), marks
