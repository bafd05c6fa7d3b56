"""Training of the enumerated policy from sampled groups, many runs side by side.

A run has a policy, rewards and an engine of its own, drawn from its seed. An update draws groups
from the engine's policy μ (the weights of some updates ago, with noise on the router), and takes
inner steps of Adam on them, the whole batch each. Uniform numbers for all draws come from the
seed, so runs of one seed see the same ones, whatever their loss.

The gradient is in units of Σ_t ∇log π per sequence, for every loss: one that divides by the
length is multiplied by it again, so that a bound on its norm means the same for all.

Shapes: X runs, U updates, K inner steps, B sampled sequences (groups of G), N = V^T sequences,
T tokens, P parameters; the policy's letters are those of policy.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.studies.exact.policy import DTYPE, Policy, Sizes
from benchmarks.studies.exact.study import Grid, noise_for_rates
from moe_upgrpo.losses import (
    PRESETS,
    PolicyLossConfig,
    aggregation_weights,
    group_advantages,
    policy_loss,
)

BETAS = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings that the runs of one cell have in common."""

    updates: int = 12
    """Batches drawn."""
    inner_steps: int = 16
    """Optimizer steps on each."""
    groups: int = 8
    group: int = 8
    lag: int = 0
    """Updates by which the engine's weights are behind."""
    recomputed: bool = False
    """π_old is the trainer's policy at its own weights, not at those of the engine."""

    @property
    def batch(self) -> int:
        return self.groups * self.group


@dataclass(frozen=True, kw_only=True)
class Start:
    """One seed's policy, rewards and engine. accepted_N: wrong ones that are always rewarded."""

    seed: int
    theta_P: Tensor
    reward_N: Tensor
    accepted_N: Tensor
    noise_MLE: Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    start: Start
    learning_rate: float
    max_norm: float = math.inf
    """Bound on the gradient's norm."""
    false_positives: float = 0.0
    """Chance of a wrong response to be rewarded, drawn for each."""
    columns: dict = field(default_factory=dict)
    """Key of its cell."""


class Model:
    """Log-probs of all sequences for many θ at once: one forward over the longest prefixes."""

    def __init__(self, sizes: Sizes):
        self.policy = Policy(sizes)
        tree = self.tree = self.policy.tree
        self.nodes_R = tree.nodes_NT[:: sizes.tokens, -1]  # sequences are in lexical order
        self.place = (
            (torch.arange(len(tree.tokens_NT)) // sizes.tokens)[:, None],
            torch.arange(sizes.length),
            tree.tokens_NT,
        )
        prefixes_RT = tree.prefixes_MT[self.nodes_R]
        self._native = torch.func.vmap(lambda theta_P: self.policy.forward(theta_P, prefixes_RT)[0])
        self._noisy = torch.func.vmap(
            lambda theta_P, noise_RTLE: self.policy.forward(
                theta_P, prefixes_RT, noise_TLE=noise_RTLE
            )[0]
        )

    def noise(self, noise_MLE: Tensor) -> Tensor:
        """`[R, T, L, E]`: of each position of the longest prefixes."""
        return noise_MLE[self.tree.ancestors_MT[self.nodes_R]]

    def log_probs(self, theta_XP: Tensor, noise_XRTLE: Tensor | None = None) -> Tensor:
        """log π(y_t | y_<t), `[X, N, T]`, of the trainer or of the engine with that noise."""
        if noise_XRTLE is None:
            every_XRTV = self._native(theta_XP)
        else:
            every_XRTV = self._noisy(theta_XP, noise_XRTLE)
        return every_XRTV[(slice(None), *self.place)]


def filled_to(share: float, probability_N: Tensor, order_N: Tensor) -> Tensor:
    """0/1 `[N]`: sequences in that order, each that still fits, up to that total probability."""
    chosen_N, total = torch.zeros_like(probability_N), 0.0
    for n in order_N.tolist():
        if total + float(probability_N[n]) <= share:
            chosen_N[n], total = 1.0, total + float(probability_N[n])
    return chosen_N


def make_start(
    model: Model, seed: int, *, right: float, accepted: float = 0.0, mismatch: float = 0.1
) -> Start:
    """A random policy under which a response is right with the chance `right`, or just below.

    accepted: share of the wrong probability whose sequences the verifier always takes as right.
    mismatch: router mismatch rate of the engine at the start.
    """
    generator = torch.Generator().manual_seed(seed)
    theta_P = model.policy.initial(generator)
    with torch.no_grad():
        probability_N = model.log_probs(theta_P[None])[0].sum(-1).exp()
        order_N = torch.randperm(len(probability_N), generator=generator)
        reward_N = filled_to(right, probability_N, order_N)
        wrong_N = probability_N * (1 - reward_N)
        fits_N = order_N.flip(0)[reward_N[order_N.flip(0)] == 0]
        accepted_N = filled_to(accepted * float(wrong_N.sum()), probability_N, fits_N)
        grid = Grid(rates=(mismatch,), noise_draws=4)
        _, engine = noise_for_rates(model.policy, theta_P, grid, generator)[mismatch]
    return Start(
        seed=seed,
        theta_P=theta_P,
        reward_N=reward_N,
        accepted_N=accepted_N,
        noise_MLE=engine.noise_MLE,
    )


def in_sequence_units(config: PolicyLossConfig, batch: int, length: int) -> float:
    """Divisor of a mean over sequences of Σ_t in the loss: 1 or the length."""
    weight = aggregation_weights(
        torch.tensor([length], dtype=DTYPE),
        config.aggregation,
        global_tokens=batch * length,
        global_sequences=batch,
    )
    return 1 / (float(weight) * batch)


def pulls(
    config: PolicyLossConfig,
    current_XBT: Tensor,
    old_XBT: Tensor,
    rollout_XBT: Tensor,
    advantage_XB: Tensor,
) -> Tensor:
    """A·c/B `[X, B, T]`: what the ascent direction has of ∇log π of each token, through autograd.

    Every run is a batch of its own; one call of `policy_loss` for all, because the loss is a sum
    once its denominators are given.
    """
    X, B, T = current_XBT.shape
    leaf_XBT = current_XBT.detach().clone().requires_grad_()
    flat = (leaf_XBT, old_XBT, advantage_XB[..., None].expand_as(leaf_XBT), torch.ones(X, B, T))
    loss = policy_loss(
        *(x.reshape(X * B, T) for x in flat),
        config=config,
        rollout_log_probs=rollout_XBT.reshape(X * B, T),
        global_tokens=B * T,
        global_sequences=B,
    ).loss
    (slope_XBT,) = torch.autograd.grad(loss, leaf_XBT)
    return -slope_XBT * in_sequence_units(config, B, T)


def ascent_direction(
    model: Model, theta_XP: Tensor, index_XB: Tensor, pull
) -> tuple[Tensor, Tensor]:
    """Gradient `[X, P]` and the pulls `pull(log-probs [X, B, T])` it is made of."""
    leaf_XP = theta_XP.detach().clone().requires_grad_()
    current_XBT = taken(model.log_probs(leaf_XP), index_XB)
    pull_XBT = pull(current_XBT)
    (gradient_XP,) = torch.autograd.grad(current_XBT, leaf_XP, pull_XBT)
    return gradient_XP, pull_XBT


def taken(values_XNT: Tensor, index_XB: Tensor) -> Tensor:
    """`[X, N, T]` → `[X, B, T]`: the drawn sequences."""
    return values_XNT.gather(1, index_XB[..., None].expand(-1, -1, values_XNT.shape[-1]))


class Adam:
    """Adam with a learning rate for each run; θ goes up the direction."""

    def __init__(self, theta_XP: Tensor, learning_rate_X: Tensor):
        self.rate_X1, self.steps = learning_rate_X[:, None], 0
        self.mean_XP, self.square_XP = torch.zeros_like(theta_XP), torch.zeros_like(theta_XP)

    def step(self, theta_XP: Tensor, gradient_XP: Tensor) -> Tensor:
        self.steps += 1
        self.mean_XP.lerp_(gradient_XP, 1 - BETAS[0])
        self.square_XP.lerp_(gradient_XP.square(), 1 - BETAS[1])
        mean_XP = self.mean_XP / (1 - BETAS[0] ** self.steps)
        deviation_XP = (self.square_XP / (1 - BETAS[1] ** self.steps)).sqrt() + 1e-8
        return theta_XP + self.rate_X1 * mean_XP / deviation_XP


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(10_000 + seed), dtype=DTYPE)


def train(model: Model, loss: str, runs: Sequence[Run], plan: Plan) -> pd.DataFrame:
    """A row for each run and update 0 … U: the exact figures after it, and of its inner steps.

    reward, engine_reward: P(right) of the trainer's policy and of the engine at the same weights
    (true rewards); kl: KL(π_θ ‖ π at the start) of a sequence; entropy: of a sequence, nats.
    first_norm, largest_norm: gradient norms before the bound, first and largest of the update.
    largest_weight: largest c on a positive. pull, wrong_pull: Σ|A·c| over positives, and of it on
    wrong responses. informative: share of groups with unlike rewards. finite: no NaN or infinity
    up to here.
    """
    config = PRESETS[loss]
    theta_XP = torch.stack([run.start.theta_P for run in runs])
    right_XN = torch.stack([run.start.reward_N for run in runs])
    accepted_XN = torch.stack([run.start.accepted_N for run in runs])
    noise_XRTLE = torch.stack([model.noise(run.start.noise_MLE) for run in runs])
    rate_X, bound_X, false_X = (
        torch.tensor([getattr(run, name) for run in runs], dtype=DTYPE)
        for name in ("learning_rate", "max_norm", "false_positives")
    )
    draws_XU2B = torch.stack(
        [uniform(run.start.seed, (plan.updates, 2, plan.batch)) for run in runs]
    )
    adam, history = Adam(theta_XP, rate_X), [theta_XP]
    finite_X = torch.ones(len(runs), dtype=torch.bool)
    with torch.no_grad():
        start_XN = model.log_probs(theta_XP).sum(-1)
    rows = [exact_figures(model, theta_XP, noise_XRTLE, right_XN, start_XN)]
    for update in range(plan.updates):
        engine_XP = history[max(update - plan.lag, 0)]
        with torch.no_grad():
            rollout_XNT = model.log_probs(engine_XP, noise_XRTLE)
            old_XNT = model.log_probs(theta_XP if plan.recomputed else engine_XP)
        index_XB = drawn(rollout_XNT, draws_XU2B[:, update, 0])
        right_XB = right_XN.gather(1, index_XB)
        mistaken_XB = (draws_XU2B[:, update, 1] < false_X[:, None]).to(DTYPE)
        rewarded_XB = right_XB.maximum(accepted_XN.gather(1, index_XB)).maximum(mistaken_XB)
        advantage_XB = group_advantages(rewarded_XB.flatten(), plan.group).view_as(rewarded_XB)
        positive_XB = advantage_XB > 0
        old_XBT, rollout_XBT = taken(old_XNT, index_XB), taken(rollout_XNT, index_XB)
        measured = []
        for _ in range(plan.inner_steps):
            gradient_XP, pull_XBT = ascent_direction(
                model,
                theta_XP,
                index_XB,
                lambda now_XBT, old=old_XBT, rollout=rollout_XBT, a=advantage_XB: pulls(
                    config, now_XBT, old, rollout, a
                ),
            )
            norm_X = gradient_XP.norm(dim=-1)
            finite_X &= norm_X.isfinite()
            scale_X = (bound_X / norm_X).clamp(max=1).where(finite_X & (norm_X > 0), 1.0)
            # a run that is not finite stays where it was
            gradient_XP = torch.where(finite_X[:, None], gradient_XP * scale_X[:, None], 0.0)
            theta_XP = adam.step(theta_XP, gradient_XP)
            pull_XB = pull_XBT.abs().sum(-1) * positive_XB
            weight_XB = pull_XBT.abs().amax(-1) * plan.batch / advantage_XB.abs()
            measured.append(
                (
                    norm_X,
                    weight_XB.where(positive_XB, 0.0).amax(-1),
                    pull_XB.sum(-1),
                    (pull_XB * (1 - right_XB)).sum(-1),
                )
            )
        history.append(theta_XP)
        norm_XK, weight_XK, pull_XK, wrong_XK = (
            torch.stack(x, -1) for x in zip(*measured, strict=True)
        )
        rows.append(
            exact_figures(model, theta_XP, noise_XRTLE, right_XN, start_XN)
            | {
                "first_norm": norm_XK[:, 0],
                "largest_norm": norm_XK.amax(-1),
                "largest_weight": weight_XK.amax(-1),
                "pull": pull_XK.sum(-1),
                "wrong_pull": wrong_XK.sum(-1),
                "informative": positive_XB.view(len(runs), plan.groups, -1)
                .any(-1)
                .to(DTYPE)
                .mean(-1),
                "finite": finite_X.clone(),
            }
        )
    frames = [
        pd.DataFrame({name: column.numpy() for name, column in row.items()}).assign(
            update=update, run=np.arange(len(runs))
        )
        for update, row in enumerate(rows)
    ]
    cells = pd.DataFrame(
        [
            {
                "loss": loss,
                "seed": run.start.seed,
                "learning_rate": run.learning_rate,
                "clipped": math.isfinite(run.max_norm),
            }
            | run.columns
            for run in runs
        ]
    )
    return pd.concat(frames, ignore_index=True).join(cells, on="run").drop(columns="run")


def drawn(log_probs_XNT: Tensor, uniform_XB: Tensor) -> Tensor:
    """Indices `[X, B]` of sequences, by the inverse of the cumulated probabilities."""
    cumulated_XN = log_probs_XNT.sum(-1).exp().cumsum(-1)
    found_XB = torch.searchsorted(cumulated_XN, uniform_XB * cumulated_XN[:, -1:])
    return found_XB.clamp(max=cumulated_XN.shape[-1] - 1)


@torch.no_grad()
def exact_figures(
    model: Model, theta_XP: Tensor, noise_XRTLE: Tensor, right_XN: Tensor, start_XN: Tensor
) -> dict[str, Tensor]:
    log_p_XN = model.log_probs(theta_XP).sum(-1)
    p_XN = log_p_XN.exp()
    engine_XN = model.log_probs(theta_XP, noise_XRTLE).sum(-1).exp()
    return {
        "reward": (p_XN * right_XN).sum(-1),
        "engine_reward": (engine_XN * right_XN).sum(-1),
        "kl": (p_XN * (log_p_XN - start_XN)).sum(-1),
        "entropy": -(p_XN * log_p_XN).sum(-1),
    }


def collapsed(reward: Sequence[float], finite: bool = True) -> bool:
    """The exact reward after some update is below half of the best so far, or not all is finite.

    The start counts as an update: a run that only loses half of what it had has collapsed too.
    """
    curve = np.asarray(reward, dtype=float)
    if len(curve) == 0:
        raise ValueError("collapsed: an empty curve given")
    if not finite or not np.isfinite(curve).all():
        return True
    return bool((curve < 0.5 * np.maximum.accumulate(curve)).any())


def exploded(norms: Sequence[float], factor: float = 100.0) -> bool:
    """A gradient norm above `factor` times the first that is not 0, or one that is not finite."""
    norms = np.asarray(norms, dtype=float)
    if not np.isfinite(norms).all():
        return True
    nonzero = norms[norms > 0]
    return bool(len(nonzero) and nonzero.max() > factor * nonzero[0])
