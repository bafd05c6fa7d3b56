"""`compute_policy_loss` against a transcription of the UP-GRPO post's appendix."""

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import compute_policy_loss
from tests.losses.batches import random_batch


def masked_mean(x, mask):
    return (x * mask).sum() / (mask.sum() + 1e-8)


def appendix(old_log_prob, log_prob, advantages, mask, low, high, c):
    """Per-token losses and the three metrics, in the appendix's order of min and max."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    upper = torch.maximum(unclipped, clipped)
    ceiling = -advantages * c
    negative = torch.where(advantages < 0, torch.min(ceiling, upper), upper)
    losses = torch.where(advantages > 0, -advantages * log_prob, negative)
    not_positive = (advantages <= 0) * mask
    return (
        losses,
        masked_mean((clipped > unclipped).double(), not_positive),
        masked_mean(-log_ratio, mask),
        masked_mean((upper > ceiling).double(), not_positive),
    )


def aggregate(losses, mask, mode):
    """verl's `agg_loss` without distribution: sequences without tokens do not count."""
    if mode == "token-sum":
        return (losses * mask).sum()
    if mode == "token-mean":
        return (losses * mask).sum() / mask.sum()
    rows, lengths = (losses * mask).sum(-1), mask.sum(-1)
    sequences = (lengths > 0).sum()
    if mode == "seq-mean-token-mean":
        rows = rows / lengths.clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        rows = rows / mask.shape[-1]
    return rows.sum() / sequences


MODES = [
    "token-sum",
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_values_gradients_and_metrics(mode, spread):
    batch = random_batch(seed=40, spread=spread)
    batch.advantages[4] = 0
    theirs, ours = batch.with_grad(), batch.with_grad()
    losses, clipfrac, kl, clipfrac_lower = appendix(
        theirs.old_log_probs, theirs.log_probs, theirs.advantages, theirs.mask, 0.2, 0.28, 3.0
    )
    expected = aggregate(losses, theirs.mask, mode)
    expected.backward()
    returned = compute_policy_loss(
        ours.old_log_probs,
        ours.log_probs,
        ours.advantages,
        ours.mask,
        cliprange=0.5,
        cliprange_low=0.2,
        cliprange_high=0.28,
        loss_agg_mode=mode,
    )
    returned[0].backward()
    torch.testing.assert_close(ours.log_probs.grad, theirs.log_probs.grad, rtol=1e-12, atol=1e-18)
    assert expected.item() == pytest.approx(returned[0].item(), rel=1e-12)
    for value, of_appendix in zip(returned[1:], (clipfrac, kl, clipfrac_lower), strict=True):
        assert value.item() == pytest.approx(of_appendix.item(), rel=1e-12)
    assert spread == 0.1 or (clipfrac > 0 and clipfrac_lower > 0)


def test_cliprange_stands_in_for_either_side_and_c_is_the_ceiling():
    batch = random_batch(seed=41, spread=1.5)
    call = (batch.old_log_probs, batch.log_probs, batch.advantages, batch.mask)
    both = compute_policy_loss(*call, cliprange_low=0.1, cliprange_high=0.1, clip_ratio_c=1.5)
    one = compute_policy_loss(*call, cliprange=0.1, clip_ratio_c=1.5)
    assert [x.item() for x in one] == [x.item() for x in both]
    expected = appendix(*call, 0.1, 0.1, 1.5)
    assert one[3].item() == pytest.approx(expected[3].item(), rel=1e-12)


def test_positional_order_is_the_appendixs():
    batch = random_batch(seed=42)
    call = (batch.old_log_probs, batch.log_probs, batch.advantages, batch.mask)
    positional = compute_policy_loss(*call, 0.2, 0.1, 0.3, 4.0, "seq-mean-token-mean")
    named = compute_policy_loss(
        old_log_prob=call[0],
        log_prob=call[1],
        advantages=call[2],
        response_mask=call[3],
        cliprange=0.2,
        cliprange_low=0.1,
        cliprange_high=0.3,
        clip_ratio_c=4.0,
        loss_agg_mode="seq-mean-token-mean",
    )
    assert [x.item() for x in positional] == [x.item() for x in named]


def test_finite_where_the_snippet_is_not():
    """A log-ratio of 1e3 on a positive token: the snippet's gradient is NaN (0·inf in `where`)."""
    lp = torch.tensor([[-0.5]], requires_grad=True)
    old, one = torch.tensor([[-1000.5]]), torch.ones(1, 1)
    theirs = appendix(old, lp, one, one, 0.2, 0.2, 3.0)[0].sum()
    assert torch.autograd.grad(theirs, lp)[0].isnan().all()
    loss = compute_policy_loss(old, lp, one, one, cliprange=0.2)[0]
    assert torch.autograd.grad(loss, lp)[0].item() == -1


def test_bad_input():
    batch = random_batch()
    call = (batch.old_log_probs, batch.log_probs, batch.advantages, batch.mask)
    with pytest.raises(UserError, match="cliprange: None given"):
        compute_policy_loss(*call)
    with pytest.raises(UserError, match=r"dual_clip: 0\.5 given; allowed: above 1"):
        compute_policy_loss(*call, cliprange=0.2, clip_ratio_c=0.5)
    with pytest.raises(UserError, match="loss_agg_mode: 'mean' given; allowed: token-sum, token-"):
        compute_policy_loss(*call, cliprange=0.2, loss_agg_mode="mean")


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_a_batch_without_tokens(shape):
    """The sum of nothing is 0, with a graph; the mean of nothing is an error."""
    lp, nothing = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    call = (nothing, lp, nothing, nothing)
    loss, *shares = compute_policy_loss(*call, cliprange=0.2, loss_agg_mode="token-sum")
    loss.backward()
    assert loss.item() == 0 and lp.grad.shape == shape and lp.grad.count_nonzero() == 0
    assert [share.item() for share in shares] == [0, 0, 0]
    for mode in MODES[1:]:
        with pytest.raises(UserError, match="mask: 0 tokens selected"):
            compute_policy_loss(*call, cliprange=0.2, loss_agg_mode=mode)
