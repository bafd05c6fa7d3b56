"""A Hugging Face config made into a Megatron-Core GPTModel."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import AutoConfig, PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.groups import device
from moe_upgrpo.megatron.layout import Layout, moe_layers

MODEL_TYPES = ("qwen3_moe", "qwen3")
RECOMPUTE = {
    "none": {},
    # The smallest units: what has to be kept beside their inputs is one layer's activations.
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over the sequence shards.

    Megatron's own wrapper of torch's norm refuses sequence parallelism (torch_norm.py:33), which
    tensor-parallel MoE models need; finalize_model_grads.py:354 asks for the attribute set here.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def read_model_config(model_dir: Path) -> PretrainedConfig:
    """The Hugging Face config of a checkpoint folder, refused by name where it is not supported."""
    if not (Path(model_dir) / "config.json").is_file():
        raise UserError(
            f"{model_dir} holds no config.json: a Hugging Face checkpoint folder is expected "
            "(config.json, *.safetensors, tokenizer files)."
        )
    config = AutoConfig.from_pretrained(model_dir)
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{model_dir} is a {config.model_type!r} model; the trainer supports "
            f"{' and '.join(MODEL_TYPES)}."
        )
    unsupported = {
        "attention_bias": config.attention_bias,
        "sliding_window": config.use_sliding_window and config.sliding_window,
        "rope type": _rope(config)["rope_type"] != "default" and _rope(config)["rope_type"],
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
    }
    for field, value in unsupported.items():
        if value:
            raise UserError(
                f"{model_dir}: {field}={value} is not supported for {config.model_type} models."
            )
    return config


def _rope(config: PretrainedConfig) -> dict:
    return config.rope_parameters


def transformer_config(
    hf: PretrainedConfig, layout: Layout, dtype: torch.dtype, recompute: str = "none"
) -> TransformerConfig:
    """Megatron's config of a Qwen3 model; experts dropless, no auxiliary loss, router in fp32."""
    experts = moe_layers(hf)
    moe = {}
    if experts:
        moe = dict(
            moe_layer_freq=[int(layer in experts) for layer in range(hf.num_hidden_layers)],
            moe_ffn_hidden_size=hf.moe_intermediate_size,
            num_moe_experts=hf.num_experts,
            moe_router_topk=hf.num_experts_per_tok,
            # Qwen3-MoE normalises the gates of the chosen experts: softmax after top-k, not before.
            moe_router_pre_softmax=not hf.norm_topk_prob,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_token_dispatcher_type=layout.dispatcher,
            moe_grouped_gemm=False,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
        )
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.intermediate_size,
        **moe,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        **RECOMPUTE[recompute],
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Interleaved, two stages exchange activations and gradients with the same peer at a time,
        # and a batch of sends and receives does not tell them apart (p2p_communication.py:25): with
        # two stages they are swapped without an error. deallocate_pipeline_outputs stays off: it
        # frees outputs that gloo is still sending (schedules.py:1600).
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Not skipped although every weight is loaded: initialisation also marks the weights that
        # tensor parallelism splits (layers.py:883), and gradient norms are wrong without the mark.
        perform_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron-Core's own layers without Transformer Engine, with the norm of this module."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_norm = RMSNorm
    for spec in block.layer_specs:
        layer, attention = spec.submodules, spec.submodules.self_attention.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block


def build_model(
    hf: PretrainedConfig, layout: Layout, dtype: torch.dtype, recompute: str = "none"
) -> list[GPTModel]:
    """This rank's part of the model, one chunk for each virtual pipeline stage.

    The weights are not yet set (see `moe_upgrpo.megatron.weights`).
    """
    layout.check_model(hf)
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute={recompute!r}: use one of {', '.join(RECOMPUTE)}.")
    config = transformer_config(hf, layout, dtype, recompute)
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunks.append(
            GPTModel(
                config,
                block_spec(config, vp_stage),
                vocab_size=hf.vocab_size,
                max_sequence_length=hf.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                parallel_output=True,
                share_embeddings_and_output_weights=hf.tie_word_embeddings,
                position_embedding_type="rope",
                rotary_base=_rope(hf)["rope_theta"],
                vp_stage=vp_stage,
            ).to(device())
        )
    return chunks
