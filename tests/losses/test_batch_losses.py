"""Losses and factors that look at the whole batch, by hand on the batch of test_hand.py.

    A    π               r             log π − mean         (A − 0)·(log π − mean)
    +2   .4  .45         2   1.125     .3269 .4447          .6539  .8895
    −1   .1  .2  .4      .25 .5  1     −1.0594 −.3662 .3269 1.0594 .3662 −.3269
    −1   .4              4             .3269                −.3269

The mean of A is 0, that of log π is −1.243234.
"""

import math

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    BRANCHES,
    Context,
    PolicyLossConfig,
    RolloutCorrection,
    batch_statistics,
    gradient_coefficients,
    policy_loss,
)
from tests.losses.test_hand import INPUTS, LOG_PI, A, log_probs, padded

ln = math.log


def preset(name: str, **changes) -> PolicyLossConfig:
    return PolicyLossConfig.preset(name, **changes)


# name -> config, context, per-token loss, −∂/∂log π before the aggregation's weight
CASES = {
    # int(.34·6) = 2 tokens pay |Δ|: ln 1.125 and ln 4, the second for having become less likely
    "kl-cov": (
        preset("kl-cov", covariance_share=0.34),
        {},
        [[-4, -2.25 + ln(1.125)], [0.25 + ln(4), 0.5, 1], [4]],
        [[4, 2.25 - 1], [-0.25 + 1, -0.5, -1], [-4]],
    ),
    # the dual clip of the negative side is off; .25 is below .3, and so not up for the draw. Of
    # .6539, .8895 and .3662 the draws .1 and .5 are taken
    "clip-cov": (
        preset(
            "clip-cov",
            clip_low=0.7,
            clip_high=1.5,
            covariance_share=0.34,
            covariance_range=(0.3, 2),
        ),
        dict(draws=padded([[0.9, 0.1], [0, 0.5, 0], [0]])),
        [[-4, 0], [0.3, 0, 1], [4]],
        [[4, 0], [0, 0, -1], [-4]],
    ),
    # −.1·(6 tokens/2 positives)·log π beside PPO's, which cuts r = 2 at 1.28
    "vapo": (
        preset("vapo"),
        {},
        [[-2.56 - 0.3 * ln(0.4), -2.25 - 0.3 * ln(0.45)], [0.8, 0.8, 1], [3]],
        [[0.3, 2.25 + 0.3], [0, 0, -1], [0]],
    ),
    "gtpo": (
        preset("gtpo"),
        dict(token_weights=padded([[2, 1], [0, 1, 0.5], [1]])),
        [[-4, -2], [0, 1, 0.5], [1]],
        [[4, 2], [0, -1, -0.5], [-1]],
    ),
    # entropies 1 … 6 and their quantile 1 − .5: 3.5
    "top entropy": (
        preset("symmetric-ratio", top_entropy=0.5),
        dict(entropy=padded([[1, 4], [2, 6, 3], [5]])),
        [[0, -2.25], [0, 0.5, 0], [4]],
        [[0, 2.25], [0, -0.5, 0], [-4]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    config, context, per_token, pull = CASES[name]
    current = log_probs()
    arguments = dict(**INPUTS, config=config, context=Context(**context))
    result = policy_loss(current, **arguments)
    torch.testing.assert_close(result.per_token, padded(per_token))
    result.per_token.sum().backward()
    torch.testing.assert_close(current.grad, -padded(pull))
    c = [[x / a for x in row] for a, row in zip(A, pull, strict=True)]
    torch.testing.assert_close(gradient_coefficients(current, **arguments), padded(c))


@pytest.mark.parametrize(
    ("groups", "loss", "pull"),
    [
        # s = ln 1.5 | ln .5 | ln 4 over τ = .5: e^(−s/τ) = 4/9, e^(s/τ) = .25 and 16
        (
            [0, 0, 0],
            ln(13 / 9) + ln(17.25),
            [[-4 / 13] * 2, [2 * 0.25 / 17.25 / 3] * 3, [32 / 17.25]],
        ),
        ([7, 7, 3], (ln(13 / 9) + ln(1.25)) / 2, [[-2 / 13] * 2, [0.2 / 3] * 3, [0]]),
        ([0, 1, 1], 0.0, [[0, 0], [0, 0, 0], [0]]),  # no group has both signs
    ],
)
def test_real(groups, loss, pull):
    current = log_probs()
    context = Context(groups=torch.tensor(groups))
    result = policy_loss(current, **INPUTS, config=preset("real"), context=context)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(current.grad, padded(pull))


def test_an_empty_response_is_none_of_reals_group():
    """The loss of the first case above, with a fourth row that has no token in it."""
    current, *rows = (torch.cat([x, x[:1]]) for x in (log_probs().detach(), *INPUTS.values()))
    given = dict(zip(INPUTS, rows, strict=True))
    given["mask"][3] = False
    context = Context(groups=torch.zeros(4, dtype=torch.int64))
    loss = policy_loss(current, **given, config=preset("real"), context=context).loss
    assert loss.item() == pytest.approx(ln(13 / 9) + ln(17.25), rel=1e-12)


def test_real_is_the_stacks_formula():
    """An independent transcription of ms-swift's, on equal groups: logsumexp with a zero."""
    g = torch.Generator().manual_seed(5)
    old = -torch.rand(8, 5, generator=g, dtype=torch.float64)
    lp = (old + torch.randn(8, 5, generator=g, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2, 4, 5, 2, 3])[:, None]
    signs = torch.tensor([1.0, -1, -1, 1, -1, -1, -1, -1], dtype=torch.float64)
    total = 0.0
    for first in (0, 4):
        scores = ((lp - old) * mask).sum(-1)[first : first + 4] / mask.sum(-1)[first : first + 4]
        right = signs[first : first + 4] > 0
        if right.any():
            zero = torch.zeros(1, dtype=torch.float64)
            total = total + torch.cat([scores[~right] / 0.5, zero]).logsumexp(0)
            total = total + torch.cat([-scores[right] / 0.5, zero]).logsumexp(0)
    expected = total / 2
    advantages = signs[:, None].expand(8, 5)
    context = Context(groups=torch.arange(8) // 4)
    found = policy_loss(lp, old, advantages, mask, config=preset("real"), context=context).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (mine,) = torch.autograd.grad(found, lp)
    (theirs,) = torch.autograd.grad(expected, lp)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-16)


def test_ipo_is_the_stacks_formula():
    """An independent transcription of prime-rl's default loss, whose ratio is to μ."""
    g = torch.Generator().manual_seed(6)
    old = -2 * torch.rand(6, 7, generator=g, dtype=torch.float64)
    lp = old + 0.5 * torch.randn(6, 7, generator=g, dtype=torch.float64)
    lp = lp.clamp(max=-0.01).requires_grad_()
    advantages = torch.randn(6, 7, generator=g, dtype=torch.float64)
    moved = lp.exp() - old.exp()
    invalid = torch.where(advantages > 0, moved > 0.2, moved < -0.2)
    log_ratio = lp - old
    per_token = -(~invalid).double() * advantages * log_ratio.exp() + 1e-3 * log_ratio.square()
    mask = torch.ones(6, 7)
    found = policy_loss(lp, old, advantages, mask, config=preset("ipo"))
    torch.testing.assert_close(found.per_token, per_token, rtol=1e-12, atol=1e-15)
    (mine,) = torch.autograd.grad(found.loss, lp)
    (theirs,) = torch.autograd.grad(per_token.mean(), lp)
    assert invalid.any()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-16)


def test_fipo_weighs_by_the_discounted_future():
    """An independent transcription of ms-swift's `_compute_fipo_influence`, as a double loop."""
    g = torch.Generator().manual_seed(7)
    old = -2 * torch.rand(4, 9, generator=g, dtype=torch.float64)
    lp = old + 0.8 * torch.randn(4, 9, generator=g, dtype=torch.float64)
    signs = torch.tensor([[1.0], [-1], [-1], [1]], dtype=torch.float64).expand(4, 9)
    config = preset("fipo", clip_low=None, clip_high=None, dual_clip=3.5, influence_safety=2.0)
    mask = torch.arange(9) < torch.tensor([9, 7, 9, 1])[:, None]
    c = gradient_coefficients(lp, old, signs, mask, config=config)
    for b, t in mask.nonzero().tolist():
        future = 0.0
        for k in range(t, int(mask[b].sum())):
            delta = float(lp[b, k] - old[b, k])
            future += 2 ** (-(k - t) / 32) * (delta if math.exp(delta) <= 3.5 else 0.0)
        weight = min(max(math.exp(future), 1.0), 1.2)
        r = math.exp(lp[b, t] - old[b, t])
        if signs[b, t] < 0 and r > 2:
            weight = min(max(weight, 0.8), 1.0)
        kept = signs[b, t] > 0 or r <= 3.5
        assert c[b, t].item() == pytest.approx(weight * r if kept else 0.0, rel=1e-12)


# ρ = .25 1 3 | 2 2, as in test_correction.py; (log ρ)² = 1.92 0 1.21 | .48 .48
RHO = torch.tensor([[0.25, 1.0, 3.0], [2.0, 2.0, 1.0]], dtype=torch.float64)
TOKENS = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        # means from the smallest on: 0 .24 .32 .54 .82: below .33 three stay
        (dict(m2=0.33), [[0, 1, 0], [1, 1, 0]]),
        (dict(m2=0.3), [[0, 1, 0], [0, 0, 0]]),  # two of equal value go together
        (dict(m2=0.9), [[1, 1, 1], [1, 1, 0]]),  # nothing is above it
        (dict(m2=1e-9), [[0, 1, 0], [0, 0, 0]]),
        (dict(outlier=2.5), [[0, 0, 0], [1, 1, 0]]),  # the first sequence has a 3
        (dict(weight="token-mask"), [[0, 1, 0], [1, 1, 0]]),
        (dict(weight="sequence-mask"), [[1, 1, 1], [0, 0, 0]]),  # products .75 and 4
        # π_old = .2, μ = .8 .2 .0667 | .1 .1. KL(.2‖.8) = .8 ln 4 − .2 ln 4 = .83;
        # .2 ln 3 + .8 ln(.8/.9333) = .0964 and .0667 ln(1/3) + .9333 ln(.9333/.8) = .0706;
        # .2 ln 2 + .8 ln(.8/.9) = .0444 and .1 ln .5 + .9 ln(.9/.8) = .0367
        (dict(binary_kl=0.09), [[0, 1, 0], [1, 1, 0]]),
        (dict(binary_kl=0.1), [[0, 1, 1], [1, 1, 0]]),
        (dict(binary_kl=0.04), [[0, 1, 0], [0, 0, 0]]),
    ],
)
def test_what_a_correction_keeps(fields, kept):
    old = torch.full((2, 3), ln(0.2), dtype=torch.float64)
    config = preset("reinforce", correction=RolloutCorrection(positive=True, **fields))
    c = gradient_coefficients(
        old, old, torch.ones_like(old), TOKENS, config=config, rollout_log_probs=old - RHO.log()
    )
    assert c.tolist() == kept


# A token keeps ρ where its entropy is 3 or more, the median; mean(log μ − log π) of the sequences
# is −ln(.75)/3 = .096 and −ln 2.
@pytest.mark.parametrize(
    ("limit", "expected", "clipped"),
    [
        (None, [[0, 1, 3], [0, 2, 0]], [[1, 0, 0], [1, 0, 0]]),
        (0.09, [[0, 0, 0], [0, 2, 0]], [[1, 1, 1], [1, 0, 0]]),
        (0.1, [[0, 1, 3], [0, 2, 0]], [[1, 0, 0], [1, 0, 0]]),
    ],
)
def test_factors_together_are_their_product(limit, expected, clipped):
    old = torch.full((2, 3), ln(0.2), dtype=torch.float64)
    arguments = dict(
        log_probs=old.clone().requires_grad_(),
        old_log_probs=old,
        advantages=-torch.ones_like(old),
        mask=TOKENS,
        rollout_log_probs=old - RHO.log(),
        context=Context(entropy=torch.tensor([[1, 5, 3], [2, 4, 9]]).double()),
        config=preset(
            "reinforce",
            top_entropy=0.5,
            off_policy_limit=limit,
            correction=RolloutCorrection(weight="decoupled"),
        ),
    )
    result = policy_loss(**arguments)
    result.loss.backward()
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(gradient_coefficients(**arguments), wanted)
    torch.testing.assert_close(arguments["log_probs"].grad, wanted / 5)
    assert result.clipped.int().tolist() == clipped


def test_sequence_mask_tis_is_the_weight_with_geometric_bounds():
    """NeMo-RL's seq-mask-tis: ρ untruncated, exp(mean log ρ) within bounds."""
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    correction = RolloutCorrection(weight="decoupled", geometric=(0.9, 1.1), positive=True)
    c = gradient_coefficients(
        old,
        old,
        torch.ones_like(old),
        TOKENS,
        config=preset("reinforce", correction=correction),
        rollout_log_probs=old - RHO.log(),
    )
    assert c[0].tolist() == pytest.approx([0.25, 1, 3]) and c[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", [n for n, b in BRANCHES.items() if b.statistics is not None])
def test_statistics_change_with_the_policy_where_the_branch_says_so(name):
    draws = padded([[0.9, 0.1], [0, 0.5, 0], [0]])
    context = Context(draws=draws, groups=torch.tensor([0, 0, 1]))
    found = [
        batch_statistics(lp, **INPUTS, config=preset(name), context=context)
        for lp in (log_probs().detach(), log_probs().detach() * 2)
    ]
    assert found[0] and (found[0] != found[1]) == preset(name).statistics_of_policy


def test_statistics_are_those_that_the_config_reads():
    lp, draws = log_probs().detach(), padded([[0.9, 0.1], [0, 0.5, 0], [0]])
    context = Context(draws=draws, entropy=padded([[1, 4], [2, 6, 3], [5]]))

    def names(config: PolicyLossConfig) -> set[str]:
        return set(batch_statistics(lp, **INPUTS, config=config, context=context))

    assert names(preset("up-gspo")) == set()
    assert names(preset("clip-cov")) == {"mean_advantage", "mean_log_prob", "draw_limit"}
    assert names(preset("grpo", top_entropy=0.2)) == {"entropy_limit"}
    found = batch_statistics(lp, **INPUTS, config=preset("kl-cov"))
    assert (
        found["mean_log_prob"].item()
        == pytest.approx(sum(map(sum, LOG_PI)) / 6)
        == pytest.approx(-1.243234, abs=1e-6)
    )
    assert found["covariance_limit"].item() == pytest.approx(1.059351, abs=1e-6)


NEEDS = {
    "clip-cov": ("draws", "'clip-cov' needs it"),
    "gtpo": ("token_weights", "'gtpo' needs it"),
    "real": ("groups", r"'real' needs it; allowed: \[B\], one integer"),
}


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("context", [None, Context()])
def test_what_a_loss_needs_is_named(name, context):
    field, says = NEEDS[name]
    assert field in preset(name).arguments
    for call in (policy_loss, gradient_coefficients, batch_statistics):
        with pytest.raises(UserError, match=f"context.{field}: None given, and {says}"):
            call(log_probs(), **INPUTS, config=preset(name), context=context)


def test_the_context_is_checked():
    config = preset("grpo", top_entropy=0.5)
    with pytest.raises(UserError, match=r"entropy: None given, and top_entropy = 0\.5 needs it"):
        policy_loss(log_probs(), **INPUTS, config=config)
    with pytest.raises(UserError, match=r"entropy: shape \(3, 2\) given; allowed: \(3, 3\)"):
        context = Context(entropy=torch.zeros(3, 2))
        policy_loss(log_probs(), **INPUTS, config=config, context=context)
    with pytest.raises(UserError, match="entropy: nan given at sequence 0, position 0"):
        context = Context(entropy=torch.full((3, 3), math.nan))
        policy_loss(log_probs(), **INPUTS, config=config, context=context)
    with pytest.raises(UserError, match=r"context.groups: shape \(2,\) given; allowed: \(3,\)"):
        context = Context(groups=torch.zeros(2))
        policy_loss(log_probs(), **INPUTS, config=preset("real"), context=context)
    for other in (preset("kl-cov"), preset("vapo"), config):
        with pytest.raises(UserError, match=r"statistics: m2_limit given, and the loss reads .*"):
            context = Context(entropy=torch.zeros(3, 3), statistics={"m2_limit": 1.0})
            policy_loss(log_probs(), **INPUTS, config=other, context=context)
    # What the loss does not look at is not read.
    policy_loss(log_probs(), **INPUTS, config=preset("grpo"), context=Context(entropy=None))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("vespo", dict(correction=RolloutCorrection(weight="token-tis")), "correction: .* 'vespo'"),
        ("real", dict(off_policy_limit=0.1), "off_policy_limit: 0.1 given with positive 'real'"),
        ("real", dict(top_entropy=0.2), "top_entropy: 0.2 given .* allowed with log-likelihood"),
        ("vapo", dict(aggregation="seq-mean-token-mean"), "allowed with positive 'vapo': token-m"),
        ("gspo", dict(correction=RolloutCorrection(m2=0.04)), "correction.m2: 0.04 given"),
        ("grpo", dict(covariance_range=(2.0, 1.0)), r"covariance_range: \(2.0, 1.0\) given"),
        ("dro", dict(dro_beta=0.0), "dro_beta: 0.0 given"),
        ("grpo", dict(negative="gspoo"), r"negative: 'gspoo' .*\(nearest: gspo"),
    ],
)
def test_undefined_combinations(name, changes, says):
    with pytest.raises(UserError, match=says):
        preset(name, **changes)
    assert set(BRANCHES["real"].refuses) == {"correction", "off_policy_limit", "top_entropy"}


def test_unknown_names_list_the_nearest():
    with pytest.raises(UserError, match=r"preset: 'up-vesp' .*\(nearest: up-vespo"):
        preset("up-vesp")
    with pytest.raises(UserError, match=r"correction.weight: 'tokentis' .*\(nearest: token-tis"):
        RolloutCorrection(weight="tokentis")
