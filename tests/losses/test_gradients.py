"""Gradients: against the oracle, against finite differences, and the oracle against the papers."""

import math

import pytest
import torch

from moe_upgrpo.losses import (
    PRESETS,
    Context,
    PolicyLossConfig,
    RolloutCorrection,
    aggregation_weights,
    classic_branches,
    gradient_coefficients,
    policy_loss,
    tokens,
)
from tests.losses.batches import EVERY_PRESET, Batch, random_batch

# One config for each preset, and for each extra that multiplies a loss.
CONFIGS = {name: PRESETS[name] for name in EVERY_PRESET} | {
    "gspo, wide": PolicyLossConfig.preset("gspo", clip_low=0.2, clip_high=0.2),
    "up-gspo, wide": PolicyLossConfig.preset("up-gspo", clip_low=0.2, clip_high=0.2),
    "gspo-token, token-mean": PolicyLossConfig.preset(
        "gspo-token", clip_low=0.2, clip_high=0.2, aggregation="token-mean"
    ),
    "tic, wide": PolicyLossConfig.preset("tic-grpo", clip_high=1.5),
    "self-ratio": PolicyLossConfig.preset("up-grpo", positive="self-ratio"),
    "is-reshape": PolicyLossConfig.preset("is-reshape", power_positive=0.5, power_negative=1.5),
    "dr-grpo": PolicyLossConfig.preset(
        "grpo", aggregation="seq-mean-token-sum-norm", token_sum_norm=50.0
    ),
    "grpo, router shift": PolicyLossConfig.preset("grpo", router_shift_floor=0.5),
    "grpo, mis on both signs": PolicyLossConfig.preset(
        "grpo", correction=RolloutCorrection(weight="token-mis", low=0.95, positive=True)
    ),
    "up-gspo, sequence tis": PolicyLossConfig.preset(
        "up-gspo", correction=RolloutCorrection(weight="sequence-tis", high=1.05)
    ),
    "up-grpo, off-policy mask and geometric": PolicyLossConfig.preset(
        "up-grpo",
        off_policy_limit=0.02,
        correction=RolloutCorrection(weight="icepop", geometric=(0.98, 1.02)),
    ),
    "luspo, wide": PolicyLossConfig.preset("luspo", clip_low=0.2, clip_high=0.2),
    "clip-cov, many": PolicyLossConfig.preset(
        "clip-cov", covariance_share=0.3, covariance_range=(-0.2, 5.0)
    ),
    "kl-cov, many": PolicyLossConfig.preset("kl-cov", covariance_share=0.3),
    "dro and clip-cov": PolicyLossConfig(
        positive="dro", negative="clip-cov", covariance_range=(-0.2, 5.0)
    ),
    # one function of r for both signs, and tokens that only one sign drops
    "ipo and kl-cov": PolicyLossConfig(positive="ipo", negative="kl-cov"),
    "dppo-tv and dppo-kl": PolicyLossConfig(positive="dppo-tv", negative="dppo-kl"),
    "cispo and dppo-tv": PolicyLossConfig(positive="cispo", negative="dppo-tv", clip_low=None),
    "dro, corrected": PolicyLossConfig.preset(
        "dro", correction=RolloutCorrection(weight="token-tis", high=1.02, positive=True)
    ),
    "grpo, top entropy": PolicyLossConfig.preset(
        "grpo", top_entropy=0.5, correction=RolloutCorrection(weight="token-tis", high=1.02)
    ),
    "grpo, m2 and kpop": PolicyLossConfig.preset(
        "grpo",
        correction=RolloutCorrection(
            weight="token-mask", low=0.9, high=1.1, m2=2e-3, binary_kl=2e-3, outlier=1.12
        ),
    ),
}


def gradient(config: PolicyLossConfig, batch: Batch) -> torch.Tensor:
    batch = batch.with_grad()
    policy_loss(**batch.arguments(config)).loss.backward()
    return batch.log_probs.grad


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_the_oracle_with_its_aggregation(name, spread):
    config = CONFIGS[name]
    batch = random_batch(seed=1, spread=spread)
    c = gradient_coefficients(**batch.arguments(config))
    w_B = aggregation_weights(
        batch.mask.sum(-1), config.aggregation, token_sum_norm=config.token_sum_norm
    )
    expected = -w_B[:, None] * batch.advantages * c
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(gradient(config, batch), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_weight_is_the_magnitude_of_the_gradient(name):
    config = CONFIGS[name]
    batch = random_batch(seed=4, spread=0.5)
    weight = policy_loss(**batch.arguments(config)).gradient_weight
    expected = gradient(config, batch).abs()
    assert expected.count_nonzero() > 0 and not weight.requires_grad
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)


def by_its_formula(log_x, low=-math.inf, high=math.inf):
    y = log_x.clamp(low, high)
    return (y - y.detach()).exp()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_the_finite_difference_with_stop_gradients_held(name, monkeypatch):
    """Central differences of `.loss`, every `detach()` replaying its value at the base point.

    Does not cover points where a clip switches: the batch has none within the step.
    """
    config = CONFIGS[name]
    batch = random_batch(seed=2, lengths=(4, 0, 2, 3), width=4)
    held: list[torch.Tensor] = []
    detach = torch.Tensor.detach

    def record(x):
        held.append(detach(x))
        return held[-1]

    monkeypatch.setattr(torch.Tensor, "detach", record)
    for module in (tokens, classic_branches):  # its value is 1 without a detach (test_passes.py)
        monkeypatch.setattr(module, "ratio_to_itself", by_its_formula)
    arguments = batch.arguments(config)
    policy_loss(**arguments)
    taken = list(held)

    def loss_at(log_probs: torch.Tensor) -> float:
        replay = iter(taken)
        monkeypatch.setattr(torch.Tensor, "detach", lambda x: next(replay))
        return policy_loss(**{**arguments, "log_probs": log_probs}).loss.item()

    step, numeric = 1e-6, torch.zeros_like(batch.log_probs)
    for b, t in batch.mask.nonzero().tolist():
        nudge = torch.zeros_like(batch.log_probs)
        nudge[b, t] = step
        up, down = loss_at(batch.log_probs + nudge), loss_at(batch.log_probs - nudge)
        numeric[b, t] = (up - down) / (2 * step)
    monkeypatch.undo()
    analytic = gradient(config, batch)
    assert analytic.count_nonzero() > 0
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=1e-8)


def kept(condition: bool, value: float) -> float:
    return value if condition else 0.0


def sapo(tau: float, r: float) -> float:
    """d/dlog r of 4/τ·σ(τ(r−1)), through tanh: 4σ(1−σ) = 1 − tanh²(x/2)"""
    return (1 - math.tanh(tau * (r - 1) / 2) ** 2) * r


def binary_kl(old: float, new: float) -> float:
    return old * math.log(old / new) + (1 - old) * math.log((1 - old + 1e-8) / (1 - new + 1e-8))


P_OLD = 0.01  # the grid's probability under the old policy: π = r·P_OLD stays below 1

# The coefficients as the papers give them, for one token per sequence (so r = s = R), as
# functions of r: c for A > 0, c for A < 0.
PAPERS = {
    "grpo": (lambda r: kept(r <= 1.2, r), lambda r: kept(0.8 <= r <= 3, r)),
    "dapo": (lambda r: kept(r <= 1.28, r), lambda r: kept(0.8 <= r <= 10, r)),
    "gspo": (lambda r: kept(r <= 1.0004, r), lambda r: kept(r >= 0.9997, r)),
    "gspo-token": (lambda r: kept(r <= 1.0004, r), lambda r: kept(r >= 0.9997, r)),
    "tic-grpo": (lambda r: kept(r <= 1.2, r), lambda r: kept(r <= 1.2, r)),
    "tic-grpo-min": (lambda r: kept(r <= 1.2, r), lambda r: r),
    "gmpo": (lambda r: kept(r <= math.exp(0.4), r), lambda r: kept(r >= math.exp(-0.4), r)),
    "cispo": (lambda r: min(r, 5.0), lambda r: min(r, 5.0)),
    "dppo-tv": (
        lambda r: kept((r - 1) * P_OLD <= 0.2, min(r, 20)),
        lambda r: kept((r - 1) * P_OLD >= -0.2, min(r, 20)),
    ),
    "dppo-kl": (
        lambda r: kept(r <= 1 or binary_kl(P_OLD, r * P_OLD) <= 0.05, min(r, 20)),
        lambda r: kept(r >= 1 or binary_kl(P_OLD, r * P_OLD) <= 0.05, min(r, 20)),
    ),
    "topr": (lambda r: 1.0, lambda r: min(r, 1.0)),
    "aspo": (lambda r: kept(r <= 1.2, min(1 / r, 3)), lambda r: kept(r >= 0.8, min(r, 3))),
    "sapo": (lambda r: sapo(1.0, r), lambda r: sapo(1.05, r)),
    "reinforce": (lambda r: 1.0, lambda r: 1.0),
    "is-reshape": (lambda r: 1.0, lambda r: r),
    "no-upper-clip": (lambda r: r, lambda r: kept(0.8 <= r <= 3, r)),
    "symmetric-ratio": (lambda r: r, lambda r: r),
    "deepseek-v3.2": (
        lambda r: kept(r <= 1.2, r),
        lambda r: kept(0.8 <= r <= 3 and -math.log(r) <= 1e-4, r),
    ),
}
PAPERS |= {
    "vespo": (
        lambda r: math.exp(3 + 2 * math.log(r) - 3 * r),
        lambda r: math.exp(2 + 3 * math.log(r) - 2 * r),
    ),
    "luspo": PAPERS["gspo"],
    "dro": (lambda r: 1 - math.log(r), lambda r: 1 + math.log(r)),  # β = |A| = 1
    "ipo": (
        lambda r: kept((r - 1) * P_OLD <= 0.2, r) - 2e-3 * math.log(r),
        lambda r: kept((r - 1) * P_OLD >= -0.2, r) + 2e-3 * math.log(r),
    ),
    # the token is its own future; r > 10 leaves the sum, r > 4 is held to [.8, 1] where A < 0
    "fipo": (
        lambda r: kept(r <= 1.28, r * min(max(r, 1), 1.2)),
        lambda r: kept(0.8 <= r <= 10, r * (1 if r > 4 else min(max(r, 1), 1.2))),
    ),
    # 101 tokens of one advantage have no covariance: clip-cov draws none, kl-cov a few at random
    "clip-cov": (lambda r: kept(r <= 1.2, r), lambda r: kept(r >= 0.8, r)),
    "copg": (lambda r: kept(r <= 1.2, 1), lambda r: kept(r >= 0.8, 1)),
    "hinge-ratio": (lambda r: kept(r - 1 < 0.2, r), lambda r: kept(1 - r < 0.2, r)),
    "hinge-probability": (
        lambda r: kept((r - 1) * P_OLD < 0.2, r * P_OLD),
        lambda r: kept((1 - r) * P_OLD < 0.2, r * P_OLD),
    ),
    "hinge-log": (lambda r: kept(math.log(r) < 0.2, 1), lambda r: kept(-math.log(r) < 0.2, 1)),
    "hinge-root": (
        lambda r: kept(r**0.5 - 1 < 0.2, r**0.5 / 2),
        lambda r: kept(1 - r**0.5 < 0.2, r**0.5 / 2),
    ),
    "ppo-early-stop": (lambda r: r, lambda r: r),
}
PAPERS |= {
    "up-" + name.replace("-grpo", ""): (lambda r: 1.0, negative)
    for name, (_, negative) in PAPERS.items()
    if "up-" + name.replace("-grpo", "") in PRESETS
}
# They are no function of r alone: test_hand.py and test_batch_losses.py have them.
ELSEWHERE = {"rspo", "up-rspo", "kl-cov", "up-kl-cov", "vapo", "real", "gtpo"}


def test_the_papers_cover_every_preset():
    assert set(PAPERS) | ELSEWHERE == set(EVERY_PRESET)
    assert not set(PAPERS) & ELSEWHERE


@pytest.mark.parametrize("name", PAPERS)
def test_oracle_is_the_papers_coefficient(name):
    """r from 1e-3 to 30, both signs; off the exact bounds, where float rounding decides."""
    ratios = torch.logspace(-3, math.log10(30), 101, dtype=torch.float64)
    old = torch.full((101, 1), P_OLD, dtype=torch.float64).log()
    lp = old + ratios.log()[:, None]
    ones = torch.ones_like(lp)
    for sign, paper in zip((1.0, -1.0), PAPERS[name], strict=True):
        context = Context(draws=torch.zeros_like(lp))
        c = gradient_coefficients(lp, old, sign * ones, ones, config=PRESETS[name], context=context)
        expected = torch.tensor([paper(r) for r in ratios.tolist()], dtype=torch.float64)
        torch.testing.assert_close(c[:, 0], expected, rtol=1e-9, atol=1e-12)
