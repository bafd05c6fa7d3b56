# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face config made into a Megatron-Core model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import PretrainedConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import elementwise, optimizer, releases
from moe_upgrpo.megatron.attention import CausalAttention
from moe_upgrpo.megatron.backend import has_cuda
from moe_upgrpo.megatron.experts import GroupedExperts
from moe_upgrpo.megatron.families import family, moe_layers, num_experts, top_k
from moe_upgrpo.megatron.groups import device
from moe_upgrpo.megatron.head import ScoringModel
from moe_upgrpo.megatron.layout import Layout

RECOMPUTE = {
    "none": {},
    # The smallest units: beside their inputs only one layer's activations have to be kept.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps)


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together, including those of other tensor-parallel ranks.

    Replaces a norm over each head (attention.py:1280), which gets [S, B, A, D], A heads of
    this rank. Every rank has the whole weight, as of all norms, and uses its heads' part of it.
    heads: the config's field with the heads of all ranks.
    """

    heads: str

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.shape, self.eps = (getattr(config, self.heads), hidden_size), eps
        self.weight = torch.nn.Parameter(
            torch.ones(self.shape[0] * self.shape[1], dtype=config.params_dtype)
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, heads_SBAD: torch.Tensor) -> torch.Tensor:
        inputs_SBAD = heads_SBAD.float()
        squares_SB11 = inputs_SBAD.square().sum((-2, -1), keepdim=True)
        # One sum over the ranks forward, one of its gradients backward.
        squares_SB11 = mappings.copy_to_tensor_model_parallel_region(
            mappings.reduce_from_tensor_model_parallel_region(squares_SB11)
        )
        normed_SBAD = inputs_SBAD * (squares_SB11 / self.weight.numel() + self.eps).rsqrt()
        first = parallel_state.get_tensor_model_parallel_rank() * heads_SBAD.shape[-2]
        weight_AD = self.weight.view(self.shape)[first : first + heads_SBAD.shape[-2]]
        return normed_SBAD.to(heads_SBAD.dtype) * weight_AD


class AllQueriesNorm(AllHeadsNorm):
    """The norm of OLMoE's queries."""

    heads = "num_attention_heads"


class AllKeysNorm(AllHeadsNorm):
    """The norm of OLMoE's keys."""

    heads = "num_query_groups"


LATENT_EPS = 1e-6  # for MLA's latents: transformers uses it whatever rms_norm_eps is


class LatentNorm(RMSNorm):
    """RMSNorm with the epsilon of MLA's latents."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = LATENT_EPS, **_):
        super().__init__(config, hidden_size, LATENT_EPS)


class LatentSelfAttention(MLASelfAttention):
    """MLA whose norms and projections are those of the layer spec.

    Since 0.19 Megatron chooses them itself (multi_latent_attention.py:631): it norms the query of
    a model without a query latent, which transformers does not, and only Transformer Engine can.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            projection = getattr(self, name, None)
            # Transformer Engine's projection includes the latent's norm, which Megatron gives all
            # norms' epsilon (extensions/transformer_engine.py: eps=self.config.layernorm_epsilon).
            if hasattr(projection, "layer_norm_weight"):
                projection.eps = LATENT_EPS

    def _resolve_qk_norm_config(self, submodules):
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        names += ("q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def uses_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: it is installed, on a machine with CUDA."""
    return gpt_layer_specs.HAVE_TE and has_cuda()


def takes_grouped_experts(config: TransformerConfig) -> bool:
    """Whether torch's grouped product takes the experts: rows of a multiple of 16 bytes."""
    inner = (config.moe_ffn_hidden_size or 0) // config.expert_tensor_parallel_size
    width = config.params_dtype.itemsize
    return all(size * width % 16 == 0 for size in (config.hidden_size, inner))


def _fuses_gradient_accumulation() -> bool:
    """Whether Apex's kernel adds weight gradients to the buffers that are reduced."""
    return layers._grad_accum_fusion_available and has_cuda()


def code_paths() -> dict[str, str]:
    """The implementations used on this machine where Megatron-Core has several.

    The paths through Transformer Engine and Apex were not run: their kernels take a GPU. All that
    could be tried of its layers without one is in benchmarks/micro/te_layers.py. The router
    is Megatron's Python class on all of them; its fused kernel stays off (moe_router_fusion),
    because it returns before anything is recorded or replayed (moe_utils.py:652).
    """
    te = uses_transformer_engine()
    spec = TESpecProvider() if te else LocalSpecProvider()
    experts = releases.experts_of(spec, grouped=True) if te else GroupedExperts
    return {
        "layer spec": "Transformer Engine" if te else "local (torch)",
        "norm": "Transformer Engine" if te else "torch.nn.RMSNorm",
        "linear layers": spec.column_parallel_linear().__name__,
        "attention": spec.core_attention().__name__ if te else CausalAttention.__name__,
        "experts": experts.__name__,
        "router": f"{TopKRouter.__name__}, unfused",
        "gradient accumulation": "Apex, fused" if _fuses_gradient_accumulation() else "torch",
        "optimizer": optimizer.code_path(),
    }


def transformer_config(
    hf: PretrainedConfig,
    layout: Layout,
    dtype: torch.dtype,
    recompute: str = "none",
    passed: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron's config of a model; experts dropless, no auxiliary loss, router in fp32.

    passed: values of fields that the user gave (`moe_upgrpo.megatron.passthrough`).
    """
    experts, of_family = moe_layers(hf), family(hf)
    moe = {}
    if experts:
        moe = dict(
            moe_layer_freq=[int(layer in experts) for layer in range(hf.num_hidden_layers)],
            moe_ffn_hidden_size=getattr(hf, of_family.expert_size),
            num_moe_experts=num_experts(hf),
            moe_router_topk=top_k(hf),
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_token_dispatcher_type=layout.dispatcher,
            moe_grouped_gemm=uses_transformer_engine(),
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
        )
    settings = of_family.settings(hf)
    latent = settings.get("multi_latent_attention")
    own = dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        ffn_hidden_size=hf.intermediate_size,
        **moe,
        **settings,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        **RECOMPUTE[recompute],
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Interleaved, two stages exchange activations and gradients with the same peer at a time,
        # and a batch of sends and receives does not tell them apart (p2p_communication.py:25): with
        # two stages they are swapped without an error.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # A stage frees outputs that it has sent. Not where messages overlap: Megatron frees them
        # while they are on their way (schedules.py:1522, 1600), and whether the backend still holds
        # their memory depends on it.
        deallocate_pipeline_outputs=layout.pp > 1 and layout.vpp == 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Not skipped although every weight is loaded: initialisation also marks the weights that
        # tensor parallelism splits (layers.py:883), and gradient norms are wrong without the mark.
        perform_initialization=True,
        bias_activation_fusion=uses_transformer_engine(),
        # Megatron's own fused rotation of MLA is for YaRN alone.
        apply_rope_fusion=uses_transformer_engine() and not latent,
        bias_dropout_fusion=False,  # dropout is 0
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        gradient_accumulation_fusion=_fuses_gradient_accumulation(),
    )
    return (MLATransformerConfig if latent else TransformerConfig)(**(own | dict(passed or {})))


def block_spec(
    config: TransformerConfig, vp_stage: int | None, *, norms_all_heads: bool = False
) -> TransformerBlockSubmodules:
    """Megatron-Core's own layers; without Transformer Engine, with the norm of this module.

    norms_all_heads: as a `Family` says.
    """
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=uses_transformer_engine(),
        normalization="RMSNorm",
        vp_stage=vp_stage,
    )
    if config.multi_latent_attention:
        for spec in block.layer_specs:
            spec.submodules.self_attention.module = LatentSelfAttention
    if not uses_transformer_engine():
        _use_torch(config, block)
    if norms_all_heads:
        for spec in block.layer_specs:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm, attention.k_layernorm = AllQueriesNorm, AllKeysNorm
    return block


def _use_torch(config: TransformerConfig, block: TransformerBlockSubmodules) -> None:
    """Put torch's norm, attention and grouped products in the place of Megatron-Core's own."""
    block.layer_norm = RMSNorm
    for spec in block.layer_specs:
        layer, attention = spec.submodules, spec.submodules.self_attention.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        attention.core_attention = CausalAttention
        if config.multi_latent_attention:
            attention.q_layernorm = attention.kv_layernorm = LatentNorm
            # Whole on every tensor-parallel rank, as in the spec with Transformer Engine. The local
            # spec splits them by columns and gathers their output with a backward that takes only
            # the rank's own gradient (multi_latent_attention.py:607): the rotary key's gradient, a
            # sum over the heads of all ranks, is then wrong without an error.
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if takes_grouped_experts(config):
            releases.replace_experts(layer.mlp, GroupedExperts)


def build_model(
    hf: PretrainedConfig,
    layout: Layout,
    dtype: torch.dtype,
    recompute: str = "none",
    passed: Mapping[str, Any] | None = None,
) -> list[ScoringModel]:
    """This rank's part of the model, one chunk for each virtual pipeline stage.

    The weights are not yet set (see `moe_upgrpo.megatron.weights`).
    """
    layout.check_model(hf)
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute={recompute!r}: use one of {', '.join(RECOMPUTE)}.")
    config = transformer_config(hf, layout, dtype, recompute, passed)
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunks.append(
            ScoringModel(
                config,
                block_spec(config, vp_stage, norms_all_heads=family(hf).norms_all_heads),
                vocab_size=hf.vocab_size,
                max_sequence_length=hf.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                parallel_output=True,
                share_embeddings_and_output_weights=hf.tie_word_embeddings,
                position_embedding_type="rope",
                rotary_base=hf.rope_parameters["rope_theta"],
                vp_stage=vp_stage,
            ).to(device())
        )
    return chunks
