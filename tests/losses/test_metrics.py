"""Metrics on the batch of test_hand.py, by hand; merging; the glossary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    GLOSSARY,
    PRESETS,
    Metric,
    PolicyLossConfig,
    RolloutCorrection,
    finalize_metrics,
    merge_metrics,
    policy_loss,
)
from tests.losses.batches import EVERY_PRESET, random_batch
from tests.losses.test_hand import INPUTS, log_probs


def metrics_of(config: PolicyLossConfig) -> dict[str, float]:
    return finalize_metrics(policy_loss(log_probs(), **INPUTS, config=config).metrics)


# r = 2 1.125 | .25 .5 1 | 4, A = +2 | −1 | −1
LOG_R = sum(math.log(r) for r in (2, 1.125, 0.25, 0.5, 1, 4))
SUM_R, SUM_R2 = 8.875, 4 + 1.265625 + 0.0625 + 0.25 + 1 + 16


def test_grpo_by_hand():
    metrics = metrics_of(PRESETS["grpo"])
    assert metrics == pytest.approx(
        {
            "ppo_kl": -LOG_R / 6,
            "ratio_mean": SUM_R / 6,
            "ratio_effective_sample_size": SUM_R**2 / SUM_R2,
            "positive_fraction": 2 / 6,
            "negative_fraction": 4 / 6,
            "clip_fraction": 4 / 6,  # 2 | .25 .5 | 4
            "clip_fraction_positive": 1 / 2,
            "clip_fraction_negative": 3 / 4,
            "clip_fraction_positive_upper": 1 / 2,
            "clip_fraction_positive_lower": 0,
            "clip_fraction_negative_upper": 1 / 4,
            "clip_fraction_negative_lower": 2 / 4,
            "dual_clip_fraction": 1 / 4,
            "positive_beyond_upper_fraction": 1 / 2,
            # Σ|A|c: 2·1.125 of the positives; 1 of the negatives
            "gradient_share_positive": 2.25 / 3.25,
        },
        rel=1e-12,
    )


def test_up_grpo_clips_no_positive_and_counts_those_grpo_would_have():
    metrics = metrics_of(PRESETS["up-grpo"])
    assert metrics["clip_fraction_positive_upper"] == 0
    assert metrics["clip_fraction"] == pytest.approx(3 / 6)
    assert metrics["positive_beyond_upper_fraction"] == pytest.approx(1 / 2)
    assert metrics["gradient_share_positive"] == pytest.approx(4 / 5)  # 2·(1+1) against 1


def test_gspo_counts_all_tokens_of_a_clipped_sequence():
    metrics = metrics_of(PRESETS["gspo"])
    assert metrics["clip_fraction"] == pytest.approx(5 / 6)
    assert metrics["clip_fraction_positive_upper"] == 1
    assert metrics["clip_fraction_negative_lower"] == pytest.approx(3 / 4)
    assert metrics["clip_fraction_negative_upper"] == 0
    assert metrics_of(PRESETS["up-gspo"])["positive_beyond_upper_fraction"] == 1
    # seq-mean-token-mean: Σ w|A|c is 2/3 against 4/3
    assert metrics_of(PRESETS["up-gspo"])["gradient_share_positive"] == pytest.approx(1 / 3)


def test_aspo_counts_its_dual_clip_without_a_lost_gradient():
    metrics = metrics_of(PRESETS["aspo"])
    assert metrics["dual_clip_fraction"] == pytest.approx(1 / 4)
    assert metrics["clip_fraction_negative_upper"] == 0


def test_a_correction_gives_the_gradient_share_its_weight():
    """μ = 2·π_old on the last token only: ρ = .5, so |A|c there is 4·.5 under DAPO's C = 10."""
    rollout = INPUTS["old_log_probs"].clone()
    rollout[2] += math.log(2)
    config = PolicyLossConfig.preset("dapo", correction=RolloutCorrection(weight="token-tis"))
    result = policy_loss(log_probs(), **INPUTS, config=config, rollout_log_probs=rollout)
    metrics = finalize_metrics(result.metrics)
    # positives 2·1.125 (2 is cut); negatives 1 + 2
    assert metrics["gradient_share_positive"] == pytest.approx(2.25 / 5.25)
    assert metrics["correction_weight_mean"] == pytest.approx(3.5 / 4)


def test_the_off_policy_mask_counts_as_clipped():
    """Sequence 1 is dropped whole: its mean(log μ − log π) is above the limit."""
    config = PolicyLossConfig.preset("deepseek-v3.2")
    result = policy_loss(log_probs(), **INPUTS, config=config)
    negative = INPUTS["mask"].bool() & (INPUTS["advantages"] < 0)
    share = (result.clipped & negative).sum() / negative.sum()
    assert finalize_metrics(result.metrics)["clip_fraction_negative"] == pytest.approx(float(share))
    # By hand: r = .25 .5 1 has mean log r < 0, so all three; r = 4 is beyond the dual clip.
    assert float(share) == 1.0


@pytest.mark.fault(
    "Numbers",
    "padding, half precision, spread ratios",
    "the effective sample is no larger than the sample",
)
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(0, 3000),
    st.floats(-3, 3),
    st.sampled_from([0.0, 1e-7, 0.5]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_an_effective_sample_is_no_larger_than_the_sample(tokens, padding, level, spread, dtype):
    """By Python's floats too; equal ratios are worth all tokens, whatever the padding."""
    shifts = torch.tensor([level + spread * (i % 3) for i in range(tokens)], dtype=dtype)
    lp, mask = torch.zeros(2, tokens + padding, dtype=dtype), torch.zeros(2, tokens + padding)
    lp[0, :tokens], mask[0, :tokens] = shifts, 1
    config = PolicyLossConfig.preset(
        "symmetric-ratio", correction=RolloutCorrection(weight="decoupled", positive=True)
    )
    one, old = torch.ones_like(lp), torch.zeros_like(lp)
    result = policy_loss(lp, old, one, mask, config=config, rollout_log_probs=old - lp)
    values = finalize_metrics(result.metrics)
    ratios = [math.exp(x) for x in shifts.tolist()]
    expected = sum(ratios) ** 2 / sum(r * r for r in ratios)
    for name in ("ratio_effective_sample_size", "correction_effective_sample_size"):
        assert values[name] <= tokens
        assert values[name] == pytest.approx(expected, rel=1e-6)
    assert values["ratio_mean"] == pytest.approx(sum(ratios) / tokens, rel=1e-6)
    twice = merge_metrics([result.metrics] * 7)
    assert finalize_metrics(twice)["ratio_effective_sample_size"] <= 7 * tokens


def test_merging_adds_both_sums():
    parts = [
        {"ppo_kl": Metric(1.0, 2.0), "ratio_effective_sample_size": Metric(3.0, 5.0)},
        {"ppo_kl": Metric(2.0, 1.0), "ratio_effective_sample_size": Metric(1.0, 3.0)},
    ]
    merged = merge_metrics(parts)
    assert merged["ppo_kl"] == Metric(3.0, 3.0)
    values = finalize_metrics(merged)
    assert values == {"ppo_kl": 1.0, "ratio_effective_sample_size": 2.0}  # 4²/8


def test_merging_nothing_or_different_losses_is_an_error():
    with pytest.raises(UserError, match="parts: none given"):
        merge_metrics([])
    with pytest.raises(UserError, match="parts: metrics differ"):
        merge_metrics([{"ppo_kl": Metric(1.0, 1.0)}, {}])


def test_nothing_counted_is_not_a_number():
    assert math.isnan(finalize_metrics({"ppo_kl": Metric(0.0, 0.0)})["ppo_kl"])


def test_the_glossary_has_exactly_what_is_emitted():
    emitted = set()
    corrected = PolicyLossConfig.preset("grpo", correction=RolloutCorrection(weight="icepop"))
    for config in [corrected, *(PRESETS[name] for name in EVERY_PRESET)]:
        result = policy_loss(**random_batch().arguments(config))
        emitted |= result.metrics.keys()
        for numerator, denominator in result.metrics.values():
            assert not numerator.requires_grad and not denominator.requires_grad
            assert numerator.dim() == denominator.dim() == 0
    assert emitted == GLOSSARY.keys()
