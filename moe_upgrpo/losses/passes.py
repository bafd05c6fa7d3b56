# SPDX-License-Identifier: Apache-2.0
"""Elementwise functions that go through a batch quickly.

On a CPU torch's `where`, `masked_fill`, comparisons and the backward of `clamp` go value by value,
and are slow (2 ms for half a million values, instead of .1) where the condition changes from one
value to the next, as a clip's does. Multiplication, conversion to bool and the backward of
`hardtanh` do not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from moe_upgrpo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def clamp(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x.clamp(low, high), with its gradient: 1 from low to high, bounds included, 0 outside."""
    clamped: Tensor = _functions().Clamp.apply(x, low, high)
    return clamped


def clamped_exp(x: Tensor, high: float, mask: Tensor | None = None) -> Tensor:
    """exp(min(x, high)); gradient exp(x) up to the bound and 0 beyond it.

    With a mask, 1 where it does not hold, whatever x holds there; the gradient that comes back has
    to be 0 there: the mask, as in `masked`, is not kept.
    """
    found: Tensor = _functions().ClampedExp.apply(x, high, mask)
    return found


def ratio_to_itself(log_x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """exp(y − sg(y)) with y = clamp(log x, low, high): value 1, and all derivatives."""
    ratio: Tensor = _functions().SelfRatio.apply(log_x, low, high)
    return ratio


def scaled_square(x: Tensor, k: float) -> Tensor:
    """k·x²"""
    squared: Tensor = _functions().ScaledSquare.apply(x, k)
    return squared


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask holds, else 0, whatever x holds there. mask: bool, or, for fewer passes, 0
    and 1 in the dtype of x."""
    if mask.dtype == torch.bool:
        return torch.where(mask, x, 0.0)
    found: Tensor = _functions().Masked.apply(x, mask)
    return found


def _at(x: Tensor, mask: Tensor) -> Tensor:
    """`masked` without a gradient"""
    if mask.dtype == torch.bool:
        return torch.where(mask, x, 0.0)
    found: Tensor = torch.ops.aten.threshold_backward(x, mask, 0.0)
    return found


def weigh(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """weight·x where the mask holds, else 0, whatever x holds there; weight is a constant.

    Either the weight or the gradient that comes back has to be 0 where the mask does not hold: the
    mask, as in `masked`, is not kept.
    """
    weighted: Tensor = _functions().Weigh.apply(x, weight, mask)
    return weighted


def add_product_(to: Tensor, constant: Tensor, x: Tensor) -> Tensor:
    """to + constant·x, written to the first; the other two may have fewer columns. (The backward of
    `addcmul_` multiplies the constant by 1, for one more pass.)"""
    added: Tensor = _functions().AddProduct.apply(to, constant, x)
    return added


def of_sign(x: Tensor, advantages: Tensor, positive: bool, out: Tensor | None = None) -> Tensor:
    """x where A > 0, or where A <= 0 if not `positive`, else 0, whatever x holds there. out: as in
    `where_below`."""
    if not positive:
        return where_below(x, advantages, 0.0, or_at=True, out=out)
    op = torch.ops.aten.threshold_backward  # relu's
    chosen: Tensor
    if out is None:
        chosen = op(x, advantages, 0.0)
    else:
        chosen = op.grad_input(x, advantages, 0.0, grad_input=out)
    return chosen


def where_below(
    x: Tensor, y: Tensor, limit: float, or_at: bool = False, out: Tensor | None = None
) -> Tensor:
    """x where y, a finite constant, is below the limit (or at it), else 0, whatever x holds there.

    The backward of hardtanh is this choice in one pass; the graph keeps y alone. out: the tensor to
    write to, x for instance, without a gradient.
    """
    high = _outside(-math.inf, limit, y.dtype)[1] if or_at else limit
    op = torch.ops.aten.hardtanh_backward
    chosen: Tensor
    if out is None:
        chosen = op(x, y, -math.inf, high)
    else:
        chosen = op.grad_input(x, y, -math.inf, high, grad_input=out)
    return chosen


@cache
def _functions() -> Any:
    """The autograd functions, made at first use, since the import does without torch."""

    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
            ctx.save_for_backward(x)
            ctx.bounds = _outside(low, high, x.dtype)
            return x.clamp(low, high)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            (x,) = ctx.saved_tensors
            return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.bounds), None, None

    class ClampedExp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, high: float, mask: Tensor | None) -> Tensor:
            if mask is None:
                found = x.clamp(max=high).exp_()
            else:
                found = _at(x, mask).clamp_(max=high).exp_()
            ctx.save_for_backward(x, found)
            ctx.high = high
            return found

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            x, found = ctx.saved_tensors
            slope = gradient * found
            out = None if torch.is_grad_enabled() else slope
            return where_below(slope, x, ctx.high, or_at=True, out=out), None, None

    class SelfRatio(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, log_x: Tensor, low: float, high: float) -> Tensor:
            ctx.save_for_backward(log_x)
            ctx.bounds = low, high
            return log_x.new_ones(()).expand(log_x.shape)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            (log_x,) = ctx.saved_tensors
            if torch.is_grad_enabled():  # its own derivative is asked for: the ratio again
                gradient = gradient * ratio_to_itself(log_x, *ctx.bounds)
            if ctx.bounds != (-math.inf, math.inf):
                gradient = torch.ops.aten.hardtanh_backward(
                    gradient, log_x, *_outside(*ctx.bounds, log_x.dtype)
                )
            return gradient, None, None

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
            ctx.save_for_backward(mask)
            return _at(x, mask)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            (mask,) = ctx.saved_tensors
            return gradient * mask, None  # finite: it comes from behind the mask

    class Weigh(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return _at(x, mask).mul_(weight)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            (weight,) = ctx.saved_tensors
            return gradient * weight, None, None

    class AddProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, to: Tensor, constant: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(constant)
            ctx.shape = x.shape
            ctx.mark_dirty(to)
            return to.addcmul_(constant, x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
            (constant,) = ctx.saved_tensors
            return gradient, None, (gradient * constant).sum_to_size(ctx.shape)

    class ScaledSquare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
            ctx.save_for_backward(x)
            ctx.k = k
            return x.square().mul_(k)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            return (gradient * x).mul_(2 * ctx.k), None

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, cut: Tensor) -> Tensor:
            ctx.save_for_backward(cut)
            return _kept(x, cut, torch.empty_like(x))

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return keep(gradient, *ctx.saved_tensors), None

    class Functions:
        pass

    for function in (Clamp, ClampedExp, SelfRatio, Masked, Weigh, AddProduct, ScaledSquare, Keep):
        setattr(Functions, function.__name__, function)
    return Functions


@cache
def _outside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers just outside the bounds, since hardtanh has no gradient at its bounds."""
    ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
    below, above = torch.nextafter(torch.tensor([low, high], dtype=dtype), ends).tolist()
    return below, above


# Values of a block that stays in a core's cache between two passes.
BLOCK = 2**16


def keep(x: Tensor, cut: Tensor) -> Tensor:
    """x, but 0 where it is cut. x must be finite."""
    kept: Tensor = _functions().Keep.apply(x, cut)
    return kept


def keep_(x: Tensor, cut: Tensor) -> Tensor:
    """x, set to 0 in place where it is cut. x must be finite; it gets no gradient."""
    return _kept(x, cut, x)


def _kept(x: Tensor, cut: Tensor, out: Tensor) -> Tensor:
    # In blocks, as the multiplication converts the bools to numbers.
    blocks = max(1, x.numel() // BLOCK) if x.device.type == "cpu" else 1
    for x_part, cut_part, out_part in zip(*(y.chunk(blocks) for y in (x, cut, out)), strict=True):
        torch.mul(x_part, ~cut_part, out=out_part)
    return out


def exceeds(x: Tensor, limit: float) -> Tensor:
    """x > limit"""
    if x.device.type != "cpu":
        return x > limit
    return torch.gt(x.detach(), limit, out=torch.empty_like(x)).bool()


def falls_below(x: Tensor, limit: float) -> Tensor:
    """x < limit"""
    if x.device.type != "cpu":
        return x < limit
    return torch.lt(x.detach(), limit, out=torch.empty_like(x)).bool()
