"""Checkpoints in and out of models with Transformer Engine's weights, by the names of its modules.

Stand-ins made of te_layers.json: what transformer_engine 2.20.2 built, and computes nothing.
`python -m benchmarks.micro.te_layers` repeats it with the modules themselves, where they are
installed.
"""

import functools
import json
import sys
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.micro import te_layers as command
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import model, weights
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from tests.megatron import te_layers
from tests.megatron.te_layers import LAYOUTS, MODELS, TABLE, Row, differences, rows, stand_in
from tests.ranks import run_ranks

CASES = {f"{name}, {layout}": (name, layout) for name in MODELS for layout in MODELS[name]}
STAGES = Layout(tp=2, ep=2, pp=2)
DTYPES = (torch.float32, torch.bfloat16)


def built(folder, layout: Layout, dtype: torch.dtype, table: list[Row]):
    hf = read_model_config(folder)
    return hf, [stand_in(chunk, table) for chunk in model.build_model(hf, layout, dtype)]


def of_rank(folder, layout: Layout, table: list[Row]) -> dict:
    """A rank's exports of a checkpoint that it loaded, by dtype, and the marks that are set."""
    with process_groups(layout):
        exported = {}
        for dtype in DTYPES:
            hf, chunks = built(folder, layout, dtype, table)
            weights.load_weights(chunks, hf, folder)
            found = weights.export_weights(chunks, hf)
            exported[dtype] = {name: tensor.clone() for name, tensor in found}
        if layout.pp > 1:
            return {"exported": exported}
        same = {row.name: row for row in rows(chunks[0])} == {row.name: row for row in table}
        for name, parameter in chunks[0].named_parameters():
            if ".mlp.experts." in name:  # as modules of Megatron-Core 0.16 to 0.18 leave them
                parameter.tensor_model_parallel = False
        ours = model.build_model(hf, layout, dtype)
        differs = differences(chunks[0], ours[0], hf)
        marks = {name: te_layers.marks(p) for name, p in chunks[0].named_parameters()}
    return {"exported": exported, "same": same, "differs": differs, "marks": marks}


@pytest.fixture(scope="module")
def ranks(checkpoints):
    """Case -> what its ranks found."""

    @functools.cache
    def of(case: str) -> list[dict]:
        name, _, layout_name = case.partition(", ")
        layout = LAYOUTS.get(layout_name, STAGES)
        table = te_layers.read()[case.removesuffix("·PP2")]
        return run_ranks(layout.tp * layout.pp, of_rank, checkpoints[name], layout, table)

    return of


@pytest.mark.parametrize("case", [*CASES, "deepseek, TP2·EP2·PP2"])
def test_round_trip_is_exact_to_the_bit(case, checkpoints, ranks):
    """Also over stages, whose layers count from 0 anew."""
    source = load_file(checkpoints[case.partition(", ")[0]] / "model.safetensors")
    for rank in ranks(case):
        for dtype, exported in rank["exported"].items():
            assert exported.keys() == source.keys() and len(source) > 20
            for tensor_name, tensor in source.items():
                is_bias = tensor_name.endswith("e_score_correction_bias")  # fp32 in any model
                expected = tensor if is_bias else tensor.to(dtype)
                assert exported[tensor_name].dtype == expected.dtype
                assert torch.equal(exported[tensor_name], expected), tensor_name


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_marks_are_those_of_the_local_layers(case, ranks):
    """Marks once our table has set them: who holds parts of a weight, who sums its gradient."""
    for rank in ranks(case):
        assert rank["same"] and rank["differs"] == []
        split = {name for name, marks in rank["marks"].items() if marks["tensor_model_parallel"]}
        assert any(".linear_proj.weight" in name for name in split)
        assert not any("norm" in n or "router" in n or "_down_proj" in n for n in split)
        shared = {name for name, marks in rank["marks"].items() if marks["sequence_parallel"]}
        norms = {name for name in rank["marks"] if "layer_norm" in name or "layernorm" in name}
        assert norms <= shared if "TP2" in case else not shared


def compared(folder, table: list[Row]) -> list[str]:
    with process_groups(Layout()):
        hf, (chunk,) = built(folder, Layout(), torch.float32, table)
        return differences(chunk, *model.build_model(hf, Layout(), torch.float32), hf)


def test_a_name_or_a_shape_or_a_mark_that_changes_is_seen(tiny_checkpoint):
    case = "tiny, one rank"
    for change, said in (
        (dict(name="decoder.layers.{layer}.mlp.experts.weight{expert}"), "no counterpart"),
        (dict(shape=(3, 64)), "(3, 64), not"),
        (dict(marks=te_layers.MARKS | {"sequence_parallel": True}), "'sequence_parallel': True"),
    ):
        table = [
            Row(**(vars(row) | change)) if "experts.linear_fc1" in row.name else row
            for row in te_layers.read()[case]
        ]
        found = compared(tiny_checkpoint, table)
        assert len(found) >= 16 and all(said in line for line in found), said


def test_the_table_says_of_which_modules_it_is():
    said = json.loads(TABLE.read_text(encoding="utf-8"))
    assert said["versions"].keys() == {"transformer_engine", "megatron-core", "torch"}
    assert said["code_paths"]["experts"] == "TEGroupedMLP"
    assert said["models"].keys() == CASES.keys()
    names = {row["name"] for table in said["models"].values() for row in table}
    for own in (
        "linear_qkv.layer_norm_weight",
        "linear_fc1.layer_norm_weight",
        "linear_q_up_proj.layer_norm_weight",
        "linear_kv_up_proj.layer_norm_weight",
        "mlp.experts.linear_fc2.weight{expert}",
    ):
        assert any(name.endswith(own) for name in names), own


@pytest.mark.parametrize("rms_norm_eps", [1e-2])
def test_latents_have_their_own_epsilon_inside_a_projection_too(rms_norm_eps):
    """transformers takes 1e-6 for them (modeling_deepseek_v3.py), Megatron-Core the model's."""
    fused = mock.Mock(layer_norm_weight=torch.ones(4), eps=rms_norm_eps)
    plain = torch.nn.Linear(4, 4)

    def init(self, *args, **kwargs):
        torch.nn.Module.__init__(self)
        vars(self).update(linear_q_up_proj=plain, linear_kv_up_proj=fused)

    with mock.patch.object(model.MLASelfAttention, "__init__", init):
        model.LatentSelfAttention()
    assert fused.eps == 1e-6 and not hasattr(plain, "eps")


def test_the_command_says_that_it_was_not_run_where_it_cannot(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(sys, "argv", ["te_layers"])
    with pytest.raises(UserError, match=r"^Not run: transformer_engine.pytorch cannot"):
        command.main()
