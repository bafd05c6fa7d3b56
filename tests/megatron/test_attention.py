"""Core attention against attention written out in float64, and that it makes no scores.

In whole models, in every layout, with recomputation: test_transformers.py and test_layouts.py.
Not covered: the kernels of CUDA.
"""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import context
from moe_upgrpo.megatron.attention import CausalAttention

S, B = 40, 3
# Query heads, key/value heads, width of queries and keys, width of values.
SHAPES = {
    "a key for each query": (4, 4, 16, 16),
    "grouped queries": (6, 2, 16, 16),
    "narrow values": (4, 4, 20, 12),
    "wide values": (4, 4, 12, 20),
}


def config(**changes) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **changes)


def attention(softmax_scale=None, attention_dropout=0.0, **changes) -> CausalAttention:
    made = config(attention_dropout=attention_dropout, **changes)
    return CausalAttention(made, 1, None, "self", softmax_scale=softmax_scale)


def tensors(shape, dtype=torch.float32, length=S) -> list[torch.Tensor]:
    queries, keys, width, value_width = shape
    torch.manual_seed(0)
    sizes = ((queries, width), (keys, width), (keys, value_width))
    return [torch.randn(length, B, *size).to(dtype).requires_grad_() for size in sizes]


def by_hand(query, key, value, scale) -> torch.Tensor:
    """One sequence, head and position after another: softmax(scale q·k of those before) · v."""
    repeats = query.shape[2] // key.shape[2]
    rows = []
    for s in range(len(query)):
        row = []
        for b in range(query.shape[1]):
            for a in range(query.shape[2]):
                scores = (key[: s + 1, b, a // repeats] @ query[s, b, a]) * scale
                row.append(scores.softmax(0) @ value[: s + 1, b, a // repeats])
        rows.append(torch.cat(row).reshape(query.shape[1], -1))
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, scale):
    given = tensors(shape)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = by_hand(*exact, scale or shape[2] ** -0.5)
    found = attention(scale)(*given, None)
    assert found.shape == (S, B, shape[0] * shape[3])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    direction = torch.randn(expected.shape)
    found.backward(direction)
    expected.backward(direction.double())
    for mine, theirs in zip(given, exact, strict=True):
        assert theirs.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_follows_a_position_does_not_reach_it(shape):
    """So that padding on the right needs no mask."""
    given = [tensor.detach() for tensor in tensors(shape)]
    found = attention()(*given)
    for tensor in given:
        tensor[S // 2 :] = 7.0
    changed = attention()(*given)
    assert torch.equal(changed[: S // 2], found[: S // 2])
    assert not torch.equal(changed[S // 2 :], found[S // 2 :])


class Largest(TorchDispatchMode):
    """The most elements of a tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_scores_are_made(shape, dtype):
    """Nothing larger than a tensor of queries, in the forward and the backward."""
    length = 512
    given = tensors(shape, dtype, length)
    with Largest() as largest:
        attention()(*given).sum().backward()
    scores = B * shape[0] * length**2
    assert 0 < largest.elements <= B * shape[0] * length * max(shape[2:]) < scores / 10


@pytest.mark.parametrize(("field", "value"), [("window_size", (8, 0)), ("attention_dropout", 0.5)])
def test_what_it_cannot_do_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"{field}=.*Transformer Engine takes (None|0\.0) alone"):
        attention(**{field: value})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed_sequences_are_each_attended_to_by_itself(shape):
    """Values and gradients of three sequences in one row, against each of them alone."""
    lengths = [7, 1, S - 8]
    given = [tensor.detach()[:, 0].requires_grad_() for tensor in tensors(shape)]
    alone = [tensor.detach()[:, :1].requires_grad_() for tensor in tensors(shape)]
    offsets = torch.tensor([0, 7, 8, S], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    found = attention()(*given, packed_seq_params=packed)
    parts = zip(*(tensor.split(lengths) for tensor in alone), strict=True)
    expected = torch.cat([by_hand(*part, shape[2] ** -0.5) for part in parts])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    direction = torch.randn(expected.shape)
    found.backward(direction)
    expected.backward(direction)
    for mine, theirs in zip(given, alone, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad[:, 0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_parts_of_the_sequences_attend_to_all_before_them(shape, size, monkeypatch):
    """Each rank's chunks, with the keys of all as they would be gathered, against the whole."""
    given = tensors(shape)
    expected = attention()(*given)
    direction = torch.randn(expected.shape)
    theirs = torch.autograd.grad(expected, given, direction)
    parts, mine = [], [torch.zeros_like(tensor) for tensor in given]
    for rank in range(size):
        monkeypatch.setattr(context, "size", lambda: size)
        monkeypatch.setattr(context, "rank", lambda rank=rank: rank)
        whole = iter(given[1:])
        monkeypatch.setattr(context, "whole", lambda part, w=whole, **_: next(w))
        made = attention(context_parallel_size=size)
        found = made(*(context.mine(tensor, 0) for tensor in given))
        gradients = torch.autograd.grad(found, given, context.mine(direction, 0))
        mine = [a + b for a, b in zip(mine, gradients, strict=True)]
        parts.append(found)
    found = torch.cat(parts)[context.places(S)]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_masks_are_refused():
    given = tensors(SHAPES["grouped queries"])
    for name in ("attention_mask", "attention_bias"):
        with pytest.raises(ValueError, match=f"{name}.*padded on the right"):
            attention()(*given, **{name: torch.ones(1)})
