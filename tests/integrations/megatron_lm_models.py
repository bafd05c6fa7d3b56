"""Models of Megatron-LM's own Megatron-Core for a CPU, split as the arguments say.

The same weights whatever the split. What is not Megatron-LM's: attention over packed sequences and
over those that context parallelism splits, which its local attention refuses (Transformer Engine
has it), and the partition of the positions, which it takes from Transformer Engine.
"""

import copy
import itertools
import re
import zlib
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.rl import rl_utils
from torch.distributed.nn.functional import all_gather

VOCAB, WIDTH, EXPERTS, TOP_K, LAYERS = 64, 16, 8, 2, 3


def partitioned_indices(ends, seq_len: int, size: int, rank: int) -> torch.Tensor:
    """Positions of a context-parallel rank, as Transformer Engine's thd_get_partitioned_indices.

    Of each sequence two chunks of 2 * size: the one at the rank and its mirror image.
    """
    mine = []
    for start, end in itertools.pairwise(ends.tolist()):
        chunk = (end - start) // (2 * size)
        for which in (rank, 2 * size - 1 - rank):
            mine.append(torch.arange(start + which * chunk, start + (which + 1) * chunk))
    indices = torch.cat(mine)
    assert len(indices) == seq_len // size
    return indices


rl_utils.tex = SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
rl_utils.HAVE_TEX = True


class Attention(DotProductAttention):
    """Causal attention, sequence by sequence; under context parallelism on gathered tensors."""

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        group = getattr(packed_seq_params, "cp_group", None)
        if group is None:
            return self._whole(query, key, value, packed_seq_params)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        ends, length = packed_seq_params.cu_seqlens_q_padded, size * query.shape[0]
        order = torch.cat([partitioned_indices(ends, length, size, r) for r in range(size)])
        back = torch.argsort(order)
        whole = [
            torch.cat(all_gather(x.contiguous(), group=group)).index_select(0, back)
            for x in (query, key, value)
        ]
        out = self._whole(*whole, packed_seq_params)
        return out.index_select(0, partitioned_indices(ends, length, size, rank))

    def _whole(self, query, key, value, packed_seq_params):
        def attend(start, end):
            parts = [x[start:end] for x in (query, key, value)]
            if parts[0].dim() == 3:
                parts = [x[:, None] for x in parts]
            return super(Attention, self).forward(*parts, None, attn_mask_type=AttnMaskType.causal)

        ends = [0, query.shape[0]]
        if packed_seq_params is not None:
            padded = packed_seq_params.cu_seqlens_q_padded
            ends = (packed_seq_params.cu_seqlens_q if padded is None else padded).tolist()
        out = torch.cat([attend(a, b) for a, b in itertools.pairwise(ends) if b > a])
        return out.squeeze(1) if query.dim() == 3 else out


class Norm(torch.nn.RMSNorm):
    """Megatron-LM's own without Transformer Engine refuses sequence parallelism."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Model(GPTModel):
    """In single precision, where Megatron-LM has no Float16Module that takes the argument away."""

    def forward(self, *args, fp32_output=None, **kwargs):
        return super().forward(*args, **kwargs)


def model_of(args, groups: ProcessGroupCollection | None = None, **changes) -> Model:
    """A dense layer and two MoE layers, split by the arguments, or by other groups and `changes`
    of the config."""
    groups = groups or ProcessGroupCollection.use_mpu_process_groups()
    stage, stages = dist.get_rank(groups.pp), dist.get_world_size(groups.pp)
    split = dict(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        sequence_parallel=args.sequence_parallel,
        num_layers_in_first_pipeline_stage=(
            args.decoder_first_pipeline_num_layers if stages > 1 else None
        ),
    )
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=64,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_layer_freq=[0, 1, 1],
        moe_ffn_hidden_size=32,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        moe_token_dispatcher_type="alltoall",
        moe_enable_routing_replay=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=args.calculate_per_token_loss,
        **split | changes,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, pp_rank=stage)
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        layer.submodules.self_attention.submodules.core_attention = Attention
    torch.manual_seed(0)
    model = Model(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=WIDTH,
        position_embedding_type="learned_absolute",
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        pg_collection=groups,
    )
    if config.tensor_model_parallel_size == 1:
        with torch.no_grad():
            for name, parameter in whole_names(model).items():
                if parameter.dim() > 1:
                    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    parameter.normal_(std=0.1, generator=generator)
    return model


def whole_names(model: Model) -> dict[str, torch.nn.Parameter]:
    """Parameters by the names that they have in a model of one stage."""
    first = model.decoder.layers[0].layer_number - 1 if model.decoder.layers else 0
    return {
        re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + first}.", name): parameter
        for name, parameter in model.named_parameters()
    }


def summed_gradients(model: Model) -> None:
    """Sum over the data-parallel replicas, and once over the parts of a sequence."""
    size = parallel_state.get_context_parallel_world_size()
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        parts = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
        if getattr(parameter, "sequence_parallel", False):
            parts.append(parallel_state.get_tensor_model_parallel_group())
        for group in parts:
            dist.all_reduce(parameter.grad, group=group)
        # Each of them has the loss of the whole sequence.
        parameter.grad /= size


class Bigrams(torch.nn.Module):
    """For the losses' jobs: Megatron-LM's attention takes one sequence at a time where they are not
    packed (its forward always says thd), so no model of it makes a micro-batch of two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(VOCAB, VOCAB))
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.model_type = ModelType.encoder_or_decoder

    def forward(self, tokens, *args, **kwargs):
        return self.logits[tokens]

    def set_input_tensor(self, tensor):
        pass
