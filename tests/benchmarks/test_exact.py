"""The exact benchmark against enumeration by hand, autograd through the model, and sampling.

Policies here are smaller than the benchmark's; what a larger one finds is in docs/exact.md.
"""

import itertools
import json
from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.studies.exact import __main__ as command
from benchmarks.studies.exact.estimators import (
    ESTIMATORS,
    Samples,
    Scheme,
    Tangent,
    coefficients,
    covariance,
    estimates,
    moments,
    targets,
)
from benchmarks.studies.exact.policy import DTYPE, Mismatch, Policy, Sizes, Tree, ascent
from benchmarks.studies.exact.report import Report, checks, crossing, with_errors
from benchmarks.studies.exact.study import gradient, mismatch_rate
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import group_advantages, policy_loss

SIZES = Sizes(tokens=3, length=3, layers=2, experts=4, hidden=4, expert_width=2)


class World:
    """A policy, rewards, an engine with noise on its router, and θ updated since."""

    def __init__(self, sizes: Sizes = SIZES, seed: int = 0, updates: int = 2, sigma: float = 0.5):
        generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(sizes)
        tree = self.policy.tree
        self.reward_N = (torch.arange(len(tree.tokens_NT)) % 3 == 0).to(DTYPE)
        shape = (len(tree.depth_M), sizes.layers, sizes.experts)
        self.mismatch = Mismatch(noise_MLE=sigma * torch.randn(shape, generator=generator).double())
        steps = ascent(
            self.policy, self.policy.initial(generator), self.reward_N, learning_rate=0.1
        )
        self.old_P, *_, self.theta_P = itertools.islice(steps, max(updates + 1, 2))
        if updates == 0:
            self.theta_P = self.old_P

    def log_probs_NT(self, theta_P, mismatch=None):
        return self.policy.tree.of_sequences(self.policy.outputs(theta_P, mismatch).log_probs_MV)

    @cached_property
    def samples(self) -> Samples:
        return Samples(
            current_NT=self.log_probs_NT(self.theta_P),
            old_NT=self.log_probs_NT(self.old_P),
            rollout_NT=self.log_probs_NT(self.old_P, self.mismatch),
            reward_N=self.reward_N,
        )

    def tangent(self) -> Tangent:
        return Tangent(self.policy.jacobian(self.theta_P), self.policy.tree.pairs_NT)

    def estimate(self, name: str, scheme: Scheme):
        samples = self.samples
        c_SNT = coefficients(ESTIMATORS[name], samples)[None]
        return estimates(moments(c_SNT, samples, self.tangent()), scheme)

    def gradient_of_batch(self, name, index_B, advantage_B) -> torch.Tensor:
        """Ascent direction from `policy_loss` on real sequences, by autograd through the model.

        Times T where the loss divides by it: TIC and TOPR do not (docs/losses.md).
        """
        leaf_P = self.theta_P.clone().requires_grad_()
        samples = self.samples
        advantages_BT = advantage_B[:, None].expand(-1, self.policy.sizes.length)
        loss = policy_loss(
            self.log_probs_NT(leaf_P)[index_B],
            samples.old_NT[index_B],
            advantages_BT,
            torch.ones_like(advantages_BT),
            config=ESTIMATORS[name],
            rollout_log_probs=samples.rollout_NT[index_B],
        ).loss
        scale = 1 if name in ("tic-grpo", "topr") else self.policy.sizes.length
        return -scale * torch.autograd.grad(loss, leaf_P)[0]


def close(a, b, tolerance=1e-12):
    assert torch.is_tensor(a) and a.shape == b.shape
    assert float((a - b).norm()) <= tolerance * float(b.norm().clamp(min=1)), (a, b)


# --- the policy


def test_the_tree_of_two_tokens_and_two_positions():
    """Sequences 00 01 10 11; prefixes: none (node 0), 0 (node 1), 1 (node 2); 2 begins."""
    tree = Tree(2, 2)
    assert tree.tokens_NT.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert tree.nodes_NT.tolist() == [[0, 1], [0, 1], [0, 2], [0, 2]]
    assert tree.prefixes_MT.tolist() == [[2, 0], [2, 0], [2, 1]]
    assert tree.depth_M.tolist() == [0, 1, 1]
    assert tree.ancestors_MT.tolist() == [[0, 0], [0, 1], [0, 2]]
    # pair = node·V + token
    assert tree.pairs_NT.tolist() == [[0, 2], [0, 3], [1, 4], [1, 5]]


def test_probabilities_of_all_sequences_add_up_to_one():
    world = World()
    for mismatch in (None, world.mismatch, Mismatch(bf16_router=True)):
        total = world.log_probs_NT(world.theta_P, mismatch).sum(-1).exp().sum()
        assert abs(float(total) - 1) < 1e-12


def test_a_prefix_does_not_see_what_follows_it():
    """Each prefix alone, fed behind its end with other tokens, gives the same distribution."""
    world = World()
    tree = world.policy.tree
    behind_MT = torch.arange(tree.T) > tree.depth_M[:, None]
    other_MT = torch.where(behind_MT, tree.V - 1, tree.prefixes_MT)
    assert (other_MT != tree.prefixes_MT).any()
    log_probs, _, _ = world.policy.forward(world.theta_P, other_MT)
    last = (torch.arange(len(tree.depth_M)), tree.depth_M)
    close(log_probs[last], world.policy.outputs(world.theta_P).log_probs_MV)


@pytest.mark.bits
def test_held_to_its_own_routes_the_policy_is_the_same_and_to_others_another():
    world = World()
    native = world.policy.outputs(world.theta_P)
    held = world.policy.outputs(world.theta_P, routes_MLK=native.routes_MLK)
    assert torch.equal(held.log_probs_MV, native.log_probs_MV)
    noisy = world.policy.outputs(world.theta_P, world.mismatch)
    assert mismatch_rate(world.policy, noisy, native) > 0
    forced = world.policy.outputs(world.theta_P, routes_MLK=noisy.routes_MLK)
    assert torch.equal(forced.routes_MLK, noisy.routes_MLK)
    assert not torch.equal(forced.log_probs_MV, native.log_probs_MV)


def test_the_jacobian_is_that_of_autograd():
    world = World()
    native = world.policy.outputs(world.theta_P)
    jacobian_QP = world.policy.jacobian(world.theta_P)
    leaf_P = world.theta_P.clone().requires_grad_()
    log_probs_Q = world.policy.outputs(leaf_P).log_probs_MV.flatten()
    for q in (0, 4, len(log_probs_Q) - 1):
        (row_P,) = torch.autograd.grad(log_probs_Q[q], leaf_P, retain_graph=True)
        close(jacobian_QP[q], row_P)
    close(world.policy.jacobian(world.theta_P, native.routes_MLK), jacobian_QP)


def test_the_rate_is_an_expectation_over_sampled_tokens():
    """One flipped router, at one prefix of depth 1: its chance under μ over T·L."""
    world = World()
    rollout = world.policy.outputs(world.theta_P)
    routes = rollout.routes_MLK.clone()
    kept = set(routes[1, 0].tolist())
    routes[1, 0] = torch.tensor(sorted(set(range(4)) - kept))
    rate = mismatch_rate(world.policy, rollout, replace(rollout, routes_MLK=routes))
    chance = float(rollout.log_probs_MV[0, 0].exp())  # node 1 is the prefix "token 0"
    assert rate == pytest.approx(chance / (3 * 2), rel=1e-12)


@pytest.mark.parametrize("kind", ["noise", "lag"])
def test_the_deployed_gradient_by_finite_differences(kind):
    """The noise, or the lag, stays while θ moves. bf16 has no derivative of its own: not here."""
    world = World()
    mismatch = world.mismatch
    if kind == "lag":
        mismatch = Mismatch(lag_P=world.theta_P - world.old_P)
    g_P = gradient(world.policy, world.theta_P, world.reward_N, mismatch)
    direction_P = torch.randn(len(g_P), generator=torch.Generator().manual_seed(1)).double()
    h = 1e-6

    def objective(theta_P):
        return float(world.log_probs_NT(theta_P, mismatch).sum(-1).exp() @ world.reward_N)

    up, down = (objective(world.theta_P + s * h * direction_P) for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(float(g_P @ direction_P), rel=1e-5)
    if kind == "lag":
        close(g_P, gradient(world.policy, world.old_P, world.reward_N, Mismatch()))


# --- the estimators


@pytest.mark.bits
def test_negative_control_up_is_grpo_at_the_first_inner_step():
    """To the last bit, with a mismatched engine; and no longer after two updates."""
    first, later = World(updates=0), World(updates=2)
    grpo, up = ESTIMATORS["grpo"], ESTIMATORS["up-grpo"]
    assert not torch.equal(first.samples.rollout_NT, first.samples.old_NT)
    assert torch.equal(coefficients(up, first.samples), coefficients(grpo, first.samples))
    assert not torch.equal(coefficients(up, later.samples), coefficients(grpo, later.samples))


@pytest.mark.parametrize("name", ["reinforce", "up-grpo", "grpo", "gspo", "tic-grpo", "dapo"])
def test_on_policy_a_loss_with_c_of_one_is_unbiased(name):
    """The target by autograd of Σ_y π(y)·A(y), A = (R − p)/σ held fixed, not by `targets`."""
    world = World(updates=0, sigma=0.0)
    p = world.samples.right
    advantage_N = (world.reward_N - p) / (p * (1 - p)) ** 0.5
    leaf_P = world.theta_P.clone().requires_grad_()
    (world.log_probs_NT(leaf_P).sum(-1).exp() @ advantage_N).backward()
    close(world.estimate(name, Scheme.fixed(p))["all"].mean_SP[0], leaf_P.grad)
    target = targets(
        gradient(world.policy, world.theta_P, world.reward_N, Mismatch()), Scheme.fixed(p)
    )
    close(target["all"], leaf_P.grad)


def test_whole_sequence_importance_sampling_is_unbiased_whatever_the_mismatch():
    world = World(updates=2)
    scheme = Scheme.fixed(world.samples.right)
    wanted = targets(gradient(world.policy, world.theta_P, world.reward_N, Mismatch()), scheme)
    for part, estimate in world.estimate("sequence-is", scheme).items():
        close(estimate.mean_SP[0], wanted[part])
    biased = world.estimate("up-grpo", scheme)["all"].mean_SP[0]
    assert float((biased - wanted["all"]).norm()) > 0.05 * float(wanted["all"].norm())


def test_the_bias_of_ups_right_side_by_hand():
    """A₊·Σ_{R=1} (μ − π)(y)·∇log π(y): zero only where μ = π, whatever became of the ratio."""
    world = World(updates=0)
    samples = world.samples
    p = samples.right
    scheme = Scheme.fixed(p)
    leaf_P = world.theta_P.clone().requires_grad_()
    log_pi_N = world.log_probs_NT(leaf_P).sum(-1)
    weight_N = (samples.probability_N - log_pi_N.detach().exp()) * world.reward_N
    (by_hand_P,) = torch.autograd.grad(log_pi_N @ weight_N, leaf_P)
    by_hand_P *= (1 - p) / (p * (1 - p)) ** 0.5
    wanted = targets(gradient(world.policy, world.theta_P, world.reward_N, Mismatch()), scheme)
    found = world.estimate("up-grpo", scheme)["right"].mean_SP[0] - wanted["right"]
    close(found, by_hand_P)
    assert float(by_hand_P.norm()) > 0.01


def test_the_fixed_baseline_in_numbers():
    """p = 1/4: A₊ = (3/4)/√(3/16) = √3, A₋ = 1/√3. Weights of u given the sign: p·A₊ = √3/4 and
    (1−p)·A₋ = √3/4; variance within: p·A₊² = 3/4, (1−p)·A₋² = 1/4; between: p(1−p)·A² = 9/16, 1/16,
    and −p(1−p)·A₊·A₋ = −3/16."""
    scheme = Scheme.fixed(0.25)
    r3 = 3**0.5
    assert scheme.alpha == pytest.approx((r3 / 4, r3 / 4))
    assert scheme.beta == pytest.approx((3 / 4, 1 / 4))
    assert np.array(scheme.gamma) == pytest.approx(np.array([[9, -3], [-3, 1]]) / 16)
    assert scheme.advantage == pytest.approx((r3, 1 / r3))


@pytest.mark.parametrize(("size", "kind"), [(2, "dr-grpo"), (3, "grpo")])
@pytest.mark.parametrize("name", ["up-grpo", "gspo", "tic-grpo", "grpo+token-tis"])
def test_groups_are_marginalised_as_by_enumerating_every_group(name, size, kind):
    """Four sequences, all 4^G groups, each through `policy_loss` and the model."""
    world = World(Sizes(tokens=2, length=2, layers=2, experts=4, hidden=4, expert_width=2))
    samples = world.samples
    assert samples.reward_N.tolist() == [1, 0, 0, 1]
    scheme = Scheme.group(samples.right, size, kind)
    chances, gradients = [], []
    for members in itertools.product(range(4), repeat=size):
        index_G = torch.tensor(members)
        advantage_G = group_advantages(samples.reward_N[index_G], size, kind)
        chances.append(samples.probability_N[index_G].prod())
        gradients.append(world.gradient_of_batch(name, index_G, advantage_G))
    chance_X, gradient_XP = torch.stack(chances), torch.stack(gradients)
    assert float(chance_X.sum()) == pytest.approx(1)
    mean_P = chance_X @ gradient_XP
    spread_XP = gradient_XP - mean_P
    covariance_PP = size * (spread_XP.T * chance_X) @ spread_XP  # of one sequence's share
    found = world.estimate(name, scheme)["all"]
    close(found.mean_SP[0], mean_P)
    assert float(found.variance_S[0]) == pytest.approx(float(covariance_PP.trace()), rel=1e-10)
    c_NT = coefficients(ESTIMATORS[name], samples)
    close(covariance(c_NT, samples, world.tangent(), scheme), covariance_PP, 1e-10)


@pytest.mark.parametrize("name", ["up-gspo", "topr", "grpo+token-tis"])
def test_sampled_batches_have_the_exact_mean_and_variance(name):
    """150 batches of 32 from μ through `policy_loss` and the model, fixed baseline.

    Bounds are about five standard errors; a wrong factor of 1.6 in the variance would show.
    """
    world = World()
    samples = world.samples
    p, size, batches = samples.right, 32, 150
    generator = torch.Generator().manual_seed(3)
    advantage_N = (world.reward_N - p) / (p * (1 - p)) ** 0.5
    index_XB = torch.multinomial(
        samples.probability_N.expand(batches, -1), size, replacement=True, generator=generator
    )
    gradient_XP = torch.stack(
        [world.gradient_of_batch(name, index_B, advantage_N[index_B]) for index_B in index_XB]
    )
    exact = world.estimate(name, Scheme.fixed(p))["all"]
    variance = float(exact.variance_S[0]) / size
    off = float((gradient_XP.mean(0) - exact.mean_SP[0]).square().sum())
    assert off < 5 * variance / batches
    measured = (gradient_XP - exact.mean_SP[0]).square().sum(1)
    error = float(measured.std()) / batches**0.5
    assert abs(float(measured.mean()) - variance) < 5 * error
    assert 5 * error < 0.6 * variance


def test_the_parts_add_up():
    world = World()
    found = world.estimate("up-grpo", Scheme.group(world.samples.right, 4))
    close(found["right"].mean_SP + found["wrong"].mean_SP, found["all"].mean_SP)


# --- the command


def test_crossing_by_hand():
    """10/n = 1 + 4/n at n = 6; an estimator that is worse in both never crosses."""
    assert crossing((0.0, 1.0), (10.0, 4.0)) == 6
    assert crossing((1.0, 0.0), (4.0, 10.0)) == 6
    assert np.isnan(crossing((1.0, 0.0), (10.0, 4.0)))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("exact")
    assert command.main(command.Arguments(output_dir=out, quick=True)) == 0
    return out


def test_the_quick_run_leaves_everything(quick):
    summary = json.loads((quick / "summary.json").read_text())
    assert len(summary["checks"]) == 5 and all(c["holds"] for c in summary["checks"].values())
    cells = pd.read_parquet(quick / "cells.parquet")
    assert set(cells["estimator"]) == set(ESTIMATORS)
    assert set(cells["mode"]) == {"recomputed", "bypass", "R2", "R3"}
    assert set(cells["part"]) == {"all", "right", "wrong"} and not cells.isna().any().any()
    assert (quick / "exact-bias.svg").exists() and (quick / "exact-mse.svg").exists()
    assert len(pd.read_parquet(quick / "crossings.parquet")) > 0


def test_a_page_is_made_of_the_cells_that_it_shows(quick):
    """Tables of a part of the cells are those of all of them; of the full run: test_pages.py."""
    cells, conditions = (
        pd.read_parquet(quick / f"{name}.parquet") for name in ("cells", "conditions")
    )
    meta = json.loads((quick / "meta.json").read_text())
    made = {key: value for key, value in meta.items() if key not in ("cells", "checks")}
    whole, shown = Report(cells, conditions, made), Report.read(quick)
    assert len(shown.cells) < len(cells) / 2 and shown.checks == whole.checks
    for name in ("run", "checks", "positives", "crossings", "modes", "groups"):
        assert shown.sections()[name]() == whole.sections()[name](), name


def test_a_broken_control_fails_the_run(quick):
    cells = pd.read_parquet(quick / "cells.parquet")
    hit = (cells["estimator"] == "up-grpo") & (cells["inner_step"] == 1) & (cells["mode"] == "R3")
    cells.loc[hit, "off_grpo"] = 1e-15
    assert [c["holds"] for c in checks(with_errors(cells)).values()] == [False] + 4 * [True]


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="policies: 1 given"):
        command.main(command.Arguments(policies=1))
    with pytest.raises(UserError, match=r"tokens \*\* length up to 20000"):
        Sizes(tokens=8, length=5)
    with pytest.raises(UserError, match=r"p: 0\.0 given"):
        Scheme.fixed(0.0)
