"""Parity with verl 0.9.1's registered policy losses: value, gradient and clip metrics.

Needs verl, which imports on a CPU without its GPU dependencies:

    pip install --no-deps verl==0.9.1
    pip install ray tensordict omegaconf codetiming orjson

Without them this file fails rather than skips. It compares log-ratios within ±20, where neither
library's guard against overflow has a part.
"""

import importlib
import inspect
import re
import types

import numpy as np
import pytest
import torch

from moe_upgrpo.losses import (
    PolicyLossConfig,
    RolloutCorrection,
    compute_policy_loss,
    finalize_metrics,
    group_advantages,
    kl_estimate,
    policy_loss,
)
from tests.losses.batches import random_batch

try:
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    ActorConfig = importlib.import_module("verl.workers.config").ActorConfig
    PolicyLossOptions = importlib.import_module("verl.workers.config.actor").PolicyLossConfig
    corrections = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; the head of {__file__} says what to install") from error


def ours(name: str, **changes) -> PolicyLossConfig:
    return PolicyLossConfig.preset(name, **changes)


# verl's name -> (its config fields, our config)
AGREE = {
    "vanilla": (
        dict(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0),
        ours("grpo", clip_high=0.28),
    ),
    "gspo": (
        dict(clip_ratio_low=0.05, clip_ratio_high=0.08),
        ours("gspo-token", clip_low=0.05, clip_high=0.08),
    ),
    "geo_mean": (
        dict(clip_ratio_low=0.3, clip_ratio_high=0.4),
        ours("gmpo", clip_low=0.3, clip_high=0.4),
    ),
    "cispo": (
        dict(clip_ratio_low=0.2, clip_ratio_high=0.28),
        ours("cispo", clip_low=0.2, clip_high=0.28),
    ),
    "dppo_tv": (
        dict(clip_ratio_low=0.05, clip_ratio_high=0.05, clip_ratio_c=1.5),
        ours("dppo-tv", divergence_limit=0.05, ratio_cap=1.5),
    ),
    "dppo_kl": (
        dict(clip_ratio_low=0.01, clip_ratio_high=0.01, clip_ratio_c=1.5),
        ours("dppo-kl", divergence_limit=0.01, ratio_cap=1.5),
    ),
    "sapo": (dict(tau_pos=1.0, tau_neg=1.05), ours("sapo")),
    "gpg": ({}, ours("reinforce")),
    # All of the range are drawn: verl's choice among them is random.
    "clip_cov": (
        dict(
            clip_ratio_low=0.2,
            clip_ratio_high=0.28,
            policy_loss=dict(clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=0.9),
        ),
        ours("clip-cov", clip_high=0.28, covariance_share=1.0, covariance_range=(0.1, 0.9)),
    ),
    "kl_cov": (
        dict(policy_loss=dict(kl_cov_ratio=0.1, ppo_kl_coef=0.7)),
        ours("kl-cov", covariance_share=0.1, covariance_kl=0.7),
    ),
    "dro": (dict(policy_loss=dict(dro_beta=0.3)), ours("dro", dro_beta=0.3)),
}

# Registered in verl and not compared: one line each.
DIFFER = {
    "bypass_mode": "no loss of its own: sets π_old := μ and calls vanilla or REINFORCE",
}


def actor_config(policy_loss=None, **fields) -> ActorConfig:
    if policy_loss is not None:
        fields["policy_loss"] = PolicyLossOptions(**policy_loss)
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **fields)


def verl_loss(name: str, batch, mode: str, **fields):
    return core_algos.get_policy_loss_fn(name)(
        old_log_prob=batch.old_log_probs,
        log_prob=batch.log_probs,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=actor_config(**fields.pop("config", {})),
        **fields,
    )


def test_every_registered_loss_is_compared_or_accounted_for():
    # Ours are there too, by the entry point of moe_upgrpo: tests/integrations.
    theirs = {name for name in core_algos.POLICY_LOSS_REGISTRY if "moe_upgrpo/" not in name}
    assert theirs == AGREE.keys() | DIFFER.keys()


def batch_for(name: str):
    # verl's geo_mean takes the plain mean over rows, empty ones included; the others leave them out
    third = 2 if name == "geo_mean" else 0
    return random_batch(seed=50, lengths=(7, 3, third, 5, 1, 6) * 4, spread=0.3)


MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
ONE_MODE = {"sapo": MODES[2:], "geo_mean": MODES[2:]}  # verl ignores the argument


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in AGREE for mode in ONE_MODE.get(name, MODES)]
)
def test_loss_and_gradient(name, mode):
    """To 1e-7: verl adds 1e-8 to sequence lengths."""
    fields, config = AGREE[name]
    config = PolicyLossConfig(**{**vars(config), "aggregation": mode})
    theirs, mine = batch_for(name).with_grad(), batch_for(name).with_grad()
    expected, _ = verl_loss(name, theirs, mode, config=fields)
    expected.backward()
    result = policy_loss(**mine.arguments(config))
    result.loss.backward()
    assert theirs.log_probs.grad.count_nonzero() > 3
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-8)
    torch.testing.assert_close(mine.log_probs.grad, theirs.log_probs.grad, rtol=1e-7, atol=1e-15)


def test_the_tokens_that_clip_cov_draws(monkeypatch):
    """verl takes the first of a permutation of the eligible tokens, here those of smallest draw."""
    fields, config = AGREE["clip_cov"]
    fields = dict(fields, policy_loss=dict(fields["policy_loss"], clip_cov_ratio=0.05))
    config = PolicyLossConfig(**{**vars(config), "covariance_share": 0.05})
    theirs, mine = batch_for("clip_cov").with_grad(), batch_for("clip_cov").with_grad()
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    expected, _ = verl_loss("clip_cov", theirs, "token-mean", config=fields)
    expected.backward()
    mine.draws.copy_(torch.linspace(0.9, 0.1, mine.draws.numel()).view_as(mine.draws))
    result = policy_loss(**mine.arguments(config))
    result.loss.backward()
    drawn = result.clipped & (theirs.log_probs.grad == 0) & mine.mask.bool()
    assert drawn.sum() > 4 == int(0.05 * mine.mask.sum())
    torch.testing.assert_close(mine.log_probs.grad, theirs.log_probs.grad, rtol=1e-7, atol=1e-15)


def test_the_drop_in_takes_every_mode_of_verl():
    """Its losses by verl's own `agg_loss`; the modes are those that verl's source compares with."""
    source = inspect.getsource(core_algos.agg_loss)
    modes = set(re.findall(r'"((?:token|seq)-[a-z-]+)"', source.split('"""')[2]))
    assert {"token-sum", "token-mean", "seq-mean-token-sum-norm"} < modes
    batch = random_batch(seed=51, spread=1.0)
    result = policy_loss(**batch.arguments(ours("up-grpo")))
    for mode in modes:
        expected = core_algos.agg_loss(result.per_token, batch.mask, mode)
        found, *_ = compute_policy_loss(
            batch.old_log_probs,
            batch.log_probs,
            batch.advantages,
            batch.mask,
            cliprange=0.2,
            loss_agg_mode=mode,
        )
        assert found.item() == pytest.approx(expected.item(), rel=1e-7), mode


def test_our_gspo_is_verls_for_advantages_per_sequence():
    """verl registers GSPO-token under the name gspo; with one advantage per sequence they agree."""
    theirs, mine = batch_for("gspo").with_grad(), batch_for("gspo").with_grad()
    fields, config = AGREE["gspo"]
    verl_loss("gspo", theirs, "seq-mean-token-mean", config=fields)[0].backward()
    gspo = ours("gspo", clip_low=config.clip_low, clip_high=config.clip_high)
    policy_loss(**mine.arguments(gspo)).loss.backward()
    torch.testing.assert_close(mine.log_probs.grad, theirs.log_probs.grad, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "dppo_tv", "dppo_kl"])
def test_clip_fractions_and_kl(name):
    """verl counts both signs over all tokens; ours are by sign, so their counts are added."""
    fields, config = AGREE[name]
    batch = batch_for(name)
    _, theirs = verl_loss(name, batch, config.aggregation, config=fields)
    mine = policy_loss(**batch.arguments(config)).metrics
    values = finalize_metrics(mine)
    assert values["ppo_kl"] == pytest.approx(theirs["actor/ppo_kl"], rel=1e-7)
    bounds = ("positive_upper", "negative_lower")
    clipped = sum(float(mine[f"clip_fraction_{bound}"].numerator) for bound in bounds)
    assert clipped > 0
    tokens = float(mine["ppo_kl"].denominator)
    assert clipped / tokens == pytest.approx(theirs["actor/pg_clipfrac"], rel=1e-6)
    if name == "vanilla":
        dual = float(mine["dual_clip_fraction"].numerator) / tokens
        assert dual == pytest.approx(theirs["actor/pg_clipfrac_lower"], rel=1e-6)


def test_a_weight_from_the_rollout_multiplies_the_loss():
    """verl applies it to both signs; so do we when asked to."""
    weights = {"token-tis": ("token", 1.02), "sequence-tis": ("sequence", 1.1), "icepop": None}
    for kind, spec in weights.items():
        level, threshold = spec or ("token", "0.97_1.03")
        low, high = (0.97, 1.03) if spec is None else (None, threshold)
        theirs, mine = batch_for("vanilla").with_grad(), batch_for("vanilla").with_grad()
        log_rho = theirs.old_log_probs - theirs.rollout_log_probs
        w, _ = corrections.compute_rollout_correction_weights(
            log_rho, theirs.mask, rollout_is=level, rollout_is_threshold=threshold
        )
        fields, config = AGREE["vanilla"]
        verl_loss("vanilla", theirs, "token-mean", config=fields, rollout_is_weights=w)[
            0
        ].backward()
        correction = RolloutCorrection(weight=kind, low=low, high=high, positive=True)
        config = PolicyLossConfig(**{**vars(config), "correction": correction})
        policy_loss(**mine.arguments(config)).loss.backward()
        torch.testing.assert_close(
            mine.log_probs.grad, theirs.log_probs.grad, rtol=1e-7, atol=1e-15
        )


def test_rejections_keep_the_same_sequences():
    """k3, and the geometric mean, whose bounds verl puts on μ/π_old: they are inverted here.

    verl takes rejected tokens out of the mask and so out of the denominators; here the denominators
    stay those of the batch.
    """
    batch = batch_for("vanilla")
    log_rho = batch.old_log_probs - batch.rollout_log_probs
    cases = (
        ("seq_mean_k3", "0.001", RolloutCorrection(k3=0.001)),
        ("seq_mean_k1", "0.99_1.02", RolloutCorrection(geometric=(1 / 1.02, 1 / 0.99))),
    )
    for option, threshold, correction in cases:
        kept, _ = corrections.compute_rollout_rejection_mask(
            log_rho, batch.mask, rollout_rs=option, rollout_rs_threshold=threshold
        )
        assert 0 < kept.sum() < batch.mask.sum()
        config = ours(
            "reinforce", correction=RolloutCorrection(**{**vars(correction), "positive": True})
        )
        clipped = policy_loss(**batch.arguments(config)).clipped
        assert torch.equal(clipped, (batch.mask - kept).bool())


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "rloo"])
def test_advantages(kind):
    rewards = torch.tensor([1.0, 0, 0.5, 0, 0, 1, 1, 1], dtype=torch.float64)
    index = np.repeat([0, 1], 4)
    scores, mask = rewards[:, None].clone(), torch.ones(8, 1, dtype=torch.float64)
    if kind == "rloo":
        theirs, _ = core_algos.compute_rloo_outcome_advantage(scores, mask, index)
    else:
        theirs, _ = core_algos.compute_grpo_outcome_advantage(
            scores, mask, index, norm_adv_by_std_in_grpo=kind == "grpo"
        )
    torch.testing.assert_close(
        group_advantages(rewards, 4, kind), theirs[:, 0], rtol=1e-12, atol=1e-15
    )


VERL_ADVANTAGES = {
    "opo": ("opo", {}),
    "gpg": ("gpg", {}),
    "pass-at-k": ("grpo_passk", dict(config={"norm_adv_by_std_in_grpo": True})),
    "reinforce++": ("reinforce_plus_plus", dict(config=types.SimpleNamespace(gamma=1.0))),
    "reinforce++-baseline": ("reinforce_plus_plus_baseline", {}),
}


@pytest.mark.parametrize("kind", VERL_ADVANTAGES)
def test_advantages_of_responses_of_some_length(kind):
    """The reward is at the last token, as verl has it."""
    rewards = torch.tensor([1.0, 0, 0.5, 0, 0, 1, 0.25, 0], dtype=torch.float64)
    lengths = torch.tensor([3, 1, 2, 5, 4, 1, 1, 2])
    mask = (torch.arange(5) < lengths[:, None]).double()
    scores = torch.zeros_like(mask).scatter(1, lengths[:, None] - 1, rewards[:, None])
    name, fields = VERL_ADVANTAGES[kind]
    estimator = core_algos.get_adv_estimator_fn(name)
    theirs, _ = estimator(scores, mask, index=np.repeat([0, 1], 4), **fields)
    mine = group_advantages(rewards, 4, kind, lengths=lengths)
    torch.testing.assert_close(mine[:, None] * mask, theirs, rtol=1e-7, atol=1e-12)


def test_gdpo():
    g = torch.Generator().manual_seed(4)
    rewards = torch.rand(2, 8, generator=g, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 2, 5, 4, 1, 1, 2])
    mask = (torch.arange(5) < lengths[:, None]).double()
    theirs, _ = core_algos.compute_gdpo_outcome_advantage(
        mask,
        mask,
        np.repeat([0, 1], 4),
        config={"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 0.5]},
        non_tensor_batch={"a": rewards[0].numpy(), "b": rewards[1].numpy()},
        batch={"prompts": torch.zeros(8, 0), "attention_mask": mask.long()},
    )
    mine = group_advantages(rewards, 4, "gdpo", lengths=lengths, reward_weights=(1.0, 0.5))
    torch.testing.assert_close(mine[:, None] * mask, theirs.double(), rtol=1e-5, atol=1e-6)


def test_every_outcome_estimator_is_compared_or_accounted_for():
    ours = {"grpo", "rloo", "gdpo", "optimal_token_baseline"}
    ours |= {name for name, _ in VERL_ADVANTAGES.values()}
    differ = {
        "gae": "needs a critic",
        "remax": "needs a greedy response to each prompt",
        "grpo_vectorized": "grpo",
        "rloo_vectorized": "rloo",
        "tir_optimal_token_baseline": "optimal_token_baseline over several turns",
    }
    assert core_algos.ADV_ESTIMATOR_REGISTRY.keys() == ours | differ.keys()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl(kind):
    batch = random_batch(seed=51)
    theirs = core_algos.kl_penalty(batch.log_probs, batch.old_log_probs, kind)
    mine = kl_estimate(batch.log_probs, batch.old_log_probs, kind)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
