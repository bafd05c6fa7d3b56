"""GroupedExperts against Megatron-Core's loop over experts, and where they are used.

Not covered: CUDA's grouped product.
"""

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from transformers import Qwen3MoeConfig

from moe_upgrpo.megatron import model, optimizer
from moe_upgrpo.megatron.experts import GroupedExperts
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout

EXPERTS, HIDDEN, INNER = 4, 16, 24
TOKENS_PER_EXPERT = [5, 0, 1, 3]


def built(inner=INNER, dtype=torch.float32) -> torch.nn.Module:
    hf = Qwen3MoeConfig(
        vocab_size=32, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=EXPERTS,
        num_experts_per_tok=2, moe_intermediate_size=inner, norm_topk_prob=True,
    )  # fmt: skip
    (chunk,) = model.build_model(hf, Layout(), dtype)
    experts = chunk.decoder.layers[0].mlp.experts
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def run(forward, experts) -> list[torch.Tensor]:
    """The output, and the gradients of tokens, gates and weights."""
    torch.manual_seed(1)
    dtype = next(experts.parameters()).dtype
    tokens = torch.randn(sum(TOKENS_PER_EXPERT), HIDDEN, dtype=dtype, requires_grad=True)
    gates = torch.rand(len(tokens), requires_grad=True)
    out, bias = forward(experts, tokens, torch.tensor(TOKENS_PER_EXPERT), gates)
    assert bias is None
    out.backward(torch.randn(out.shape, dtype=dtype))
    found = [out.detach(), tokens.grad, gates.grad]
    for parameter in experts.parameters():
        found.append(parameter.grad)
        parameter.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compute_what_the_loop_computes(dtype):
    """Also of an expert without tokens, whose gradient is 0."""
    with process_groups(Layout()):
        experts = built(dtype=dtype)
        assert type(experts) is GroupedExperts
        found, expected = (run(c.forward, experts) for c in (GroupedExperts, SequentialMLP))
    assert len(found) == 3 + 2 * EXPERTS
    for mine, theirs in zip(found, expected, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        error = (mine.float() - theirs.float()).abs().max()
        assert error <= tolerance * max(1, theirs.float().abs().max())
    weights = found[3:]
    idle = TOKENS_PER_EXPERT.index(0)
    assert [bool(w.any()) for w in weights] == [i // 2 != idle for i in range(len(weights))]


def test_no_copy_of_the_weights_is_kept_for_the_backward():
    with process_groups(Layout()):
        experts = built()
        own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(GroupedExperts.forward, experts)
    beside = sum(size for address, size in kept.items() if address not in own)
    weights = sum(p.numel() * 4 for p in experts.parameters())
    assert 0 < beside < weights / 2


def test_sizes_that_the_grouped_product_does_not_take_go_through_the_loop():
    with process_groups(Layout()):
        experts = built(inner=18)  # rows of 72 bytes
        assert type(experts) is SequentialMLP
        run(SequentialMLP.forward, experts)


def test_a_gpu_takes_them_where_transformer_engine_is_not_installed(tiny_checkpoint, monkeypatch):
    hf = read_model_config(tiny_checkpoint)
    with process_groups(Layout()):
        config = model.transformer_config(hf, Layout(), torch.bfloat16)
        for module in (model, optimizer):
            monkeypatch.setattr(module, "has_cuda", lambda: True)
        mlps = [layer.submodules.mlp for layer in model.block_spec(config, None).layer_specs]
    for mlp in mlps:
        submodules = mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules
        experts = submodules.experts
        assert getattr(experts, "func", getattr(experts, "module", None)) is GroupedExperts
    paths = model.code_paths()
    assert paths["experts"] == "GroupedExperts" and paths["attention"] == "CausalAttention"
    assert paths["optimizer"] == "torch.optim.adamw.AdamW, fused"
