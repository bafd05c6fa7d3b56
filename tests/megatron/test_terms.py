"""An update with KL and entropy terms, and one whose gradient is taken at other weights.

In every layout: test_layouts.py; the terms themselves: tests/losses/test_terms.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_upgrpo.losses import Context, LossTerms, PolicyLossConfig, policy_loss, token_draws
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample, make_batch
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.megatron.measured import gradients_by_name, make_samples, with_reference, with_routes
from tests.ranks import run_ranks

LOSS = PolicyLossConfig.preset("up-grpo")
TERMS = LossTerms(kl_coef=0.3, kl_estimator="k3", entropy_coef=0.2)


def actor_of(checkpoint, **settings) -> MegatronActor:
    optimizer = OptimizerSettings(**{"algorithm": "sgd", "lr": 0.1, "warmup_steps": 0} | settings)
    return MegatronActor(checkpoint, Layout(), micro_batch_size=3, optimizer=optimizer)


def weights(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in actor.export_weights()}


@pytest.mark.bits
def test_coefficients_of_0_change_no_bit(tiny_checkpoint):
    def stepped(**more):
        actor = actor_of(tiny_checkpoint, algorithm="adam")
        update = actor.update(samples, LOSS, **more)
        return update, dict(actor.export_weights())

    with groups.process_groups(Layout()):
        frozen = MegatronActor(tiny_checkpoint, Layout())
        samples = make_samples()
        plain, expected = stepped()
        samples = with_reference(samples, frozen.score(samples, record=()))
        found, after = stepped(terms=LossTerms(kl_estimator="k1"))
        other, moved = stepped(terms=TERMS)
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert found.grad_norm == plain.grad_norm and found.terms == {}
    # And with terms the policy loss that is reported is still the policy loss alone.
    assert other.loss == plain.loss and {*other.terms} == {"kl", "entropy"}
    assert not all(torch.equal(moved[name], tensor) for name, tensor in expected.items())


def test_the_gradient_of_the_whole_is_its_finite_difference(tiny_checkpoint):
    """Along the gradient itself: the loss falls by its squared norm. The policy loss is left out,
    by advantages of 0, which its own tests hold; routes are replayed, as a flip is no slope."""
    with groups.process_groups(Layout()):
        actor = actor_of(tiny_checkpoint, lr=0.0, clip_grad=0.0)
        samples = [replace(sample, advantage=0.0) for sample in make_samples()]
        native = actor.score(samples, record=("routes",))
        samples = with_routes(with_reference(samples, native), native, lambda routes: routes)
        first = actor.update(samples, LOSS, terms=TERMS)
        squared = sum(g.double().square().sum() for g in gradients_by_name(actor).values())
        along = [p.main_grad.clone() for chunk in actor.chunks for p in chunk.parameters()]
        start, values = actor.weights_now(), []
        step = 1e-3 / squared.sqrt().item()
        for sign in (1, -1):
            at = [w + sign * step * g for w, g in zip(start, along, strict=True)]
            values.append(sum(actor.update(samples, LOSS, terms=TERMS, at=at).terms.values()))
        assert first.loss == 0 and squared.sqrt() == pytest.approx(first.grad_norm, rel=1e-4)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(squared.item(), rel=0.02)


def test_gradients_at_the_old_weights_add_up(tiny_checkpoint):
    """Without momentum, two steps from one policy are the sum of both gradients at it: the
    reference is one step each, from the same start. At moving weights they are not."""
    halves = make_samples()[:4], make_samples()[4:]

    def moved(*batches, fixed):
        actor = actor_of(tiny_checkpoint, clip_grad=0.0)
        start = weights(actor)
        at = actor.weights_now() if fixed else None
        updates = [actor.update(batch, LOSS, at=at) for batch in batches]
        return updates, {name: w - start[name] for name, w in weights(actor).items()}

    with groups.process_groups(Layout()):
        alone = [moved(batch, fixed=False) for batch in halves]
        updates, both = moved(*halves, fixed=True)
        _, moving = moved(*halves, fixed=False)
    off = {True: 0.0, False: 0.0}
    for name, change in both.items():
        expected = alone[0][1][name] + alone[1][1][name]
        scale = max(expected.abs().max().item(), 1e-6)
        off[True] = max(off[True], (change - expected).abs().max().item() / scale)
        off[False] = max(off[False], (moving[name] - expected).abs().max().item() / scale)
    assert off[True] < 1e-3 < 1e-2 < off[False]
    # What is recorded is of the old weights too.
    for ours, (theirs, _) in zip(updates, alone, strict=True):
        for a, b in zip(ours.log_probs, theirs[0].log_probs, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_an_update_at_other_weights_the_policy_goes_on_from_its_own(dtype, tiny_checkpoint):
    """With Adam split over ranks, whose fp32 weights lie elsewhere in bf16: a rate of 0 changes
    nothing, whatever the gradient was taken at."""
    with groups.process_groups(Layout()):
        settings = OptimizerSettings(lr=0.0)
        actor = MegatronActor(tiny_checkpoint, Layout(), dtype=dtype, optimizer=settings)
        before = actor.weights_now()
        update = actor.update(make_samples(), LOSS, at=[1.1 * w for w in before])
        native = actor.update(make_samples(), LOSS)
        assert all(map(torch.equal, actor.weights_now(), before))
    assert update.grad_norm != native.grad_norm


def numbered() -> list[Sample]:
    """Samples in groups of two, one of them of either sign, with weights of their tokens."""
    return [
        replace(
            sample,
            number=i,
            group=i // 2,
            advantage=abs(sample.advantage) * (-1 if i in (1, 2, 6, 7) else 1),
            token_weights=np.cos(sample.old_log_probs) ** 2,
        )
        for i, sample in enumerate(make_samples())
    ]


def batch_losses(checkpoint, micro_batch_size: int) -> list:
    """Tokens that updates clip, their weights and scores, on this data-parallel rank."""
    with groups.process_groups(Layout()):
        rank, ranks = groups.data_parallel()
        mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        settings = OptimizerSettings(lr=0.0)
        actor = MegatronActor(
            checkpoint, Layout(), micro_batch_size=micro_batch_size, optimizer=settings
        )
        samples = numbered()
        found, forwards = [], []
        score = actor.score
        actor.score = lambda *args, **named: forwards.append(1) or score(*args, **named)
        for loss in BATCH_LOSSES:
            before = len(forwards)
            update = actor.update(samples[mine], loss, seed=5)
            # beside the update's own, for statistics of the policy alone
            assert len(forwards) - before == loss.statistics_of_policy, loss
            scored = actor.score(samples[mine], record=())
            found.append((update.clipped, update.gradient_weight, scored))
        return found


def preset(name: str, **changes) -> PolicyLossConfig:
    return PolicyLossConfig.preset(name, **changes)


# Wide enough ranges and shares that a batch of 8 sequences has tokens on either side.
BATCH_LOSSES = [
    preset("clip-cov", covariance_range=(0.0, 99.0), covariance_share=0.2, clip_high=None),
    preset("up-kl-cov", covariance_share=0.3),
    preset("grpo", top_entropy=0.5, clip_low=None, dual_clip=None),
    preset("real"),
    preset("vapo"),
    preset("gtpo"),
]


@pytest.mark.parametrize(("ranks", "size"), [(1, 6), (2, 2)])
def test_what_looks_at_the_whole_batch_does_in_every_split(ranks, size, tiny_checkpoint):
    """Against `policy_loss` of the batch as one, in padded tensors of the test's own."""
    parts = run_ranks(ranks, batch_losses, tiny_checkpoint, size)
    samples = numbered()
    batch = make_batch(samples)
    for i, loss in enumerate(BATCH_LOSSES):
        clipped, weight, scored = (
            [x for part in parts for x in part[i][kind]] for kind in range(3)
        )
        log_probs, entropy = torch.zeros(2, *batch.mask_BS.shape)
        for b, (sample, one) in enumerate(zip(samples, scored, strict=True)):
            log_probs[b, sample.response_rows] = torch.from_numpy(one.log_probs)
            entropy[b, sample.response_rows] = torch.from_numpy(one.entropy)
        whole = policy_loss(
            log_probs,
            batch.old_log_probs_BS,
            batch.advantages_BS,
            batch.mask_BS,
            config=loss,
            rollout_log_probs=batch.rollout_log_probs_BS,
            context=Context(
                entropy=entropy,
                draws=token_draws(5, torch.arange(8), len(entropy[0])),
                groups=torch.arange(8) // 2,
                token_weights=batch.token_weights_BS,
            ),
        )
        cut = 0
        for b, sample in enumerate(samples):
            rows = whole.clipped[b, sample.response_rows].numpy()
            assert np.array_equal(clipped[b], rows), (loss, b)
            expected = whole.gradient_weight[b, sample.response_rows].numpy()
            np.testing.assert_allclose(weight[b], expected, rtol=1e-3, atol=1e-7)
            cut += rows.sum()
        assert whole.gradient_weight.count_nonzero() > 8
        assert loss.negative in ("kl-cov", "real", "gtpo") or 0 < cut < batch.mask_BS.sum()
