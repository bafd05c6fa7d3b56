"""Finite loss and gradient where exp overflows, where nothing is there, where a sign is missing."""

import dataclasses
import math

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, finalize_metrics, policy_loss
from tests.losses.batches import EVERY_PRESET, Batch, has_extra, random_batch


def finite_gradient(name: str, batch) -> torch.Tensor:
    batch = batch.with_grad()
    result = policy_loss(**batch.arguments(PRESETS[name]))
    result.loss.backward()
    assert result.loss.isfinite()
    assert result.per_token.isfinite().all()
    assert batch.log_probs.grad.isfinite().all()
    for value, (_, denominator) in zip(
        finalize_metrics(result.metrics).values(), result.metrics.values(), strict=True
    ):
        assert math.isfinite(value) or float(denominator) == 0
    return batch.log_probs.grad


@pytest.mark.fault(
    "Numbers",
    "log-ratios at which exp overflows",
    "finite loss and gradient",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_log_ratios_of_a_thousand(name, dtype):
    """±1e3 in turn, from a low current or a low old log-prob, and against the rollout's too."""
    batch = random_batch(seed=30, dtype=dtype)
    turn = torch.tensor([1.0, -1.0, 0.0] * 14, dtype=dtype).view(6, 7)
    batch = dataclasses.replace(
        batch,
        log_probs=batch.log_probs - 1e3 * (turn < 0).to(dtype),
        old_log_probs=batch.old_log_probs - 1e3 * (turn > 0).to(dtype),
    )
    log_ratio = (batch.log_probs - batch.old_log_probs)[batch.mask.bool()]
    assert log_ratio.max() > 990 and log_ratio.min() < -990
    gradient = finite_gradient(name, batch)
    if not has_extra(PRESETS[name]):  # No cut turns a gradient round: c >= 0.
        assert (gradient * batch.advantages).max() <= 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_the_branch_not_taken_leaves_no_trace(shift, sign):
    """A > 0: exactly −w·A whatever r; A < 0 on a clipped token: exactly 0."""
    lp = torch.full((2, 3), -0.5, dtype=torch.float64)
    batch = dataclasses.replace(
        random_batch(lengths=(3, 3), width=3), log_probs=lp, old_log_probs=lp - shift
    )
    batch = dataclasses.replace(batch, advantages=torch.full_like(lp, sign))
    gradient = finite_gradient("up-grpo", batch)
    expected = torch.full_like(gradient, -1 / 6 if sign > 0 else 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)


@pytest.mark.fault(
    "Numbers",
    "NaN and infinity in padding",
    "neither value nor gradient sees them",
)
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_minus_infinity_behind_the_mask(name):
    batch = random_batch(seed=31)
    hidden = batch.mask == 0
    batch.log_probs[hidden] = float("-inf")
    assert finite_gradient(name, batch)[hidden].count_nonzero() == 0


@pytest.mark.parametrize("lengths", [(0, 0, 4), (1, 0, 0)])
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_empty_responses(name, lengths):
    batch = random_batch(seed=32, lengths=lengths, width=4)
    finite_gradient(name, batch)


@pytest.mark.parametrize("name", EVERY_PRESET)
def test_a_micro_batch_of_nothing_but_empty_responses(name):
    """Allowed with the batch's denominators: loss and gradient are 0."""
    batch = random_batch(seed=33, lengths=(0, 0), width=4).with_grad()
    arguments = batch.arguments(PRESETS[name])
    result = policy_loss(**arguments, global_tokens=10, global_sequences=3)
    result.loss.backward()
    assert result.loss.item() == 0
    assert batch.log_probs.grad.count_nonzero() == 0


@pytest.mark.fault(
    "Numbers",
    "an empty micro-batch",
    "a loss of zero with a graph",
)
@pytest.mark.parametrize("lengths", [(), (0, 0, 0)], ids=["no sequences", "no positions"])
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_a_micro_batch_of_no_sequences_or_no_positions(name, lengths):
    """[0, T] and [B, 0]: 0 with a graph that reaches the weights behind, and nothing counted."""
    batch = random_batch(lengths=(3, 3, 3), width=4).rows(slice(len(lengths)))
    if lengths:
        batch = Batch(*(getattr(batch, f.name)[:, :0] for f in dataclasses.fields(batch)))
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    arguments = batch.arguments(PRESETS[name]) | {"log_probs": weight * batch.log_probs}
    result = policy_loss(**arguments, global_tokens=10, global_sequences=3)
    result.loss.backward()
    assert result.loss.item() == 0 and weight.grad.item() == 0
    assert result.per_token.shape == result.clipped.shape == batch.log_probs.shape
    assert all(float(part) == 0 for pair in result.metrics.values() for part in pair)
    assert all(math.isnan(value) for value in finalize_metrics(result.metrics).values())
    for mask_type in (torch.bool, torch.int64, torch.bfloat16):
        arguments["mask"] = batch.mask.to(mask_type)
        assert policy_loss(**arguments, global_tokens=10, global_sequences=3).loss == 0
    with pytest.raises(UserError, match="mask: 0 tokens selected"):
        policy_loss(**arguments)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_batches_of_one_sign(name, sign):
    batch = random_batch(seed=34, spread=2.0)
    finite_gradient(name, dataclasses.replace(batch, advantages=sign * batch.advantages.abs()))


def test_half_precision_is_computed_in_float32():
    """exp(12) overflows float16; the gradient comes back in the input's type."""
    batch = random_batch(seed=35, dtype=torch.float32).with_grad()
    old = (batch.log_probs.detach() - 12).half()
    lp = batch.log_probs.detach().half().requires_grad_()
    arguments = {**batch.arguments(PRESETS["grpo"]), "log_probs": lp, "old_log_probs": old}
    result = policy_loss(**arguments)
    result.loss.backward()
    assert result.loss.dtype == torch.float32 and result.loss.isfinite()
    assert lp.grad.dtype == torch.float16 and lp.grad.isfinite().all()
