"""Exact mean and covariance of a policy loss's gradient over everything that could be sampled.

A sequence is drawn from the rollout policy μ, rewarded R ∈ {0, 1}, and enters the loss with an
advantage whose sign is R's: A > 0 where it is right, A < 0 where it is wrong. Every loss here is
linear in |A| at a given sign, so its gradient for one sequence is |A|·u(y), where u is what
`policy_loss` gives at A = ±1. u is a sum over the sequence's tokens of coefficients times
∇log π(token | prefix), and all sequences have one length, so that no aggregation couples them.

Every gradient is the ascent direction (minus the loss's), and in units of Σ_t ∇log π: a loss that
divides by the length or by the number of tokens is multiplied by it again.

Shapes: N sequences, T tokens, M·V (prefix, next token) pairs, P parameters, S estimators, and 2
signs: right (A > 0) first, wrong (A < 0) second.
"""

import math
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    PRESETS,
    PolicyLossConfig,
    RolloutCorrection,
    aggregation_weights,
    group_advantages,
    policy_loss,
)


def _corrected(preset: str, positive: bool, changes: dict | None = None, **correction):
    correction = RolloutCorrection(positive=positive, **correction)
    return PolicyLossConfig.preset(preset, correction=correction, **(changes or {}))


# The losses with presets when the study was made: its results are for these.
_X = (
    *("grpo", "dapo", "deepseek-v3.2", "gspo", "gspo-token", "tic-grpo", "tic-grpo-min", "gmpo"),
    *("rspo", "cispo", "dppo-tv", "dppo-kl", "aspo", "sapo"),
)
UP_OF = {"up-" + name.replace("-grpo", ""): name for name in _X}
STUDIED = (
    *_X,
    *UP_OF,
    *("topr", "reinforce", "is-reshape", "no-upper-clip", "symmetric-ratio"),
)


def _estimators() -> dict[str, PolicyLossConfig]:
    """The presets studied, and the rollout corrections on GRPO, UP and GSPO.

    `grpo+X` corrects both signs; `up-grpo+X` the wrong side only, as the loss's default is;
    `up-grpo+X, both` both.
    """
    found = {name: PRESETS[name] for name in STUDIED}
    rules: dict[str, dict] = {
        name: {"weight": name}
        for name in (
            "decoupled",
            "token-tis",
            "sequence-tis",
            "token-mis",
            "sequence-mis",
            "icepop",
        )
    }
    rules |= {
        "geometric": {"geometric": (0.999, 1.001)},
        "k3": {"k3": 0.01},
        "veto": {"veto": 1e-4},
    }
    for name, rule in rules.items():
        found[f"grpo+{name}"] = _corrected("grpo", True, **rule)
    for name in ("token-tis", "sequence-tis", "icepop"):
        found[f"up-grpo+{name}"] = _corrected("up-grpo", False, weight=name)
        found[f"up-grpo+{name}, both"] = _corrected("up-grpo", True, weight=name)
    found["gspo+sequence-tis"] = _corrected("gspo", True, weight="sequence-tis")
    found["reinforce+sequence-tis"] = _corrected("reinforce", True, weight="sequence-tis")
    # R·∏ρ = π_θ(y)/μ(y), with no clip and no truncation: the unbiased one
    found["sequence-is"] = _corrected(
        "tic-grpo", True, {"clip_high": None}, weight="sequence-tis", high=math.inf
    )
    return found


ESTIMATORS: dict[str, PolicyLossConfig] = _estimators()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Every sequence as the loss sees it. `[N, T]` log-probs of the named policies, rewards `[N]`.

    router_log_probs: (current, old) `[N, T, L, K]`, for RSPO.
    """

    current_NT: Tensor
    old_NT: Tensor
    rollout_NT: Tensor
    reward_N: Tensor
    router_log_probs: tuple[Tensor, Tensor] | None = None

    @property
    def probability_N(self) -> Tensor:
        """μ(y)"""
        return self.rollout_NT.sum(-1).exp()

    @property
    def given_sign_2N(self) -> Tensor:
        """μ(y | R = 1) and μ(y | R = 0)"""
        weight_2N = torch.stack([self.reward_N, 1 - self.reward_N]) * self.probability_N
        return weight_2N / weight_2N.sum(-1, keepdim=True)

    @property
    def right(self) -> float:
        """p = P_μ(R = 1)"""
        return float(self.probability_N @ self.reward_N)


def coefficients(config: PolicyLossConfig, samples: Samples) -> Tensor:
    """c `[N, T]`: u(y) = Σ_t c_t·∇log π_θ(y_t | y_<t) at A = ±1, by backward through `policy_loss`.

    Each sequence counts as a batch of its own.
    """
    leaf_NT = samples.current_NT.detach().clone().requires_grad_()
    _, T = leaf_NT.shape
    loss = policy_loss(
        leaf_NT,
        samples.old_NT,
        (2 * samples.reward_N - 1)[:, None].expand_as(leaf_NT),
        torch.ones_like(leaf_NT),
        config=config,
        rollout_log_probs=samples.rollout_NT,
        router_log_probs=samples.router_log_probs,
        global_tokens=T,
        global_sequences=1,
    ).loss
    (slope_NT,) = torch.autograd.grad(loss, leaf_NT)
    weight = aggregation_weights(
        leaf_NT.new_tensor([T]), config.aggregation, global_tokens=T, global_sequences=1
    )
    return -slope_NT / weight


class Tangent:
    """∇_θ log π of every (prefix, next token) pair at one θ and one choice of routes.

    jacobian_QP: of the Q = M·V pairs; pairs_NT: each token's pair; gram_NTT: J_y J_yᵀ, the inner
    products of the gradients of a sequence's tokens.
    """

    def __init__(self, jacobian_QP: Tensor, pairs_NT: Tensor, chunk: int = 256):
        self.jacobian_QP, self.pairs_NT = jacobian_QP, pairs_NT
        parts = (jacobian_QP[pairs] for pairs in pairs_NT.split(chunk))
        self.gram_NTT = torch.cat([rows @ rows.transpose(1, 2) for rows in parts])

    def gradients(self, c_NT: Tensor) -> Tensor:
        """u(y) = Σ_t c_t·∇log π(y_t | y_<t), `[N, P]`."""
        return torch.einsum("nt,ntp->np", c_NT, self.jacobian_QP[self.pairs_NT])

    def weighted_sum(self, weight_XNT: Tensor) -> Tensor:
        """Σ_y Σ_t weight·∇log π(y_t | y_<t), `[X, P]`."""
        spread_XQ = weight_XNT.new_zeros(len(weight_XNT), len(self.jacobian_QP))
        spread_XQ.index_add_(1, self.pairs_NT.flatten(), weight_XNT.flatten(1))
        return spread_XQ @ self.jacobian_QP


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments of u(y) given its sign, under μ: mean `[S, 2, P]`, covariance's trace `[S, 2]`."""

    mean_S2P: Tensor
    variance_S2: Tensor


def moments(c_SNT: Tensor, samples: Samples, tangent: Tangent) -> Moments:
    S, N, T = c_SNT.shape
    weight_2N = samples.given_sign_2N
    weighted_S2NT = weight_2N[None, :, :, None] * c_SNT[:, None]
    mean_S2P = tangent.weighted_sum(weighted_S2NT.view(2 * S, N, T)).view(S, 2, -1)
    # Σ_y w(y)·|u(y)|², |u|² = cᵀ(J_y J_yᵀ)c
    second_SN = torch.einsum("snt,ntu,snu->sn", c_SNT, tangent.gram_NTT, c_SNT)
    variance_S2 = second_SN @ weight_2N.T - mean_S2P.square().sum(-1)
    return Moments(mean_S2P=mean_S2P, variance_S2=variance_S2.clamp(min=0))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How rewards become advantages, with its random parts marginalised exactly.

    For n sequences in groups of G with C right ones, C ~ Binomial(G, p), advantages A₊(C), −A₋(C):
    the estimator (1/G)·Σ_i |A_i|·u_i of a group has, for signs s and ū_s, Σ_s the mean and the
    covariance of u given s,

        mean                 Σ_s α_s·ū_s
        covariance times G   Σ_s β_s·Σ_s + Σ_{s,s'} γ_{ss'}·ū_s ū_s'ᵀ

    so that the mean of n sequences has that covariance divided by n. A fixed baseline is G = 1.
    """

    alpha: tuple[float, float]
    beta: tuple[float, float]
    gamma: tuple[tuple[float, float], tuple[float, float]]
    advantage: tuple[float, float]
    """E|A| given the sign: α_s/P(s)."""

    @classmethod
    def fixed(cls, p: float) -> "Scheme":
        """(R − p)/√(p(1−p)), p = P_μ(R = 1): the exact expected reward and deviation under μ."""
        _check_both(p)
        deviation = math.sqrt(p * (1 - p))
        return cls._of([1 - p, p], [(0.0, p / deviation), ((1 - p) / deviation, 0.0)], p)

    @classmethod
    def group(cls, p: float, size: int, kind: str = "grpo") -> "Scheme":
        """`group_advantages` of that kind on groups of `size`; unlike rewards or nothing."""
        _check_both(p)
        levels = []
        for right in range(size + 1):
            rewards = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
            advantages = group_advantages(rewards, size, kind).tolist()
            levels.append((advantages[0] if right else 0.0, -advantages[-1] if right < size else 0))
        return cls._of(binom.pmf(range(size + 1), size, p).tolist(), levels, p)

    @classmethod
    def _of(cls, chances: list[float], levels: list[tuple[float, float]], p: float) -> "Scheme":
        """chances[c], levels[c]: of c right ones, and (A₊, A₋) then."""
        size = len(chances) - 1
        chance_C = torch.tensor(chances, dtype=torch.float64)
        level_C2 = torch.tensor(levels, dtype=torch.float64)
        right_C = torch.arange(size + 1, dtype=torch.float64)
        count_C2 = torch.stack([right_C, size - right_C], 1)
        share_C2 = count_C2 * level_C2 / size
        alpha_2 = chance_C @ share_C2
        beta_2 = chance_C @ (count_C2 * level_C2.square()) / size
        gamma_22 = size * (
            torch.einsum("c,cs,cz->sz", chance_C, share_C2, share_C2) - alpha_2.outer(alpha_2)
        )
        return cls(
            alpha=tuple(alpha_2.tolist()),
            beta=tuple(beta_2.tolist()),
            gamma=tuple(map(tuple, gamma_22.tolist())),
            advantage=(float(alpha_2[0]) / p, float(alpha_2[1]) / (1 - p)),
        )


def _check_both(p: float) -> None:
    if not 0 < p < 1:
        raise UserError(f"p: {p} given; allowed: between 0 and 1, so that both rewards occur")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean `[S, P]`, and trace of one sequence's covariance `[S]`: divide by n for n of them."""

    mean_SP: Tensor
    variance_S: Tensor


def estimates(moments: Moments, scheme: Scheme) -> dict[str, Estimate]:
    """The estimator's part of each sign, and both together (`all`)."""
    mean_S2P, found = moments.mean_S2P, {}
    inner_S22 = mean_S2P @ mean_S2P.transpose(1, 2)
    alpha_2, beta_2, gamma_22 = (
        mean_S2P.new_tensor(x) for x in (scheme.alpha, scheme.beta, scheme.gamma)
    )
    for part, signs in {"right": [0], "wrong": [1], "all": [0, 1]}.items():
        within = moments.variance_S2[:, signs] @ beta_2[signs]
        between = (inner_S22 * gamma_22)[:, signs][:, :, signs].sum((1, 2))
        mean_SP = torch.einsum("s,nsp->np", alpha_2[signs], mean_S2P[:, signs])
        found[part] = Estimate(mean_SP=mean_SP, variance_S=(within + between).clamp(min=0))
    return found


def targets(gradient_P: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """∇_θ E_π[ã(y)], ã the mean advantage of y's reward, and the part of it of each sign.

    Σ_{R=1} π·∇log π = ∇J and Σ_{R=0} π·∇log π = −∇J, so every one is a multiple of ∇J: on-policy
    each loss with c = 1 meets it exactly, and what remains off it is bias.
    """
    right, wrong = scheme.advantage
    return {
        "right": right * gradient_P,
        "wrong": wrong * gradient_P,
        "all": (right + wrong) * gradient_P,
    }


def covariance(c_NT: Tensor, samples: Samples, tangent: Tangent, scheme: Scheme) -> Tensor:
    """The whole covariance `[P, P]` of one sequence, of one estimator with both signs."""
    u_NP = tangent.gradients(c_NT)
    mean_2P = samples.given_sign_2N @ u_NP
    total_PP = mean_2P.T @ mean_2P.new_tensor(scheme.gamma) @ mean_2P
    for beta, weight_N, mean_P in zip(scheme.beta, samples.given_sign_2N, mean_2P, strict=True):
        spread_NP = u_NP - mean_P
        total_PP += beta * (spread_NP.T * weight_N) @ spread_NP
    return total_PP
