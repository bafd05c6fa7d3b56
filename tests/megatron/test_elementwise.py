"""Norm, rotation and gate in few passes: bit for bit what Megatron-Core and torch compute."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils

from moe_upgrpo.megatron import backend, elementwise

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def run(function, tensors, seed=1):
    """The value, and the gradients to all tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    gradient = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    value.backward(gradient.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_same_bits(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 24), (5, 2, 4, 33), (6, 128)], ids=str)
def test_the_norm(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    expected = run(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, weight])
    assert_same_bits(run(lambda x, w: elementwise.rms_norm(x, w, 1e-6), [x, weight]), expected)


def test_the_norm_of_a_view_and_of_a_frozen_weight():
    x, weight = torch.randn(6, 5, 16), torch.rand(8)
    expected = run(lambda x: F.rms_norm(x[:, 1:, 8:], (8,), weight, 1e-6), [x])
    assert_same_bits(run(lambda x: elementwise.rms_norm(x[:, 1:, 8:], weight, 1e-6), [x]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mscale", [1.0, 1.25])
@pytest.mark.parametrize("width", [16, 10], ids=["all", "part"])
def test_rotary_embeddings(width, mscale, dtype):
    angles = torch.randn(9, 1, 1, width // 2).repeat(1, 1, 1, 2)
    heads = torch.randn(9, 3, 2, 16).to(dtype)

    def rotary(t):
        return rope_utils._apply_rotary_pos_emb_bshd(t, angles, mscale=mscale)

    expected = run(rotary, [heads])
    with backend.apply():
        found = run(rotary, [heads])
        few_passes = type(rotary(heads.clone().requires_grad_()).grad_fn).__name__
    assert_same_bits(found, expected)
    assert ("Rotation" in few_passes) == (width == 16 and dtype != torch.bfloat16)


def test_interleaved_pairs_are_left_to_megatron():
    angles, heads = torch.randn(9, 1, 1, 8).repeat_interleave(2, -1), torch.randn(9, 3, 2, 16)

    def rotary(t):
        return rope_utils._apply_rotary_pos_emb_bshd(t, angles, rotary_interleaved=True)

    expected = run(rotary, [heads])
    with backend.apply():
        assert_same_bits(run(rotary, [heads]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(11, 24), (5, 7), (0, 8)], ids=str)
def test_the_gate(size, dtype):
    tokens, inner = size
    both, probs = torch.randn(tokens, 2 * inner).to(dtype), torch.rand(tokens).to(dtype)

    def plain(both, probs):
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up * probs[:, None]

    assert_same_bits(run(elementwise.gated, [both, probs]), run(plain, [both, probs]))
    with torch.no_grad():
        assert torch.equal(elementwise.gated(both, probs), plain(both, probs))


def test_the_gate_of_frozen_probabilities():
    both, probs = torch.randn(5, 12), torch.rand(5)
    expected = run(lambda both: F.silu(both[:, :6]) * both[:, 6:] * probs[:, None], [both])
    assert_same_bits(run(lambda both: elementwise.gated(both, probs), [both]), expected)


def test_half_precision_with_gates_in_fp32_keeps_the_inner_size_s_precision():
    both, probs = torch.randn(5, 12).bfloat16(), torch.rand(5)
    assert elementwise.gated(both, probs).dtype == torch.bfloat16
