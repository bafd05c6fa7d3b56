"""The grid: policies × mismatches × inner steps × ways to treat them × losses.

What is compared with what:

- the trainer's policy π_θ; the old one π_old at θ_0; the rollout policy μ, which is the engine at
  θ_0 with its mismatch; the deployed policy, the engine at the current θ with the same mismatch
  (the same noise for each prefix, the same rounding, the same lag).
- inner step k has k − 1 updates behind it: at k = 1, θ = θ_0. Every loss is evaluated at the same
  θ, on one common trajectory: Adam up the exact gradient of J(π_θ), native routes. Samples stay
  those of μ. A stale engine is a number of the same updates behind.
- modes: `recomputed` π_old is the trainer's; `bypass` π_old := μ; `R2` π_θ runs with the experts
  that π_old chose; `R3` π_θ and π_old run with the experts that the engine chose.
- targets: ∇J of the trainer's policy at θ; ∇J of the deployed policy at θ; and, to see what a loss
  estimates, ∇J of the trainer's policy at θ_0.
"""

import itertools
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from benchmarks.studies.exact.estimators import (
    ESTIMATORS,
    Estimate,
    Samples,
    Scheme,
    Tangent,
    coefficients,
    estimates,
    moments,
    targets,
)
from benchmarks.studies.exact.policy import DTYPE, Mismatch, Outputs, Policy, Sizes, ascent
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.routing import compare_routes

MODES = ("recomputed", "bypass", "R2", "R3")
NONE = "none"
BF16 = "bf16 router"


@dataclass(frozen=True, kw_only=True)
class Grid:
    policies: int = 8
    """Random policies, each with its own rewards and noise."""
    sizes: Sizes = field(default_factory=Sizes)
    reward_share: float = 0.25
    """Chance of a sequence to be a right one, drawn once for each."""
    inner_steps: tuple[int, ...] = (1, 4, 16, 64)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Router mismatch rates to which the noise is scaled; 0 is always there."""
    lags: tuple[int, ...] = (1, 4, 8)
    """Updates that a stale engine is behind."""
    group: int = 8
    learning_rate: float = 1e-4
    """Settings of the common trajectory."""
    noise_draws: int = 16
    """Draws of the noise by which it is scaled to a rate; the one that comes nearest is taken."""
    modes: tuple[str, ...] = MODES
    estimators: dict[str, PolicyLossConfig] = field(default_factory=lambda: dict(ESTIMATORS))


def mismatch_rate(policy: Policy, rollout: Outputs, train: Outputs) -> float:
    """Router mismatch rate over the tokens that the rollout policy samples, in expectation."""
    divergence = compare_routes(
        rollout.routes_MLK, train.routes_MLK, num_experts=policy.sizes.experts
    )
    per_prefix_M = divergence.routers_per_token.to(DTYPE) / policy.sizes.layers
    tree = policy.tree
    log_probs_NT = tree.of_sequences(rollout.log_probs_MV)
    return float(log_probs_NT.sum(-1).exp() @ per_prefix_M[tree.nodes_NT].mean(-1))


def noise_for_rates(
    policy: Policy, theta_P: Tensor, grid: Grid, generator: torch.Generator
) -> dict[float, tuple[float, Mismatch]]:
    """rate -> (σ, the mismatch): the σ whose mean rate over the draws is nearest, then one draw.

    One draw's rate is a step function of σ with large steps (the first prefix alone is 1/T of all
    tokens), hence the choice among several.
    """
    train = policy.outputs(theta_P)
    shape = (len(policy.tree.depth_M), policy.sizes.layers, policy.sizes.experts)
    draws = [torch.randn(shape, generator=generator, dtype=DTYPE) for _ in range(grid.noise_draws)]
    sigmas = torch.logspace(-2.5, 0, 24, dtype=DTYPE).tolist()

    def rate(sigma: float, draw: Tensor) -> float:
        rollout = policy.outputs(theta_P, Mismatch(noise_MLE=sigma * draw))
        return mismatch_rate(policy, rollout, train)

    rates = torch.tensor([[rate(sigma, draw) for draw in draws] for sigma in sigmas])
    found = {}
    for wanted in grid.rates:
        row = int((rates.mean(-1) - wanted).abs().argmin())
        draw = draws[int((rates[row] - wanted).abs().argmin())]
        found[wanted] = (sigmas[row], Mismatch(noise_MLE=sigmas[row] * draw))
    return found


def mismatches(
    policy: Policy, trajectory: list[Tensor], start: int, grid: Grid, generator: torch.Generator
) -> dict[str, tuple[float, Mismatch]]:
    """name -> (σ or 0, the mismatch)."""
    theta_P = trajectory[start]
    noise = noise_for_rates(policy, theta_P, grid, generator)
    found = {NONE: (0.0, Mismatch())}
    found |= {f"noise {rate:.0%}": pair for rate, pair in noise.items()}
    found[BF16] = (0.0, Mismatch(bf16_router=True))
    for lag in grid.lags:
        found[f"stale {lag}"] = (0.0, Mismatch(lag_P=theta_P - trajectory[start - lag]))
    return found


def gradient(policy: Policy, theta_P: Tensor, reward_N: Tensor, mismatch: Mismatch) -> Tensor:
    """∇_θ J(θ) of the policy that the mismatch makes of θ."""
    leaf_P = theta_P.clone().requires_grad_()
    log_probs_NT = policy.tree.of_sequences(policy.outputs(leaf_P, mismatch).log_probs_MV)
    return torch.autograd.grad(log_probs_NT.sum(-1).exp() @ reward_N, leaf_P)[0]


def kl_per_token(policy: Policy, first: Outputs, second: Outputs) -> float:
    """KL(first ‖ second) over sequences, divided by their length."""
    log_p_N = policy.tree.of_sequences(first.log_probs_MV).sum(-1)
    log_q_N = policy.tree.of_sequences(second.log_probs_MV).sum(-1)
    return float(log_p_N.exp() @ (log_p_N - log_q_N)) / policy.sizes.length


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One mode's two trainer forwards and the tangent of the current one."""

    old: Outputs
    current: Outputs
    tangent: Tangent

    def samples(self, policy: Policy, rollout: Outputs, reward_N: Tensor, mode: str) -> Samples:
        tree = policy.tree
        old_NT = tree.of_sequences((rollout if mode == "bypass" else self.old).log_probs_MV)
        chosen_MLK = self.old.routes_MLK
        return Samples(
            current_NT=tree.of_sequences(self.current.log_probs_MV),
            old_NT=old_NT,
            rollout_NT=tree.of_sequences(rollout.log_probs_MV),
            reward_N=reward_N,
            router_log_probs=tuple(
                side.router_log_probs_MLE.gather(-1, chosen_MLK)[tree.nodes_NT]
                for side in (self.current, self.old)
            ),
        )


class Settings:
    """Forwards and tangents at one θ; routes that were seen before are not computed again."""

    def __init__(self, policy: Policy, old_theta_P: Tensor, theta_P: Tensor):
        self.policy, self.old_theta_P, self.theta_P = policy, old_theta_P, theta_P
        self.native_old, self.native = policy.outputs(old_theta_P), policy.outputs(theta_P)
        self.tangents: dict[bytes, Tangent] = {}

    def tangent(self, routes_MLK: Tensor) -> Tangent:
        key = routes_MLK.sort(-1).values.numpy().tobytes()
        if key not in self.tangents:
            jacobian_QP = self.policy.jacobian(self.theta_P, routes_MLK)
            self.tangents[key] = Tangent(jacobian_QP, self.policy.tree.pairs_NT)
        return self.tangents[key]

    def of_mode(self, mode: str, rollout: Outputs) -> Setting:
        old, current = self.native_old, self.native
        if mode == "R2":
            current = self.policy.outputs(self.theta_P, routes_MLK=old.routes_MLK)
        elif mode == "R3":
            old = self.policy.outputs(self.old_theta_P, routes_MLK=rollout.routes_MLK)
            current = self.policy.outputs(self.theta_P, routes_MLK=rollout.routes_MLK)
        return Setting(old=old, current=current, tangent=self.tangent(current.routes_MLK))


def compared(estimate: Estimate, target_P: Tensor, name: str) -> dict[str, Tensor]:
    """Against one target: |mean − target|, the cosine of the two, |target|."""
    mean_norm_S, target_norm = estimate.mean_SP.norm(dim=-1), target_P.norm()
    inner_S = estimate.mean_SP @ target_P
    return {
        f"bias_{name}": (estimate.mean_SP - target_P).norm(dim=-1),
        f"cosine_{name}": inner_S / (mean_norm_S * target_norm).clamp(min=1e-300),
        f"norm_{name}": target_norm.expand_as(mean_norm_S),
    }


def cells(
    names: list[str],
    c_SNT: Tensor,
    samples: Samples,
    tangent: Tangent,
    gradients: dict[str, Tensor],
    schemes: dict[str, Scheme],
) -> pd.DataFrame:
    """One row for each estimator, scheme and part."""
    found = moments(c_SNT, samples, tangent)
    grpo_NT = c_SNT[names.index("grpo")]
    sign_N1 = (2 * samples.reward_N - 1)[:, None]
    of_part = {"right": sign_N1[:, 0] > 0, "wrong": sign_N1[:, 0] < 0}
    of_part["all"] = of_part["right"] | of_part["wrong"]
    frames = []
    for scheme_name, scheme in schemes.items():
        wanted = {name: targets(g, scheme) for name, g in gradients.items()}
        for part, estimate in estimates(found, scheme).items():
            c_part_SNT = c_SNT[:, of_part[part]]
            columns = {
                "mean_norm": estimate.mean_SP.norm(dim=-1),
                "variance": estimate.variance_S,
                # largest difference between a coefficient and GRPO's, and likelihood's ±1
                "off_grpo": (c_part_SNT - grpo_NT[of_part[part]]).abs().amax((1, 2)),
                "off_likelihood": (c_part_SNT - sign_N1[of_part[part]]).abs().amax((1, 2)),
                # tokens of the part that carry no gradient
                "without_gradient": given_part(samples, part) @ (c_SNT == 0).to(DTYPE).mean(-1).T,
            }
            for name, target in wanted.items():
                columns |= compared(estimate, target[part], name)
            frame = pd.DataFrame({key: value.numpy() for key, value in columns.items()})
            frames.append(frame.assign(estimator=names, advantages=scheme_name, part=part))
    return pd.concat(frames, ignore_index=True)


def given_part(samples: Samples, part: str) -> Tensor:
    """μ(y | part) `[N]`"""
    right_N, wrong_N = samples.given_sign_2N
    return {"right": right_N, "wrong": wrong_N, "all": samples.probability_N}[part]


def run_policy(seed: int, grid: Grid) -> tuple[pd.DataFrame, pd.DataFrame]:
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(grid.sizes)
    reward_N = (torch.rand(len(policy.tree.tokens_NT), generator=generator) < grid.reward_share).to(
        DTYPE
    )
    start = max(grid.lags, default=0)
    steps = ascent(policy, policy.initial(generator), reward_N, learning_rate=grid.learning_rate)
    trajectory = list(itertools.islice(steps, start + max(grid.inner_steps)))
    chosen = mismatches(policy, trajectory, start, grid, generator)
    old_theta_P = trajectory[start]
    frames, conditions = [], []
    for step in grid.inner_steps:
        theta_P = trajectory[start + step - 1]
        settings = Settings(policy, old_theta_P, theta_P)
        for name, (sigma, mismatch) in chosen.items():
            with torch.no_grad():
                rollout = policy.outputs(old_theta_P, mismatch)
            gradients = {
                "train": gradient(policy, theta_P, reward_N, Mismatch()),
                "deployed": gradient(policy, theta_P, reward_N, mismatch),
                "old": gradient(policy, old_theta_P, reward_N, Mismatch()),
            }
            place = {"policy": seed, "mismatch": name, "inner_step": step}
            samples = None
            for mode in grid.modes:
                setting = settings.of_mode(mode, rollout)
                samples = setting.samples(policy, rollout, reward_N, mode)
                schemes = {
                    "fixed": Scheme.fixed(samples.right),
                    f"group of {grid.group}": Scheme.group(samples.right, grid.group),
                }
                names = list(grid.estimators)
                c_SNT = torch.stack([coefficients(c, samples) for c in grid.estimators.values()])
                frame = cells(names, c_SNT, samples, setting.tangent, gradients, schemes)
                frames.append(frame.assign(**place, mode=mode))
            conditions.append(
                place
                | {
                    "sigma": sigma,
                    "router_mismatch": mismatch_rate(policy, rollout, settings.native_old),
                    "kl_rollout": kl_per_token(policy, rollout, settings.native_old),
                    "kl_update": kl_per_token(policy, settings.native_old, settings.native),
                    "router_shift": mismatch_rate(policy, settings.native_old, settings.native),
                    "right_rollout": samples.right,
                    "right_train": expected(policy, settings.native, reward_N),
                }
            )
    return pd.concat(frames, ignore_index=True), pd.DataFrame(conditions)


def expected(policy: Policy, outputs: Outputs, reward_N: Tensor) -> float:
    """J = Σ_y π(y)·R(y)"""
    return float(policy.tree.of_sequences(outputs.log_probs_MV).sum(-1).exp() @ reward_N)


QUICK = Grid(
    policies=2,
    sizes=Sizes(tokens=3, length=3, layers=2, hidden=4, expert_width=2),
    inner_steps=(1, 16),
    rates=(0.1,),
    lags=(4,),
    noise_draws=4,
)
