# SPDX-License-Identifier: Apache-2.0
"""Norm, rotary embedding and gated activation on a CPU, in fewer passes over memory.

Autograd keeps every intermediate result of these and makes as many new tensors in the backward:
they took more of a small model's step than its matrix products. Here the backward is written out,
in place where the tensor is its own, with the same operations in the same order: values and
gradients are bit for bit those of autograd. Half precision and other devices are left to torch,
which has kernels of its own for them.

S positions, B sequences, A heads, D their width, H hidden size; N tokens of a rank's experts, F the
experts' inner size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def takes(*tensors: Tensor) -> bool:
    """Whether the tensors are of one of the precisions, and on the device, that this is for."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(
        tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors
    )


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) ⊙ weight over the last dimension, as torch.nn.functional.rms_norm."""
    if not takes(x, weight_H):
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    return _RMSNorm.apply(x, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_H, eps):
        scale = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        return (x * scale).mul_(weight_H)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight_H, scale = ctx.saved_tensors
        of_weight_H = None
        if ctx.needs_input_grad[1]:
            products = (x * scale).mul_(gradient)
            of_weight_H = products.sum(tuple(range(x.ndim - 1)))
            del products
        if not ctx.needs_input_grad[0]:
            return None, of_weight_H, None
        of_x = gradient * weight_H
        products = of_x * x
        # d scale / d mean = -½ scale³, d mean / d x = 2 x / H
        of_mean = products.sum(-1, keepdim=True).mul_(-0.5).mul_(scale.pow(3)).div_(x.shape[-1])
        torch.mul(x, of_mean.mul_(2), out=products)
        return of_x.mul_(scale).add_(products), of_weight_H, None


def rotate(t_SBAD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """t ⊙ cos + rotate_half(t) ⊙ sin: rotary position embeddings whose pairs are D/2 apart.

    cos, sin: [S, 1, 1, D]; they get no gradient. rotate_half((a, b)) = (−b, a).
    """
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return _Rotation.apply(t_SBAD, cos, signed)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t_SBAD, cos, signed):
        ctx.save_for_backward(cos, signed)
        half = signed.shape[-1] // 2
        return (t_SBAD * cos).add_(t_SBAD.roll(half, -1).mul_(signed))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_SBAD):
        cos, signed = ctx.saved_tensors
        half = signed.shape[-1] // 2
        turned_SBAD = (gradient_SBAD * signed).roll(half, -1)
        return (gradient_SBAD * cos).add_(turned_SBAD), None, None


def gated(gate_and_up_N2F: Tensor, probs_N: Tensor) -> Tensor:
    """silu(gate) ⊙ up ⊙ p, [N, F]: the inner activation of experts, p the tokens' gates."""
    if takes(gate_and_up_N2F, probs_N):
        return _Gated.apply(gate_and_up_N2F, probs_N)
    gate_NF, up_NF = gate_and_up_N2F.chunk(2, dim=-1)
    if not torch.is_grad_enabled():
        return F.silu(gate_NF).mul_(up_NF).mul_(probs_N[:, None])
    inner_NF = F.silu(gate_NF) * up_NF
    return (inner_NF * probs_N[:, None]).to(inner_NF.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up_N2F, probs_N):
        ctx.save_for_backward(gate_and_up_N2F, probs_N)
        gate_NF, up_NF = gate_and_up_N2F.chunk(2, dim=-1)
        return F.silu(gate_NF).mul_(up_NF).mul_(probs_N[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_NF):
        gate_and_up_N2F, probs_N = ctx.saved_tensors
        gate_NF, up_NF = gate_and_up_N2F.chunk(2, dim=-1)
        active_NF = F.silu(gate_NF)
        of_inner_NF = gradient_NF * probs_N[:, None]
        of_both_N2F = torch.empty_like(gate_and_up_N2F)
        of_gate_NF, of_up_NF = of_both_N2F.chunk(2, dim=-1)
        torch.mul(of_inner_NF, active_NF, out=of_up_NF)
        torch.ops.aten.silu_backward.grad_input(
            of_inner_NF.mul_(up_NF), gate_NF, grad_input=of_gate_NF
        )
        of_probs_N = None
        if ctx.needs_input_grad[1]:
            of_probs_N = active_NF.mul_(up_NF).mul_(gradient_NF).sum(-1)
        return of_both_N2F, of_probs_N
