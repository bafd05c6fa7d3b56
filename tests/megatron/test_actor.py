"""Refusals of the actor. That it computes rightly: test_layouts.py."""

import gc
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.utils import get_model_config

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import actor as actor_module
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample, make_batch
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.megatron.tap import Visit
from tests.megatron.measured import gradients_by_name
from tests.ranks import run_ranks

VALUES = np.full(3, -1.0, np.float32)
SAMPLE = Sample(
    tokens=np.array([5, 6, 7, 8, 9]),
    prompt_length=2,
    old_log_probs=VALUES,
    rollout_log_probs=VALUES,
    advantage=1.0,
)
LOSS = PolicyLossConfig.preset("up-grpo")


def broken_update(layout: Layout, checkpoint) -> tuple[str, bool, bool]:
    """The error of an update with a NaN weight; whether weights changed; and with it mended."""
    with groups.process_groups(layout):
        actor = MegatronActor(checkpoint, layout, optimizer=OptimizerSettings())
        weights = dict(actor.chunks[-1].module.named_parameters())
        head = weights.get("output_layer.weight", torch.zeros(0, 1))
        with torch.no_grad():
            head[7:8] = float("nan")  # every softmax is then NaN
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with pytest.raises(UserError) as error:
            actor.update([SAMPLE], LOSS)

        def changed() -> bool:
            return not all(
                torch.equal(weight.nan_to_num(), before[name].nan_to_num())
                for name, weight in weights.items()
            )

        after_error = changed()
        with torch.no_grad():
            head[7:8] = 0.1
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        actor.update([SAMPLE], LOSS)  # and it is the log-prob that stopped it
        return str(error.value), after_error, changed()


def norms_without_marks(layout: Layout, checkpoint, algorithm: str) -> tuple[float, float]:
    """The gradient norm of a step whose modules marked nothing, or all; and from the gradients."""
    with groups.process_groups(layout), pytest.MonkeyPatch.context() as patch:

        def build(*args):
            chunks = build_model(*args)
            for i, parameter in enumerate(p for chunk in chunks for p in chunk.parameters()):
                parameter.tensor_model_parallel = True
                if i % 2:
                    del parameter.tensor_model_parallel
            return chunks

        patch.setattr(actor_module, "build_model", build)
        settings = OptimizerSettings(algorithm=algorithm, lr=0, warmup_steps=0, clip_grad=0)
        actor = MegatronActor(checkpoint, layout, optimizer=settings)
        seen = actor.update([SAMPLE], LOSS)
        gradients = {}
        if algorithm == "sgd":  # Adam's split buffers hold the sum of a part only
            gradients = gradients_by_name(actor)
        return seen.grad_norm, float(
            sum(g.double().square().sum() for g in gradients.values())
        ) ** 0.5


@pytest.mark.parametrize(
    ("checkpoint", "layout"),
    [
        ("tiny", Layout(tp=2, ep=2)),
        ("dense", Layout(tp=2)),
        ("moonlight", Layout(tp=2, ep=2)),
    ],
    ids=str,
)
def test_the_gradient_norm_does_not_depend_on_the_marks_of_modules(checkpoint, layout, checkpoints):
    folder = checkpoints[checkpoint]
    ranks = run_ranks(2, norms_without_marks, layout, folder, "sgd")
    ((one, from_gradients),) = run_ranks(1, norms_without_marks, Layout(), folder, "sgd")
    assert from_gradients > 0.1 and one == pytest.approx(from_gradients, rel=1e-5)
    for norm, whole in ranks + run_ranks(2, norms_without_marks, layout, folder, "adam"):
        assert norm == pytest.approx(from_gradients, rel=1e-5)
        assert whole in (0, pytest.approx(from_gradients, rel=1e-5))


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_a_log_prob_that_is_not_finite_stops_the_update_before_any_weight_changes(
    layout, tiny_checkpoint
):
    """On every rank, also on the stages that never see a log-prob."""
    for message, after_error, after_mend in run_ranks(
        layout.pp, broken_update, layout, tiny_checkpoint
    ):
        assert "position 2" in message and "nan" in message and "were not changed" in message
        assert not after_error and after_mend


@pytest.fixture
def actor(tiny_checkpoint):
    with groups.process_groups(Layout()):
        yield MegatronActor(
            tiny_checkpoint,
            Layout(),
            micro_batch_size=1,
            optimizer=OptimizerSettings(algorithm="sgd"),
            recompute="full",
        )


@pytest.mark.parametrize("trains", [True, False])
def test_an_actor_that_is_given_up_leaves_neither_weights_nor_threads(trains, tiny_checkpoint):
    """Megatron's gradient hooks, left alone, keep both to the end of the process."""
    optimizer = OptimizerSettings() if trains else None

    def left_by_one() -> int:
        with groups.process_groups(Layout()):
            actor = MegatronActor(tiny_checkpoint, Layout(), optimizer=optimizer)
            if trains:
                actor.update([SAMPLE], LOSS)
            weights = weakref.ref(actor.chunks[0])
            assert len(os.listdir("/proc/self/task")) > 40  # gloo's
        del actor
        gc.collect()
        assert weights() is None
        return len(os.listdir("/proc/self/task"))

    # One group of them all stays in torch after an update: three threads.
    assert left_by_one() + 3 >= left_by_one()


def test_no_samples_is_an_error(actor):
    with pytest.raises(UserError, match="No samples"):
        actor.score([])


def test_what_cannot_be_recorded_is_refused_by_name(actor):
    with pytest.raises(UserError, match=r"\['logits'\]: use any of routes, margins, gates"):
        actor.score([SAMPLE], record=("routes", "logits"))


@pytest.mark.parametrize("shape", [(5, 2, 2), (4, 1, 2), (4, 2, 3), (4, 0, 0)])
def test_routes_of_another_shape_are_refused(shape, actor):
    with pytest.raises(UserError, match=r"takes \(4, 2, 2\) \(tokens − 1, MoE layers, experts"):
        actor.score([replace(SAMPLE, routes=np.zeros(shape, np.int16))])


def test_other_kinds_of_recomputation_are_refused(actor, tiny_checkpoint):
    with pytest.raises(UserError, match="recompute='selective': use one of none, full"):
        MegatronActor(tiny_checkpoint, Layout(), recompute="selective")


def test_nothing_is_recorded_where_nothing_is_asked_for(actor):
    (scored,) = actor.score([SAMPLE], record=())
    assert scored.routes.shape == (4, 0, 0) and scored.own_routes is scored.routes
    assert scored.margins is None and scored.gates is None
    assert actor.update([SAMPLE], LOSS).scored is None
    with pytest.raises(UserError, match=r"record=\['scores'\]: use any of routes, margins, gates"):
        actor.update([SAMPLE], LOSS, record=("scores",))


@pytest.mark.bits
def test_without_old_log_probs_the_old_policy_is_the_one_that_the_update_starts_from(
    tiny_checkpoint,
):
    """A ratio of 1 and the gradient that old log-probs from a forward before would have given."""
    with groups.process_groups(Layout()):
        settings = OptimizerSettings(algorithm="sgd", lr=0.0, clip_grad=0.0)
        actor = MegatronActor(tiny_checkpoint, Layout(), optimizer=settings)
        (before,) = actor.score([SAMPLE], record=())
        grpo = PolicyLossConfig.preset("grpo")
        given = actor.update([replace(SAMPLE, old_log_probs=before.log_probs)], grpo)
        own = actor.update([replace(SAMPLE, old_log_probs=None)], grpo)
        stale = actor.update([SAMPLE], grpo)
    assert own.grad_norm == given.grad_norm != stale.grad_norm
    assert own.loss == given.loss == -1.0  # the mean of -advantage x ratio
    assert np.array_equal(own.log_probs[0], before.log_probs)
    with pytest.raises(ValueError, match="Some samples have old log-probs"):
        make_batch([SAMPLE, replace(SAMPLE, old_log_probs=None)])


def test_a_recomputation_that_did_not_happen_is_an_error(actor):
    get_model_config(actor.chunks[0]).recompute_granularity = None
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] did not run once forward and 1 times"):
        actor.update([SAMPLE], LOSS)


def test_a_recomputation_in_the_wrong_micro_batch_is_an_error_that_names_the_routers(
    actor, monkeypatch
):
    """The planted fault: whatever is recomputed gets the routes of the first micro-batch."""
    first = []

    def backward_of(visit: Visit, output):
        first.append(visit)
        output.register_hook(first[0]._begin_backward)

    monkeypatch.setattr(Visit, "backward_of", backward_of)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] .*micro-batch 0.*\{0: \(1, 2\)"):
        actor.update([SAMPLE, SAMPLE], LOSS)


@pytest.mark.bits
def test_a_dense_model_has_no_routes_and_that_is_no_error(checkpoints):
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoints["dense"], Layout())
        assert (actor.layer_ids, actor.top_k, actor.num_experts) == ([], 0, 0)
        (scored,) = actor.score([SAMPLE], record=("routes", "margins", "gates"))
        assert scored.routes.shape == scored.own_routes.shape == scored.gates.shape == (4, 0, 0)
        assert scored.margins.shape == (4, 0)
        (replayed,) = actor.score([replace(SAMPLE, routes=scored.routes)])
        assert np.array_equal(replayed.log_probs, scored.log_probs)
        with pytest.raises(UserError, match=r"this model takes \(4, 0, 0\)"):
            actor.score([replace(SAMPLE, routes=np.zeros((4, 2, 2), np.int16))])


@pytest.mark.bits
@pytest.mark.parametrize("frozen", ["router", "nothing"])
def test_frozen_routers_stay_and_the_rest_trains_as_before(frozen, tiny_checkpoint):
    """One SGD step without clipping: every other weight moves as it does with trained routers."""

    def after(settings: OptimizerSettings) -> dict[str, torch.Tensor]:
        with groups.process_groups(Layout()):
            actor = MegatronActor(tiny_checkpoint, Layout(), optimizer=settings)
            before = {n: w.clone() for n, w in actor.export_weights()}
            actor.update([SAMPLE], LOSS)
            return {n: w.clone() - before[n] for n, w in actor.export_weights()}

    settings = OptimizerSettings(algorithm="sgd", lr=0.1, warmup_steps=0, clip_grad=0.0)
    free, held = after(settings), after(replace(settings, frozen=frozen))
    routers = {name for name in free if name.endswith("mlp.gate.weight")}
    assert len(routers) == 2 and all(free[name].abs().max() > 0 for name in routers)
    for name, moved in held.items():
        if name in routers and frozen == "router":
            assert torch.equal(moved, torch.zeros_like(moved))
        else:
            assert torch.equal(moved, free[name]), name
