"""Every loss on one batch small enough to be worked by hand, intermediates first.

Three sequences of 2, 3 and 1 tokens:

    A    π_old           π               r             s = ∏r^(1/|y|)   R = ∏r
    +2   .2  .4          .4  .45         2   1.125     1.5              2.25
    −1   .4  .4  .4      .1  .2  .4      .25 .5  1     .5               .125
    −1   .1              .4              4             4                4
"""

import math
from dataclasses import dataclass

import pytest
import torch

from moe_upgrpo.losses import BRANCHES, PolicyLossConfig, gradient_coefficients, policy_loss
from moe_upgrpo.losses import classic_branches as branches
from moe_upgrpo.losses.tokens import Tokens

ROWS = (2, 3, 1)
PI_OLD = [[0.2, 0.4], [0.4, 0.4, 0.4], [0.1]]
PI = [[0.4, 0.45], [0.1, 0.2, 0.4], [0.4]]
A = [2.0, -1.0, -1.0]
LOG_PI = [[math.log(p) for p in row] for row in PI]

# w_b of each aggregation: N = 6 tokens, S = 3 sequences
WEIGHTS = {
    "token-mean": (1 / 6, 1 / 6, 1 / 6),
    "seq-mean-token-mean": (1 / 6, 1 / 9, 1 / 3),
    "seq-mean-token-sum": (1 / 3, 1 / 3, 1 / 3),
    "seq-mean-token-sum-norm": (1 / 30, 1 / 30, 1 / 30),  # constant 10
}


def padded(rows) -> torch.Tensor:
    return torch.tensor([list(row) + [0.0] * (3 - len(row)) for row in rows], dtype=torch.float64)


MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
INPUTS = {
    "old_log_probs": padded(PI_OLD).clamp(min=1e-9).log(),
    "advantages": padded([[a] * n for a, n in zip(A, ROWS, strict=True)]),
    "mask": MASK,
}


def log_probs() -> torch.Tensor:
    return padded(PI).clamp(min=1e-9).log().requires_grad_()


@dataclass(frozen=True)
class Case:
    """f: surrogate; c: gradient coefficient; cut: where the gradient is taken away."""

    name: str
    config: PolicyLossConfig
    f: list[list[float]]
    c: list[list[float]]
    cut: list[list[int]]
    rollout: list[list[float]] | None = None


def preset(name: str, **changes) -> PolicyLossConfig:
    return PolicyLossConfig.preset(name, **changes)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gate(tau: float, r: float) -> tuple[float, float]:
    s = sigma(tau * (r - 1))
    return 4 / tau * s, 4 * s * (1 - s) * r


VESPO = 0.125**3 * math.exp(1.75)
LOG = math.log

# GMPO, bounds ±.4 in log space. Row 0: (.4 + ln 1.125)/2 = .258892, ρ = 1.295494.
# Row 1: (−.4 − .4 + 0)/3 = −.266667, ρ = .765928. Row 2: not bounded above, ρ = 4.
RHO = (1.2954937, 0.7659283, 4.0)
NONE = [[0, 0], [0, 0, 0], [0]]
R_TOKEN = [[2, 1.125], [0.25, 0.5, 1], [4]]
SAPO = [
    [gate(1.0, r) for r in R_TOKEN[0]],
    [gate(1.05, r) for r in R_TOKEN[1]],
    [gate(1.05, 4)],
]


def times_log_pi(weights) -> list[list[float]]:
    return [[w * lp for w, lp in zip(*p, strict=True)] for p in zip(weights, LOG_PI, strict=True)]


CASES = [
    Case(
        "grpo",  # 1+ε = 1.2 cuts 2; 1−ε = .8 cuts .25 and .5; C = 3 cuts 4
        preset("grpo"),
        f=[[1.2, 1.125], [0.8, 0.8, 1], [3]],
        c=[[0, 1.125], [0, 0, 1], [0]],
        cut=[[1, 0], [1, 1, 0], [1]],
    ),
    Case(
        "dapo",  # 1+εh = 1.28 cuts 2; C = 10 leaves 4
        preset("dapo"),
        f=[[1.28, 1.125], [0.8, 0.8, 1], [4]],
        c=[[0, 1.125], [0, 0, 1], [4]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "dr-grpo: grpo over a constant",
        preset("grpo", aggregation="seq-mean-token-sum-norm", token_sum_norm=10),
        f=[[1.2, 1.125], [0.8, 0.8, 1], [3]],
        c=[[0, 1.125], [0, 0, 1], [0]],
        cut=[[1, 0], [1, 1, 0], [1]],
    ),
    Case(
        "up-grpo",
        preset("up-grpo"),
        f=[LOG_PI[0], [0.8, 0.8, 1], [3]],
        c=[[1, 1], [0, 0, 1], [0]],
        cut=[[0, 0], [1, 1, 0], [1]],
    ),
    Case(
        "up-grpo, the other form",
        preset("up-grpo", positive="self-ratio"),
        f=[[1, 1], [0.8, 0.8, 1], [3]],
        c=[[1, 1], [0, 0, 1], [0]],
        cut=[[0, 0], [1, 1, 0], [1]],
    ),
    Case(
        "no-upper-clip",  # the dual clip stays
        preset("no-upper-clip"),
        f=[[2, 1.125], [0.8, 0.8, 1], [3]],
        c=[[2, 1.125], [0, 0, 1], [0]],
        cut=[[0, 0], [1, 1, 0], [1]],
    ),
    Case("symmetric-ratio", preset("symmetric-ratio"), f=R_TOKEN, c=R_TOKEN, cut=NONE),
    Case(
        "gspo",  # s = 1.5 > 1.0004 and .5 < .9997 are cut; 4 with A < 0 is not
        preset("gspo"),
        f=[[1.0004] * 2, [0.9997] * 3, [4]],
        c=[[0, 0], [0, 0, 0], [4]],
        cut=[[1, 1], [1, 1, 1], [0]],
    ),
    Case(
        "gspo, wide",  # bounds .4 and 1.6 cut nothing
        preset("gspo", clip_low=0.6, clip_high=0.6),
        f=[[1.5] * 2, [0.5] * 3, [4]],
        c=[[1.5] * 2, [0.5] * 3, [4]],
        cut=NONE,
    ),
    Case(
        "gspo-token",
        preset("gspo-token"),
        f=[[1.0004] * 2, [0.9997] * 3, [4]],
        c=[[0, 0], [0, 0, 0], [4]],
        cut=[[1, 1], [1, 1, 1], [0]],
    ),
    Case(
        "up-gspo",
        preset("up-gspo"),
        f=[LOG_PI[0], [0.9997] * 3, [4]],
        c=[[1, 1], [0, 0, 0], [4]],
        cut=[[0, 0], [1, 1, 1], [0]],
    ),
    Case(
        "tic-grpo",  # min(R, 1.2): f is R/|y| at each token, c is R
        preset("tic-grpo"),
        f=[[1.2 / 2] * 2, [0.125 / 3] * 3, [1.2]],
        c=[[0, 0], [0.125] * 3, [0]],
        cut=[[1, 1], [0, 0, 0], [1]],
    ),
    Case(
        "tic-grpo, wide",  # 1+ε = 2.5 leaves 2.25
        preset("tic-grpo", clip_high=1.5),
        f=[[2.25 / 2] * 2, [0.125 / 3] * 3, [2.5]],
        c=[[2.25] * 2, [0.125] * 3, [0]],
        cut=[[0, 0], [0, 0, 0], [1]],
    ),
    Case(
        "tic-grpo-min",  # min(RA, 1.2A) = RA for A < 0 and R > 1.2
        preset("tic-grpo-min"),
        f=[[1.2 / 2] * 2, [0.125 / 3] * 3, [4]],
        c=[[0, 0], [0.125] * 3, [4]],
        cut=[[1, 1], [0, 0, 0], [0]],
    ),
    Case(
        "up-tic",
        preset("up-tic"),
        f=[LOG_PI[0], [0.125 / 3] * 3, [1.2]],
        c=[[1, 1], [0.125] * 3, [0]],
        cut=[[0, 0], [0, 0, 0], [1]],
    ),
    Case(
        "gmpo",
        preset("gmpo"),
        f=[[RHO[0]] * 2, [RHO[1]] * 3, [RHO[2]]],
        c=[[0, RHO[0]], [0, 0, RHO[1]], [RHO[2]]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "cispo",  # weight min(r, 1.5); no gradient is removed
        preset("cispo", clip_high=0.5),
        f=times_log_pi([[1.5, 1.125], [0.25, 0.5, 1], [1.5]]),
        c=[[1.5, 1.125], [0.25, 0.5, 1], [1.5]],
        cut=NONE,
    ),
    Case(
        "dppo-tv",  # π−π_old = .2 .05 | −.3 −.2 0 | .3, δ = .15, ratio capped at 3
        preset("dppo-tv", divergence_limit=0.15, ratio_cap=3.0),
        f=times_log_pi([[0, 1.125], [0, 0, 1], [3]]),
        c=[[0, 1.125], [0, 0, 1], [3]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        # .2 ln .5 + .8 ln(.8/.6) = .0915, .4 ln(.4/.45) + .6 ln(.6/.55) = .0051 |
        # .4 ln 4 + .6 ln(.6/.9) = .311, .4 ln 2 + .6 ln(.6/.8) = .105, 0 | moved up with A < 0
        "dppo-kl",
        preset("dppo-kl"),
        f=times_log_pi([[0, 1.125], [0, 0, 1], [4]]),
        c=[[0, 1.125], [0, 0, 1], [4]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "topr in bypass mode",  # μ = π_old: clip(.125, 0, 1), clip(4, 0, 1)
        preset("topr"),
        f=times_log_pi([[1, 1], [0.125] * 3, [1]]),
        c=[[1, 1], [0.125] * 3, [1]],
        cut=NONE,
    ),
    Case(
        "topr",  # π/μ = .5 1 1 and 4/5: ∏ = .5 and .8
        preset("topr"),
        f=times_log_pi([[1, 1], [0.5] * 3, [0.8]]),
        c=[[1, 1], [0.5] * 3, [0.8]],
        cut=NONE,
        rollout=[[0.3, 0.3], [0.2, 0.2, 0.4], [0.5]],
    ),
    Case(
        "aspo",  # 2 is cut at 1.2, value 1/1.2; 1/1.125; .8 cuts .25 and .5; 4 is capped at 3, kept
        preset("aspo"),
        f=[[1 / 1.2, 1 / 1.125], [0.8, 0.8, 1], [3]],
        c=[[0, 1 / 1.125], [0, 0, 1], [3]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "sapo",
        preset("sapo"),
        f=[[f for f, _ in row] for row in SAPO],
        c=[[c for _, c in row] for row in SAPO],
        cut=NONE,
    ),
    Case("reinforce", preset("reinforce"), f=LOG_PI, c=[[1, 1], [1, 1, 1], [1]], cut=NONE),
    Case(
        "r^γ, γ₊ = .5, γ₋ = 2",
        preset("is-reshape", power_positive=0.5, power_negative=2.0),
        f=[[2**0.5, 1.125**0.5], [0.0625, 0.25, 1], [16]],
        c=[[2**0.5, 1.125**0.5], [0.0625, 0.25, 1], [16]],
        cut=NONE,
    ),
    Case(
        # mean(log μ − log π): row 1 with μ = π_old has −ln .5 = .693 > .5 and goes; row 2 −ln 4
        "deepseek-v3.2",
        preset("deepseek-v3.2", off_policy_limit=0.5),
        f=[[1.2, 1.125], [0, 0, 0], [3]],
        c=[[0, 1.125], [0, 0, 0], [0]],
        cut=[[1, 0], [1, 1, 1], [1]],
    ),
    Case(
        # row 1 with μ = .1 .25 .4 has mean(log μ − log π) = ln(1.25)/3 = .074 < .5 and stays
        "deepseek-v3.2 against the engine's log-probs",
        preset("deepseek-v3.2", off_policy_limit=0.5),
        f=[[1.2, 1.125], [0.8, 0.8, 1], [3]],
        c=[[0, 1.125], [0, 0, 1], [0]],
        cut=[[1, 0], [1, 1, 0], [1]],
        rollout=[[0.3, 0.3], [0.1, 0.25, 0.4], [0.1]],
    ),
    Case(
        # ∏π/μ in bypass mode 2.25, .125 and 4: φ₊ = e^(3 + 2 ln 2.25 − 6.75) = 5.0625·e^−3.75 and
        # φ₋ = e^(2 + 3 ln w − 2w): .125³·e^1.75, 64·e^−6
        "vespo",
        preset("vespo"),
        f=times_log_pi([[5.0625 * math.exp(-3.75)] * 2, [VESPO] * 3, [64 * math.exp(-6)]]),
        c=[[5.0625 * math.exp(-3.75)] * 2, [VESPO] * 3, [64 * math.exp(-6)]],
        cut=NONE,
    ),
    Case(
        # π/μ = .5 1 1 has the product .5: φ₋ = e^2·.125·e^−1; the others have 1: φ = 1
        "vespo with the engine's log-probs",
        preset("vespo"),
        f=times_log_pi([[1, 1], [0.125 * math.e] * 3, [1]]),
        c=[[1, 1], [0.125 * math.e] * 3, [1]],
        cut=NONE,
        rollout=[[0.4, 0.45], [0.2, 0.2, 0.4], [0.4]],
    ),
    Case(
        "luspo",  # gspo's f at each token, summed: times the length
        preset("luspo"),
        f=[[1.0004] * 2, [0.9997] * 3, [4]],
        c=[[0, 0], [0, 0, 0], [4]],
        cut=[[1, 1], [1, 1, 1], [0]],
    ),
    Case(
        "copg",  # log(.2·1.2) for .4; log(.4·.8) for .1 and .2
        preset("copg"),
        f=[[LOG(0.24), LOG(0.45)], [LOG(0.32), LOG(0.32), LOG(0.4)], [LOG(0.4)]],
        c=[[0, 1], [0, 0, 1], [1]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "hinge-ratio",  # A > 0: min(r−1, .2) − .2; A < 0: max(r−1, −.2) + .2
        preset("hinge-ratio"),
        f=[[0, -0.075], [0, 0, 0.2], [3.2]],
        c=[[0, 1.125], [0, 0, 1], [4]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "hinge-probability",  # π−π_old = .2 .05 | −.3 −.2 0 | .3, ε = .15
        preset("hinge-probability", clip_low=0.15, clip_high=0.15),
        f=[[0, -0.1], [0, 0, 0.15], [0.45]],
        c=[[0, 0.45], [0, 0, 0.4], [0.4]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "hinge-log",  # ln 2 > .2, ln 1.125 = .117783; ln 4 = 1.386294
        preset("hinge-log"),
        f=[[0, LOG(1.125) - 0.2], [0, 0, 0.2], [LOG(4) + 0.2]],
        c=[[0, 1], [0, 0, 1], [1]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        "hinge-root",  # √2−1 > .2, √1.125−1 = .06066; −.5 and −.29289 < −.2; √4−1 = 1
        preset("hinge-root"),
        f=[[0, 1.125**0.5 - 1.2], [0, 0, 0.2], [1.2]],
        c=[[0, 1.125**0.5 / 2], [0, 0, 0.5], [1]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case("ppo-early-stop", preset("ppo-early-stop"), f=R_TOKEN, c=R_TOKEN, cut=NONE),
    Case(
        # future of row 0: ln 2 + γ ln 1.125 = .8084 > ln 1.2: 1.2, and ln 1.125 = .1178: 1.125;
        # row 1 looks down: 1; row 2 has r = 4, not above the limits 4 and 10: 1.2
        "fipo",
        preset("fipo"),
        f=[[1.2 * 1.28, 1.125 * 1.125], [0.8, 0.8, 1], [1.2 * 4]],
        c=[[0, 1.125 * 1.125], [0, 0, 1], [1.2 * 4]],
        cut=[[1, 0], [1, 1, 0], [0]],
    ),
    Case(
        # r = 4 is above the dual clip 3: out of the sum, and the weight is 1; and 2 is not
        "fipo with a dual clip of 3",
        preset("fipo", dual_clip=3.0, influence_safety=3.0),
        f=[[1.2 * 1.28, 1.125 * 1.125], [0.8, 0.8, 1], [3]],
        c=[[0, 1.125 * 1.125], [0, 0, 1], [0]],
        cut=[[1, 0], [1, 1, 0], [1]],
    ),
]


def test_the_shared_intermediates():
    t = Tokens(log_probs(), **INPUTS)
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        t.ratio_BT, padded([[2, 1.125, 1], [0.25, 0.5, 1], [4, 1, 1]]), **close
    )
    torch.testing.assert_close(t.lengths_B1, padded([[2], [3], [1]])[:, :1], **close)
    torch.testing.assert_close(t.sequence_ratio_B1, padded([[1.5], [0.5], [4]])[:, :1], **close)
    torch.testing.assert_close(
        t.trajectory_ratio_B1, padded([[2.25], [0.125], [4]])[:, :1], **close
    )
    torch.testing.assert_close(t.self_ratio_BT, torch.ones(3, 3, dtype=torch.float64), **close)


def test_the_intermediates_of_single_losses():
    """The parts of f and c of GMPO, TOPR, SAPO and DPPO, digit by digit."""
    t = Tokens(log_probs(), **INPUTS)

    def column(x: torch.Tensor) -> list[float]:
        return x[:, 0].tolist()

    # GMPO: ln 2 = .693 > .4, ln 1.125 = .117783; ln .25 and ln .5 < −.4
    clipped = t.log_ratio_BT.clamp(max=0.4)[0, :2].tolist()
    assert clipped == pytest.approx([0.4, 0.117783], abs=1e-6)
    gmpo = PolicyLossConfig.preset("gmpo")
    assert column(branches.gmpo_positive(t, gmpo))[0] == pytest.approx(math.exp(0.2588915), 1e-6)
    assert column(branches.gmpo_negative(t, gmpo))[1] == pytest.approx(math.exp(-0.8 / 3), 1e-6)

    # TOPR: products 2.25, .125 and 4, cut at 1
    weights = branches.topr_weight(t, PolicyLossConfig.preset("topr"))
    assert column(weights) == pytest.approx([1, 0.125, 1], rel=1e-12)

    # SAPO: 4·σ(1) = 4·.7310586 and 4·σ(.125) = 4·.5312094; 4/1.05·σ(3.15) = 3.8095238·.9589087
    sapo, config = BRANCHES["sapo"], PolicyLossConfig.preset("sapo")
    positive = sapo.positive.surrogate(t, config)[0, :2].tolist()
    assert positive == pytest.approx([2.9242343, 2.1248375], abs=1e-6)
    assert column(sapo.negative.surrogate(t, config))[2] == pytest.approx(3.6529856, abs=1e-6)

    # DPPO: π and π_old back from the logs; the binary KLs of the comment in CASES
    p, p_old = t.probabilities()
    assert (p - p_old)[MASK].tolist() == pytest.approx([0.2, 0.05, -0.3, -0.2, 0, 0.3])
    divergence = branches.binary_kl(p, p_old)[MASK].tolist()
    assert divergence == pytest.approx([0.09152, 0.00509, 0.31124, 0.10465, 0, 0.22629], abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_by_hand(case: Case):
    rollout = None if case.rollout is None else padded(case.rollout).clamp(min=1e-9).log()
    current = log_probs()
    arguments = dict(**INPUTS, config=case.config, rollout_log_probs=rollout)
    result = policy_loss(current, **arguments)
    tolerance = dict(rtol=1e-6, atol=1e-9)

    coefficients = gradient_coefficients(current, **arguments)
    torch.testing.assert_close(coefficients, padded(case.c), **tolerance)
    assert result.clipped.tolist() == padded(case.cut).bool().tolist()
    per_token = [[-a * f for f in row] for a, row in zip(A, case.f, strict=True)]
    torch.testing.assert_close(result.per_token, padded(per_token), **tolerance)

    w = WEIGHTS[case.config.aggregation]
    loss = sum(wb * sum(row) for wb, row in zip(w, per_token, strict=True))
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    gradient = [[-wb * a * c for c in row] for wb, a, row in zip(w, A, case.c, strict=True)]
    result.loss.backward()
    torch.testing.assert_close(current.grad, padded(gradient), **tolerance)


def test_router_shift_by_hand():
    """RSPO's γ on GRPO. L = 1 layer, K = 2 experts; |Δ| = ln 2 and ln 2 at the first token: γ = .5.

    r·γ = 1 there, inside the clip that 2 was cut by. In the last row |Δ| = 20: γ = floor = .1,
    r·γ = .4 < .8. Elsewhere Δ = 0.
    """
    old = torch.full((3, 3, 1, 2), -1.0, dtype=torch.float64)
    current = old.clone()
    current[0, 0, 0] += torch.tensor([math.log(2), -math.log(2)])
    current[2, 0, 0] -= 20
    config = PolicyLossConfig.preset("grpo", router_shift_floor=0.1)
    lp = log_probs()
    result = policy_loss(lp, **INPUTS, config=config, router_log_probs=(current, old))
    expected = padded([[-2.0, -2.25], [0.8, 0.8, 1], [0.8]])
    torch.testing.assert_close(result.per_token, expected)
    assert result.clipped.tolist() == padded([[0, 0], [1, 1, 0], [1]]).bool().tolist()
    gamma_sum, tokens = result.metrics["router_shift_mean"]
    assert gamma_sum.item() == pytest.approx(0.5 + 1 + 3 + 0.1)
    assert tokens.item() == 6
    # the ratio that is reported is the policy's own, without γ: 2 + 1.125 + .25 + .5 + 1 + 4
    assert result.metrics["ratio_mean"].numerator.item() == pytest.approx(8.875)


def test_aspo_caps_the_weight_of_a_stale_positive():
    """A > 0, r = .1: 1/r = 10 is capped at C = 3 and the gradient stays."""
    old = torch.tensor([[0.5]], dtype=torch.float64).log()
    lp = torch.tensor([[0.05]], dtype=torch.float64).log().requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    result = policy_loss(lp, old, one, one, config=PolicyLossConfig.preset("aspo"))
    result.loss.backward()
    assert lp.grad.item() == pytest.approx(-3)
    assert not result.clipped.any()


def test_vespo_cuts_each_token_before_the_sequence():
    """log r = 25 and −21 within ±20; log ρ = −30 and 17 within [ln 1e-8, 20]: as TRL does."""
    old = torch.tensor([[-30.0, -3.0]], dtype=torch.float64)
    lp = old + torch.tensor([[25.0, -21.0]])
    log_w = 20 - 20 + math.log(1e-8) + 17
    for sign, (k, rate) in ((1, (2, 3)), (-1, (3, 2))):
        c = gradient_coefficients(
            lp,
            old,
            torch.full_like(old, sign),
            torch.ones_like(old),
            config=PolicyLossConfig.preset("vespo"),
            rollout_log_probs=old - torch.tensor([[-30.0, 17.0]]),
        )
        phi = math.exp(rate + k * log_w - rate * math.exp(log_w))
        assert c[0].tolist() == pytest.approx([phi, phi], rel=1e-12)
