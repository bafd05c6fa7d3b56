# SPDX-License-Identifier: Apache-2.0
"""Faults that give the two sides' routes different shapes: tried first, as nothing fits before.

Each takes an `Evidence` and returns what it explains, or None; see `faults.ROUTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_upgrpo.routing.sets import unequal
from moe_upgrpo.tools.diagnose import matching
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.matching import Explained, overlaps, sampled

_AXES = ("tokens", "layers", "top-k")


def transposed(evidence: Evidence) -> Explained | None:
    """Axes of one side in another order: once exchanged, the shapes fit and the sets agree."""
    fits = matching.fit(evidence)
    before = matching.rate(evidence)
    if fits and before < 0.5:
        return None
    best = None
    for order in permutations(range(3)):
        if order == (0, 1, 2):
            continue
        for side in ("train_routes", "rollout_routes"):
            turned = [x.transpose(order) for x in getattr(evidence, side)]
            mended = replace(evidence, **{side: turned}, left_out=None)
            if not (matching.fit(mended) and _are_sets(mended)):
                continue
            after = matching.rate(mended)
            if best is None or after < best[0] - 0.01:
                best = after, order, side, mended
    if best is None or (fits and best[0] > 0.5 * before):
        return None
    after, order, side, mended = best
    if after > 0.5 and not fits and _lengths_fit(evidence):
        return None  # layers or top-k differ, while the axes need not
    who = "trainer" if side == "train_routes" else "rollout"
    swapped = [_AXES[i] for i in range(3) if order[i] != i]
    said = (
        f"the axes {' and '.join(swapped)} of the {who}'s routes exchanged: from "
        f"{'all' if not fits else f'{before:.1%}'} to {after:.1%} of routers differ"
    )
    share = 1 - after if not fits else 1 - after / before
    return _fault("transposed-axes", share, said, mended)


def _lengths_fit(evidence: Evidence) -> bool:
    pairs = zip(evidence.rollout_routes, evidence.train_routes, strict=True)
    return all(len(a) == len(b) for a, b in pairs)


def _sides_uniform(evidence: Evidence) -> bool:
    return matching.uniform(evidence.rollout_routes) and matching.uniform(evidence.train_routes)


def _are_sets(evidence: Evidence) -> bool:
    """Whether most rows of both sides hold different experts, as routers write them."""
    for side in sampled(evidence, 256):
        if side.shape[-1] > 1 and (side[..., 1:] == side[..., :-1]).any(axis=-1).mean() > 0.5:
            return False
    return True


def _fault(cause: str, share: float | None, shown_by: str, mended: Evidence) -> Explained:
    finding = Finding(cause=cause, kind="fault", share=share, measure="routers", shown_by=shown_by)
    return Explained(finding=finding, mended=mended)


def other_top_k(evidence: Evidence) -> Explained | None:
    """More experts for each token on one side, with the other's among them."""
    k = [x[0].shape[-1] for x in (evidence.rollout_routes, evidence.train_routes)]
    layers = [x[0].shape[1] for x in (evidence.rollout_routes, evidence.train_routes)]
    if k[0] == k[1] or layers[0] != layers[1] or not _sides_uniform(evidence):
        return None
    rollout, train = sampled(evidence)
    few, many = (rollout, train) if k[0] < k[1] else (train, rollout)
    shared = overlaps(few, many).mean()
    few_side, many_side = ("engine", "trainer") if k[0] < k[1] else ("trainer", "engine")
    said = (
        f"the {many_side} records {max(k)} experts for each token and the {few_side} {min(k)}, "
        f"{shared:.1%} of which are among the {many_side}'s"
    )
    # To go on, the experts that only the larger sets have are taken out.
    names = (
        ("train_routes", "rollout_routes") if k[0] < k[1] else ("rollout_routes", "train_routes")
    )
    pairs = zip(getattr(evidence, names[0]), getattr(evidence, names[1]), strict=True)
    reduced = [_reduced(large, small) for large, small in pairs]
    return _fault("other-top-k", None, said, replace(evidence, **{names[0]: reduced}))


def _reduced(large: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Cut the larger sets to as many experts as the smaller have, keeping shared ones first."""
    rows = min(len(large), len(small))
    within = (large[:rows, :, :, None] == small[:rows, :, None, :]).any(axis=-1)
    order = np.argsort(~within, axis=-1, kind="stable")[..., : small.shape[-1]]
    return np.take_along_axis(large[:rows], order, axis=-1)


def extra_layers(evidence: Evidence) -> Explained | None:
    """More routers on one side: the layers without a counterpart are named."""
    layers = [x[0].shape[1] for x in (evidence.rollout_routes, evidence.train_routes)]
    if layers[0] == layers[1] or not _sides_uniform(evidence):
        return None
    rollout, train = sampled(evidence, 512)
    if rollout.shape[-1] != train.shape[-1]:
        return None
    cost = _layer_costs(rollout, train)
    a, b = linear_sum_assignment(cost)
    more_on_train = layers[1] > layers[0]
    larger = max(layers)
    kept = [int(j) for j in (b if more_on_train else a)]
    extra = sorted(set(range(larger)) - set(kept))
    who = "the trainer" if more_on_train else "the engine"
    matched = 1 - float(cost[a, b].mean())
    said = (
        f"{who} records {larger} layers and the other side {min(layers)}; without layers "
        f"{_listed(extra)} of {who} the sets of {matched:.1%} of routers agree"
    )
    at_end = extra == list(range(min(layers), larger)) and kept == sorted(kept)
    cause = "mtp-routers" if at_end else "orphan-routers"
    mended = _take_layers(evidence, "train_routes" if more_on_train else "rollout_routes", kept)
    return _fault(cause, None, said, mended)


def extra_rows(evidence: Evidence) -> Explained | None:
    """Sequences with more rows on one side; the first ones, which both have, are compared.

    One or two extra rows in each are reported only where the sets agree without them; otherwise
    another test tells their cause.
    """
    rows = [[len(x) for x in side] for side in (evidence.rollout_routes, evidence.train_routes)]
    more = {a - b for a, b in zip(*rows, strict=True)}
    if more == {0} or not matching.fit(evidence):
        return None
    rate = matching.rate(evidence)
    if len(more) == 1 and (count := max(more, key=abs)) in (-2, -1, 1, 2):
        if rate > 0.5:
            return None
        who = "engine" if count > 0 else "trainer"
        said = f"the {who} has {abs(count)} more for each sequence: without the last"
    else:
        both = sum(map(min, *rows))
        said = (
            f"{sum(rows[0]):,} rows of the engine against {sum(rows[1]):,} of the trainer: only "
            f"{both:,}, the first of each sequence, were compared, and of those"
        )
    return _fault("extra-rows", None, f"{said} {rate:.1%} of routers differ", evidence)


def layer_order(evidence: Evidence) -> Explained | None:
    """Layers in another order: matched by their sets, they pair with other layers."""
    if evidence.rollout_routes[0].shape[1] < 2:
        return None
    cost = _layer_costs(*sampled(evidence, 512))
    _, assigned = linear_sum_assignment(cost)
    L = len(assigned)
    offsets = assigned - np.arange(L)
    if not offsets.any():
        return None
    mended = _take_layers(evidence, "train_routes", [int(j) for j in assigned])
    values, times = np.unique(offsets, return_counts=True)
    offset = int(values[times.argmax()])
    if offset and times.max() >= max(2, L - abs(offset)):
        # With an offset, the layers at one end have no counterpart and are no longer compared.
        inside = np.arange(L) + offset
        alone = (inside < 0) | (inside >= L)
        mended = matching.leave_out(mended, _at_layers(mended, alone))
        cause, done = "layer-offset", f"layer i held against layer i {offset:+d}"
    else:
        moved = [i for i in range(L) if offsets[i]]
        names = ", ".join(
            f"{evidence.layer_ids[i]}→{evidence.layer_ids[assigned[i]]}" for i in moved[:6]
        )
        cause, done = "layer-order", f"the layers matched by their sets ({names})"
    return matching.explains(evidence, mended, cause=cause, shown_by=done)


def _at_layers(evidence: Evidence, layers_L: np.ndarray) -> list[np.ndarray]:
    return [np.broadcast_to(layers_L, x.shape[:2]).copy() for x in evidence.rollout_routes]


def orphan_layer(evidence: Evidence) -> Explained | None:
    """A layer that agrees only by chance, while all others agree."""
    agree_L = matching.agreement(evidence)
    if len(agree_L) < 2:
        return None
    alone = agree_L < 0.15
    if not alone.any() or not (np.nanmin(agree_L[~alone], initial=np.inf) > 0.5):
        return None
    at_the_end = bool(alone[-int(alone.sum()) :].all())
    if alone.sum() > len(agree_L) // 2 or (at_the_end and alone.sum() > 1):
        return None  # `half_loaded` handles layers from one on
    names = _listed([evidence.layer_ids[i] for i in alone.nonzero()[0]])
    mended = matching.leave_out(evidence, _at_layers(evidence, alone))
    return matching.explains(
        evidence,
        mended,
        cause="orphan-routers",
        shown_by=f"without layer {names}, whose sets agree as those of unrelated tokens do",
        least=0.2,
    )


def half_loaded(evidence: Evidence) -> Explained | None:
    """Layers that agree up to one, and hardly from there on: those have other weights."""
    agree_L = matching.agreement(evidence)
    for first in range(1, len(agree_L)):
        # A layer about which nothing is known counts for neither part.
        above = np.nanmin(agree_L[:first], initial=np.inf)
        below = np.nanmax(agree_L[first:], initial=-np.inf)
        if 0.9 < above < np.inf and -np.inf < below < 0.7:
            break
    else:
        return None
    layers = np.arange(len(agree_L)) >= first
    mended = matching.leave_out(evidence, _at_layers(evidence, layers))
    return matching.explains(
        evidence,
        mended,
        cause="half-loaded-weights",
        shown_by=f"layers from {evidence.layer_ids[first]} on left out, at which agreement breaks",
    )


def _layer_costs(rollout: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Share of tokens whose sets differ, for each layer of one side against each of the other."""
    return np.array(
        [
            [float(unequal(rollout[:, i], train[:, j]).mean()) for j in range(train.shape[1])]
            for i in range(rollout.shape[1])
        ]
    )


def _take_layers(evidence: Evidence, side: str, layers: Sequence[int]) -> Evidence:
    changed = {side: [x[:, layers] for x in getattr(evidence, side)]}
    if side == "train_routes" and evidence.margins is not None:
        changed["margins"] = [x[:, layers] for x in evidence.margins]
    ids = evidence.layer_ids
    if len(ids) != len(layers):
        changed["layer_ids"] = [ids[i] if i < len(ids) else i for i in range(len(layers))]
    return replace(evidence, **changed)


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown}, …" if len(numbers) > 6 else shown
