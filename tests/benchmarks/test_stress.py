"""The stress studies against hand-made curves, an independent loop, and the exact estimators.

Policies here are smaller than the studies'; what the full run finds is in docs/stress.md.
"""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from benchmarks.studies.exact.estimators import (
    Samples,
    Scheme,
    Tangent,
    coefficients,
    estimates,
    moments,
)
from benchmarks.studies.exact.policy import DTYPE, Mismatch, Sizes
from benchmarks.studies.stress import __main__ as command
from benchmarks.studies.stress.fallen import fallen, half_of_right, weight_on_positive
from benchmarks.studies.stress.report import at_matched, counted, runs_of, wilson
from benchmarks.studies.stress.runs import (
    Adam,
    Model,
    Plan,
    Run,
    ascent_direction,
    collapsed,
    drawn,
    exploded,
    filled_to,
    make_start,
    pulls,
    taken,
    train,
    uniform,
)
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, group_advantages, policy_loss

SIZES = Sizes(tokens=3, length=3, layers=2, experts=4, hidden=4, expert_width=2)
SMALL = Plan(updates=3, inner_steps=2, groups=2, group=4)


@pytest.fixture(scope="module")
def model():
    return Model(SIZES)


@pytest.fixture(scope="module")
def start(model):
    return make_start(model, 5, right=0.3, accepted=0.3, mismatch=0.2)


def close(found, wanted, relative=1e-9):
    assert float((found - wanted).norm()) <= relative * float(wanted.norm())


# --- what counts as a collapse


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ([0.2, 0.5, 0.9, 0.46], False),  # above .45
        ([0.2, 0.5, 0.9, 0.44], True),
        ([0.2, 0.8, 0.3, 0.9], True),  # came back, and counts
        ([0.2, 0.09, 0.2], True),  # below half of the start
        ([0.2, 0.1], False),  # half of the best is not below it
        ([0.2, math.nan], True),
    ],
)
def test_collapse_by_hand_made_curves(curve, wanted):
    assert collapsed(curve) is wanted


def test_collapse_of_what_is_not_finite_or_not_there():
    assert collapsed([0.2, 0.3], finite=False)
    with pytest.raises(ValueError, match="empty"):
        collapsed([])


def test_explosion_is_against_the_first_norm_that_is_not_zero():
    assert not exploded([0.0, 0.5, 50.0, 0.001])
    assert exploded([0.0, 0.5, 51.0])
    assert exploded([1.0, math.inf]) and not exploded([0.0, 0.0])


def test_lost_is_a_collapse_that_lasts():
    def run(seed, reward):
        rows = len(reward)
        constant = dict.fromkeys(
            ("kl", "entropy", "first_norm", "largest_norm", "largest_weight", "pull"), 1.0
        )
        return pd.DataFrame(
            {"reward": reward, "engine_reward": reward, "update": range(rows), "seed": seed}
        ).assign(study="x", loss="grpo", finite=True, wrong_pull=0.25, informative=1.0, **constant)

    found = runs_of(pd.concat([run(0, [0.2, 0.9, 0.4, 0.8]), run(1, [0.2, 0.9, 0.4])]))
    assert found["collapsed"].tolist() == [True, True]
    assert found["lost"].tolist() == [False, True]
    assert found["mean"].tolist() == pytest.approx([0.7, 0.65])
    assert found["best"].tolist() == [0.9, 0.9]
    assert found["wrong_pull"].tolist() == [0.25, 0.25]


def test_matched_reward_lies_between_two_updates():
    """.8 is 3/4 of the way from .5 to .9: KL 1 + 3/4·2."""
    reward = pd.Series([0.2, 0.5, 0.9, 0.7]).to_numpy()
    assert at_matched(reward, pd.Series([0.0, 1.0, 3.0, 9.0]).to_numpy()) == pytest.approx(2.5)
    assert math.isnan(at_matched(reward[:2], reward[:2]))


def test_wilson_by_hand():
    """0 of 10: the upper end is z²/(n + z²) = 3.8415/13.8415; 5 of 10: ½ ± .2634."""
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert counted([True, False] * 5) == "5/10 (24 to 76%)"


# --- the runs


def test_one_forward_gives_what_the_policy_gives(model, start):
    noise = model.noise(start.noise_MLE)[None]
    found = model.log_probs(start.theta_P[None], noise)[0]
    outputs = model.policy.outputs(start.theta_P, Mismatch(noise_MLE=start.noise_MLE))
    close(found, model.tree.of_sequences(outputs.log_probs_MV), 1e-12)
    native = model.log_probs(start.theta_P[None])[0]
    close(native, model.tree.of_sequences(model.policy.outputs(start.theta_P).log_probs_MV), 1e-12)
    assert float((found - native).abs().max()) > 1e-3


def test_the_start_has_the_share_that_was_asked_for(model, start):
    """27 sequences: the nearest below, and no accepted sequence is a right one."""
    probability_N = model.log_probs(start.theta_P[None])[0].sum(-1).exp()
    assert 0.25 < float(probability_N @ start.reward_N) <= 0.3
    assert 0 < float(probability_N @ start.accepted_N) <= 0.3 * 0.75
    assert float(start.accepted_N @ start.reward_N) == 0
    clean = make_start(model, 5, right=0.3, mismatch=0.2)
    assert torch.equal(clean.reward_N, start.reward_N) and not clean.accepted_N.any()
    p = torch.tensor([0.5, 0.2, 0.25, 0.05], dtype=DTYPE)
    assert filled_to(0.3, p, torch.tensor([1, 0, 2, 3])).tolist() == [0, 1, 0, 1]


def test_adam_is_torchs():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 3, generator=generator, dtype=DTYPE)
    theirs = ours.clone().requires_grad_()
    rates = [0.1, 0.01]
    adam = Adam(ours, torch.tensor(rates, dtype=DTYPE))
    rows = [theirs[i].detach().clone().requires_grad_() for i in range(2)]
    optimizers = [
        torch.optim.Adam([row], lr=rate, maximize=True)
        for row, rate in zip(rows, rates, strict=True)
    ]
    for _ in range(3):
        direction = torch.randn(2, 3, generator=generator, dtype=DTYPE)
        ours = adam.step(ours, direction)
        for row, optimizer, g in zip(rows, optimizers, direction, strict=True):
            row.grad = g.clone()
            optimizer.step()
    close(ours, torch.stack([row.detach() for row in rows]), 1e-12)


@pytest.mark.parametrize("loss", ["up-grpo", "gspo", "tic-grpo"])
def test_training_is_that_of_a_plain_loop(model, start, loss):
    """One run, an engine one update behind, a clip that binds: policy, loss and torch's Adam."""
    plan = Plan(updates=3, inner_steps=2, groups=2, group=4, lag=1)
    run = Run(start=start, learning_rate=0.05, max_norm=0.3, false_positives=0.2)
    found = train(model, loss, [run], plan)
    tree, T = model.tree, SIZES.length
    leaf_P = start.theta_P.clone().requires_grad_()
    adam = torch.optim.Adam([leaf_P], lr=0.05, maximize=True)
    mismatch = Mismatch(noise_MLE=start.noise_MLE)
    draws = uniform(5, (3, 2, 8))
    weights, rewards = [], []

    def log_probs(theta_P, mismatch=None):
        return tree.of_sequences(model.policy.outputs(theta_P, mismatch).log_probs_MV)

    for update in range(3):
        weights.append(leaf_P.detach().clone())
        engine_P = weights[max(update - 1, 0)]
        with torch.no_grad():
            rollout_NT, old_NT = log_probs(engine_P, mismatch), log_probs(engine_P)
        cumulated = rollout_NT.sum(-1).exp().cumsum(-1)
        index = (draws[update, 0][:, None] > cumulated).sum(-1)
        reward = start.reward_N + start.accepted_N
        reward = torch.where(draws[update, 1] < 0.2, 1.0, reward[index])
        advantage = group_advantages(reward, 4)[:, None].expand(-1, T)
        for _ in range(2):
            adam.zero_grad()
            value = policy_loss(
                log_probs(leaf_P)[index],
                old_NT[index],
                advantage,
                torch.ones(8, T),
                config=PRESETS[loss],
                rollout_log_probs=rollout_NT[index],
            ).loss
            (-value * (1 if loss == "tic-grpo" else T)).backward()
            torch.nn.utils.clip_grad_norm_([leaf_P], 0.3)
            adam.step()
        with torch.no_grad():
            rewards.append(float(log_probs(leaf_P).sum(-1).exp() @ start.reward_N))
    assert found["reward"].iloc[1:].tolist() == pytest.approx(rewards, rel=1e-5)
    assert found["largest_norm"].max() > 0.3


@pytest.mark.parametrize("loss", ["up-gspo", "no-upper-clip", "up-tic"])
def test_sampled_gradients_have_the_exact_mean(model, start, loss):
    """Groups of 4 from μ, θ updated since; 600 batches of 32. The bound is five standard errors.

    And all sequences at once, weighed by μ, are the exact mean to rounding.
    """
    generator = torch.Generator().manual_seed(1)
    theta_P = start.theta_P + 0.1 * torch.randn(
        start.theta_P.shape, generator=generator, dtype=DTYPE
    )
    noise = model.noise(start.noise_MLE)[None]
    with torch.no_grad():
        current, old = (model.log_probs(x[None])[0] for x in (theta_P, start.theta_P))
        rollout = model.log_probs(start.theta_P[None], noise)[0]
    samples = Samples(current_NT=current, old_NT=old, rollout_NT=rollout, reward_N=start.reward_N)
    tangent = Tangent(model.policy.jacobian(theta_P), model.tree.pairs_NT)
    found = moments(coefficients(PRESETS[loss], samples)[None], samples, tangent)

    p, N = samples.right, len(start.reward_N)
    fixed = estimates(found, Scheme.fixed(p))["all"].mean_SP[0]
    advantage = (start.reward_N - p) / (p * (1 - p)) ** 0.5 * samples.probability_N * N
    whole, _ = ascent_direction(
        model,
        theta_P[None],
        torch.arange(N)[None],
        lambda now: pulls(PRESETS[loss], now, old[None], rollout[None], advantage[None]),
    )
    close(whole[0], fixed)

    X, B = 600, 32
    uniforms = torch.rand(X, B, generator=generator, dtype=DTYPE)
    index = drawn(rollout.expand(X, -1, -1), uniforms)
    signs = group_advantages(start.reward_N[index].flatten(), 4).view(X, B)
    gradients, _ = ascent_direction(
        model,
        theta_P.expand(X, -1),
        index,
        lambda now: pulls(
            PRESETS[loss], now, *(taken(x.expand(X, -1, -1), index) for x in (old, rollout)), signs
        ),
    )
    exact = estimates(found, Scheme.group(p, 4))["all"]
    error = float((gradients.mean(0) - exact.mean_SP[0]).norm())
    standard = float(exact.variance_S[0] / (X * B)) ** 0.5
    assert error < 5 * standard < 0.5 * float(exact.mean_SP[0].norm())


@pytest.mark.bits
def test_staleness_zero_is_no_staleness(model, start):
    """Then the engine's weights are the trainer's, and old log-probs of either are the same."""
    runs = [Run(start=start, learning_rate=0.05)]
    fresh = train(model, "grpo", runs, SMALL)
    recomputed = train(model, "grpo", runs, replace(SMALL, recomputed=True))
    pd.testing.assert_frame_equal(fresh, recomputed, check_exact=True)
    stale = train(model, "grpo", runs, replace(SMALL, lag=2))
    first = stale["update"] <= 1  # nothing is older than the start
    pd.testing.assert_frame_equal(fresh[first], stale[first], check_exact=True)
    assert stale["reward"].iloc[-1] != fresh["reward"].iloc[-1]


def test_false_positives(model, start):
    """Rate 0 is the clean verifier; at rate 1 all are rewarded, no group says anything."""
    clean = replace(start, accepted_N=torch.zeros_like(start.reward_N))

    def curves(start, rate):
        return train(model, "up-grpo", [Run(start=start, learning_rate=0.05, **rate)], SMALL)

    plain = curves(clean, {})
    pd.testing.assert_frame_equal(plain, curves(clean, {"false_positives": 0.0}))
    assert plain["wrong_pull"].sum() == 0 < plain["pull"].sum()
    every = curves(clean, {"false_positives": 1.0})
    assert every["reward"].nunique() == 1 and every["informative"].max() == 0
    assert curves(start, {})["wrong_pull"].sum() > 0


def test_runs_side_by_side_are_the_runs_alone(model, start):
    other = replace(start, seed=6, theta_P=start.theta_P.flip(0))
    runs = [
        Run(start=start, learning_rate=0.05, max_norm=0.2),
        Run(start=other, learning_rate=0.3),
    ]
    both = train(model, "symmetric-ratio", runs, SMALL)
    for run in runs:
        alone = train(model, "symmetric-ratio", [run], SMALL)["reward"]
        here = both[both["seed"] == run.start.seed]["reward"]
        assert here.tolist() == pytest.approx(alone.tolist(), rel=1e-7)


def test_a_run_that_is_not_finite_stops_and_counts(model, start):
    theta_P = start.theta_P.clone()
    theta_P[-1] = 1e200  # its square in a norm's gradient overflows
    broken = Run(start=replace(start, theta_P=theta_P), learning_rate=0.05)
    found = train(model, "symmetric-ratio", [broken, Run(start=start, learning_rate=0.05)], SMALL)
    finite = found[found["update"] == 3]["finite"].tolist()
    assert finite[1] and found[found["seed"] == start.seed]["reward"].notna().any()
    assert runs_of(found.assign(study="x"))["finite"].size


# --- positives that have fallen


@pytest.mark.parametrize("k", [1, 4, 8])
def test_weights_on_fallen_positives_by_hand(k):
    """All three tokens at r = e^-k, or the first alone. ASPO's 1/r is capped at 3."""
    r = math.exp(-k)
    every = {"grpo": r, "up-grpo": 1, "gspo": r, "tic-grpo": r**3, "reinforce": 1, "aspo": 1 / r}
    first = {
        "grpo": [r, 1, 1],
        "up-grpo": [1, 1, 1],
        "gspo": [r ** (1 / 3)] * 3,
        "tic-grpo": [r] * 3,
        "up-tic": [1, 1, 1],
        "no-upper-clip": [r, 1, 1],
    }
    for loss, wanted in every.items():
        assert weight_on_positive(loss, [-k] * 3) == pytest.approx([min(wanted, 3)] * 3)
    for loss, wanted in first.items():
        assert weight_on_positive(loss, [-k, 0, 0]) == pytest.approx(wanted)


def test_fallen_positives(model, start):
    """The half that fell is where it should be, and unclipped whole-sequence IS is unbiased."""
    found = fallen(model, [start], ["up-grpo", "sequence-is"], depths=(1, 2), steps=2)
    up, unbiased = (found[found["loss"] == loss] for loss in ("up-grpo", "sequence-is"))
    assert up["weight"].tolist() == pytest.approx([1, 1])
    assert unbiased["bias"].max() < 1e-9 < up["bias"].min()
    for row in found.itertuples():
        assert math.exp(-row.k) * 0.9 < row.fall <= math.exp(-row.k)
        assert 0.5 < row.keep < 2
    assert (unbiased["weight"] <= unbiased["fall"] * 1.001).all()
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DTYPE)
    marked = replace(start, reward_N=torch.tensor([1.0, 0, 1, 1], dtype=DTYPE))
    assert half_of_right(marked, p).tolist() == [1, 0, 0, 1]


# --- the command


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("stress")
    assert command.main(command.Arguments(output_dir=out, quick=True)) == 0
    return out


def test_the_quick_run_leaves_everything(quick):
    summary = json.loads((quick / "summary.json").read_text())
    studies = {cell["study"] for cell in summary["cells"]}
    assert studies == {"collapse", "false positives", "positives", "staleness"}
    assert {cell["loss"] for cell in summary["fallen"]} == set(command.QUICK.fallen_losses)
    curves = pd.read_parquet(quick / "curves.parquet")
    assert curves["reward"].between(0, 1).all() and curves["finite"].dropna().all()
    assert len(list(quick.glob("stress-*.svg"))) == 4


def test_the_own_rate_is_that_of_the_largest_mean_with_clipping():
    rows = [
        ("grpo", 0.1, True, 1, 0.5),
        ("grpo", 0.1, True, 0, 0.9),  # the start does not count
        ("grpo", 0.2, True, 1, 0.6),
        ("grpo", 0.3, False, 1, 0.9),
        ("gspo", 0.1, True, 1, 0.7),
    ]
    sweep = pd.DataFrame(rows, columns=["loss", "learning_rate", "clipped", "update", "reward"])
    assert command.own_learning_rates(sweep) == {"grpo": 0.2, "gspo": 0.1}


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="seeds: 1 given"):
        command.main(command.Arguments(seeds=1))
