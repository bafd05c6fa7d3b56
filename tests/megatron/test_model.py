"""Which models are taken and how they are built; what they compute is in test_transformers.py."""

import json
import shutil

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3NextConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import families, model, weights
from moe_upgrpo.megatron.attention import CausalAttention
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16}


def changed(source, folder, fields):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.fault(
    "Models that are read",
    "top-1 with renormalised gates, `n_group: null`, what would train wrongly or crash",
    "refused, by the field's name and what is supported",
)
@pytest.mark.parametrize(
    ("checkpoint", "fields", "words"),
    [
        ("tiny", {"model_type": "gpt2"}, "'gpt2' model; .*qwen3, qwen3_moe, qwen2_moe, olmoe, mix"),
        ("tiny", {"model_type": "gpt_oss"}, "'gpt_oss' .*not supported: its attention has sinks"),
        ("tiny", {"model_type": "qwen3_next"}, "'qwen3_next' .*: three quarters .* gated delta"),
        ("tiny", {"model_type": None}, "None model; the trainer supports"),
        ("tiny", {"model_type": "qwen3_mo"}, r"'qwen3_mo' model; the .*nearest: qwen3_moe"),
        ("tiny", {"attention_bias": True}, "attention_bias=True .* qwen3_moe .*: False"),
        ("tiny", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 .*: None"),
        ("tiny", {"hidden_act": "gelu"}, "hidden_act=gelu .* supported: silu"),
        ("tiny", {"rope_parameters": YARN}, "rope_type=yarn .* supported: default"),
        (
            "tiny",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 .* supported: 1.0",
        ),
        ("tiny", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8"),
        ("dense", {"layer_types": ["sliding_attention"] * 4}, "layer_types=.*full_attention"),
        ("mixtral", {"sliding_window": 8}, "sliding_window=8 .*mixtral"),
        ("deepseek", {"rope_parameters": YARN}, "rope_parameters=.*mscale.* both given"),
        (
            "deepseek",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=linear .*: default or yarn",
        ),
        ("deepseek", {"rope_interleave": False}, "rope_interleave=False .*: True"),
        ("deepseek", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("deepseek", {"topk_group": 1}, "topk_group=1 .*half of num_experts_per_tok"),
        ("deepseek", {"scoring_func": "softmax"}, "scoring_func=softmax .*: sigmoid"),
        ("deepseek", {"first_k_dense_replace": 4}, "first_k_dense_replace=4 .*: 0 to .* = 3"),
        ("deepseek", {"n_shared_experts": 0}, "n_shared_experts=0 .*: 1 or more"),
        ("deepseek", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek", {"n_group": None}, "n_group=None .*: a whole number of at least 1"),
        ("deepseek", {"topk_group": None}, "topk_group=None"),
        ("deepseek", {"num_experts_per_tok": None}, "num_experts_per_tok=None"),
        ("deepseek", {"first_k_dense_replace": None}, "first_k_dense_replace=None .*at least 0"),
        ("deepseek", {"n_routed_experts": 0}, "n_routed_experts=0"),
        ("tiny", {"num_experts_per_tok": 1}, "norm_topk_prob=True .*: False with num_experts_per"),
        ("tiny", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 .*: 1 to num_experts=8"),
        ("tiny", {"num_local_experts": None}, "num_experts=None"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 .*: 2 or more"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 .* olmoe .*: None"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True"),
        (
            "olmoe",
            {"norm_topk_prob": True, "num_experts_per_tok": 1},
            "norm_topk_prob=True .*: False with num_experts_per",
        ),
        (
            "qwen2",
            {"norm_topk_prob": True, "num_experts_per_tok": 1},
            "norm_topk_prob=True .*: False with num_experts_per",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
            "sliding_window=8 .*: None",
        ),
        ("qwen2", {"shared_expert_intermediate_size": 0}, "shared_expert_.*=0 .* at least 1"),
        ("qwen2", {"qkv_bias": False}, r"tensor\(s\) are not of this model, .*k_proj.bias"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act=gelu .* supported: silu"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(checkpoint, fields, words, checkpoints, tmp_path):
    with pytest.raises(UserError, match=words):
        families.read_model_config(changed(checkpoints[checkpoint], tmp_path / "c", fields))


def test_a_layout_that_does_not_divide_a_shared_expert_or_key_heads(checkpoints):
    """Each rank holds whole heads and a part of the shared expert."""
    for name, field in (("qwen2", "num_key_value_heads=2"), ("olmoe", "num_key_value_heads=2")):
        hf = families.read_model_config(checkpoints[name])
        with pytest.raises(UserError, match=field):
            Layout(tp=4).check_model(hf)
    hf = families.read_model_config(checkpoints["qwen2"])
    hf.shared_expert_intermediate_size = 49
    with pytest.raises(UserError, match="shared_expert_intermediate_size=49"):
        Layout(tp=2, ep=2).check_model(hf)


def test_why_qwen3_next_is_not_taken(monkeypatch):
    delta_nets = Qwen3NextConfig().layer_types.count("linear_attention")
    assert delta_nets / len(Qwen3NextConfig().layer_types) == 3 / 4
    nets = pytest.importorskip("megatron.core.ssm.gated_delta_net")  # 0.16
    monkeypatch.setattr(nets, "HAVE_FLA", False)
    with pytest.raises(ImportError, match="FLA"):
        nets.GatedDeltaNet(None, None)


def test_why_gpt_oss_is_not_taken():
    windows = GptOssConfig().layer_types
    assert windows[::2] == ["sliding_attention"] * (len(windows) // 2)
    assert windows[1::2] == ["full_attention"] * (len(windows) // 2)
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **heads))
    names = set(dict(built.named_parameters()))
    assert {
        f"model.layers.0.{n}" for n in ("self_attn.sinks", "mlp.experts.down_proj_bias")
    } < names
    plain = dict(num_layers=1, hidden_size=64, num_attention_heads=4, attention_dropout=0.0)
    for name, value in (("softmax_type", "learnable"), ("window_size", (8, 0))):
        config = model.TransformerConfig(**plain, **{name: value})
        with pytest.raises(UserError, match=name):
            CausalAttention(config, 1, None, "self")


def test_multi_token_prediction_layers_are_refused_by_name(checkpoints, tmp_path):
    folder = changed(checkpoints["deepseek"], tmp_path / "c", {})
    state = load_file(folder / "model.safetensors")
    state["model.layers.4.enorm.weight"] = state["model.norm.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors .*model\.layers\.4\.enorm.* multi-token"):
        families.read_model_config(folder)


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_folder_without_a_config_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"holds no config\.json, or none that can be read"):
        families.read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("dispatcher", "expected"),
    [("alltoall", MoEAlltoAllTokenDispatcher), ("allgather", MoEAllGatherTokenDispatcher)],
)
def test_the_dispatcher_asked_for_is_built(dispatcher, expected, tiny_checkpoint):
    layout = Layout(dispatcher=dispatcher)
    with process_groups(layout):
        hf = families.read_model_config(tiny_checkpoint)
        (chunk,) = model.build_model(hf, layout, torch.float32)
        for layer in chunk.decoder.layers:
            assert type(layer.mlp.token_dispatcher) is expected


def test_rl_defaults(checkpoints):
    """Dropless, no auxiliary loss, fp32 router, selection bias frozen, the unfused router."""
    for name in ("tiny", "mixtral", "deepseek"):
        hf = families.read_model_config(checkpoints[name])
        with process_groups(Layout()):
            config = model.transformer_config(hf, Layout(), torch.bfloat16)
        assert config.moe_router_dtype == "fp32"
        assert config.moe_router_load_balancing_type == "none"
        assert config.moe_aux_loss_coeff == 0
        assert config.moe_expert_capacity_factor is None
        assert config.moe_router_fusion is False
        assert config.moe_router_enable_expert_bias == (name == "deepseek")
        assert config.moe_router_bias_update_rate == 0 or name != "deepseek"


def test_code_paths_without_a_gpu():
    """Those with Transformer Engine are in te_layers.json; Apex is not covered."""
    assert model.code_paths() == {
        "layer spec": "local (torch)",
        "norm": "torch.nn.RMSNorm",
        "linear layers": "ColumnParallelLinear",
        "attention": "CausalAttention",
        "experts": "GroupedExperts",
        "router": "TopKRouter, unfused",
        "gradient accumulation": "torch",
        "optimizer": "torch.optim.adamw.AdamW, foreach",
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("0.self_attention.linear_qkv.layer_norm_weight", "0.input_layernorm.weight"),
        ("1.mlp.linear_fc1.layer_norm_weight", "1.pre_mlp_layernorm.weight"),
        (
            "2.self_attention.linear_q_up_proj.layer_norm_weight",
            "2.self_attention.q_layernorm.weight",
        ),
        (
            "2.self_attention.linear_kv_up_proj.layer_norm_weight",
            "2.self_attention.kv_layernorm.weight",
        ),
        ("3.mlp.experts.linear_fc2.weight11", "3.mlp.experts.local_experts.11.linear_fc2.weight"),
        ("3.mlp.shared_experts.linear_fc2.weight", "3.mlp.shared_experts.linear_fc2.weight"),
        ("3.mlp.router.weight", "3.mlp.router.weight"),
    ],
)
def test_the_names_of_transformer_engines_layers(theirs, ours):
    """As gpt_layer_specs.py and the two maps of Megatron-Bridge have them; whole models are in
    test_te_layers.py."""
    assert weights._local_name(f"decoder.layers.{theirs}") == f"decoder.layers.{ours}"
