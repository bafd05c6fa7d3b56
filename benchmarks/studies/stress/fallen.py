"""Positives whose probability has fallen: what each loss weighs them, its bias, what comes back.

π_old is a random policy, and so is μ, the same one (no mismatch). Half of the right sequences
(every second one in order of probability) is pushed down by gradient steps until its total
probability is e^-k of the old, while that of the other half is held. There every loss's exact
gradient is compared with ∇J, and followed for some steps.

Shapes: those of runs.py.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from benchmarks.studies.exact.estimators import (
    ESTIMATORS,
    Samples,
    Scheme,
    Tangent,
    coefficients,
    estimates,
    moments,
    targets,
)
from benchmarks.studies.exact.policy import DTYPE, Mismatch
from benchmarks.studies.exact.study import gradient
from benchmarks.studies.stress.runs import Adam, Model, Start, ascent_direction, pulls
from moe_upgrpo.errors import UserError

DEPTHS = (1, 2, 4, 8)
"""k: the fallen half is at e^-k."""
RATE = 3e-3


def weight_on_positive(loss: str, log_ratio: Sequence[float]) -> list[float]:
    """c of each token of one positive sequence whose tokens have these log r."""
    current_1T = torch.tensor([log_ratio], dtype=DTYPE) - 10
    old_1T = torch.full_like(current_1T, -10)
    samples = Samples(
        current_NT=current_1T, old_NT=old_1T, rollout_NT=old_1T, reward_N=torch.ones(1, dtype=DTYPE)
    )
    return coefficients(ESTIMATORS[loss], samples)[0].tolist()


def half_of_right(start: Start, probability_N: Tensor) -> Tensor:
    """0/1 `[N]`: every second right sequence in falling order of probability."""
    order_N = (probability_N * start.reward_N).argsort(descending=True)
    right_R = order_N[: int(start.reward_N.sum())]
    half_N = torch.zeros_like(probability_N)
    half_N[right_R[::2]] = 1.0
    return half_N


def pushed_down(
    model: Model,
    theta_XP: Tensor,
    fall_XN: Tensor,
    keep_XN: Tensor,
    depths: Sequence[int] = DEPTHS,
    *,
    max_steps: int = 4000,
) -> dict[int, Tensor]:
    """k → θ `[X, P]`, the first at which P(fall) is at most e^-k of the start's."""

    def log_shares(theta_XP: Tensor) -> tuple[Tensor, Tensor]:
        log_p_XN = model.log_probs(theta_XP).sum(-1)
        return tuple(
            log_p_XN.masked_fill(part_XN == 0, -torch.inf).logsumexp(-1)
            for part_XN in (fall_XN, keep_XN)
        )

    with torch.no_grad():
        fall_start_X, keep_start_X = log_shares(theta_XP)
    found = {k: theta_XP.clone() for k in depths}
    missing = {k: torch.ones(len(theta_XP), dtype=torch.bool) for k in depths}
    adam = Adam(theta_XP, torch.full((len(theta_XP),), RATE, dtype=DTYPE))
    for _ in range(max_steps):
        leaf_XP = theta_XP.detach().clone().requires_grad_()
        fall_X, keep_X = log_shares(leaf_XP)
        for k in depths:
            hit_X = missing[k] & (fall_X.detach() <= fall_start_X - k)
            found[k][hit_X] = theta_XP[hit_X]
            missing[k] &= ~hit_X
        if not any(m.any() for m in missing.values()):
            return found
        goal = -fall_X - 10 * (keep_X - keep_start_X).square()
        (gradient_XP,) = torch.autograd.grad(goal.sum(), leaf_XP)
        theta_XP = adam.step(theta_XP, gradient_XP)
    raise UserError(f"the positives had not fallen to e^-{max(depths)} after {max_steps} steps")


def fallen(
    model: Model,
    starts: Sequence[Start],
    losses: Sequence[str],
    *,
    depths: Sequence[int] = DEPTHS,
    steps: int = 16,
) -> pd.DataFrame:
    """A row for each seed, k and loss.

    weight: mean c on the fallen sequences under μ. bias_right, bias: of the right side and of
    all, over the length of the whole target; cosine: of all with ∇J. fall, keep: P/P_old of the
    two halves; after `steps` Adam steps along the loss's exact mean, fall_after and keep_after;
    reward, reward_after: P(right).
    """
    theta_XP = torch.stack([s.theta_P for s in starts])
    reward_XN = torch.stack([s.reward_N for s in starts])
    with torch.no_grad():
        old_XNT = model.log_probs(theta_XP)
    p_old_XN = old_XNT.sum(-1).exp()
    fall_XN = torch.stack([half_of_right(s, p) for s, p in zip(starts, p_old_XN, strict=True)])
    keep_XN = reward_XN - fall_XN
    right_X = (p_old_XN * reward_XN).sum(-1)
    schemes = [Scheme.fixed(float(p)) for p in right_X]
    advantage_XN = (reward_XN - right_X[:, None]) / (right_X * (1 - right_X)).sqrt()[:, None]
    N = reward_XN.shape[1]
    every_XN = torch.arange(N).expand(len(starts), -1)
    frames = []
    for k, down_XP in pushed_down(model, theta_XP, fall_XN, keep_XN, depths).items():
        exact = [
            against_target(model, down_XP[x], old_XNT[x], reward_XN[x], fall_XN[x], scheme, losses)
            for x, scheme in enumerate(schemes)
        ]
        before = shares(model, down_XP, p_old_XN, fall_XN, keep_XN)
        for i, loss in enumerate(losses):
            config, now_XP = ESTIMATORS[loss], down_XP
            adam = Adam(now_XP, torch.full((len(starts),), RATE, dtype=DTYPE))
            for _ in range(steps):
                direction_XP, _ = ascent_direction(
                    model,
                    now_XP,
                    every_XN,
                    # all sequences, weighed by μ: the mean itself
                    lambda now_XNT, c=config: pulls(
                        c, now_XNT, old_XNT, old_XNT, advantage_XN * p_old_XN * N
                    ),
                )
                now_XP = adam.step(now_XP, direction_XP)
            after = shares(model, now_XP, p_old_XN, fall_XN, keep_XN)
            columns = before | {f"{name}_after": values for name, values in after.items()}
            frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
            found = pd.DataFrame([rows[i] for rows in exact])
            place = {"loss": loss, "k": k, "seed": [s.seed for s in starts]}
            frames.append(pd.concat([frame, found], axis=1).assign(**place))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def shares(
    model: Model, theta_XP: Tensor, p_old_XN: Tensor, fall_XN: Tensor, keep_XN: Tensor
) -> dict[str, Tensor]:
    p_XN = model.log_probs(theta_XP).sum(-1).exp()
    parts = {"fall": fall_XN, "keep": keep_XN}
    of_old = {n: (p_XN * w).sum(-1) / (p_old_XN * w).sum(-1) for n, w in parts.items()}
    return of_old | {"reward": (p_XN * (fall_XN + keep_XN)).sum(-1)}


def against_target(
    model: Model,
    theta_P: Tensor,
    old_NT: Tensor,
    reward_N: Tensor,
    fall_N: Tensor,
    scheme: Scheme,
    losses: Sequence[str],
) -> list[dict[str, float]]:
    """For each loss, the exact mean of its gradient against ∇J at θ."""
    with torch.no_grad():
        current_NT = model.log_probs(theta_P[None])[0]
    samples = Samples(current_NT=current_NT, old_NT=old_NT, rollout_NT=old_NT, reward_N=reward_N)
    tangent = Tangent(model.policy.jacobian(theta_P), model.tree.pairs_NT)
    c_SNT = torch.stack([coefficients(ESTIMATORS[loss], samples) for loss in losses])
    found = estimates(moments(c_SNT, samples, tangent), scheme)
    wanted = targets(gradient(model.policy, theta_P, reward_N, Mismatch()), scheme)
    length = wanted["all"].norm()
    means = {part: found[part].mean_SP for part in ("right", "all")}
    bias = {part: (mean - wanted[part]).norm(dim=-1) / length for part, mean in means.items()}
    cosine_S = torch.nn.functional.cosine_similarity(means["all"], wanted["all"][None])
    weight_N = samples.probability_N * fall_N
    weight_S = c_SNT.mean(-1) @ weight_N / weight_N.sum()
    columns = {
        "weight": weight_S,
        "bias_right": bias["right"],
        "bias": bias["all"],
        "cosine": cosine_S,
    }
    return [{name: float(x[i]) for name, x in columns.items()} for i in range(len(losses))]
