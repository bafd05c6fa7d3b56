# SPDX-License-Identifier: Apache-2.0
"""Faults that a model shows: something is changed on one side, and the difference vanishes.

Each takes the pair (`live.Live`) and returns a finding or None; `LIVE_FAULTS` lists them in the
order in which they are tried. They come after the tests that need no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.tokenizer import read_tokenizer
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.tools import pair
from moe_upgrpo.tools.diagnose import models, tensors
from moe_upgrpo.tools.diagnose.differences import Measure, Removed, removed
from moe_upgrpo.tools.diagnose.evidence import Finding
from moe_upgrpo.tools.diagnose.live import Live

EXPLAINED = 0.8
"""A fault is named where its test removes at least this part of the difference."""
SURE = 0.05
_FITS = 6  # forward passes in the search for a temperature
_LEAST_CHANGE = 0.02  # relative; a temperature that differs by less counts as the same


def finding(
    cause: str, of: Removed, shown_by: str, kind: str = "fault", share: float | None = None
) -> Finding:
    """A finding with the removed share, clamped to [0, 1]."""

    def bounded(x: float | None) -> float | None:
        return None if x is None else min(1.0, max(0.0, x))

    return Finding(
        cause=cause,
        kind=kind,
        share=bounded(of.share if share is None else share),
        low=bounded(of.low),
        high=bounded(of.high),
        measure=of.measure,
        shown_by=f"{shown_by}: {of}",
    )


def _explains(of: Removed, prompts: int) -> bool:
    """Whether a change removed most of the difference, by more than prompts differ. With fewer than
    5 prompts no test by prompt can say so: 2^-4 is above 0.05."""
    return of.share is not None and of.share >= EXPLAINED and (of.p < SURE or prompts < 5)


def tokens(live: Live) -> Finding | None:
    """The engine answered other token ids: it returned them, or its log-probs are those of another
    way to write the same prompts."""
    sent = np.repeat(np.arange(len(live.prompts)), live.options.samples)
    other = [
        i
        for i, (p, rollout) in enumerate(zip(sent, live.rollouts, strict=True))
        if not np.array_equal(live.prompts[p], rollout.prompt_ids)
    ]
    if other:
        first = other[0]
        return Finding(
            cause="other-tokens",
            kind="fault",
            share=None,
            measure="gap",
            shown_by=f"{len(other)} of {len(live.rollouts)} responses came back with other prompt "
            f"ids: {live.rollouts[first].prompt_ids.tolist()[:12]} in place of "
            f"{live.prompts[sent[first]].tolist()[:12]}",
        )
    for name, prompts in _other_prompts(live):
        samples = [
            Sample(
                tokens=np.concatenate([prompts[p], r.response_ids]), prompt_length=len(prompts[p])
            )
            for p, r in zip(sent, live.rollouts, strict=True)
        ]
        try:
            live.actor.check_length(max(len(s.tokens) for s in samples))
        except UserError:
            continue
        trainer = live.scored(live.actor, samples)
        of = removed(live.base, live.compare(live.as_sampled, trainer), "gap")
        if _explains(of, len(live.prompts)):
            return finding("other-tokens", of, f"prompts {name} give the engine's log-probs")
    return None


def _other_prompts(live: Live) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Ways in which an engine that tokenizes for itself may have written the same prompts."""
    options = live.options
    tokenizer = read_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    lines = pair.read_lines(options)
    begin = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None][:1]
    ways = {
        "with the special token of a beginning before them": [
            np.array([*begin, *ids]) for ids in live.prompts
        ],
        "without their first token": [ids[1:] for ids in live.prompts],
        "without special tokens": [
            np.array(tokenizer(line, add_special_tokens=False).input_ids) for line in lines
        ],
    }
    if tokenizer.chat_template:
        ways["in the chat template"] = [
            np.array(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": line}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
            )
            for line in lines
        ]
    for name, prompts in ways.items():
        same = all(np.array_equal(a, b) for a, b in zip(prompts, live.prompts, strict=True))
        if not same and all(len(ids) for ids in prompts):
            yield name, prompts


def temperature(live: Live) -> Finding | None:
    """The engine's log-probs are the trainer's with the logits divided by another number.

    With β = 1/τ: ∂ log p(y) / ∂ log β = β (z_y − E z) = log p(y) + H, H the entropy. To first
    order, the slope of the gap over that is the relative change of β that is missing.
    """
    told = live.actor.temperature
    rollout_N = np.concatenate([r.logp_rollout for r in live.rollouts]).astype(np.float64)
    scores, beta = live.native, 1 / told
    try:
        for _ in range(_FITS):
            logp_N = np.concatenate([s.log_probs for s in scores]).astype(np.float64)
            moved_N = logp_N + np.concatenate([s.entropy for s in scores])
            if not (size := moved_N @ moved_N) > 0:
                return None
            slope = float(moved_N @ (rollout_N - logp_N) / size)
            if abs(slope) < 1e-4:
                break
            beta *= min(2.0, max(0.5, 1 + slope))
            live.actor.temperature = 1 / beta
            scores = live.actor.score(live.samples, record=())
        found = live.actor.temperature
    finally:
        live.actor.temperature = told
    if abs(math.log(found / told)) < _LEAST_CHANGE:
        return None
    trainer = live.seen(None, [s.log_probs for s in scores])
    of = removed(live.base, live.compare(live.as_sampled, trainer), "gap")
    if not _explains(of, len(live.prompts)):
        return None
    by = f"logits divided by {found:.3g} in place of {told:.3g} give the engine's log-probs"
    return finding("other-temperature", of, by)


def weights(live: Live) -> Finding | None:
    """The engine in this process holds other tensors than a twin made from the checkpoint."""
    if not isinstance(live.engine, HFEngine):
        return None
    with live.twin(dtype=str(live.engine.dtype).removeprefix("torch.")) as twin:
        found = tensors.compare(live.engine.model, twin.model, live.engine.num_experts)
        if found is None:
            return None
        after = live.compare(live.whole(twin))
    before = live.compare(live.whole(live.engine))
    of = removed(before, after, _measure(before, "gap" if found.of_head else "routers"))
    kind = "numerics" if found.cause == "fp8" else "fault"
    return finding(found.cause, of, f"{found.says}; with the checkpoint's", kind)


def _measure(before, wished: Measure) -> Measure:
    """The requested measure, if it shows any difference."""
    other: Measure = "gap" if wished == "routers" else "routers"
    shows = before.has(wished) and before.rate(wished)
    return wished if shows or not before.has(other) else other


def given_again(live: Live) -> Finding | None:
    """The difference vanishes once the engine has received the trainer's weights again.

    Not done to the server at a URL, which may serve others too (`reload_refused`), nor where
    `weights` has compared the tensors.
    """
    if isinstance(live.engine, HFEngine) or live.options.engine_url is not None:
        return None
    if not live.actor.layer_ids:
        return None
    before = live.compare(live.whole(live.engine))
    version = live.engine.weight_version + 1
    live.engine.update_weights(live.actor.export_weights(), version=version)
    after = live.compare(live.whole(live.engine))
    of = removed(before, after, "routers")
    if not _explains(of, len(live.prompts)):
        return None
    fell_L = before.by_layer - after.by_layer
    first = int(np.argmax(fell_L > fell_L.max() / 10))
    if first == 0:
        return finding("stale-weights", of, "given the trainer's weights")
    by = (
        f"routes agree before MoE layer {first} (layer {live.actor.layer_ids[first]} of the model) "
        "and from there on do not; given the trainer's weights"
    )
    return finding("half-loaded-weights", of, by)


def head(live: Live) -> Finding | None:
    """The engine's log-probs are those of a head that is the embedding, tied by mistake."""
    if live.actor.hf.tie_word_embeddings or isinstance(live.engine, HFEngine):
        return None
    plain = live.compare(live.as_sampled, live.twin_seen())
    tied = live.compare(live.as_sampled, live.twin_seen(prepare=models.tie_head))
    of = removed(plain, tied, "gap")
    if not _explains(of, len(live.prompts)):
        return None
    return finding("tied-head", of, "a head equal to the embedding gives the engine's log-probs")


def router_dtype(live: Live) -> Finding | None:
    """The sets of an fp32 engine match those of routers that compute in bf16."""
    if live.options.engine_dtype != "float32" or not live.actor.layer_ids:
        return None
    engine = live.whole(live.engine)
    plain = live.compare(engine, live.twin_seen())
    bf16 = live.twin_seen(prepare=lambda model: models.route_in(model, torch.bfloat16))
    of = removed(plain, live.compare(engine, bf16), "routers")
    if not _explains(of, len(live.prompts)):
        return None
    return finding("router-dtype", of, "routers in bf16 give the engine's experts")


LIVE_FAULTS: dict[str, Callable[[Live], Finding | None]] = {
    "tokens": tokens,
    "weights": weights,
    "temperature": temperature,
    "head": head,
    "router-dtype": router_dtype,
    "given-again": given_again,
}


def live_faults(live: Live) -> tuple[list[Finding], dict[str, str]]:
    """The faults found, first causes first, and the tests that could not be made, with the reason.

    It stops at the first fault that explains most of the difference.
    """
    found, not_tried = [], {}
    if live.options.engine_url is not None:
        not_tried["given-again"] = (
            f"the server at {live.options.engine_url} may have others to serve: its weights are "
            "not replaced. Restart it from the checkpoint and run again."
        )
    for name, test in LIVE_FAULTS.items():
        try:
            one = test(live)
        except UserError as error:  # for example, no twin of this model
            not_tried[name] = str(error)
            continue
        if one is not None:
            found.append(one)
            if one.share is None or one.share >= EXPLAINED or one.cause in tensors.CAUSES:
                break
    return found, not_tried
