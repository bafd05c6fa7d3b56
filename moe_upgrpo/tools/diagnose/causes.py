# SPDX-License-Identifier: Apache-2.0
"""The causes that can be named, as data: what each says and what to do about it."""

from __future__ import annotations

from moe_upgrpo.tools.diagnose.evidence import Cause
from moe_upgrpo.tools.diagnose.model_causes import MODEL_CAUSES

_R3 = "--replay R3"
_DIAGNOSE = "moe-upgrpo diagnose --model CHECKPOINT --prompts FILE"


def _of(name: str, says: str, remedy: str, command: str | None = None) -> Cause:
    return Cause(name=name, says=says, remedy=remedy, command=command)


CAUSES: dict[str, Cause] = {
    cause.name: cause
    for cause in (
        # Faults that routes show.
        _of(
            "transposed-axes",
            "the axes of one side's routes are in another order",
            "write both sides as [sequences, tokens, layers, top-k]",
            "numpy.moveaxis, where the routes are recorded",
        ),
        _of(
            "mtp-routers",
            "one side records routers at its end that the other has not, as those of multi-token "
            "prediction are",
            "leave the routers of multi-token prediction and draft models out of the record",
            "moe-upgrpo patch list",
        ),
        _of(
            "orphan-routers",
            "one side records a router that has no counterpart on the other",
            "match routers by their layer's number: look for a decoder that is built twice, dense "
            "layers that are counted, or a hook on another module",
            "moe-upgrpo doctor --stack NAME",
        ),
        _of(
            "other-top-k",
            "the two sides record another number of experts for each token",
            "leave shared experts out of the record, and give engine and trainer the same top-k",
        ),
        _of(
            "padding-side",
            "one side's sequences are padded at the beginning and the other's at the end",
            "take the padding off by each side's own mask before rows are joined",
        ),
        _of(
            "overflowed-ids",
            "ids of experts do not fit the type in which one side records them",
            "record ids as int16",
            "routes.astype(numpy.int16)",
        ),
        _of(
            "local-ids",
            "one side counts its experts within a rank of expert parallelism",
            "add the first expert's number of the rank to its ids",
        ),
        _of(
            "zero-filled-rows",
            "one side's record has rows that were never written",
            "look for tokens that its recorder does not see: a prefix cache, chunked prefill, "
            "speculative or preempted tokens; do not replay such rows",
            "moe-upgrpo doctor --stack NAME",
        ),
        _of(
            "row-off-by-one",
            "one side's rows belong to the token before or after",
            "join row p − 1 to the token at position p: S tokens have S − 1 rows "
            "(docs/mismatch.md, The row join)",
            "routes[1:] or routes[:-1] of the side that has a row more",
        ),
        _of(
            "rows-shifted",
            "one side's rows belong to tokens further on or back",
            "count the tokens that one side has and the other has not, such as those of a chat "
            "template or a special token at the beginning",
        ),
        _of(
            "rows-of-some-sequences-shifted",
            "rows of some sequences belong to other tokens, from the beginning or from some row on",
            "look at the lengths by which rows are cut into sequences, and for rows that are lost "
            "where a request is preempted or a turn begins",
        ),
        _of(
            "extra-rows",
            "one side has more rows of a sequence than the other",
            "cut both to S − 1 rows for S tokens, as the last sampled token needs none; where more "
            "are missing, record the same whole sequences on both sides",
            "routes[: len(tokens) - 1]",
        ),
        _of(
            "layer-order",
            "the layers of one side are in another order",
            "sort routers by their layer's number: pipeline stages and virtual stages give them in "
            "another",
        ),
        _of(
            "layer-offset",
            "the layers of one side are counted from another one",
            "count MoE layers alone on both sides: dense layers at the beginning shift the numbers",
        ),
        _of(
            "experts-permuted",
            "the experts of one side have other numbers",
            "map experts by the checkpoint's names: expert parallelism, redundant experts and "
            "shared experts give them other numbers",
        ),
        _of(
            "wrong-pairing",
            "sequences are held against the routes of other sequences",
            "carry routes with their sequence through every sort, shuffle and balancing of the "
            "batch",
        ),
        _of(
            "repeated-rows",
            "one side's record holds old rows again",
            "copy the buffer before the next step writes it, and clear it between requests",
            "moe-upgrpo doctor --stack NAME",
        ),
        _of(
            "half-loaded-weights",
            "from some layer on the two sides have other weights",
            "hand over all layers at each update: look at names that the engine skips, and at the "
            "expert mapping of the last pipeline stage",
            _DIAGNOSE,
        ),
        _of(
            "unrelated-tokens",
            "the two sides' records belong to other tokens",
            "compare records of the same prompts and responses: what is said of one side alone, "
            "such as rows that were never written, still holds",
        ),
        _of(
            "unrelated-sequences",
            "some sequences' records belong to other tokens",
            "look at how those sequences were generated: aborted, resumed or truncated requests",
        ),
        _of(
            "other-weights",
            "the two sides do not compute the same model",
            "give both the same checkpoint, and look at what the engine reports as loaded",
            _DIAGNOSE,
        ),
        _of(
            "not-rounding",
            "experts are exchanged at large margins too, which rounding does not do",
            "compare the two sides on the checkpoint, one knob at a time",
            _DIAGNOSE,
        ),
        # Faults that log-probs show.
        _of(
            "constant-log-probs",
            "log-probs of one side were never written",
            "look for tokens for which the engine gives none, and leave them out of the loss",
        ),
        _of(
            "log-probs-off-by-one",
            "one side's log-probs belong to the token before or after",
            "shift labels by one on one side only: the logits at position p − 1 are those of the "
            "token at p",
        ),
        _of(
            "log-prob-unit",
            "one side's log-probs are in another unit",
            "take natural logarithms of single tokens on both sides",
        ),
        _of(
            "other-temperature",
            "the two sides' log-probs are of another temperature",
            "divide the trainer's logits by the sampling temperature, and let the engine give "
            "log-probs after it",
            "--temperature T; vLLM: logprobs_mode=processed_logprobs",
        ),
        _of(
            "truncated-sampling",
            "one side's log-probs are of a truncated distribution",
            "sample with top-p 1 and without top-k, or take the log-probs before truncation",
            "top_p=1.0, top_k=-1",
        ),
        _of(
            "replay-not-used",
            "the replayed routes reach no router of the trainer",
            "look for a fused router, a hook that is not called or a patch that is missing",
            "moe-upgrpo patch list",
        ),
        _of(
            "stale-weights",
            "tokens were sampled with older weights",
            "expected where generation overlaps with training; correct for it, or give the engine "
            "each update",
            "--correction.weight token-tis",
        ),
        # No faults.
        _of(
            "near-ties",
            "experts that nearly tie are exchanged by rounding",
            "nothing is wrong: replay the engine's routes if the gap matters, or raise the "
            "precision of the router",
            _R3,
        ),
        _of(
            "top-k-ties",
            "experts that tie exactly are chosen in another order",
            "break ties alike on both sides, or raise the precision of the router",
            _R3,
        ),
        _of(
            "carried-on",
            "experts exchanged in earlier layers and tokens change what later routers see",
            "replay the engine's routes, which takes these and their cause away",
            _R3,
        ),
        _of(
            "not-repeatable",
            "a side differs from itself in two equal passes",
            "switch on the side's deterministic kernels",
            "--deterministic",
        ),
        _of(
            "batch-shape",
            "a side differs from itself in batches of another shape",
            "expected of kernels that choose by the batch's size; replay the engine's routes",
            _R3,
        ),
        _of(
            "arithmetic",
            "the same experts give other log-probs by rounding",
            "raise the engine's precision, or correct for what is left",
            "--correction.weight token-tis",
        ),
        _of(
            "engine-routing",
            "the engine's other experts move the log-prob",
            "replay the engine's routes",
            _R3,
        ),
        _of(
            "update",
            "the update moves the log-prob, as it should",
            "fewer or smaller optimizer steps on a batch, if it is too much",
            "--minibatches",
        ),
        _of(
            "routing-shift",
            "the update moves tokens to other experts",
            "hold the update to the old policy's routes",
            "--replay R2",
        ),
        *MODEL_CAUSES,
    )
}
