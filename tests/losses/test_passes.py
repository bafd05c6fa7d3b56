"""Passes against the torch functions that they stand for: value, gradient, padding."""

import math

import pytest
import torch
from torch.autograd import grad

from moe_upgrpo.losses import passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("low", "high"), [(0.8, 1.2), (-math.inf, 1.2), (1.0, math.inf), (0.0, 3.0), (1.0, 1.0)]
)
def test_clamp_is_torchs_at_its_bounds_and_beside_them(low, high, dtype):
    bounds = torch.tensor([b for b in (low, high) if math.isfinite(b)], dtype=dtype)
    beside = [torch.nextafter(bounds, torch.tensor(way, dtype=dtype)) for way in (-9.0, 9.0)]
    values = [bounds, *beside, torch.tensor([-1e30, 0.5, 1.0, 1.1, 7.0], dtype=dtype)]
    x = torch.cat(values).requires_grad_()
    weights = torch.arange(1, len(x) + 1, dtype=dtype)
    ours, theirs = passes.clamp(x, low, high), x.clamp(low, high)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(grad((y * weights).sum(), x)[0] for y in (ours, theirs)))


@pytest.mark.parametrize(("low", "high"), [(-math.inf, math.inf), (-1.0, 0.0)])
def test_ratio_to_itself_is_its_formula_with_both_derivatives(low, high):
    x = torch.tensor([[-2.0, 0.0, -0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, -2.0, 5.0, 3.0]], dtype=torch.float64)
    found = []
    y = x.clamp(low, high)
    for ratio in (passes.ratio_to_itself(x, low, high), (y - y.detach()).exp()):
        (first,) = grad((ratio * weights).sum(), x, create_graph=True)
        found.append((ratio.detach(), first.detach(), grad(first.square().sum(), x)[0]))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.count_nonzero() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_clamped_exp_has_value_and_both_derivatives_of_its_formula():
    """At the bound and beyond it; with a mask, also where x is no number."""
    x = torch.tensor([-2.0, 0.0, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    bad = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    here = torch.tensor([True] * 4 + [False] * 2)
    weights = torch.tensor([1.0, -2.0, 5.0, 3.0], dtype=torch.float64)
    found = []
    for exp in (
        lambda: passes.clamped_exp(x, 1.0),
        lambda: passes.clamped_exp(torch.cat([x, bad]), 1.0, here)[:4],
        lambda: x.clamp(max=1.0).exp(),
    ):
        y = exp()
        (plain,) = grad((y * weights).sum(), x, retain_graph=True)
        (first,) = grad((y * weights).sum(), x, create_graph=True)
        found.append((y.detach(), plain, first.detach(), grad(first.square().sum(), x)[0]))
    assert found[0][1].count_nonzero() == 3
    for ours in found[:2]:
        for mine, theirs in zip(ours, found[2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-15, atol=0)
    assert passes.clamped_exp(torch.cat([x, bad]), 1.0, here)[4:].tolist() == [1.0, 1.0]


def test_an_added_product_has_its_gradients_also_where_a_row_has_one_number():
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    constant = torch.tensor([[2.0, 0.5], [-1.0, 3.0]])
    for x in (torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.tensor([[5.0], [7.0]])):
        x.requires_grad_()
        added = passes.add_product_(first * 1, constant, x)
        expected = first + constant * x
        assert torch.equal(added, expected)
        for ours, theirs in zip(
            *(grad(y.square().sum(), (first, x)) for y in (added, expected)), strict=True
        ):
            assert torch.equal(ours, theirs) and ours.count_nonzero()


@pytest.mark.parametrize("with_number", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_is_where_whatever_stands_behind_it(dtype, with_number):
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    x = torch.tensor([[-0.0, 2.5, math.nan], [math.inf, -1e-40, -math.inf]], dtype=dtype)
    x.requires_grad_()
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=dtype)
    masked = passes.masked(x, mask.to(dtype) if with_number else mask.bool())
    assert torch.equal(masked, torch.where(mask.bool(), x, 0.0))
    assert torch.equal(grad((masked * weights).sum(), x)[0], weights * mask)


@pytest.mark.parametrize("limit", [1.2, -0.5, 0.0, math.inf])
def test_comparisons_are_torchs(limit):
    x = torch.tensor([limit, 1.2, -0.5, 0.0, 1e30, -1e30], requires_grad=True)
    assert torch.equal(passes.exceeds(x, limit), x > limit)
    assert torch.equal(passes.falls_below(x, limit), x < limit)


def test_what_is_cut_is_zero_and_has_no_gradient(monkeypatch):
    """In one block, and in several of unequal size."""
    g = torch.Generator().manual_seed(3)
    cut = torch.rand(7, 5, generator=g) < 0.5
    x = torch.randn(7, 5, generator=g, requires_grad=True)
    expected = torch.where(cut, 0.0, x)
    for block in (2**16, 8):
        monkeypatch.setattr(passes, "BLOCK", block)
        kept = passes.keep(x, cut)
        assert torch.equal(kept, expected) and cut.any() and not cut.all()
        assert torch.equal(grad(kept.sum(), x)[0], (~cut).float())
        assert torch.equal(passes.keep_(x.detach().clone(), cut), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_choice_by_another_tensor_has_value_and_gradients_of_where(dtype):
    y = torch.tensor([-3.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 7.0], dtype=dtype)
    x = torch.arange(1, len(y) + 1, dtype=dtype, requires_grad=True)
    choices = {
        (lambda: passes.where_below(x, y, 1.0)): y < 1,
        (lambda: passes.where_below(x, y, 1.0, or_at=True)): y <= 1,
        (lambda: passes.of_sign(x, y, positive=True)): y > 0,
        (lambda: passes.of_sign(x, y, positive=False)): y <= 0,
    }
    for choose, here in choices.items():
        chosen = choose()
        assert torch.equal(chosen, torch.where(here, x, 0.0))
        (first,) = grad(chosen.square().sum(), x, create_graph=True)
        assert torch.equal(first, torch.where(here, 2 * x, 0.0))
        assert torch.equal(grad(first.sum(), x)[0], 2 * here.to(dtype))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_weighted_input_is_finite_whatever_stands_behind_the_mask(kind):
    x = torch.tensor([[2.0, math.nan, -math.inf], [3.0, 0.5, math.nan]], requires_grad=True)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]]).to(kind)
    weight = torch.tensor([[-1.5, 0.0, 0.0], [2.0, -0.0, 0.0]])
    weighted = passes.weigh(x, weight, mask)
    assert weighted.tolist() == [[-3.0, 0.0, 0.0], [6.0, 0.0, 0.0]]
    (first,) = grad(weighted.square().sum(), x, create_graph=True)
    assert first.tolist() == [[9.0, 0.0, 0.0], [24.0, 0.0, 0.0]]
    assert grad(first.sum(), x)[0].tolist() == [[4.5, 0.0, 0.0], [8.0, 0.0, 0.0]]


def test_a_scaled_square_has_its_first_and_second_derivative():
    x = torch.tensor([-3.0, 0.0, 0.5], requires_grad=True)
    y = passes.scaled_square(x, 0.25)
    (first,) = grad(y.sum(), x, create_graph=True)
    (second,) = grad(first.sum(), x)
    assert (y.tolist(), first.tolist()) == ([2.25, 0.0, 0.0625], [-1.5, 0.0, 0.25])
    assert second.tolist() == [0.5, 0.5, 0.5]
