# SPDX-License-Identifier: Apache-2.0
"""The faults that two sides' records show, in the order in which they are tried.

A test names a cause only by something that this cause alone explains: a shift, a renaming, a
division after which both sides agree. What it explained is taken out of the evidence before the
next test, so that each of several faults gets its own share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from moe_upgrpo.tools.diagnose import ids, logps, matching, rows, shapes
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.matching import Explained

RouteTest = Callable[[Evidence], Explained | None]

# Until the two sides have one shape, no other test can be made.
SHAPES: tuple[RouteTest, ...] = (
    shapes.transposed,
    shapes.extra_layers,
    shapes.other_top_k,
    shapes.extra_rows,
)
# The one of these that explains most is named; among equals, the first.
ROUTES: tuple[RouteTest, ...] = (
    rows.padding_side,
    ids.overflowed,
    ids.local_ids,
    rows.zero_rows,
    rows.row_shift,
    shapes.layer_order,
    ids.permuted,
    rows.pairing,
    rows.repeated,
    shapes.orphan_layer,
    shapes.half_loaded,
)
# No change makes the sides agree: tried once the others have found all they can.
BEYOND: tuple[RouteTest, ...] = (ids.unrelated, ids.other_weights)

LOG_PROBS: tuple[Callable[[Evidence], Finding | None], ...] = (
    logps.constant,
    logps.shifted,
    logps.unit,
    logps.temperature,
    logps.truncated,
)
_ALIKE = 0.03
"""Two tests explain equally much if they differ by less than this; the first of them is named."""
_MOST = 4
_FEW = 8
"""With no more differing routers than this, chance alone may look like any of these faults. Rows
that no router writes do not count."""


@dataclass(kw_only=True)
class Found:
    """Faults, of shapes first, then by how much they explain; and the evidence without them."""

    findings: list[Finding] = field(default_factory=list)
    left: Evidence
    tried: int = 0


def find(evidence: Evidence) -> Found:
    """All faults that the records of both sides show."""
    found = Found(left=evidence)
    if evidence.rollout_routes and evidence.train_routes and evidence.layer_ids:
        _routes(found)
    if evidence.logp_rollout is not None and evidence.logp_train is not None:
        _log_probs(found, evidence)
    return found


def _routes(found: Found) -> None:
    for test in SHAPES:
        found.tried += 1
        if result := test(found.left):
            found.findings.append(result.finding)
            found.left = result.mended
    found.tried += len(ROUTES) + len(BEYOND)
    if not matching.fit(found.left):
        return
    whole = sum(matching.sum_of(matching.differing(found.left)))
    named = []
    for tests in (ROUTES, BEYOND) if whole > _FEW else ((rows.zero_rows, ids.overflowed),):
        while len(named) < _MOST:
            now = sum(matching.sum_of(matching.differing(found.left)))
            if not now:
                break
            results = [result for test in tests if (result := test(found.left))]
            known = {one.cause for one in named}
            results = [one for one in results if one.finding.cause not in known]
            if not results:
                break
            most = max(one.finding.share for one in results)
            result = next(one for one in results if one.finding.share >= most - _ALIKE)
            named.append(_of_whole(result.finding, now / whole))
            found.left = result.mended
    found.findings += sorted(named, key=lambda one: -one.share)


def _of_whole(finding: Finding, part: float) -> Finding:
    """Convert a share of the remaining difference into a share of the whole."""
    ends = {
        name: None if (value := getattr(finding, name)) is None else value * part
        for name in ("share", "low", "high")
    }
    return replace(finding, **ends)


def _log_probs(found: Found, evidence: Evidence) -> None:
    found.tried += len(LOG_PROBS) + 2
    if logps.mean_gap(evidence) < logps.LEAST_GAP:
        return
    results = [result for test in LOG_PROBS if (result := test(evidence))]
    if not results and (other := logps.unrelated(evidence)):
        results.append(other)
    if results:
        most = max(one.share for one in results)
        finding = next(one for one in results if one.share >= most - _ALIKE)
        if finding.cause not in {one.cause for one in found.findings}:
            found.findings.append(finding)
    if stale := logps.staleness(evidence):
        found.findings.append(stale)


def not_asked(evidence: Evidence) -> dict[str, str]:
    """Questions that the evidence cannot answer, and what it lacks for each."""
    lacking = {}
    if evidence.rollout_routes is None or evidence.train_routes is None:
        lacking["routes: rows, layers, experts"] = "the routes of both sides are needed"
    if evidence.logp_rollout is None or evidence.logp_train is None:
        lacking["log-probs: temperature, unit, off by one"] = "no log-probs of both sides are given"
    if evidence.margins is None and "margin_min" not in evidence.columns:
        lacking["near ties"] = "the trainer's top-k margins are not known"
    if len(np.unique(evidence.prompt)) < 8:
        lacking["intervals"] = (
            "they are by prompt, and fewer than 8 are told apart; of a dumped batch "
            "--dump-samples G says how many sequences answer one"
        )
    return lacking
