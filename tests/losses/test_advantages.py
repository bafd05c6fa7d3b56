"""Advantages, dynamic sampling, overlong shaping by hand; KL estimators against the exact KL."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    ADVANTAGES,
    advantage_sums,
    dynamic_sampling,
    group_advantages,
    informative_groups,
    kl_estimate,
    overlong_penalty,
)

# two groups of 4: mean .25, std with n−1 = sqrt((.5625 + 3·.0625)/3) = .5; and all equal
REWARDS = torch.tensor([1.0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", [0.75 / 0.500001, *[-0.25 / 0.500001] * 3]),
        ("dr-grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1 - 0, *[0 - 1 / 3] * 3]),
    ],
)
def test_group_advantages(kind, expected):
    advantages = group_advantages(REWARDS, 4, kind)
    assert advantages[:4].tolist() == pytest.approx(expected, rel=1e-12)
    assert advantages[4:].tolist() == [0.0] * 4


def test_equal_rewards_give_exactly_zero():
    """The mean of eight .1 is not .1 in float32: left alone, its rounding becomes an advantage."""
    rewards = torch.full((8,), 0.1)
    assert (rewards - rewards.mean()).count_nonzero() == 8
    assert group_advantages(rewards, 8).count_nonzero() == 0


def test_integer_rewards():
    assert group_advantages(torch.tensor([1, 0]), 2, "rloo").tolist() == [1.0, -1.0]


# Two groups of 4, with token counts; p = .25 and .75
BINARY = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1], dtype=torch.float64)
LENGTHS = torch.tensor([3, 1, 2, 2, 4, 1, 1, 2])


def beta_density(x: float, a: float, b: float) -> float:
    return math.gamma(a + b) / (math.gamma(a) * math.gamma(b)) * x ** (a - 1) * (1 - x) ** (b - 1)


# p̄ = .5, v = 2·.25² = .125 (P−1 = 1): a = b = (.25/.125 − 1)·.5 = .5, α = β = 7/6
INVERSE = 1 / beta_density(0.25, 7 / 6, 7 / 6)
# 16 tokens, Σ = 3 + 4 + 1 + 2 = 10: mean .625; var 10·.375²+6·.625² = 3.75, /15 = .25
WHITE = 1 / math.sqrt(0.25 + 1e-8)
# R − group mean: .75·3 − .25·5 | .25·7 − .75 = 2: mean .125; Σx² = 9/16·4 + 1/16·12 = 3
SIGMA = 1 / math.sqrt((3 - 16 * 0.125**2) / 15 + 1e-8)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("maxrl", [3, -1, -1, -1, 1 / 3, 1 / 3, -1, 1 / 3]),
        ("pass-at-k", [1 / 0.5, *[0] * 7]),  # the second group has three best
        # baselines 3/8 and 7/8
        ("opo", [0.625, *[-0.375] * 3, 0.125, 0.125, -0.875, 0.125]),
        # 8 responses of which 4 have a reward: α = 2
        ("gpg", [1.5, *[-0.5] * 3, 0.5, 0.5, -1.5, 0.5]),
        ("bnpo", [x * INVERSE for x in (0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25)]),
        ("reinforce++", [x * WHITE for x in (0.375, *[-0.625] * 3, 0.375, 0.375, -0.625, 0.375)]),
        (
            "reinforce++-baseline",
            [(x - 0.125) * SIGMA for x in (0.75, *[-0.25] * 3, 0.25, 0.25, -0.75, 0.25)],
        ),
    ],
)
def test_the_stacks_estimators(kind, expected):
    found = group_advantages(BINARY, 4, kind, lengths=LENGTHS)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_gdpo_weighs_each_reward_in_its_group():
    """Group 0: both rewards have std .5, the sum of the first and −2 times the second."""
    second = torch.tensor([0.0, 1, 0, 0, 5, 5, 5, 5], dtype=torch.float64)  # the last says nothing
    found = group_advantages(
        torch.stack([BINARY, second]), 4, "gdpo", lengths=LENGTHS, reward_weights=(1, -2)
    )
    unit = 1 / 0.500001
    raw = [(0.75 + 0.5) * unit, (-0.25 - 1.5) * unit, *[0.25 * unit] * 2]
    raw += [0.25 * unit, 0.25 * unit, -0.75 * unit, 0.25 * unit]
    tokens = [x for x, n in zip(raw, LENGTHS.tolist(), strict=True) for _ in range(n)]
    mean, std = statistics.mean(tokens), statistics.stdev(tokens)
    assert found.tolist() == pytest.approx([(x - mean) / std for x in raw], rel=1e-6)


@pytest.mark.parametrize("kind", [name for name, one in ADVANTAGES.items() if one.sums])
def test_the_ranks_share_of_the_batch(kind):
    """Each rank's advantages are the batch's, with the sums added up; without them they are not."""
    g = torch.Generator().manual_seed(3)
    rewards = torch.randint(0, 2, (2, 24), generator=g).double() * torch.tensor([[1.0], [0.5]])
    rewards = rewards if ADVANTAGES[kind].several else rewards[0]
    lengths = torch.randint(0, 9, (24,), generator=g)
    whole = group_advantages(rewards, 4, kind, lengths=lengths)
    shares = [(rewards[..., a:b], lengths[a:b]) for a, b in ((0, 8), (8, 24))]
    total = sum(advantage_sums(r, 4, kind, lengths=n) for r, n in shares)
    joined = torch.cat(
        [group_advantages(r, 4, kind, lengths=n, batch_sums=total) for r, n in shares]
    )
    torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)
    alone = torch.cat([group_advantages(r, 4, kind, lengths=n) for r, n in shares])
    assert not torch.allclose(alone, whole)


def test_kinds_that_look_at_a_group_have_no_sums():
    assert advantage_sums(BINARY, 4, "rloo") is None


def test_bnpo_of_one_prompt_or_of_equal_rates_is_the_centred_reward():
    assert group_advantages(BINARY[:4], 4, "bnpo").tolist() == [0.75, -0.25, -0.25, -0.25]
    twice = torch.cat([BINARY[:4], BINARY[:4]])
    assert group_advantages(twice, 4, "bnpo")[:4].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_bnpo_of_prompts_that_are_all_wrong_or_all_right():
    """p = 0, 1 and four times .5: p̄ = .5, v = .5/5, α = β = 1 + 1.5·.5/3; f is 0 at 0 and 1."""
    rewards = torch.tensor([0.0, 0, 1, 1, *[1, 0] * 4], dtype=torch.float64)
    found = group_advantages(rewards, 2, "bnpo").tolist()
    scaled = 0.5 / beta_density(0.5, 1.25, 1.25)
    assert found == pytest.approx([0, 0, 0, 0, *[scaled, -scaled] * 4], rel=1e-6)


def test_gpg_of_no_reward_is_nothing():
    assert group_advantages(torch.zeros(8), 4, "gpg").tolist() == [0] * 8


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("opo", dict(lengths=None), "lengths: None given, and kind 'opo' needs the tokens"),
        ("opo", dict(lengths=torch.ones(4)), r"lengths: shape \(4,\) given; allowed: \(8,\)"),
        ("opo", dict(lengths=-torch.ones(8)), "0 or more"),
        ("gdpo", {}, r"rewards: shape \(8,\) given with kind 'gdpo'; allowed: \[K, N\]"),
        ("grpo", dict(rewards=torch.zeros(2, 8)), r"allowed: \[N\] \(several .* gdpo\)"),
        (
            "gdpo",
            dict(rewards=torch.zeros(2, 8), reward_weights=(1.0,)),
            "reward_weights: 1 given for 2 kinds of reward",
        ),
        ("bnpo", dict(rewards=BINARY * 2), "rewards: from 0 to 2 given .* allowed: from 0 to 1"),
        ("maxrl", dict(rewards=BINARY - 1), "allowed: from 0 to inf"),
        ("rlo", {}, r"kind: 'rlo' given; .*\(nearest: rloo"),
    ],
)
def test_what_an_estimator_needs(kind, changes, says):
    arguments = {"rewards": BINARY, "lengths": LENGTHS, **changes}
    with pytest.raises(UserError, match=says):
        group_advantages(group_size=4, kind=kind, **arguments)


@pytest.mark.parametrize(
    ("rewards", "size", "kind", "says"),
    [
        (torch.zeros(6), 4, "grpo", "group_size 4"),
        (torch.zeros(4), 1, "grpo", "group_size 1"),
        (torch.zeros(0), 2, "grpo", "N > 0"),
        (torch.zeros(2, 2), 2, "grpo", r"shape \(2, 2\)"),
        (torch.zeros(1, 1, 2), 2, "gdpo", r"shape \(1, 1, 2\)"),
        (torch.tensor([1.0, math.nan]), 2, "grpo", "rewards: NaN"),
        (torch.zeros(4), 2, "gae", "'gae' given; allowed: grpo, dr-grpo, rloo"),
    ],
)
def test_bad_rewards(rewards, size, kind, says):
    with pytest.raises(UserError, match=says):
        group_advantages(rewards, size, kind)


def test_informative_groups():
    assert informative_groups(REWARDS, 4).tolist() == [True, False]


def test_dynamic_sampling_draws_until_it_has_enough():
    batches = iter(
        [
            [("a", [1, 1]), ("b", [0, 1])],
            [("c", [0, 0]), ("d", [0, 0])],
            [("e", [1, 0]), ("f", [0, 1])],
        ]
    )
    kept = dynamic_sampling(lambda: next(batches), groups=2, max_batches=5)
    assert kept == [("b", [0, 1]), ("e", [1, 0])]


def test_dynamic_sampling_is_bounded():
    calls = []

    def hopeless():
        calls.append(1)
        return [("a", [1.0, 1.0])]

    with pytest.raises(UserError, match="max_batches: 3 gave 0 groups"):
        dynamic_sampling(hopeless, groups=1, max_batches=3)
    assert len(calls) == 3
    with pytest.raises(UserError, match="groups, max_batches: 0, 3"):
        dynamic_sampling(hopeless, groups=0, max_batches=3)


@pytest.mark.fault(
    "Numbers",
    "a response beyond the longest allowed",
    "the penalty has DAPO's floor",
)
def test_overlong_penalty():
    """L_max 20, buffer 4, by eq. 13 of DAPO: free up to 16, −1 from 20 on, whatever is beyond."""
    lengths = torch.tensor([0, 16, 17, 18, 20, 22, 4000])
    assert overlong_penalty(lengths, 20, 4).tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert overlong_penalty(lengths, 20, 4, factor=2).tolist() == [0, 0, -0.5, -1, -2, -2, -2]
    assert overlong_penalty(lengths, 20, 4, factor=0).count_nonzero() == 0
    for dtype in (torch.uint8, torch.int16, torch.float64):
        narrow = overlong_penalty(lengths[:6].to(dtype), 20, 4)
        assert narrow.tolist() == [0, 0, -0.25, -0.5, -1, -1]
    for buffer in (0, 21):
        with pytest.raises(UserError, match=f"buffer: {buffer} given"):
            overlong_penalty(lengths, 20, buffer)
    for factor in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=f"factor: {factor} given; allowed: a finite number"):
            overlong_penalty(lengths, 20, 4, factor)


def test_kl_by_hand():
    """π = .5, π_ref = .25: d = −ln 2; k1 = ln 2, k2 = (ln 2)²/2, k3 = .5 + ln 2 − 1."""
    lp, ref = torch.tensor([0.5]).double().log(), torch.tensor([0.25]).double().log()
    ln2 = math.log(2)
    for kind, value in (("k1", ln2), ("k2", ln2**2 / 2), ("k3", 0.5 + ln2 - 1)):
        assert kl_estimate(lp, ref, kind).item() == pytest.approx(value, rel=1e-12)


def test_k1_and_k3_are_unbiased_and_the_gradient_of_k2_is_the_kls():
    """Exact expectations over a categorical of 5; the gradient of E_π[k2], its samples fixed."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1)
    lp = logits.log_softmax(-1)
    p = lp.exp()
    kl = (p * (lp - ref)).sum()
    for kind in ("k1", "k3"):
        assert (p * kl_estimate(lp, ref, kind)).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    expectation = (p.detach() * kl_estimate(lp, ref, "k2")).sum()
    (estimated,) = torch.autograd.grad(expectation, logits)
    torch.testing.assert_close(estimated, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.fault(
    "Numbers",
    "k3 beyond 20 nats",
    "a gradient of the right sign",
)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@settings(deadline=None)
@given(st.floats(-2000, 0), st.floats(-2000, 0), st.sampled_from(["float32", "float64"]))
def test_the_gradient_of_a_kl_estimate_has_the_sign_of_its_derivative(kind, current, ref, dtype):
    """d/dlog π: 1; log π − log π_ref; 1 − π_ref/π, in Python's floats. Never of the other sign."""
    lp = torch.tensor([current], dtype=getattr(torch, dtype), requires_grad=True)
    ref = torch.tensor([ref], dtype=lp.dtype)
    kl_estimate(lp, ref, kind).sum().backward()
    gap = lp.item() - ref.item()
    exact = {"k1": 1.0, "k2": gap, "k3": -math.expm1(min(-gap, 700.0))}[kind]
    found = lp.grad.item()
    assert math.isfinite(found) and found * exact >= 0
    if exact and abs(exact) > 1e-6:
        assert found * exact > 0
    if gap > -20:
        assert found == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_k3_goes_on_along_its_tangent_beyond_20_nats():
    """At d = 20 + x: e^20 − 21 + x·(e^20 − 1); the slope in log π is 1 − e^20 from there on."""
    d = torch.tensor([19.0, 20, 20.5, 30, 1000], dtype=torch.float64)
    lp = (-d).requires_grad_()
    k3 = kl_estimate(lp, torch.zeros(5, dtype=torch.float64))
    (slope,) = torch.autograd.grad(k3.sum(), lp)
    e20 = 485165195.40979
    values = [math.exp(19) - 20, *(e20 - 21 + x * (e20 - 1) for x in (0, 0.5, 10, 980))]
    assert k3.tolist() == pytest.approx(values, rel=1e-12)
    assert slope.tolist() == pytest.approx([1 - math.exp(19), *[1 - e20] * 4], rel=1e-12)


def test_kl_extremes_and_bad_input():
    lp = torch.tensor([-1e3, -1.0], requires_grad=True)
    k3 = kl_estimate(lp, torch.tensor([-1.0, -1e3]), "k3")
    k3.sum().backward()
    assert k3.isfinite().all() and lp.grad.isfinite().all()
    with pytest.raises(UserError, match="'k4' given; allowed: k1, k2, k3"):
        kl_estimate(lp, lp, "k4")
    with pytest.raises(UserError, match=r"ref_log_probs: shape \(3,\) given; allowed: \(2,\)"):
        kl_estimate(lp, torch.zeros(3))
