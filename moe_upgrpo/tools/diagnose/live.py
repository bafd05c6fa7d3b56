# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with engine and trainer, both running here: their views of the same tokens.

A *twin* is the engine of transformers made anew from the trainer's checkpoint, with the settings
that the engine is said to have, or with one of them changed. The engine is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.base import Engine, Rollout
from moe_upgrpo.rollout.engines import EngineWeights
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.tools import pair
from moe_upgrpo.tools.diagnose.differences import Differences, Seen, differences
from moe_upgrpo.tools.diagnose.evidence import Evidence


@dataclass(kw_only=True)
class Live:
    """An engine's responses, and the trainer on the same tokens at the same weights."""

    options: pair.PairOptions
    weights: EngineWeights  # the form in which the engine is said to hold its weights
    actor: MegatronActor
    engine: Engine
    prompts: list[np.ndarray]
    rollouts: list[Rollout]
    samples: list[Sample]
    native: list[Scored] = field(repr=False)

    @property
    def prompt(self) -> list[int]:
        """The prompt that each sequence answers, by number."""
        return [i // self.options.samples for i in range(len(self.samples))]

    @property
    def sequences(self) -> list[np.ndarray]:
        """The tokens of each sequence, prompt and response."""
        return [sample.tokens for sample in self.samples]

    def evidence(self) -> Evidence:
        """Both sides as evidence for the tests that need no model."""
        has_routes = bool(self.actor.layer_ids)
        return Evidence(
            prompt=self.prompt,
            tokens=self.sequences,
            response=[s.response_rows for s in self.samples],
            rollout_routes=[r.routes for r in self.rollouts] if has_routes else None,
            train_routes=_signed(self.native) if has_routes else None,
            logp_rollout=[r.logp_rollout for r in self.rollouts],
            logp_train=[s.log_probs for s in self.native],
            margins=[s.margins for s in self.native] if has_routes else None,
            num_experts=self.actor.num_experts,
            layer_ids=list(self.actor.layer_ids),
            temperature=self.options.temperature,
        )

    @property
    def trainer(self) -> Seen:
        """The trainer's view."""
        return self.seen(
            [s.routes.astype(np.int16) for s in self.native], [s.log_probs for s in self.native]
        )

    @property
    def as_sampled(self) -> Seen:
        """The engine's view as it sampled: token by token, from its cache."""
        return self.seen([r.routes for r in self.rollouts], [r.logp_rollout for r in self.rollouts])

    def seen(self, routes: Sequence[np.ndarray] | None, log_probs: list[np.ndarray] | None) -> Seen:
        """A side's view, from routes of whole sequences and log-probs of the responses."""
        at_responses = None
        if routes is not None and self.actor.layer_ids:
            at_responses = [r[s.response_rows] for r, s in zip(routes, self.samples, strict=True)]
        return Seen(routes=at_responses, log_probs=log_probs)

    def compare(self, first: Seen, second: Seen | None = None) -> Differences:
        """Compare a view with another, by default the trainer's."""
        return differences(
            first,
            self.trainer if second is None else second,
            prompt=self.prompt,
            num_experts=self.actor.num_experts,
        )

    @cached_property
    def base(self) -> Differences:
        """Engine against trainer, as sampled: the difference that is to be explained."""
        return self.compare(self.as_sampled)

    def whole(self, engine: Engine, at_once: int | None = None) -> Seen:
        """An engine's view of whole sequences, each in one pass; transformers' has log-probs."""
        if not isinstance(engine, HFEngine):
            return self.seen(engine.routes(self.sequences) if self.actor.layer_ids else None, None)
        temperature = self.options.temperature
        found = engine.score(self.sequences, temperature=temperature, at_once=at_once)
        log_probs = [
            logp_X[s.response_rows] for (logp_X, _), s in zip(found, self.samples, strict=True)
        ]
        return self.seen([routes for _, routes in found], log_probs)

    def scored(self, actor: MegatronActor, samples: Sequence[Sample] | None = None) -> Seen:
        """A trainer's view of the same sequences, or of others with the same responses."""
        scores = actor.score(samples or self.samples, record=("routes",))
        routes = None if samples else _signed(scores)
        return self.seen(routes, [s.log_probs for s in scores])

    @contextmanager
    def twin(
        self,
        *,
        dtype: str | None = None,
        weights: EngineWeights | None = None,
        prepare: Callable[[PreTrainedModel], None] | None = None,
    ) -> Iterator[HFEngine]:
        """The engine of transformers on the trainer's checkpoint. prepare: changes its model.

        Raises UserError where transformers has no such model, or refuses the change.
        """
        engine = HFEngine(
            self.options.model,
            dtype=dtype or self.options.engine_dtype,
            device=groups.device(),
            weights=weights or self.weights,
        )
        with closing(engine):
            if prepare is not None:
                try:
                    prepare(engine.model)
                except (ValueError, NotImplementedError, ImportError) as error:
                    # transformers refuses what a model or this machine lacks
                    raise UserError(f"transformers: {str(error).splitlines()[0]}") from error
            yield engine

    def twin_seen(self, at_once: int | None = None, **changes) -> Seen:
        """A twin's view of the whole sequences."""
        with self.twin(**changes) as engine:
            return self.whole(engine, at_once=at_once)


def _signed(scores: Sequence[Scored]) -> list[np.ndarray]:
    """Routes in a signed type, which also holds differences of ids, and −1."""
    return [scored.routes.astype(np.int16) for scored in scores]


@contextmanager
def opened(
    options: pair.PairOptions,
    *,
    server_log: Path,
    weights: EngineWeights = "as-trained",
    engine: Engine | None = None,
) -> Iterator[Live]:
    """Start both sides, sample, and score; call it inside `groups.process_groups`.

    engine: one that already runs, and is left open; otherwise the requested one is started.
    """
    actor = pair.start_actor(options)
    prompts = pair.read_prompts(options, actor)
    given = engine is not None
    if engine is None:
        engine = pair.start_engine(options, prompts, server_log=server_log, weights=weights)
    try:
        rollouts, samples = pair.sampled(options, prompts, engine)
        if actor.layer_ids and not rollouts[0].routes.shape[1]:
            raise UserError(
                f"engine={options.engine} returned no routes of a model with experts in layers "
                f"{actor.layer_ids}. Start it with routes (docs/engines.md). Without them the "
                "log-probs can still be asked for temperature, unit and off by one: dump those of "
                "both sides and give --rollout-logp and --train-logp."
            )
        yield Live(
            options=options,
            weights=weights,
            actor=actor,
            engine=engine,
            prompts=prompts,
            rollouts=rollouts,
            samples=samples,
            native=actor.score(samples, record=("routes", "margins", "gates")),
        )
    finally:
        if not given:
            engine.close()
