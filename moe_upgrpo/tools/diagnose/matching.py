# SPDX-License-Identifier: Apache-2.0
"""Compare the two sides of an evidence, and measure by prompt what a change of one side explains.

Unlike `routing.compare_routes`, which refuses rows that no router can have written, this counts
them as rows that differ, because such rows are what it looks for.

Shape suffixes: T response tokens, L MoE layers, K experts per token, P prompts, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_upgrpo.routing.sets import ascending, unequal
from moe_upgrpo.stats.clusters import ratio_interval
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding

SAMPLE = 2048  # tokens used to match layers, experts and sequences with each other
LEAST_CHANCE = 0.4
"""Share of unrelated tokens whose sets differ; below it, agreement says nothing."""
_TO_TELL = 16  # the fewest tokens for which agreement beyond chance is measured


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A cause that was found, and the evidence with the cause undone."""

    finding: Finding
    mended: Evidence


def fit(evidence: Evidence) -> bool:
    """Whether both sides have the same layers and experts per token in all sequences."""
    both = evidence.rollout_routes + evidence.train_routes
    return uniform(both)


def uniform(routes: Sequence[np.ndarray]) -> bool:
    """Whether all sequences have the same number of layers and of experts per token."""
    return len({x.shape[1:] for x in routes}) == 1


def sides(evidence: Evidence) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both sides' sets at the response tokens, B × [T, L, K], ascending in K."""
    found = []
    for i, rows in enumerate(evidence.response):
        pair = evidence.rollout_routes[i], evidence.train_routes[i]
        common = min(map(len, pair))
        found.append(tuple(ascending(side[:common][rows]) for side in pair))
    return found


def counted(evidence: Evidence) -> list[np.ndarray]:
    """Routers at the response tokens that are compared, B × [T, L] bool."""
    shown = []
    for i, rows in enumerate(evidence.response):
        common = min(len(evidence.rollout_routes[i]), len(evidence.train_routes[i]))
        shape = evidence.rollout_routes[i].shape[:2]
        left_out = np.zeros(shape, bool) if evidence.left_out is None else evidence.left_out[i]
        shown.append(~left_out[:common][rows])
    return shown


def unlike(a_TLK: np.ndarray, b_TLK: np.ndarray) -> np.ndarray:
    """Where two sides with ascending sets differ [T, L]; everywhere if their shapes do not fit."""
    if a_TLK.shape != b_TLK.shape:
        return np.ones(a_TLK.shape[:2], bool)
    return unequal(a_TLK, b_TLK)


def differing(evidence: Evidence) -> list[np.ndarray]:
    """Routers that differ, of those compared, B × [T, L] bool."""
    pairs = zip(sides(evidence), counted(evidence), strict=True)
    return [unlike(*pair) & compared for pair, compared in pairs]


def leave_out(evidence: Evidence, more: Sequence[np.ndarray]) -> Evidence:
    """Exclude further routers from the comparison: B × [S−1, L] bool."""
    before = evidence.left_out or [np.zeros(x.shape, bool) for x in more]
    return replace(evidence, left_out=[a | b for a, b in zip(before, more, strict=True)])


def without_tokens(evidence: Evidence, marks: list[np.ndarray]) -> Evidence:
    """Leave out the marked response tokens, [T] for each sequence."""
    more = []
    for routes, rows, mark in zip(evidence.rollout_routes, evidence.response, marks, strict=True):
        whole = np.zeros(routes.shape[:2], bool)
        start = rows.indices(len(whole))[0]
        whole[start : start + len(mark)] = mark[:, None]
        more.append(whole)
    return leave_out(evidence, more)


def empty(routes: np.ndarray) -> np.ndarray:
    """Routers whose row no router wrote: one id in all its slots, or a negative one [T, L].

    With one expert per token a zero is a choice like any other, so only negative ids count.
    """
    if routes.shape[-1] == 1:
        return routes[..., 0] < 0
    return (routes == routes[..., :1]).all(axis=-1)


def by_prompt(evidence: Evidence, sums: Sequence[float]) -> np.ndarray:
    """Add up the sequences' sums for each prompt [P]."""
    _, prompt = np.unique(evidence.prompt, return_inverse=True)
    return np.bincount(prompt, np.asarray(sums, float))


def mismatch(evidence: Evidence) -> tuple[float, float | None, float | None]:
    """Share of the compared routers that differ, and its interval by prompt."""
    differ_P = by_prompt(evidence, [x.sum() for x in differing(evidence)])
    compared_P = by_prompt(evidence, [x.sum() for x in counted(evidence)])
    return _interval(differ_P, compared_P)


def rate(evidence: Evidence) -> float:
    """Share of the compared routers that differ."""
    compared = sum(int(x.sum()) for x in counted(evidence))
    return sum(int(x.sum()) for x in differing(evidence)) / compared if compared else 0.0


def by_layer(evidence: Evidence) -> np.ndarray:
    """Share of the compared routers that differ, [L]; NaN where a layer is not compared."""
    differ_L = np.sum([x.sum(axis=0) for x in differing(evidence)], axis=0)
    compared_L = np.sum([x.sum(axis=0) for x in counted(evidence)], axis=0)
    with np.errstate(invalid="ignore"):
        return differ_L / np.where(compared_L, compared_L, math.nan)


def _interval(part_P: np.ndarray, whole_P: np.ndarray) -> tuple[float, float | None, float | None]:
    known = whole_P > 0
    if not known.any():
        return math.nan, None, None
    share, low, high = ratio_interval(part_P[known], whole_P[known])
    return share, *(None if math.isnan(x) else x for x in (low, high))


def explained(
    evidence: Evidence, before: Sequence[float], after: Sequence[float]
) -> dict[str, float | None]:
    """Share of a difference that is gone afterwards, with its interval by prompt.

    before, after: the difference in each sequence, in routers or nats. Summed by prompt, because
    one sequence may gain what another loses.
    """
    before_P, after_P = by_prompt(evidence, before), by_prompt(evidence, after)
    share, low, high = _interval(np.clip(before_P - after_P, 0, None), before_P)
    # Where some prompts differ more afterwards, the sums over all say less than those of parts.
    total = before_P.sum()
    share = float(np.clip((total - after_P.sum()) / total, 0, 1)) if total else 0.0
    return {"share": share, "low": low, "high": high}


def explains(
    evidence: Evidence, mended: Evidence, *, cause: str, shown_by: str, least: float = 0.5
) -> Explained | None:
    """A fault that a change explains, if at least `least` of the differing routers agree after it.

    shown_by: what was done; its result is added. Routers that can no longer be compared are taken
    to differ as often as those that still are.
    """
    before, after = rate(evidence), rate(mended)
    sizes = zip(counted(evidence), counted(mended), strict=True)
    gone = [float(a.sum()) - float(b.sum()) for a, b in sizes]
    left = zip(sum_of(differing(mended)), gone, strict=True)
    share = explained(
        evidence, sum_of(differing(evidence)), [differ + after * less for differ, less in left]
    )
    if share["share"] < least:
        return None
    said = f"{shown_by}: {before:.1%} → {after:.1%} of routers differ"
    finding = Finding(cause=cause, kind="fault", measure="routers", shown_by=said, **share)
    return Explained(finding=finding, mended=mended)


def sum_of(found: Sequence[np.ndarray]) -> list[float]:
    """Sum each sequence's entries."""
    return [float(x.sum()) for x in found]


def sampled(evidence: Evidence, size: int = SAMPLE) -> tuple[np.ndarray, np.ndarray]:
    """Both sides' sets at up to `size` response tokens spread over the whole: [T, L, K]."""
    pairs = sides(evidence)
    rollout, train = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    step = max(1, -(-len(rollout) // size))
    return rollout[::step], train[::step]


def overlaps(a_TLK: np.ndarray, b_TLK: np.ndarray) -> np.ndarray:
    """|S ∩ S'| / K of each router [T, L]."""
    shared = (a_TLK[..., :, None] == b_TLK[..., None, :]).any(axis=-1).sum(axis=-1)
    return shared / a_TLK.shape[-1]


def agreement(evidence: Evidence) -> np.ndarray:
    """Agreement of the sets beyond that of unrelated tokens, by layer [L]: 1 all, 0 by chance.

    Unrelated are the trainer's rows of tokens far away, of another prompt where there are several.
    NaN for few tokens, and for a layer that sends most tokens to the same experts: there any two
    agree.
    """
    rollout, train = sampled(evidence)
    if len(rollout) < _TO_TELL:
        return np.full(rollout.shape[1], math.nan)
    seen_L = overlaps(rollout, train).mean(axis=0)
    far = [np.roll(train, part * len(train) // 7, axis=0) for part in (2, 3, 4)]
    chance_L = np.mean([overlaps(rollout, x).mean(axis=0) for x in far], axis=0)
    differ_L = np.mean([unlike(rollout, x).mean(axis=0) for x in far], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(differ_L > LEAST_CHANCE, (seen_L - chance_L) / (1 - chance_L), math.nan)


def together(a_TK: np.ndarray, b_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Count how often one side has expert e where the other has f [E, E]."""
    sets = np.zeros((2, len(a_TK), num_experts), np.float32)
    for side, ids in zip(sets, (a_TK, b_TK), strict=True):
        inside = (ids >= 0) & (ids < num_experts)
        rows, _ = inside.nonzero()
        side[rows, ids[inside]] = 1
    return sets[0].T @ sets[1]
