"""The gradient does not depend on padding, on the split into micro-batches and ranks, on order."""

import dataclasses

import pytest
import torch

from moe_upgrpo.losses import (
    PRESETS,
    PolicyLossConfig,
    RolloutCorrection,
    finalize_metrics,
    merge_metrics,
    policy_loss,
)
from tests.losses.batches import EVERY_PRESET, Batch, random_batch

POISON = [1e4, -1e4, float("inf"), float("-inf"), float("nan")]


# The presets, and the factors whose threshold is of the batch.
THRESHOLDS = {
    "up-grpo, top entropy": PolicyLossConfig.preset("up-grpo", top_entropy=0.4),
    "grpo, m2": PolicyLossConfig.preset(
        "grpo", correction=RolloutCorrection(m2=1e-3, positive=True)
    ),
}
CONFIGS = {name: PRESETS[name] for name in EVERY_PRESET} | THRESHOLDS


def run(name: str, batch: Batch, statistics: dict | None = None, **denominators):
    batch = batch.with_grad()
    result = policy_loss(**batch.arguments(CONFIGS[name], statistics), **denominators)
    result.loss.backward()
    return result, batch.log_probs.grad


@pytest.mark.parametrize("name", EVERY_PRESET)
def test_padding_may_hold_anything(name):
    batch = random_batch(seed=20, spread=1.0)
    clean, gradient = run(name, batch)
    for poison in POISON:
        _check_poisoned(name, batch, clean, gradient, poison)


def _check_poisoned(name, batch, clean, gradient, poison):
    padding = batch.mask == 0
    fields = {field.name: getattr(batch, field.name).clone() for field in dataclasses.fields(batch)}
    for field in fields.keys() - {"mask"}:
        fields[field][padding] = poison
    poisoned = Batch(**fields)
    dirty, dirty_gradient = run(name, poisoned)
    torch.testing.assert_close(dirty_gradient, gradient, rtol=0, atol=0)
    torch.testing.assert_close(dirty.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(dirty.per_token, clean.per_token, rtol=0, atol=0)
    assert torch.equal(dirty.clipped, clean.clipped)
    assert gradient[padding].count_nonzero() == 0
    expected = finalize_metrics(clean.metrics)
    assert finalize_metrics(dirty.metrics) == pytest.approx(expected, nan_ok=True, rel=1e-12)


@pytest.mark.parametrize("name", EVERY_PRESET)
def test_wider_padding_changes_nothing(name):
    batch = random_batch(seed=21)
    wide = random_batch(seed=22, width=12)
    fields = {}
    for field in dataclasses.fields(batch):
        x = getattr(wide, field.name).clone()
        x[:, :7] = getattr(batch, field.name)
        fields[field.name] = x
    fields["mask"][:, 7:] = 0
    (narrow, gradient), (wider, wider_gradient) = run(name, batch), run(name, Batch(**fields))
    torch.testing.assert_close(wider_gradient[:, :7], gradient, rtol=1e-13, atol=0)
    torch.testing.assert_close(wider.loss, narrow.loss, rtol=1e-13, atol=0)


# two ranks of two micro-batches each; the second micro-batch holds only the empty response; the
# rows 0 and 1, and 4 and 5, are groups
SPLIT = [[[0, 1], [2]], [[4, 5], [3]]]


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_and_ranks_add_up(name):
    """With the global denominators and statistics, losses, gradients and metrics of the parts sum
    to the whole's.

    Ranks are simulated by summing; the collective that would do it is not part of this library.
    """
    batch = random_batch(seed=23, spread=1.0)
    whole, gradient = run(name, batch)
    counts = dict(global_tokens=22, global_sequences=5, statistics=batch.statistics(CONFIGS[name]))
    loss, parts, metrics = 0.0, torch.zeros_like(gradient), []
    for rank in SPLIT:
        rank_metrics = []
        for rows in rank:
            part, part_gradient = run(name, batch.rows(torch.tensor(rows)), **counts)
            loss = loss + part.loss
            parts[rows] = part_gradient
            rank_metrics.append(part.metrics)
        metrics.append(merge_metrics(rank_metrics))
    torch.testing.assert_close(parts, gradient, rtol=1e-13, atol=0)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-13, atol=0)
    merged = finalize_metrics(merge_metrics(metrics))
    assert merged == pytest.approx(finalize_metrics(whole.metrics), nan_ok=True, rel=1e-12)


def test_without_global_denominators_the_split_shows():
    """The test above can fail: local denominators give another gradient."""
    batch = random_batch(seed=23)
    _, gradient = run("grpo", batch)
    _, first = run("grpo", batch.rows(torch.tensor([0, 1])))
    assert not torch.allclose(first, gradient[:2])


@pytest.mark.parametrize("name", ["clip-cov", "kl-cov", "up-kl-cov", "vapo", "real", *THRESHOLDS])
def test_without_the_batchs_statistics_the_split_shows(name):
    batch = random_batch(seed=23, spread=1.0)
    _, gradient = run(name, batch)
    counts = dict(global_tokens=22, global_sequences=5)
    parts = torch.zeros_like(gradient)
    for rows in (rows for rank in SPLIT for rows in rank):
        _, parts[rows] = run(name, batch.rows(torch.tensor(rows)), **counts)
    assert not torch.allclose(parts, gradient)


@pytest.mark.parametrize("name", EVERY_PRESET)
def test_order_of_sequences_does_not_matter(name):
    batch = random_batch(seed=24)
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    (first, gradient), (second, permuted) = run(name, batch), run(name, batch.rows(order))
    torch.testing.assert_close(permuted, gradient[order], rtol=0, atol=0)
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_mask_may_be_bool_or_numbers(dtype):
    batch = random_batch(seed=25)
    _, expected = run("grpo", batch)
    _, gradient = run("grpo", dataclasses.replace(batch, mask=batch.mask.to(dtype)))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
