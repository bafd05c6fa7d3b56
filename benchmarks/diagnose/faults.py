"""Faults put into a pair that had none: shared by the tests and the figure in the docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.diagnose.pairs import Pair, Shape, chosen, log_softmax, make_pair
from moe_upgrpo.tools.diagnose.evidence import Evidence

Inject = Callable[[Pair, np.random.Generator], Evidence]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An injection, and the cause that should be named first.

    storable: whether a token log can hold it; one that its writer refuses never gets into a run.
    """

    inject: Inject
    cause: str
    shape: Shape = field(default_factory=Shape)
    storable: bool = True


def _on_train(change: Callable[[np.ndarray], np.ndarray]) -> Inject:
    def inject(pair: Pair, rng: np.random.Generator) -> Evidence:
        e = pair.evidence
        return replace(e, train_routes=[change(x) for x in e.train_routes])

    return inject


def _on_rollout(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Inject:
    def inject(pair: Pair, rng: np.random.Generator) -> Evidence:
        e = pair.evidence
        return replace(e, rollout_routes=[change(x, rng) for x in e.rollout_routes])

    return inject


def _some_shifted(pair: Pair, rng: np.random.Generator) -> Evidence:
    e = pair.evidence
    wrong = [np.roll(x, -1, axis=0) if i % 3 == 0 else x for i, x in enumerate(e.train_routes)]
    return replace(e, train_routes=wrong)


def _row_lost(routes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    lost = len(routes) // 2
    return np.concatenate([routes[:lost], routes[lost + 1 :], routes[-1:]])


def _zeros(routes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    routes = routes.copy()
    routes[rng.random(len(routes)) < 0.15] = 0
    return routes


def _not_written_again(routes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    routes = routes.copy()
    for i in range(1, len(routes)):
        if rng.random() < 0.25:
            routes[i] = routes[i - 1]
    return routes


def _buffer_of_the_last(pair: Pair, rng: np.random.Generator) -> Evidence:
    e = pair.evidence
    rollout = [x.copy() for x in e.rollout_routes]
    for i in range(1, len(rollout), 3):
        start = max(e.response[i].start, e.response[i - 1].start)
        common = min(len(rollout[i]), len(rollout[i - 1]))
        rollout[i][start:common] = rollout[i - 1][start:common]
    return replace(e, rollout_routes=rollout)


def _router_at_the_end(pair: Pair, rng: np.random.Generator) -> Evidence:
    """A multi-token-prediction router, which the engine records and the trainer does not."""
    return _extra(pair, rng, pair.evidence.rollout_routes[0].shape[1])


def _router_within(pair: Pair, rng: np.random.Generator) -> Evidence:
    return _extra(pair, rng, 1)


def _extra(pair: Pair, rng: np.random.Generator, at: int) -> Evidence:
    e = pair.evidence
    router = rng.standard_normal(pair.routers_LDE.shape[1:])
    top_k = e.rollout_routes[0].shape[-1]
    more = [chosen(x[:, -1] @ router, top_k) for x in pair.hidden]
    rollout = [np.insert(x, at, y, axis=1) for x, y in zip(e.rollout_routes, more, strict=True)]
    return replace(e, rollout_routes=rollout)


def _router_replaced(pair: Pair, rng: np.random.Generator) -> Evidence:
    """The hook of one layer is on another module: its ids are unrelated to this layer."""
    e = pair.evidence
    layer = e.rollout_routes[0].shape[1] // 2
    rollout = [x.copy() for x in e.rollout_routes]
    for x in rollout:
        scores = rng.standard_normal((len(x), e.num_experts))
        x[:, layer] = chosen(scores, x.shape[-1])
    return replace(e, rollout_routes=rollout)


def _renamed(pair: Pair, rng: np.random.Generator, per_layer: bool) -> Evidence:
    e = pair.evidence
    L, E = len(e.layer_ids), e.num_experts
    names = np.array([rng.permutation(E) for _ in range(L)] if per_layer else [rng.permutation(E)])
    names = np.broadcast_to(names, (L, E))
    at = np.arange(L)[None, :, None]
    return replace(e, rollout_routes=[names[at, x].astype(np.int16) for x in e.rollout_routes])


def _ids_from_one(routes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ids that begin after a shared expert's."""
    return routes + 1


def _responses_shuffled(pair: Pair, rng: np.random.Generator) -> Evidence:
    """The trainer sorted the batch by length and did not sort it back."""
    e = pair.evidence
    order = sorted(range(len(e.train_routes)), key=lambda i: len(e.train_routes[i]))
    lengths = [len(x) for x in e.rollout_routes]
    train = []
    for i, other in enumerate(order):
        x = e.train_routes[other]
        train.append(np.resize(x, (lengths[i], *x.shape[1:])))
    return replace(e, train_routes=train)


def _other_prompts(pair: Pair, rng: np.random.Generator) -> Evidence:
    e = pair.evidence
    return replace(e, train_routes=_routes_of_others(pair, rng))


def _routes_of_others(pair: Pair, rng: np.random.Generator) -> list[np.ndarray]:
    """The trainer's routes of other tokens, from the same model."""
    e = pair.evidence
    rows = np.concatenate(pair.hidden)
    top_k, wrong = e.train_routes[0].shape[-1], []
    for x in pair.hidden:
        mixed = rows[rng.integers(0, len(rows), len(x))] + 0.7 * rng.standard_normal(x.shape)
        wrong.append(chosen(np.einsum("sld,lde->sle", mixed, pair.routers_LDE), top_k))
    return wrong


def _some_other_prompts(pair: Pair, rng: np.random.Generator) -> Evidence:
    e = pair.evidence
    others = _routes_of_others(pair, rng)
    return replace(
        e,
        train_routes=[
            y if i % 4 == 1 else x
            for i, (x, y) in enumerate(zip(e.train_routes, others, strict=True))
        ],
    )


def _other_model(pair: Pair, rng: np.random.Generator) -> Evidence:
    return _weights(pair, rng, first=0)


def _second_half_not_loaded(pair: Pair, rng: np.random.Generator) -> Evidence:
    return _weights(pair, rng, first=len(pair.evidence.layer_ids) // 2)


def _weights(pair: Pair, rng: np.random.Generator, first: int) -> Evidence:
    """Routers that have other weights from a layer on, with the same hidden states."""
    e = pair.evidence
    routers = pair.routers_LDE.copy()
    spread = routers.std()
    routers[first:] = 0.3 * routers[first:] + spread * rng.standard_normal(routers[first:].shape)
    top_k = e.train_routes[0].shape[-1]
    rollout = [chosen(np.einsum("sld,lde->sle", x, routers), top_k) for x in pair.hidden]
    return replace(e, rollout_routes=rollout)


def _padded_on_either_side(pair: Pair, rng: np.random.Generator) -> Evidence:
    e = pair.evidence
    longest = max(map(len, e.train_routes))

    def padded(x: np.ndarray, before: bool) -> np.ndarray:
        filler = np.zeros((longest - len(x), *x.shape[1:]), x.dtype)
        return np.concatenate([filler, x] if before else [x, filler])

    return replace(
        e,
        rollout_routes=[padded(x, True) for x in e.rollout_routes],
        train_routes=[padded(x, False) for x in e.train_routes],
        response=[slice(0, longest)] * len(e.response),
        margins=None,
    )


def _eight_bits(routes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return routes.astype(np.uint8).view(np.int8)


def _of_one_rank(routes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ids counted within each of four expert-parallel ranks of 16 experts."""
    return routes % 4


def _with_the_shared(pair: Pair, rng: np.random.Generator) -> Evidence:
    """The engine appends the shared expert to every set."""
    e = pair.evidence
    last = [np.full((*x.shape[:2], 1), e.num_experts, x.dtype) for x in e.rollout_routes]
    rollout = [np.concatenate(x, axis=-1) for x in zip(e.rollout_routes, last, strict=True)]
    return replace(e, rollout_routes=rollout)


def _log_probs(change: Callable[[Pair, int], np.ndarray]) -> Inject:
    def inject(pair: Pair, rng: np.random.Generator) -> Evidence:
        e = pair.evidence
        return replace(e, logp_rollout=[change(pair, i) for i in range(len(e.logp_rollout))])

    return inject


def _sampled(pair: Pair, i: int) -> np.ndarray:
    count = len(pair.evidence.logp_rollout[i])
    return pair.evidence.tokens[i][-count:]


def _colder(temperature: float) -> Callable[[Pair, int], np.ndarray]:
    def change(pair: Pair, i: int) -> np.ndarray:
        all_of_them = log_softmax(pair.logits[i] / temperature)
        return all_of_them[np.arange(len(all_of_them)), _sampled(pair, i)]

    return change


def _top_k_renormalised(pair: Pair, i: int) -> np.ndarray:
    """top-k sampling of the 8 most likely tokens; a sampled token is always among them."""
    logits, tokens = pair.logits[i], _sampled(pair, i)
    at = np.arange(len(tokens))
    kept = np.sort(logits, axis=-1)[:, -8]
    threshold = np.minimum(kept, logits[at, tokens])
    cut = np.where(logits >= threshold[:, None], logits, -np.inf)
    return log_softmax(cut)[at, tokens]


def _later_log_probs(pair: Pair, i: int) -> np.ndarray:
    return np.roll(pair.evidence.logp_rollout[i], 1)


def _half_written(pair: Pair, i: int) -> np.ndarray:
    values = pair.evidence.logp_rollout[i].copy()
    values[len(values) // 2 :] = 0
    return values


def _stale(pair: Pair, rng: np.random.Generator) -> Evidence:
    """A third of the sequences come from weights a few steps older."""
    e = pair.evidence
    rollout, age = [], []
    for i, values in enumerate(e.logp_rollout):
        old = 4 * (i % 3 == 0)
        moved = values + 0.12 * old * rng.standard_normal(len(values))
        rollout.append(np.minimum(moved, 0))
        age.append(np.full(len(values), float(old)))
    return replace(e, logp_rollout=rollout, columns={"staleness": age})


FAULTS: dict[str, Fault] = {
    "rows one late": Fault(
        inject=_on_train(lambda x: np.roll(x, 1, axis=0)), cause="row-off-by-one"
    ),
    "rows one early": Fault(
        inject=_on_train(lambda x: np.roll(x, -1, axis=0)), cause="row-off-by-one"
    ),
    "rows two late": Fault(inject=_on_train(lambda x: np.roll(x, 2, axis=0)), cause="rows-shifted"),
    "a row for the last token too": Fault(
        inject=_on_rollout(lambda x, rng: np.concatenate([x, x[-1:]])),
        cause="extra-rows",
        storable=False,
    ),
    "rows of a third of the sequences one early": Fault(
        inject=_some_shifted, cause="rows-of-some-sequences-shifted"
    ),
    "a row lost in the middle": Fault(
        inject=_on_rollout(_row_lost), cause="rows-of-some-sequences-shifted"
    ),
    "tokens and layers exchanged": Fault(
        inject=_on_train(lambda x: x.transpose(1, 0, 2)), cause="transposed-axes", storable=False
    ),
    "layers and top-k exchanged": Fault(
        inject=_on_train(lambda x: x.transpose(0, 2, 1)), cause="transposed-axes", storable=False
    ),
    "layers in another order": Fault(
        inject=_on_train(lambda x: x[:, [2, 0, 1, 5, 3, 4]]), cause="layer-order"
    ),
    "layers reversed": Fault(inject=_on_train(lambda x: x[:, ::-1]), cause="layer-order"),
    "layers one too deep": Fault(
        inject=_on_train(lambda x: np.roll(x, 1, axis=1)), cause="layer-offset"
    ),
    "zero-filled rows": Fault(inject=_on_rollout(_zeros), cause="zero-filled-rows", storable=False),
    "rows not written again": Fault(inject=_on_rollout(_not_written_again), cause="repeated-rows"),
    "the buffer of the request before": Fault(inject=_buffer_of_the_last, cause="repeated-rows"),
    "a multi-token-prediction router": Fault(
        inject=_router_at_the_end, cause="mtp-routers", storable=False
    ),
    "a router that the trainer has not": Fault(
        inject=_router_within, cause="orphan-routers", storable=False
    ),
    "a hook on another module": Fault(inject=_router_replaced, cause="orphan-routers"),
    "experts permuted": Fault(
        inject=lambda pair, rng: _renamed(pair, rng, False), cause="experts-permuted"
    ),
    "experts permuted in each layer": Fault(
        inject=lambda pair, rng: _renamed(pair, rng, True), cause="experts-permuted"
    ),
    "ids from one": Fault(
        inject=_on_rollout(_ids_from_one), cause="experts-permuted", storable=False
    ),
    "a batch not sorted back": Fault(inject=_responses_shuffled, cause="wrong-pairing"),
    "other prompts": Fault(inject=_other_prompts, cause="unrelated-tokens"),
    "a few other prompts": Fault(inject=_some_other_prompts, cause="unrelated-sequences"),
    "another model": Fault(inject=_other_model, cause="other-weights"),
    "the second half not loaded": Fault(
        inject=_second_half_not_loaded, cause="half-loaded-weights"
    ),
    "padded on either side": Fault(
        inject=_padded_on_either_side, cause="padding-side", storable=False
    ),
    "ids in eight bits": Fault(
        inject=_on_rollout(_eight_bits),
        cause="overflowed-ids",
        shape=Shape(experts=256, top_k=8, layers=2, tokens=12),
        storable=False,
    ),
    "ids of a rank": Fault(inject=_on_rollout(_of_one_rank), cause="local-ids", storable=False),
    "the shared expert counted": Fault(
        inject=_with_the_shared, cause="other-top-k", storable=False
    ),
    "log-probs of temperature 0.7": Fault(
        inject=_log_probs(_colder(0.7)), cause="other-temperature"
    ),
    "log-probs of temperature 1.3": Fault(
        inject=_log_probs(_colder(1.3)), cause="other-temperature"
    ),
    "log-probs to base 2": Fault(
        inject=_log_probs(lambda pair, i: pair.evidence.logp_rollout[i] / np.log(2)),
        cause="log-prob-unit",
    ),
    "log-probs of the token before": Fault(
        inject=_log_probs(_later_log_probs), cause="log-probs-off-by-one"
    ),
    "log-probs of top-k sampling": Fault(
        inject=_log_probs(_top_k_renormalised), cause="truncated-sampling"
    ),
    "log-probs not written": Fault(inject=_log_probs(_half_written), cause="constant-log-probs"),
    "a third of the sequences stale": Fault(inject=_stale, cause="stale-weights"),
}


def injected(name: str, *, seed: int = 0) -> Evidence:
    """A clean pair with one fault in it."""
    fault = FAULTS[name]
    pair = make_pair(fault.shape, seed=seed)
    return fault.inject(pair, np.random.default_rng(1000 + seed))
