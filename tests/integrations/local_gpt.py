"""The model of the stacks' tests: their own are of Transformer Engine's layers, which take CUDA."""

from pathlib import Path

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention

from moe_upgrpo.megatron import model, weights


def loaded(
    config, hf, checkpoint: str | Path, attention=DotProductAttention, kind=GPTModel
) -> GPTModel:
    """This rank's pipeline stage of a checkpoint, in Megatron's local layers.

    hf: the checkpoint's config; config: Megatron's, made of it. attention: the stand-in where
    sequences are packed or shared among ranks, which the local one refuses.
    """
    spec = model.block_spec(config, None)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = attention
    gpt = kind(
        config,
        spec,
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    weights.load_weights([gpt], hf, Path(checkpoint))
    return gpt
