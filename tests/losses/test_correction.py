"""Rollout correction: each weight and rejection by hand, per branch, and detached."""

import math

import pytest
import torch

from moe_upgrpo.losses import (
    PolicyLossConfig,
    RolloutCorrection,
    finalize_metrics,
    policy_loss,
)
from moe_upgrpo.losses.correction import correction_weights
from moe_upgrpo.losses.tokens import Tokens

# ρ = π_old/μ of two sequences of 3 and 2 tokens:  ρ = .25 1 3 (∏ .75) and 2 2 (∏ 4)
RHO = torch.tensor([[0.25, 1.0, 3.0], [2.0, 2.0, 1.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
OLD = torch.full((2, 3), -1.0, dtype=torch.float64)
ROLLOUT = OLD - RHO.log()


def weights(**fields) -> tuple[list, list]:
    """Weight and dropped, expanded to `[B, T]`, padding left out."""
    t = Tokens(OLD, OLD, torch.ones_like(OLD), MASK, rollout_log_probs=ROLLOUT)
    weight, dropped = correction_weights(t, RolloutCorrection(**fields))
    keep = MASK.bool()
    rows = ([x.expand(2, 3)[b][keep[b]].tolist() for b in range(2)] for x in (weight, dropped))
    return tuple(rows)


NOTHING = [[False] * 3, [False] * 2]
CASES = {
    "decoupled": (dict(weight="decoupled"), [[0.25, 1, 3], [2, 2]], NOTHING),
    "token-tis": (dict(weight="token-tis"), [[0.25, 1, 2], [2, 2]], NOTHING),
    "token-tis at 1.5": (dict(weight="token-tis", high=1.5), [[0.25, 1, 1.5], [1.5] * 2], NOTHING),
    "sequence-tis": (dict(weight="sequence-tis"), [[0.75] * 3, [2] * 2], NOTHING),
    "token-mis": (
        dict(weight="token-mis"),
        [[0, 1, 0], [2, 2]],
        [[True, False, True], [False] * 2],
    ),
    "sequence-mis": (
        dict(weight="sequence-mis"),
        [[0.75] * 3, [0] * 2],
        [[False] * 3, [True] * 2],
    ),
    "icepop": (dict(weight="icepop"), [[0, 1, 3], [2, 2]], [[True, False, False], [False] * 2]),
    # geometric means: .75^(1/3) = .909 and 2
    "geometric": (dict(geometric=(0.9, 1.1)), [[1] * 3, [0] * 2], [[False] * 3, [True] * 2]),
    # k3: .25 − ln .25 − 1 = .6363, 0, 3 − ln 3 − 1 = .9014, mean .5126; 2 − ln 2 − 1 = .3069
    "k3": (dict(k3=0.4), [[0] * 3, [1] * 2], [[True] * 3, [False] * 2]),
    "veto": (dict(veto=0.3), [[0] * 3, [1] * 2], [[True] * 3, [False] * 2]),
    "weight and rejection": (
        dict(weight="token-tis", veto=0.3),
        [[0] * 3, [2] * 2],
        [[True] * 3, [False] * 2],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_by_hand(name):
    fields, expected, dropped = CASES[name]
    weight, zeroed = weights(**fields)
    for row, expected_row in zip(weight, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-12)
    assert zeroed == dropped


def corrected_gradient(positive: bool, negative: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """UP-GRPO at r = 1, A = +1 and −1, with token-TIS; gradient, clipped and metrics."""
    config = PolicyLossConfig.preset(
        "up-grpo",
        correction=RolloutCorrection(weight="token-mis", positive=positive, negative=negative),
    )
    lp = OLD.clone().requires_grad_()
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    result = policy_loss(lp, OLD, advantages, MASK, config=config, rollout_log_probs=ROLLOUT)
    result.loss.backward()
    return lp.grad, result.clipped, finalize_metrics(result.metrics)


def test_off_for_positives_unless_asked_for():
    plain = torch.tensor([[-0.2] * 3, [0.2, 0.2, 0]], dtype=torch.float64)
    weighted = torch.tensor([[0, -0.2, 0], [0.4, 0.4, 0]], dtype=torch.float64)

    assert RolloutCorrection().positive is False
    gradient, clipped, metrics = corrected_gradient(positive=False, negative=True)
    torch.testing.assert_close(gradient[0], plain[0])
    torch.testing.assert_close(gradient[1], weighted[1])
    assert not clipped.any()
    assert metrics["correction_weight_mean"] == pytest.approx(2)  # 2 and 2
    assert metrics["correction_zero_fraction"] == 0
    assert metrics["correction_effective_sample_size"] == pytest.approx(2)  # 4²/8

    gradient, clipped, metrics = corrected_gradient(positive=True, negative=True)
    torch.testing.assert_close(gradient, weighted)
    assert clipped.tolist() == [[True, False, True], [False] * 3]
    assert metrics["correction_weight_mean"] == pytest.approx(5 / 5)  # 0 1 0 2 2
    assert metrics["correction_zero_fraction"] == pytest.approx(2 / 5)
    assert metrics["correction_effective_sample_size"] == pytest.approx(25 / 9)
    # Σ w|A|c: 1 from the positives, 4 from the negatives
    assert metrics["gradient_share_positive"] == pytest.approx(1 / 5)

    gradient, _, metrics = corrected_gradient(positive=False, negative=False)
    torch.testing.assert_close(gradient, plain)
    assert "correction_weight_mean" not in metrics


def test_decoupled_ppo_is_the_weight_times_ppo():
    """r = 1.5 on a negative: f = 1.5, ρ = 2: per-token loss 3, gradient ρ·r (arXiv 2110.00641)."""
    config = PolicyLossConfig.preset("grpo", correction=RolloutCorrection(weight="decoupled"))
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    lp = (old + math.log(1.5)).requires_grad_()
    one = torch.ones_like(old)
    result = policy_loss(lp, old, -one, one, config=config, rollout_log_probs=old - math.log(2))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(3)
    assert lp.grad.item() == pytest.approx(3)


def test_off_policy_mask_metric_and_direction():
    """The mask is for negatives that the policy has already left: log μ − log π large."""
    config = PolicyLossConfig.preset("grpo", off_policy_limit=0.05)
    old = torch.full((3, 2), -1.0)
    lp = old + torch.tensor([[-0.1], [0.1], [-0.1]])
    advantages = torch.tensor([[-1.0], [-1.0], [1.0]]).expand(3, 2)
    result = policy_loss(lp, old, advantages, torch.ones(3, 2), config=config)
    assert result.clipped.tolist() == [[True] * 2, [False] * 2, [False] * 2]
    assert finalize_metrics(result.metrics)["off_policy_mask_fraction"] == pytest.approx(0.5)
