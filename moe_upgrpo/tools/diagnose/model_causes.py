# SPDX-License-Identifier: Apache-2.0
"""The causes that a model shows: faults of the engine's weights, and the knobs."""

from __future__ import annotations

from moe_upgrpo.tools.diagnose.evidence import Cause

_R3 = "--replay R3"

MODEL_CAUSES: tuple[Cause, ...] = (
    Cause(
        name="other-tokens",
        says="the engine answers other token ids than the trainer scores",
        remedy="hand over token ids in place of text, or tokenize on both sides with one tokenizer "
        "and chat template",
    ),
    Cause(
        name="tied-head",
        says="the engine's head is its embedding and the trainer's is a matrix of its own",
        remedy="set tie_word_embeddings in the config.json that the engine reads as the trainer's",
        command='"tie_word_embeddings": false',
    ),
    Cause(
        name="other-head",
        says="the engine's head is not the trainer's",
        remedy="hand over lm_head at each update; a vocabulary that is padded or split over ranks "
        "needs all of its parts",
    ),
    Cause(
        name="fp8",
        says="the engine's weights are rounded to FP8",
        remedy="serve the weights as trained, or replay the engine's routes and correct for the "
        "rest",
        command=_R3,
    ),
    Cause(
        name="engine-dtype",
        says="the engine computes in a lower precision",
        remedy="sample in float32 where a run can pay for it, or replay the engine's routes",
        command=_R3,
    ),
    Cause(
        name="trainer-dtype",
        says="the trainer computes in a lower precision",
        remedy="train in float32, or with more of the model in float32",
        command="--dtype float32",
    ),
    Cause(
        name="router-dtype",
        says="the engine's routers compute in a lower precision",
        remedy="let the engine's routers compute in float32, as the trainer's do, or replay the "
        "engine's routes",
        command=_R3,
    ),
    Cause(
        name="prefill-decode",
        says="the engine differs from itself between decoding and prefilling the same tokens",
        remedy="switch off the prefix cache and chunked prefill, or replay the engine's routes",
        command=_R3,
    ),
    Cause(
        name="engine",
        says="the engine computes otherwise than transformers at the same precision",
        remedy="look at its attention and MoE backends, one at a time",
        command="moe-upgrpo doctor",
    ),
    Cause(
        name="experts-backend",
        says="the engine's products of experts are rounded otherwise",
        remedy="choose another MoE backend of the engine",
    ),
    Cause(
        name="attention-kernel",
        says="the engine's attention is rounded otherwise",
        remedy="choose another attention backend of the engine",
    ),
)
