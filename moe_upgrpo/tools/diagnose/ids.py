# SPDX-License-Identifier: Apache-2.0
"""Faults of ids, and routes that no change brings to agree: other tokens' or other weights'.

Each takes an `Evidence` whose sides fit, and returns what it explains, or None; see
`faults.ROUTES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_upgrpo.routing.sets import ascending
from moe_upgrpo.tools.diagnose import matching
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.matching import Explained, empty, unlike

_DRAWS = 24  # shifts of the rows, to measure what unrelated tokens have in common


def overflowed(evidence: Evidence) -> Explained | None:
    """Ids that did not fit their type: with 256 added to the negative ones the sets agree."""
    for side in ("rollout_routes", "train_routes"):
        found = getattr(evidence, side)
        if not any((x < 0).any() for x in found) or evidence.num_experts <= 128:
            continue
        wide = [np.where(x < 0, x.astype(np.int32) + 256, x) for x in found]
        who = "engine" if side == "rollout_routes" else "trainer"
        mended = replace(evidence, **{side: wide})
        done = f"256 added to the negative ids of the {who}"
        if result := matching.explains(
            evidence, mended, cause="overflowed-ids", shown_by=done, least=0.2
        ):
            return result
    return None


def local_ids(evidence: Evidence) -> Explained | None:
    """Ids counted within a rank: they are the other side's, modulo the experts of a rank."""
    E = evidence.num_experts
    for side, other in (("rollout_routes", "train_routes"), ("train_routes", "rollout_routes")):
        highest = max(int(x.max(initial=0)) for x in getattr(evidence, side))
        for ranks in (2, 4, 8, 16, 32):
            if E % ranks or highest >= E // ranks:
                continue
            folded = [x % (E // ranks) for x in getattr(evidence, other)]
            mended = replace(evidence, **{other: folded})
            # Experts of several ranks with one number look like a row that was never written.
            both = zip(evidence.rollout_routes, folded, strict=True)
            mended = matching.leave_out(mended, [np.resize(empty(x), y.shape[:2]) for y, x in both])
            who = "engine" if side == "rollout_routes" else "trainer"
            done = f"ids of the other side taken modulo {E // ranks}, as the {who}'s are"
            found = matching.explains(evidence, mended, cause="local-ids", shown_by=done)
            if found:
                return found
    return None


def permuted(evidence: Evidence) -> Explained | None:
    """Experts under other numbers: one renaming, or one for each layer, makes the sets agree.

    A renaming is judged on the tokens that it was not made from.
    """
    rollout, train = matching.sampled(evidence, 8192)
    before = unlike(rollout, train)
    if before.mean() < 0.05 or len(rollout) < 8:
        return None
    E = max(evidence.num_experts, int(max(rollout.max(), train.max())) + 1)
    block = np.arange(len(rollout)) * 8 // len(rollout) % 2 == 0
    for everywhere in (True, False):
        fit = _renaming(everywhere, E)
        after = 0
        for half in (block, ~block):
            names = fit(rollout[half], train[half])
            after += int(unlike(rollout[~half], _renamed(train[~half], names)).sum())
        if after < 0.5 * before.sum():
            break
    else:
        return None
    names = fit(rollout, train)
    mended = replace(
        evidence,
        train_routes=[_renamed(np.clip(x, 0, E - 1), names) for x in evidence.train_routes],
        num_experts=E,
    )
    where = "alike in all layers" if everywhere else "in each layer by itself"
    moved = int((names[0] != np.arange(E)).sum())
    shift = (names[0] - np.arange(E)) % E
    step = int(np.bincount(shift).argmax())
    how = f"ids shifted by {step if step <= E // 2 else step - E:+d}, " if _turned(shift) else ""
    done = f"{moved} of {E} experts renamed {where}, {how}by the sets they stand in"
    return matching.explains(evidence, mended, cause="experts-permuted", shown_by=done)


def _turned(shift: np.ndarray) -> bool:
    """Whether most experts are moved by the same number."""
    values, times = np.unique(shift, return_counts=True)
    return bool(values[times.argmax()]) and times.max() > 0.8 * len(shift)


def _renaming(everywhere: bool, E: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Make a renaming of the trainer's experts [L, E] from both sides' sets."""

    def fit(rollout: np.ndarray, train: np.ndarray) -> np.ndarray:
        L = rollout.shape[1]
        counts = [matching.together(train[:, i], rollout[:, i], E) for i in range(L)]
        if everywhere:
            counts = [np.sum(counts, axis=0)] * L
        names = []
        for i in range(1 if everywhere else L):
            # An expert that was not seen keeps its number where that is free.
            _, assigned = linear_sum_assignment(counts[i] + 0.01 * np.eye(E), maximize=True)
            names.append(assigned)
        return np.array(names * L if everywhere else names)

    return fit


def _renamed(train: np.ndarray, names_LE: np.ndarray) -> np.ndarray:
    return ascending(names_LE[np.arange(train.shape[1])[None, :, None], train])


def unrelated(evidence: Evidence) -> Explained | None:
    """Sets that agree no more than those of unrelated tokens, in all sequences or in some."""
    pairs = matching.sides(evidence)
    if matching.rate(evidence) < 0.02:
        return None
    rollout, train = matching.sampled(evidence)
    spread = np.roll(train, len(train) // 2, axis=0)
    chance = float(matching.overlaps(rollout, spread).mean())
    differ = float(unlike(rollout, spread).mean())
    if differ < matching.LEAST_CHANCE or len(rollout) < 16:
        return None
    agree = np.array([float(matching.overlaps(*pair).mean()) for pair in pairs])
    agree = (agree - chance) / (1 - chance)
    rates = np.array([float(unlike(*pair).mean()) for pair in pairs])
    sizes = np.array([len(a) for a, _ in pairs])
    lost = (agree < 0.25) & (sizes >= 4) & (rates > 0.6 * differ)
    if not lost.any():
        return None
    if lost.mean() < 0.5:
        mended = matching.without_tokens(
            evidence, [np.full(n, bool(x)) for n, x in zip(sizes, lost, strict=True)]
        )
        done = (
            f"{lost.sum()} of {len(lost)} sequences left out (sequence {lost.argmax()} the first), "
            "whose sets agree as those of unrelated tokens do"
        )
        return matching.explains(
            evidence, mended, cause="unrelated-sequences", shown_by=done, least=0.1
        )
    z, agreed = _dependence(rollout, train, evidence.num_experts), float(np.average(agree))
    cause = "other-weights" if z > 6 else "unrelated-tokens"
    known = "tokens that share experts on one side do on the other as well, " if z > 6 else ""
    said = (
        f"{known}sets agree {max(agreed, 0):.0%} beyond chance ({z:.1f} standard deviations from "
        "unrelated rows), under no shift, renaming, pairing or order of layers more"
    )
    share = {"share": 1.0, "low": None, "high": None}
    finding = Finding(cause=cause, kind="fault", measure="routers", shown_by=said, **share)
    everything = [np.ones(x.shape[:2], bool) for x in evidence.rollout_routes]
    return Explained(finding=finding, mended=matching.leave_out(evidence, everything))


def _dependence(rollout: np.ndarray, train: np.ndarray, E: int) -> float:
    """Measure how much more one side's experts tell about the other's than unrelated rows would.

    In standard deviations: the chi-square of expert against expert, compared with that of the same
    rows paired at random distances, which keep what neighbours have in common.
    """
    rng = np.random.default_rng(0)
    T = len(rollout)
    layers = np.unique(np.linspace(0, rollout.shape[1] - 1, 4).astype(int))

    def statistic(shift: int) -> float:
        total = 0.0
        for i in layers:
            counts = matching.together(rollout[:, i], np.roll(train[:, i], shift, axis=0), E)
            by_chance = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / max(counts.sum(), 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                total += float(np.nansum((counts - by_chance) ** 2 / by_chance))
        return total

    if T < 32:
        return 0.0
    null = [statistic(int(s)) for s in rng.integers(T // 8, T - T // 8, _DRAWS)]
    return (statistic(0) - float(np.mean(null))) / (float(np.std(null)) or 1.0)


def other_weights(evidence: Evidence) -> Explained | None:
    """Sets that agree in all layers, but far less than rounding leaves: other weights."""
    agree_L = matching.agreement(evidence)
    known = agree_L[~np.isnan(agree_L)]
    if not len(known) or known.mean() >= 0.5 or matching.rate(evidence) < 0.3:
        return None
    finding = Finding(
        cause="other-weights",
        kind="fault",
        share=1.0,
        measure="routers",
        shown_by=f"the sets share {known.mean():.0%} of what chance does not, in the mean of "
        "layers; rounding leaves more than half",
    )
    everything = [np.ones(x.shape[:2], bool) for x in evidence.rollout_routes]
    return Explained(finding=finding, mended=matching.leave_out(evidence, everything))
