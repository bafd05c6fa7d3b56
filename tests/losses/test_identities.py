"""Identities between losses, exact ones."""

import dataclasses
import itertools

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    BRANCHES,
    PRESETS,
    PolicyLossConfig,
    RolloutCorrection,
    aggregation_weights,
    gradient_coefficients,
    policy_loss,
)
from moe_upgrpo.losses.config import BASELINES
from tests.losses.batches import ALONE, Batch, random_batch

UP_OF = {name: up for name in BASELINES if (up := "up-" + name.replace("-grpo", "")) in PRESETS}


def run(config: PolicyLossConfig, batch: Batch, **denominators):
    """The result and the gradient of the loss."""
    batch = batch.with_grad()
    result = policy_loss(**batch.arguments(config), **denominators)
    result.loss.backward()
    return result, batch.log_probs.grad


def token_gradient(name: str, batch: Batch) -> torch.Tensor:
    """∂/∂log π of the sum of the per-token losses, before any aggregation."""
    batch = batch.with_grad()
    policy_loss(**batch.arguments(PRESETS[name])).per_token.sum().backward()
    return batch.log_probs.grad


def on_policy(batch: Batch) -> Batch:
    """r ≡ 1, μ = π_old, no router shift."""
    return dataclasses.replace(
        batch,
        log_probs=batch.old_log_probs.clone(),
        rollout_log_probs=batch.old_log_probs.clone(),
        router_current=batch.router_old.clone(),
    )


def test_the_two_forms_of_up_have_one_gradient_and_two_values():
    batch = random_batch(seed=3)
    log_form = PolicyLossConfig.preset("up-grpo")
    ratio_form = PolicyLossConfig.preset("up-grpo", positive="self-ratio")
    (of_log, log_gradient), (of_ratio, ratio_gradient) = (
        run(log_form, batch),
        run(ratio_form, batch),
    )
    torch.testing.assert_close(log_gradient, ratio_gradient, rtol=0, atol=0)
    positive = (batch.advantages > 0) & batch.mask.bool()
    a, lp = batch.advantages[positive], batch.log_probs[positive]
    assert positive.any()
    torch.testing.assert_close(of_log.per_token[positive], -a * lp, rtol=0, atol=0)
    torch.testing.assert_close(of_ratio.per_token[positive], -a, rtol=0, atol=0)


def test_up_positive_gradient_is_that_of_advantage_weighted_sft():
    """On the weights of a softmax layer, against cross-entropy with sample weights A/N."""
    g = torch.Generator().manual_seed(4)
    features = torch.randn(5, 6, 8, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, 11, (5, 6), generator=g)
    advantages = torch.rand(5, 1, generator=g, dtype=torch.float64).expand(5, 6) + 0.1
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1], [3]])
    weight = torch.randn(11, 8, generator=g, dtype=torch.float64, requires_grad=True)

    lp = torch.log_softmax(features @ weight.T, -1).gather(-1, tokens[..., None])[..., 0]
    old = lp.detach() + torch.randn(5, 6, generator=g, dtype=torch.float64)
    loss = policy_loss(lp, old, advantages, mask, config=PRESETS["up-grpo"]).loss
    (up,) = torch.autograd.grad(loss, weight)

    cross_entropy = torch.nn.functional.cross_entropy(
        (features @ weight.T)[mask], tokens[mask], reduction="none"
    )
    (sft,) = torch.autograd.grad((advantages[mask] * cross_entropy).sum() / 16, weight)
    torch.testing.assert_close(up, sft, rtol=1e-12, atol=1e-15)


def test_on_policy_up_grpo_dapo_and_gspo_token_agree_token_by_token():
    batch = on_policy(random_batch(seed=5))
    grpo = token_gradient("grpo", batch)
    torch.testing.assert_close(grpo, -batch.advantages * batch.mask, rtol=0, atol=0)
    for name in ("up-grpo", "dapo", "up-dapo", "gspo-token", "up-gspo-token"):
        torch.testing.assert_close(token_gradient(name, batch), grpo, rtol=1e-14, atol=0)


def test_which_losses_may_serve_under_up_is_data():
    """At r = 1 their negative side has c = 1; the others' has not, or is UP's own or PPO's."""
    assert BASELINES.keys() - UP_OF.keys() == {
        *("hinge-probability", "hinge-root"),  # π_old and 1/2 at r = 1
        *("vapo", "real", "gtpo"),
    }
    batch = on_policy(random_batch(seed=6))
    negative = (batch.advantages < 0) & batch.mask.bool()
    for name, branch in BRANCHES.items():
        config = PolicyLossConfig(positive=name, negative=name, aggregation=branch.aggregations[0])
        c = gradient_coefficients(**batch.arguments(config))[negative]
        # clip-cov takes the gradient of a few, at random
        balanced = bool(torch.isclose(c, torch.ones_like(c)).sum() >= len(c) - 1)
        same_as_another = name in ("log-likelihood", "self-ratio", "topr", "vapo")
        assert branch.up == (balanced and not same_as_another), name


def test_every_pair_of_branches_is_its_two_sides():
    """c of a pair is that of the positive's own loss where A > 0 and the negative's where A < 0;
    a pair without a common aggregation is refused by name."""
    batch = random_batch(seed=12, spread=0.5)
    own = {}
    for name, branch in BRANCHES.items():
        config = PolicyLossConfig(positive=name, negative=name, aggregation=branch.aggregations[0])
        own[name] = gradient_coefficients(**batch.arguments(config))
    for (positive, one), (negative, other) in itertools.product(BRANCHES.items(), repeat=2):
        shared = [a for a in one.aggregations if a in other.aggregations]
        if not shared:
            with pytest.raises(UserError, match=f"with negative '{negative}'"):
                PolicyLossConfig(
                    positive=positive, negative=negative, aggregation=one.aggregations[0]
                )
            continue
        norm = 9.0 if shared[0].endswith("norm") else None
        config = PolicyLossConfig(
            positive=positive, negative=negative, aggregation=shared[0], token_sum_norm=norm
        )
        expected = torch.where(batch.advantages > 0, own[positive], own[negative])
        c = gradient_coefficients(**batch.arguments(config))
        torch.testing.assert_close(c, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "corrected"),
    [
        (name, corrected)
        for name, branch in BRANCHES.items()
        for corrected in (False, True)
        if branch.both is not None and not (corrected and "correction" in branch.refuses)
    ],
)
def test_the_function_of_both_signs_is_that_of_each(name, corrected, monkeypatch):
    """With a correction too, which has weights on the negative side alone."""
    batch, branch = random_batch(seed=12, spread=0.5), BRANCHES[name]
    correction = RolloutCorrection(weight="token-tis" if corrected else "none")
    config = PolicyLossConfig.preset(name, correction=correction)
    (together, gradient) = run(config, batch)
    assert together.metrics  # measured now, of both
    monkeypatch.setitem(BRANCHES, name, dataclasses.replace(branch, both=None))
    (apart, of_each) = run(config, batch)
    torch.testing.assert_close(gradient, of_each, rtol=1e-13, atol=0)
    for of in ("loss", "per_token", "clipped", "gradient_weight"):
        a, b = getattr(together, of), getattr(apart, of)
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    assert of_each.count_nonzero() > 8


def test_up_clip_cov_is_clip_cov_but_for_the_positives_that_it_draws():
    """A third of the tokens may be drawn, so that some of both signs are."""
    batch = on_policy(random_batch(seed=6))
    changes = dict(covariance_share=0.3, covariance_range=(-0.2, 5.0))
    x, up_x = (
        run(PolicyLossConfig.preset(name, **changes), batch) for name in ("clip-cov", "up-clip-cov")
    )
    drawn = x[0].clipped
    positive = batch.advantages > 0
    assert drawn[positive].any() and drawn[~positive].any() and drawn.sum() == 6  # int(.3·22)
    assert torch.equal(up_x[0].clipped, drawn & ~positive)
    kept = ~(drawn & positive)
    torch.testing.assert_close(up_x[1][kept], x[1][kept], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [name for name in UP_OF if name != "clip-cov"])
def test_on_policy_up_x_is_x_across_signs_and_lengths(name):
    """One gradient of the aggregated loss: same scale for both signs and for every length."""
    batch = on_policy(random_batch(seed=6))
    x, up_x = (run(PRESETS[n], batch)[1] for n in (name, UP_OF[name]))
    assert x.count_nonzero() == batch.mask.sum()
    torch.testing.assert_close(up_x, x, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", UP_OF)
def test_off_policy_up_x_keeps_the_negatives_of_x_and_gives_positives_weight_one(name):
    batch = random_batch(seed=7)
    x, up_x = (run(PRESETS[n], batch)[1] for n in (name, UP_OF[name]))
    w_B = aggregation_weights(batch.mask.sum(-1), PRESETS[name].aggregation)
    weight_one = -w_B[:, None] * batch.advantages * batch.mask
    negative = batch.advantages < 0
    torch.testing.assert_close(up_x[negative], x[negative], rtol=0, atol=0)
    torch.testing.assert_close(up_x[~negative], weight_one[~negative], rtol=1e-13, atol=0)
    assert not torch.equal(up_x[~negative], x[~negative])


def test_gamma_zero_is_up_and_gamma_one_is_unclipped_grpo():
    batch = random_batch(seed=8)

    def reshaped(gamma_positive, gamma_negative):
        config = PolicyLossConfig.preset(
            "is-reshape", power_positive=gamma_positive, power_negative=gamma_negative
        )
        return run(config, batch)[1]

    positive = batch.advantages > 0
    up = run(PRESETS["up-grpo"], batch)[1]
    torch.testing.assert_close(reshaped(0.0, 1.0)[positive], up[positive], rtol=0, atol=0)
    unclipped = run(PRESETS["symmetric-ratio"], batch)[1]
    torch.testing.assert_close(reshaped(1.0, 1.0), unclipped, rtol=1e-13, atol=0)
    reinforce = run(PRESETS["reinforce"], batch)[1]
    torch.testing.assert_close(reshaped(0.0, 0.0), reinforce, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALONE)
def test_zero_advantage_contributes_nothing(name):
    """Rows with A = 0 have no loss, gradient or clip, and do not change what the others have."""
    batch = random_batch(seed=9, spread=1.0)
    dead = torch.tensor([0, 3])
    batch.advantages[dead] = 0
    config = PRESETS[name]
    result, gradient = run(config, batch, global_tokens=22, global_sequences=5)
    assert gradient[dead].count_nonzero() == result.per_token[dead].count_nonzero() == 0
    assert not result.clipped[dead].any()
    alive = torch.tensor([1, 2, 4, 5])
    alone, alone_gradient = run(config, batch.rows(alive), global_tokens=22, global_sequences=5)
    torch.testing.assert_close(gradient[alive], alone_gradient, rtol=0, atol=0)
    torch.testing.assert_close(result.loss, alone.loss, rtol=1e-14, atol=0)


def test_gspo_is_gspo_token_where_the_advantage_is_constant():
    wide = dict(clip_low=0.2, clip_high=0.2)
    gspo = PolicyLossConfig.preset("gspo", **wide)
    gspo_token = PolicyLossConfig.preset("gspo-token", **wide)
    batch = random_batch(seed=10, spread=0.1)
    assert not run(gspo, batch)[0].clipped.all()
    torch.testing.assert_close(run(gspo, batch)[1], run(gspo_token, batch)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", ["decoupled", "token-tis", "sequence-tis", "icepop"])
def test_a_correction_is_nothing_when_the_engine_is_the_trainer(weight):
    batch = on_policy(random_batch(seed=11))
    corrected = PolicyLossConfig.preset(
        "grpo", correction=RolloutCorrection(weight=weight, positive=True)
    )
    plain = run(PRESETS["grpo"], batch)[1]
    torch.testing.assert_close(run(corrected, batch)[1], plain, rtol=0, atol=0)
