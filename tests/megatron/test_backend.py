"""The backend replaces what it says, undoes itself, and leaves other libraries alone."""

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo.megatron import backend

MISSING = object()


def state() -> list:
    replacements = backend.mends() + backend.cpu_replacements()
    return [getattr(r.owner, r.name, MISSING) for r in replacements]


@pytest.mark.skipif(backend.has_cuda(), reason="the CPU backend does nothing where CUDA is there")
def test_it_undoes_itself_after_success_and_after_an_error():
    before = state()
    with backend.apply() as replacements:
        assert len(replacements) > 5 and all(r.reason for r in replacements)
        assert torch.cuda.current_device() == "cpu"
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().type() == "torch.cuda.FloatTensor"
    assert state() == before
    with pytest.raises(ZeroDivisionError), backend.apply():
        _ = 1 / 0
    assert state() == before
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_with_cuda_only_the_mends_act(monkeypatch):
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    mends = [r.name for r in backend.mends()]
    before = [getattr(r.owner, r.name, MISSING) for r in backend.cpu_replacements()]
    with backend.apply() as replacements:
        assert [r.name for r in replacements] == mends
        assert [getattr(r.owner, r.name, MISSING) for r in backend.cpu_replacements()] == before
        assert torch.zeros(2).type() == "torch.FloatTensor"


def test_transformers_loads_the_same_weights_inside_the_backend(tiny_checkpoint):
    """Replacing torch's factories once made transformers keep random weights, without a word."""
    expected = Qwen3MoeForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    with backend.apply():
        loaded = Qwen3MoeForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
