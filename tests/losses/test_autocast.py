"""Every number of the losses is the same under torch.autocast: float32 or better."""

import pytest
import torch

from moe_upgrpo.losses import (
    PRESETS,
    compute_policy_loss,
    finalize_metrics,
    gradient_coefficients,
    group_advantages,
    kl_estimate,
    policy_loss,
)
from moe_upgrpo.losses.correction import log_router_shift
from tests.losses.batches import EVERY_PRESET, random_batch

LOW = [torch.bfloat16, torch.float16]


def everything(arguments: dict) -> dict:
    """The result of `policy_loss`, its gradient and the oracle."""
    leaf = arguments["log_probs"].detach().clone().requires_grad_()
    result = policy_loss(**arguments | {"log_probs": leaf})
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "per_token": result.per_token.detach(),
        "clipped": result.clipped,
        "gradient_weight": result.gradient_weight,
        "gradient": leaf.grad,
        "oracle": gradient_coefficients(**arguments),
        **{
            f"{name} {i}": torch.as_tensor(part)
            for name, pair in result.metrics.items()
            for i, part in enumerate(pair)
        },
    }


@pytest.mark.fault(
    "Numbers",
    "a loss under `torch.autocast`",
    "the same numbers; no share above 1",
)
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("name", EVERY_PRESET)
def test_autocast_changes_no_number(name, low):
    """Rows of 301 tokens: a count of 301 is 302 in bfloat16."""
    batch = random_batch(lengths=(301, 299, 0), width=301, spread=1.5, dtype=torch.float32)
    arguments = batch.arguments(PRESETS[name])
    expected = everything(arguments)
    with torch.autocast("cpu", dtype=low):
        found = everything(arguments)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_all_tokens_clipped_is_a_share_of_one(low, sign):
    """513 tokens of one sign, each beyond both clips of GRPO: fractions of exactly 1."""
    zero, one = torch.zeros(1, 513), torch.ones(1, 513)
    with torch.autocast("cpu", dtype=low):
        result = policy_loss(zero, zero - 2, sign * one, one, config=PRESETS["grpo"])
    metrics = finalize_metrics(result.metrics)
    side = "positive" if sign > 0 else "negative"
    for metric in ("clip_fraction", f"clip_fraction_{side}", f"clip_fraction_{side}_upper"):
        assert metrics[metric] == 1.0
    assert metrics[f"{side}_fraction"] == 1.0


@pytest.mark.parametrize("low", LOW, ids=str)
def test_what_is_given_in_half_is_computed_in_full(low):
    """Differences of log-probs that half precision has exactly; what follows does not fit it."""
    lp, ref = (
        torch.tensor([-12.0, -30.0, -0.5], dtype=low),
        torch.tensor([-0.5, -1, -30], dtype=low),
    )
    d = torch.tensor([11.5, 29.0, -29.5], dtype=torch.float64)
    with torch.autocast("cpu", dtype=low):
        k1, k2, k3 = (kl_estimate(lp, ref, kind) for kind in ("k1", "k2", "k3"))
        advantages = group_advantages(torch.tensor([1.0, 0, 0], dtype=low), 3)
        shift = log_router_shift(lp.view(1, 1, 1, 3), ref.view(1, 1, 1, 3), 1e-30)
    assert {x.dtype for x in (k1, k2, k3, advantages, shift)} == {torch.float32}
    torch.testing.assert_close(k1.double(), -d, rtol=0, atol=0)
    torch.testing.assert_close(k2.double(), d.square() / 2, rtol=1e-6, atol=0)
    # by hand: e^11.5 − 12.5, and e^−29.5 + 28.5
    assert k3[0].item() == pytest.approx(98703.27101076, rel=1e-6) and k3[1].isfinite()
    assert k3[2].item() == pytest.approx(28.5, rel=1e-6)
    assert advantages[0].item() == pytest.approx((2 / 3) / (3**-0.5 + 1e-6), rel=1e-6)
    assert shift.item() == pytest.approx(-(11.5 + 29 + 29.5) / 3, rel=1e-6)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_the_drop_in(low):
    batch = random_batch(lengths=(301, 299), width=301, spread=1.5, dtype=torch.float32)
    call = (batch.old_log_probs, batch.log_probs, batch.advantages, batch.mask, 0.2)
    expected = compute_policy_loss(*call)
    with torch.autocast("cpu", dtype=low):
        found = compute_policy_loss(*call)
    assert [x.item() for x in found] == [x.item() for x in expected]
    assert {x.dtype for x in found} <= {torch.float32, torch.float64}
