"""Which of Megatron-Core's own options are taken, with which values, and what is said of others.

That those which promise the same step give it: test_passed_steps.py.
"""

from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import read_config
from moe_upgrpo.megatron import groups, passed_fields, passthrough
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings

ALL = [
    one.name
    for cls in (MLATransformerConfig, TransformerConfig, OptimizerConfig)
    for one in fields(cls)
] + [one.name for one in fields(DistributedDataParallelConfig)]
TABLES = (passed_fields.OURS, passed_fields.REFUSED, passed_fields.PASSED)


def test_somebody_has_decided_on_every_field_of_the_installed_release_once():
    assert len(set(ALL)) > 300
    for name in set(ALL):
        exact = [table for table in TABLES if name in table]
        matching = [p for table in TABLES for p in table if fnmatchcase(name, p)]
        assert len(exact) == 1 or len(matching) == 1, (name, matching)


def test_what_a_pattern_names_and_what_needs_something_exists_or_has_existed():
    assert {p for p in passed_fields.NEEDS if "*" not in p} <= passed_fields.PASSED.keys()
    assert all(said.strip() for table in TABLES for said in table.values())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("overlap_grad_reduc", "true", r"0\.1\d.* has no such option; the nearest is overlap_grad"),
        ("zzzzzzzz", "1", r"no such option\. docs/scale.md lists"),
        ("tensor_model_parallel_size", "2", "set by --tp"),
        ("lr", "1", "set by --optimizer.lr"),
        ("recompute_granularity", "full", "set by --recompute"),
        ("muon_momentum", "0.9", "--optimizer.algorithm, which is adam or sgd"),
        ("hidden_size", "64", "the checkpoint's config.json"),
        ("q_lora_rank", "64", "the checkpoint's config.json"),
        ("moe_expert_capacity_factor", "1.0", "dropless"),
        ("moe_aux_loss_coeff", "0.1", "auxiliary loss"),
        ("moe_z_loss_coeff", "0.1", "auxiliary loss"),
        ("moe_input_jitter_eps", "0.1", "no replay repeats"),
        ("moe_router_force_load_balancing", "true", "than the router that is recorded"),
        ("moe_router_fusion", "true", "before anything is recorded"),
        ("attention_dropout", "0.1", "dropout"),
        ("mtp_num_layers", "1", "multi-token prediction"),
        ("cuda_graph_impl", "local", "CUDA graph"),
        ("calculate_per_token_loss", "true", "denominators"),
        ("average_in_collective", "true", "sum over ranks"),
        ("use_megatron_fsdp", "true", "FSDP"),
        ("context_parallel_size", "2", "set by --cp"),
        ("cp_comm_type", "a2a", "gathers keys and values"),
        ("fp16", "true", "--dtype is float32 or bfloat16"),
        ("activation_func", "gelu", "Python object"),
        ("overlap_p2p_comm", "false", "swap them"),
        ("bucket_size", "many", "'many' is not a whole number or null"),
        ("bucket_size", "1.5", "'1.5' is not a whole number"),
        ("bucket_size", "true", "'true' is not a whole number"),
        ("bucket_size", "0", "at least 1"),
        ("overlap_grad_reduce", "1", "'1' is not true or false"),
        ("optimizer_offload_fraction", "1.5", "between 0 and 1"),
        ("optimizer_offload_fraction", "nan", "at least 0"),
        ("exp_avg_dtype", "int8", "one of float32, fp32, bfloat16"),
        ("offload_modules", "attn", r"a list, \[A, B\]"),
        ("attention_backend", "quick", "one of flash, fused"),
        ("fp8", "e5m2", "one of e4m3, hybrid or null"),
        ("moe_token_dispatcher_type", "alltoall", "set by --dispatcher; flex"),
        ("overlap_param_gather", "true", "goes with --megatron.overlap_grad_reduce true"),
        ("optimizer_offload_fraction", "0.5", "nothing without --megatron.optimizer_cpu_offload"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, value, words):
    with pytest.raises(UserError, match=rf"^--megatron\.{name}: .*{words}"):
        passthrough.read({name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("moe_token_dispatcher_type", "flex", "a GPU"),
        ("moe_flex_dispatcher_backend", "deepep", "a GPU"),
        ("moe_permute_fusion", "true", "Transformer Engine, and a GPU"),
        ("use_precision_aware_optimizer", "true", "Transformer Engine, and a GPU"),
        ("fp8", "hybrid", "Transformer Engine, and a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one_and_taken_by_plan(name, value, needed):
    with pytest.raises(UserError, match=rf"{name}: {value} needs {needed}, which this machine has"):
        passthrough.read({name: value})
    assert passthrough.read({name: value}, here=False) != passthrough.Passed()
    if value == "true":  # turned off it needs nothing
        assert passthrough.read({name: "false"}) != passthrough.Passed()


def test_values_have_the_types_of_their_fields_and_go_to_every_config_that_has_the_name():
    passed = passthrough.read(
        {
            "overlap_grad_reduce": "true",
            "overlap_param_gather": "true",
            "bucket_size": "100",
            "exp_avg_dtype": "torch.bfloat16",
            "exp_avg_sq_dtype": "fp8",
            "fp8_recipe": "blockwise",
            "fp8": "null",
            "offload_modules": "[attn_norm, core_attn]",
            "attention_backend": "flash",
            "activation_offload_fraction" if "activation_offload_fraction" in ALL else
            "cpu_offloading_num_layers": "1",
        },
        here=False,
    )  # fmt: skip
    assert passed.ddp == {
        "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 100
    }  # fmt: skip
    assert passed.optimizer == {
        "overlap_param_gather": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.uint8,
        "fp8_recipe": "blockwise",
    }
    transformer = passed.transformer
    assert (transformer["fp8_recipe"], transformer["fp8"]) == ("blockwise", None)
    assert transformer["offload_modules"] == ["attn_norm", "core_attn"]
    assert transformer["attention_backend"].name == "flash"
    assert passthrough.read({}) == passthrough.Passed()


def test_offload_brings_what_it_does_not_work_without():
    passed = passthrough.read({"optimizer_cpu_offload": "true"})
    assert passed.optimizer == {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
    }
    with pytest.raises(UserError, match=r"use_precision_aware_optimizer: .*decides on it"):
        passthrough.read(
            {"optimizer_cpu_offload": "true", "use_precision_aware_optimizer": "true"},
            here=False,
        )


@pytest.mark.parametrize("given", [
    {"optimizer_cpu_offload": "true"},
    {"overlap_grad_reduce": "true", "overlap_param_gather": "true"},
])  # fmt: skip
def test_what_is_for_adam_is_refused_with_sgd(given, tiny_checkpoint):
    settings = OptimizerSettings(algorithm="sgd")
    with groups.process_groups(Layout()), pytest.raises(UserError, match="algorithm adam"):
        MegatronActor(tiny_checkpoint, Layout(), optimizer=settings, megatron=given)


def test_what_megatrons_own_configs_refuse_names_the_options(tiny_checkpoint: Path):
    with pytest.raises(UserError, match=r"refuses --megatron.moe_enable_deepep true, beside.*flex"):
        passthrough.check(
            {"moe_enable_deepep": "true"},
            read_config(tiny_checkpoint),
            Layout(),
            dtype="bfloat16",
            recompute="none",
            optimizer=OptimizerSettings(),
            here=False,
        )


def test_of_a_resumed_run_memory_and_communication_may_change_and_numbers_may_not():
    for name in ("optimizer_cpu_offload", "overlap_grad_reduce", "bucket_size", "moe_hybridep_x"):
        assert passed_fields.may_change(name)
    for name in ("fp8", "exp_avg_dtype", "moe_permute_fusion", "hidden_size", "zzz"):
        assert not passed_fields.may_change(name)
