"""The digest of weights, by hand and by what it has to tell apart."""

import hashlib

import pytest
import torch

from moe_upgrpo.rollout import digest
from moe_upgrpo.rollout.digest import Digest, tensor_sum


def test_a_sum_by_hand():
    """1·5 + 3·(−2) + 5·7 = 34; of float32 1.0 the bits are 0x3f800000, of two of them one word."""
    assert tensor_sum(torch.tensor([5, -2, 7])) == 34
    assert (
        tensor_sum(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        == (1 << 32) * 0x3F800000 + 3 * 0x3F800000
    )
    assert tensor_sum(torch.tensor([0.0, 0.0, 1.0])) == 3 * 0x3F800000
    assert tensor_sum(torch.tensor([9.0, 0.0, 0.0, 1.0])[1:]) == 3 * 0x3F800000
    assert tensor_sum(torch.tensor([9.0, 0.0, 0.0, 1.0, 0.0])[1:]) == 3 * 0x3F800000
    assert tensor_sum(torch.tensor([1.0], dtype=torch.bfloat16)) == 0x3F80
    assert tensor_sum(torch.tensor([-1])) == 2**64 - 1
    assert tensor_sum(torch.empty(0, 4)) == 0


def test_long_tensors_go_in_pieces_and_columns_as_they_are_read(monkeypatch):
    tensor = torch.randn(7, 300)
    whole = tensor_sum(tensor)
    monkeypatch.setattr(digest, "_AT_ONCE", 64)
    assert tensor_sum(tensor) == whole
    assert tensor_sum(tensor.T) == tensor_sum(tensor.T.contiguous()) != whole


def of(**tensors):
    found = Digest()
    assert [name for name, _ in found.through(tensors.items())] == list(tensors)
    return found.value()


A, B = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)


def test_the_order_of_tensors_does_not_count():
    line = "a torch.float32 (1,) 0000000000000000\n"
    assert of(a=torch.zeros(1)) == hashlib.sha256(line.encode()).hexdigest()
    assert of(a=A, b=B) == of(b=B, a=A)


@pytest.mark.parametrize(
    "other",
    [
        dict(a=B, b=A),  # swapped
        dict(a=A),  # lost
        dict(a=A, b=B, c=B),
        dict(a=A, b=B.bfloat16()),
        dict(a=A.reshape(3, 2), b=B),
        dict(a=A.flip(0), b=B),  # rows swapped
        dict(a=A, b=-B),
        dict(a=A + torch.tensor([1e-45, 0, 0]), b=B),  # the last bit of a zero
    ],
)
def test_what_it_tells_apart(other):
    assert of(**other) != of(a=A, b=B)
