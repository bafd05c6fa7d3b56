"""OTB, GTPO's weights, NTHR's factors, draws and the early stop: by hand and by transcription."""

import importlib
import math

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    finalize_metrics,
    gtpo_weights,
    merge_metrics,
    nthr_factors,
    optimal_token_baseline,
    ratio_deviation,
    stops_early,
    token_draws,
)


def test_otb_is_verls():
    """Σπ² of random distributions; a group whose longest response is longer than the others."""
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 1, 2, 5, 4, 4, 1, 0])
    mask = (torch.arange(5) < lengths[:, None]).double()
    pi = torch.rand(8, 5, 11, generator=g, dtype=torch.float64)
    pi = pi / pi.sum(-1, keepdim=True)
    rewards = torch.rand(8, generator=g, dtype=torch.float64)
    rho = 0.5 + torch.rand(8, 5, generator=g, dtype=torch.float64)
    scores = torch.zeros_like(mask).scatter(
        1, (lengths[:, None] - 1).clamp(min=0), rewards[:, None]
    )
    for weights in (None, rho):
        theirs, _ = core_algos.compute_optimal_token_baseline_advantage(
            scores,
            mask,
            np.repeat([0, 1], 4),
            pi[..., 0].log(),
            pi.square().sum(-1),
            rollout_is_weights=weights,
        )
        mine = optimal_token_baseline(
            rewards, 4, pi[..., 0].log(), mask, pi.square().sum(-1), rollout_weights=weights
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert mine[3, 4] == rewards[3]  # alone at its end
    with pytest.raises(UserError, match=r"sum_pi_squared: shape \(8, 4\) given; allowed: \(8, 5\)"):
        optimal_token_baseline(rewards, 4, pi[..., 0].log(), mask, torch.zeros(8, 4))
    with pytest.raises(UserError, match="groups of 3 given"):
        optimal_token_baseline(rewards, 3, pi[..., 0].log(), mask, pi.square().sum(-1))


# One group of four: two right, one wrong, one without an advantage.
IDS = torch.tensor([[1, 2, 3, 9, 0], [1, 7, 7, 3, 9], [1, 2, 9, 0, 0], [1, 2, 3, 9, 0]])
LENGTHS = torch.tensor([4, 5, 3, 4])
MASK = torch.arange(5) < LENGTHS[:, None]
ADVANTAGES = torch.tensor([1.0, 1.0, -2.0, 0.0], dtype=torch.float64)


def test_gtpo_by_hand():
    """1 2 of row 0 are in row 2 at the same place, and in row 1 the 1 alone. From the end 9 is in
    all three; before it stand 3, 3 and 2. Three conflict tokens in rows 0 and 2, two in row 1."""
    found = gtpo_weights(IDS, ADVANTAGES, MASK, 4)
    expected = [
        [2 / 3, 2 / 3, 1 / 3, 2 / 3, 0],
        [1, 0.5, 0.5, 0.5, 1],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0],
    ]
    torch.testing.assert_close(found.token_weights, torch.tensor(expected, dtype=torch.float64))
    assert found.advantages is ADVANTAGES


def test_gtpo_counts_a_token_from_both_ends_twice():
    """Two equal responses: every token is a conflict from the start and from the end: 2·2/3."""
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    found = gtpo_weights(ids, torch.tensor([1.0, -1.0]), torch.ones(2, 3), 2)
    assert found.token_weights[0].tolist() == pytest.approx([4 / 3] * 3)
    assert found.token_weights[1].tolist() == [0, 0, 0]


def test_gtpo_takes_entropy_off_the_advantage():
    entropy = torch.tensor([0.5, 0.71, 0.7, 0.2], dtype=torch.float64)
    found = gtpo_weights(IDS, ADVANTAGES, MASK, 4, entropy)
    assert found.advantages.tolist() == pytest.approx([0.95, 0, -2.07, -0.02])


def test_gtpo_refuses_a_gap():
    with pytest.raises(UserError, match="mask: a gap given"):
        gtpo_weights(IDS, ADVANTAGES, MASK.roll(1, -1), 4)


def test_nthr_by_hand():
    """H = V = 1: M = Σ g·h of the right responses = 1·1 + 1·2 = 3, s = 3·g·h; s̄ of the right one
    (3 + 6)/2 = 4.5. Of the wrong ones' s = 6, 4.5, −3 and 3 only the first is above."""
    hidden = torch.tensor([[1.0, 2], [2, 1.5], [1, 1]])[..., None]
    residuals = torch.tensor([[1.0, 1], [1, 1], [-1, 1]])[..., None]
    right = torch.tensor([True, False, False])
    found = nthr_factors(hidden, residuals, right, torch.ones(3, 2))
    eta = 2 * abs(0.5 - 1 / 3)
    assert found.flatten().tolist() == pytest.approx([1, 1, eta, 1, 1, 1])
    lower = nthr_factors(hidden, residuals, right, torch.ones(3, 2), beta=0.5, eta=0.0)
    assert lower.tolist() == [[1, 1], [0, 0], [1, 0]]  # 2.25 is the limit
    hidden_tail = torch.tensor([[1, 1], [1, 0], [1, 1]])  # what is masked counts for nothing
    assert nthr_factors(hidden, residuals, right, hidden_tail)[1, 1] == 1
    for of_one_sign in (torch.ones(3), torch.zeros(3)):
        assert nthr_factors(hidden, residuals, of_one_sign.bool(), torch.ones(3, 2)).eq(1).all()


def test_nthr_names_what_it_needs():
    with pytest.raises(UserError, match="hidden: None given, and NTHR needs it"):
        nthr_factors(None, torch.ones(3, 2, 1), torch.ones(3).bool(), torch.ones(3, 2))
    with pytest.raises(UserError, match=r"residuals: \(3, 1, 1\) given"):
        nthr_factors(
            torch.ones(3, 2, 1), torch.ones(3, 1, 1), torch.ones(3).bool(), torch.ones(3, 2)
        )
    with pytest.raises(UserError, match=r"positive: shape \(2,\) given"):
        nthr_factors(
            torch.ones(3, 2, 1), torch.ones(3, 2, 1), torch.ones(2).bool(), torch.ones(3, 2)
        )


def test_draws_are_a_tokens_own_and_uniform():
    rows = torch.arange(200)
    draws = token_draws(7, rows, 300)
    assert torch.equal(token_draws(7, rows[50:60], 300), draws[50:60])
    assert torch.equal(token_draws(7, rows, 100), draws[:, :100])
    assert not torch.equal(token_draws(8, rows, 300), draws)
    assert draws.min() >= 0 and draws.max() < 1 and len(draws.unique()) == draws.numel()
    counts = torch.histc(draws, 20, 0, 1)
    # Chi-squared with 19 degrees of freedom: above 43.8 once in a thousand.
    assert ((counts - 3000) ** 2 / 3000).sum() < 43.8
    for first, second in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        both = torch.stack([first.flatten(), second.flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 4 / math.sqrt(both.shape[1])


def test_the_mixing_is_splitmix64s():
    """Its first numbers from the state 0, as published with the algorithm."""
    per_token = importlib.import_module("moe_upgrpo.losses.per_token")
    zero = torch.zeros(1, dtype=torch.int64)
    first = int(per_token._mixed(zero)) % 2**64
    assert first == 0xE220A8397B1DCDAF


def test_early_stop():
    """|r − 1| = 1, 0, .1 and, behind the mask, 1e9: mean .3667, median .1."""
    old = torch.zeros(2, 2)
    lp = torch.tensor([[2.0, 1.0], [1.1, 1e9]]).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    assert stops_early(lp, old, mask) and not stops_early(lp, old, mask, limit=0.37)
    assert not stops_early(lp, old, mask, statistic="median")
    assert stops_early(lp, old, mask, statistic="median", limit=0.09)
    parts = [
        {"ratio_mean": ratio_deviation(lp[i : i + 1], old[i : i + 1], mask[i : i + 1])}
        for i in range(2)
    ]
    assert finalize_metrics(merge_metrics(parts))["ratio_mean"] == pytest.approx(1.1 / 3, rel=1e-6)
    with pytest.raises(UserError, match=r"statistic: 'mode' given; allowed: mean, median"):
        stops_early(lp, old, mask, statistic="mode")
    with pytest.raises(UserError, match="mask: 0 tokens"):
        stops_early(lp, old, torch.zeros(2, 2))
    with pytest.raises(UserError, match="limit: 0 given"):
        stops_early(lp, old, mask, limit=0)
