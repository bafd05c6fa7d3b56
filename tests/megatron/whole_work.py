"""An actor's whole work on one batch, measured in any layout and held to one process.

Scores and records, updates with routes to replay and a loss that draws for its tokens and looks at
the whole mini-batch, gradient, metrics, one step, and a replay of its own routes.
"""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from moe_upgrpo.losses import PolicyLossConfig, merge_metrics
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.tap import RECORDS
from moe_upgrpo.train.analysis import trainer_noise_floor
from tests.megatron.compare import assert_close, in_order
from tests.megatron.measured import ADAM_AS_SGD, NO_STEP, gradients_by_name, make_samples

LOSSES = ("up-grpo", "clip-cov")
FIELDS = ("log_probs", "entropy", "routes", "own_routes", "margins", "gates")


def long_ones_first() -> list:
    """The longer half, then the shorter, either in rising order."""
    made = sorted(make_samples(), key=lambda sample: len(sample.tokens))
    return [replace(sample, number=i) for i, sample in enumerate(made[4:] + made[:4])]


def held(samples, scored, experts: int):
    """Every other one with routes to replay: expert sets that no router would choose."""
    return [
        replace(s, routes=(one.routes + 3) % experts) if i % 2 else s
        for i, (s, one) in enumerate(zip(samples, scored, strict=True))
    ]


def measure(layout: Layout, checkpoint, **limit) -> dict:
    """On a rank: scores, updates, gradients; which sequences it computed."""
    with groups.process_groups(layout):
        dp_rank, dp_size = groups.data_parallel()
        share = len(make_samples()) // dp_size
        mine = long_ones_first()[dp_rank * share : (dp_rank + 1) * share]
        actor = MegatronActor(checkpoint, layout, optimizer=NO_STEP, **limit)
        native = actor.score(mine, record=RECORDS)
        found = {"dp_rank": dp_rank, "scored": {"native": native}, "update": {}, "gradient": {}}
        batch = held(mine, native, actor.num_experts)
        found["scored"]["held"] = actor.score(batch, record=RECORDS)
        found["again"] = actor.score(mine, record=RECORDS)
        own = [
            replace(sample, routes=one.routes[:, :, ::-1])
            for sample, one in zip(mine, native, strict=True)
        ]
        found["own"] = actor.score(own, record=RECORDS)
        for loss in LOSSES:
            found["update"][loss] = actor.update(
                batch, PolicyLossConfig.preset(loss), record=RECORDS, seed=5
            )
            found["gradient"][loss] = gradients_by_name(actor)
        work = actor._work(mine, actor.limit)
        found["computed"] = [sample.number for sample in work.samples]
        found["shapes"] = [tuple(inputs.tokens_BS.shape) for inputs in work.inputs]
        trained = MegatronActor(checkpoint, layout, optimizer=ADAM_AS_SGD, **limit)
        trained.update(batch, PolicyLossConfig.preset("up-grpo"))
        found["step"] = {name: tensor.clone() for name, tensor in trained.export_weights()}
        if groups.world_size() == 1:
            with mock.patch.object(actor, "score", wraps=actor.score) as score:
                found["noise"] = trainer_noise_floor(actor, mine).sums
            found["sizes"] = [call.kwargs.get("micro_batch_size") for call in score.mock_calls]
        return found


def assert_own_routes_change_no_bit(ranks: list[dict]) -> None:
    """Replayed, with the ids of each row in another order."""
    for rank in ranks:
        for a, b in zip(rank["own"], rank["scored"]["native"], strict=True):
            assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def copies(ranks: list[dict]) -> list[dict]:
    """One rank of each copy of the model."""
    return [*{rank["dp_rank"]: rank for rank in ranks}.values()]


def assert_equals(ranks: list[dict], expected: dict) -> None:
    for kind, of_one in expected["scored"].items():
        found = in_order(ranks, lambda rank, k=kind: rank["scored"][k])
        for a, e in zip(found, of_one, strict=True):
            for field in FIELDS:
                assert getattr(a, field).shape == getattr(e, field).shape
                np.testing.assert_allclose(getattr(a, field), getattr(e, field), rtol=0, atol=1e-5)
    for loss, update in expected["update"].items():
        for field in ("log_probs", "clipped", "gradient_weight"):
            found = in_order(ranks, lambda rank, x=loss, f=field: getattr(rank["update"][x], f))
            for a, e in zip(found, getattr(update, field), strict=True):
                assert a.dtype == e.dtype
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
        for a, e in zip(
            in_order(ranks, lambda rank, x=loss: rank["update"][x].scored),
            update.scored,
            strict=True,
        ):
            assert np.array_equal(a.routes, e.routes)
        of_copies = [rank["update"][loss] for rank in copies(ranks)]
        assert sum(one.loss for one in of_copies) == pytest.approx(update.loss, rel=1e-4, abs=1e-5)
        metrics = merge_metrics([one.metrics for one in of_copies])
        assert metrics.keys() == update.metrics.keys()
        for name, metric in update.metrics.items():
            assert metrics[name] == pytest.approx(metric, rel=1e-4, abs=1e-5), name
        for rank in ranks:
            assert_close(rank["gradient"][loss], expected["gradient"][loss])
            norm = rank["update"][loss].grad_norm
            assert norm == pytest.approx(update.grad_norm, rel=1e-5)
    for rank in ranks:
        assert_close(rank["step"], expected["step"])
