"""Bad input: one ValueError naming the argument, what was given and what is allowed."""

import dataclasses
import math

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    BRANCHES,
    PRESETS,
    PolicyLossConfig,
    RolloutCorrection,
    aggregation_weights,
    gradient_coefficients,
    policy_loss,
)
from tests.losses.batches import EVERY_PRESET, has_extra, random_batch


def arguments(preset: str = "up-grpo", **changes) -> dict:
    return {**random_batch().arguments(PRESETS[preset]), **changes}


def with_value(field: str, value: float) -> dict:
    """One unmasked value replaced."""
    x = getattr(random_batch(), field).clone()
    x[1, 2] = value
    return {field: x}


CALLS = {
    "old_log_probs shape": (
        arguments(old_log_probs=torch.zeros(6, 8)),
        r"old_log_probs: shape \(6, 8\) given; allowed: \(6, 7\)",
    ),
    "advantages per sequence": (
        arguments(advantages=torch.zeros(6)),
        r"advantages: shape \(6,\) given; allowed: \(6, 7\)",
    ),
    "mask shape": (
        arguments(mask=torch.ones(7, 6)),
        r"mask: shape \(7, 6\) given; allowed: \(6, 7\)",
    ),
    "rollout shape": (
        arguments(rollout_log_probs=torch.zeros(1, 7)),
        r"rollout_log_probs: shape \(1, 7\) given",
    ),
    "log_probs not [B, T]": (
        arguments(log_probs=torch.zeros(7)),
        r"log_probs: shape \(7,\) given; allowed: two dimensions",
    ),
    "mask of nothing": (
        arguments(mask=torch.zeros(6, 7)),
        "mask: 0 tokens selected; allowed: at least one",
    ),
    "mask of nothing, by sequence": (
        arguments("up-gspo", mask=torch.zeros(6, 7)),
        "mask: 0 tokens selected; allowed: at least one",
    ),
    "mask of weights": (
        arguments(mask=torch.full((6, 7), 0.5)),
        "mask: values other than 0 and 1 given",
    ),
    "mask of two": (
        arguments(mask=torch.tensor([[2.0, 0, 1, 1, 1, 1, 1]] * 6)),
        "mask: values other than 0 and 1 given",
    ),
    "mask with NaN": (
        arguments(mask=torch.full((6, 7), math.nan)),
        "mask: values other than 0 and 1 given",
    ),
    "NaN advantage": (
        arguments(**with_value("advantages", math.nan)),
        "advantages: nan given at sequence 1, position 2 .* allowed: finite",
    ),
    "infinite advantage": (
        arguments(**with_value("advantages", math.inf)),
        "advantages: inf given at sequence 1, position 2",
    ),
    "NaN log-prob": (
        arguments(**with_value("log_probs", math.nan)),
        "^log_probs: nan given at sequence 1, position 2",
    ),
    "log-prob of nothing": (
        arguments(**with_value("log_probs", -math.inf)),
        "^log_probs: -inf given",
    ),
    "NaN old log-prob": (
        arguments(**with_value("old_log_probs", math.nan)),
        "^old_log_probs: nan given at sequence 1, position 2",
    ),
    "NaN rollout log-prob": (
        arguments("topr", **with_value("rollout_log_probs", math.nan)),
        "^rollout_log_probs: nan given at sequence 1, position 2",
    ),
    "router log-probs missing": (
        arguments("rspo", router_log_probs=None),
        "router_log_probs: None given, router_shift_floor is 0.8; allowed",
    ),
    "router log-probs of different shapes": (
        arguments("rspo", router_log_probs=(torch.zeros(6, 7, 2, 3), torch.zeros(6, 7, 2, 2))),
        r"router_log_probs: shapes \(6, 7, 2, 3\) and \(6, 7, 2, 2\)",
    ),
    "router log-probs of another batch": (
        arguments("rspo", router_log_probs=(torch.zeros(6, 8, 2, 3), torch.zeros(6, 8, 2, 3))),
        r"router_log_probs: shape \(6, 8\) given; allowed: \(6, 7\)",
    ),
    "NaN router log-probs": (
        arguments("rspo", router_log_probs=(torch.full((6, 7, 2, 3), math.nan),) * 2),
        "router_log_probs: nan given at sequence 0, position 0",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_policy_loss_and_oracle(name):
    given, says = CALLS[name]
    with pytest.raises(UserError, match=says):
        policy_loss(**given)
    if not name.startswith("mask of nothing"):  # the oracle has no aggregation
        with pytest.raises(UserError, match=says):
            gradient_coefficients(**given)


@pytest.mark.parametrize("count", [0, -3, math.inf, math.nan])
def test_global_denominators(count):
    with pytest.raises(UserError, match=r"global_tokens: .* given; allowed: a finite count > 0"):
        policy_loss(**arguments(), global_tokens=count)
    with pytest.raises(UserError, match=r"global_sequences: .* given"):
        policy_loss(**arguments("gspo"), global_sequences=count)


def test_what_is_not_used_is_not_checked():
    """A NaN in rollout log-probs that the loss does not read, or in padding, is no error."""
    policy_loss(**arguments(**with_value("rollout_log_probs", math.nan)))


def varying(name: str, factor: torch.Tensor):
    """`policy_loss` and oracle of a batch with a factor for each position on its advantages."""
    batch = random_batch(spread=0.1).with_grad()
    batch = dataclasses.replace(batch, advantages=batch.advantages * factor)
    config = PRESETS[name]
    arguments = batch.arguments(config)
    return batch, config, arguments


FACTORS = {
    "of one sign": torch.linspace(0.5, 2, 7, dtype=torch.float64),
    "of both signs": torch.tensor([1.0, -1.0] * 3 + [1], dtype=torch.float64),
    "zeros among them": torch.tensor([1.0, 1, 0, 1, 1, 1, 1], dtype=torch.float64),
}


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_an_advantage_for_each_token(name, kind):
    """The gradient is the oracle's, or the sign and the loss of whole sequences are named."""
    batch, config, arguments = varying(name, FACTORS[kind])
    coupled = [s for s in ("positive", "negative") if BRANCHES[getattr(config, s)].coupled]
    if coupled:
        says = (
            rf"advantages: .* of sequence \d given with {coupled[0]} '{config.negative}'; allowed"
        )
        for call in (policy_loss, gradient_coefficients):
            with pytest.raises(UserError, match=says):
                call(**arguments)
        return
    policy_loss(**arguments).loss.backward()
    w_B = aggregation_weights(batch.mask.sum(-1), config.aggregation)
    expected = -w_B[:, None] * batch.advantages * gradient_coefficients(**arguments)
    assert expected.count_nonzero() > 0
    # where A = 0 a term that is no multiple of A still pulls
    seen = batch.advantages != 0 if has_extra(config) else torch.ones_like(expected).bool()
    found = batch.log_probs.grad[seen]
    torch.testing.assert_close(found, expected[seen], rtol=1e-12, atol=0)


@pytest.mark.fault(
    "Numbers",
    "an advantage for each token in a loss of whole sequences",
    "refused, by name",
)
def test_an_advantage_for_each_token_where_whole_sequences_take_none():
    """UP's positive branch takes any; GSPO has the negative sequences. Behind the mask is nothing,
    and rounding makes no advantage of single tokens."""
    batch, _, _ = varying("up-gspo", torch.ones(7, dtype=torch.float64))
    up = batch.advantages > 0
    advantages = torch.where(up, batch.advantages * FACTORS["of one sign"], batch.advantages)
    advantages = torch.where(
        batch.mask.bool(), advantages * (1 + 1e-7 * FACTORS["of one sign"]), 7.0
    )
    arguments = batch.arguments(PRESETS["up-gspo"]) | {"advantages": advantages}
    policy_loss(**arguments).loss.backward()
    w_B = aggregation_weights(batch.mask.sum(-1), "seq-mean-token-mean")
    expected = -w_B[:, None] * advantages * gradient_coefficients(**arguments)
    assert expected[up & batch.mask.bool()].count_nonzero() == 8
    torch.testing.assert_close(batch.log_probs.grad, expected, rtol=1e-6, atol=0)


CONFIGS = {
    "positive": (dict(positive="grpo"), "positive: 'grpo' given; allowed: log-likelihood, "),
    "negative": (dict(negative="nope"), "negative: 'nope' given; allowed: .*ppo, gspo"),
    "aggregation": (
        dict(aggregation="mean"),
        "aggregation: 'mean' given; allowed: token-mean, seq-mean-token-mean",
    ),
    "aggregation of another loss": (
        dict(negative="gspo", aggregation="token-mean"),
        "aggregation: 'token-mean' given; allowed with negative 'gspo': seq-mean-token-mean",
    ),
    "constant missing": (
        dict(aggregation="seq-mean-token-sum-norm"),
        "token_sum_norm: None given; allowed: a constant > 0",
    ),
    "clip_low above 1": (dict(clip_low=1.5), "clip_low: 1.5 given; allowed: from 0 to 1"),
    "clip_low negative": (dict(clip_low=-0.1), "clip_low: -0.1 given; allowed: from 0 to 1"),
    "clip_high negative": (dict(clip_high=-0.1), "clip_high: -0.1 given; allowed: from 0 to inf"),
    "clip_high NaN": (dict(clip_high=math.nan), "clip_high: nan given"),
    "dual_clip below the range": (dict(dual_clip=0.9), "dual_clip: 0.9 given; allowed: above 1"),
    "ratio_cap": (dict(ratio_cap=0.5), "ratio_cap: 0.5 given; allowed: from 1"),
    "divergence_limit": (dict(divergence_limit=-1), "divergence_limit: -1 given"),
    "sapo": (dict(sapo_tau_negative=0), "sapo_tau_negative: 0 given"),
    "router_shift_floor": (dict(router_shift_floor=1.1), "router_shift_floor: 1.1 given"),
    "off_policy_limit": (dict(off_policy_limit=math.nan), "off_policy_limit: nan given"),
    "token weights on a loss of sequences": (
        dict(
            negative="gspo",
            aggregation="seq-mean-token-mean",
            correction=RolloutCorrection(weight="icepop"),
        ),
        "correction.weight: 'icepop' given .* 'gspo'; allowed",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name):
    fields, says = CONFIGS[name]
    with pytest.raises(UserError, match=says):
        PolicyLossConfig(**fields)


CORRECTIONS = {
    "weight": (dict(weight="tis"), "correction.weight: 'tis' given; allowed: none, decoupled"),
    "order": (dict(weight="token-mis", low=3.0), "correction.low, correction.high: 3.0, 2.0"),
    "negative": (dict(weight="token-mis", low=-1.0), "allowed: 0 <= low <= high"),
    "geometric": (dict(geometric=(1.1, 0.9)), r"correction.geometric: \(1.1, 0.9\) given"),
    "k3": (dict(k3=0.0), "correction.k3: 0.0 given; allowed: a number > 0"),
    "veto": (dict(veto=-1.0), "correction.veto: -1.0 given"),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_correction(name):
    fields, says = CORRECTIONS[name]
    with pytest.raises(UserError, match=says):
        RolloutCorrection(**fields)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"preset: 'ppo2' given; allowed: grpo, .*up-grpo, .*topr"):
        PolicyLossConfig.preset("ppo2")


def test_unknown_aggregation():
    with pytest.raises(UserError, match="aggregation: 'sum' given; allowed"):
        aggregation_weights(torch.ones(2), "sum")
    with pytest.raises(UserError, match="token_sum_norm: None given"):
        aggregation_weights(torch.ones(2), "seq-mean-token-sum-norm")


def test_config_cannot_be_changed_behind_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["grpo"].clip_low = -1
