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


def test_without_a_gpu_kernels_that_are_installed_are_not_taken(monkeypatch):
    """As where Transformer Engine is installed: Megatron-Core takes what it can import."""

    def kernel(*_):
        raise RuntimeError("CUDA error")

    where = {
        backend.megatron_optimizer: ("Adam", "SGD"),
        backend.clip_grads: (
            "multi_tensor_applier",
            "l2_norm_impl",
            "multi_tensor_scale_impl",
            "multi_tensor_scale_tensor_impl",
        ),
        backend.optimizer_module: ("multi_tensor_applier", "multi_tensor_scale_impl"),
        backend.moe_utils: ("te_general_gemm",),
    }
    for owner, names in where.items():
        for name in names:
            monkeypatch.setattr(owner, name, kernel, raising=False)
    monkeypatch.setattr(backend.megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(backend.distrib_optimizer, "HAVE_APEX_OR_TE", True)
    with backend.apply():
        for owner, names in where.items():
            assert all(getattr(owner, name) is not kernel for name in names)
        assert backend.megatron_optimizer.Adam is torch.optim.AdamW
        assert backend.megatron_optimizer.USING_PYTORCH_OPTIMIZER
        assert not backend.distrib_optimizer.HAVE_APEX_OR_TE
        norm, _ = backend.clip_grads.multi_tensor_applier(
            backend.clip_grads.l2_norm_impl, None, [[torch.tensor([3.0, 4.0])]], False
        )
        assert float(norm) == 5.0
    assert backend.megatron_optimizer.Adam is kernel
    assert backend.moe_utils.te_general_gemm is kernel
