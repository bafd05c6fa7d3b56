"""Hugging Face weights through every layout and back, to the bit; and what does not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.export import side_files
from moe_upgrpo.megatron import weights
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.megatron.weights import export_weights, load_weights, write_checkpoint
from tests.megatron.live import Live
from tests.ranks import run_ranks

LAYOUTS = {
    "one rank": ("tiny", 1, Layout()),
    "TP2": ("tiny", 2, Layout(tp=2)),
    "EP2": ("tiny", 2, Layout(ep=2)),
    "TP2·EP2": ("tiny", 2, Layout(tp=2, ep=2)),
    "DP2": ("tiny", 2, Layout()),
    "TP2·EP2·DP2": ("tiny", 4, Layout(tp=2, ep=2)),
    "EP4": ("tiny", 4, Layout(ep=4)),
    "PP2·VPP2": ("mixed", 2, Layout(pp=2, vpp=2)),
    "TP2·EP2·PP2": ("mixed", 4, Layout(tp=2, ep=2, pp=2)),
    "mixtral TP2·EP2": ("mixtral", 2, Layout(tp=2, ep=2)),
    "qwen2 TP2·EP2": ("qwen2", 2, Layout(tp=2, ep=2)),
    "olmoe TP2·EP2": ("olmoe", 2, Layout(tp=2, ep=2)),
    "deepseek TP2·EP2·PP2": ("deepseek", 4, Layout(tp=2, ep=2, pp=2)),
    "moonlight TP2·EP2": ("moonlight", 2, Layout(tp=2, ep=2)),
    "dense PP2": ("dense", 2, Layout(pp=2)),
}
DTYPES = (torch.float32, torch.bfloat16)


def round_trip(layout: Layout, source, target):
    """In each dtype: written as a checkpoint below `target`; what this rank exported."""
    exported = {}
    with process_groups(layout):
        hf = read_model_config(source)
        for dtype in DTYPES:
            chunks = build_model(hf, layout, dtype)
            load_weights(chunks, hf, source)
            write_checkpoint(chunks, hf, side_files(source), target / str(dtype))
            exported[dtype] = [(name, t.clone()) for name, t in export_weights(chunks, hf)]
    return exported


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_is_exact_to_the_bit(name, checkpoints, tmp_path):
    checkpoint, world_size, layout = LAYOUTS[name]
    per_rank = run_ranks(world_size, round_trip, layout, checkpoints[checkpoint], tmp_path)
    source = load_file(checkpoints[checkpoint] / "model.safetensors")
    assert len(source) > 40
    for dtype in DTYPES:
        written = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert source.keys() == written.keys()
        order = [tensor_name for tensor_name, _ in per_rank[0][dtype]]
        assert len(order) == len(source)
        for exported in per_rank:
            assert [tensor_name for tensor_name, _ in exported[dtype]] == order
        for tensor_name, tensor in source.items():
            is_bias = tensor_name.endswith("e_score_correction_bias")  # fp32 in any model
            expected = tensor if is_bias else tensor.to(dtype)
            for found in (written, *(dict(exported[dtype]) for exported in per_rank)):
                assert found[tensor_name].dtype == expected.dtype
                assert torch.equal(found[tensor_name], expected), tensor_name


def test_an_export_goes_layer_by_layer_and_holds_a_fifth_of_the_weights(tmp_path, monkeypatch):
    """Sixteen layers; a file of a checkpoint when a sixteenth of it has come together."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
    layout = Layout()
    with process_groups(layout):
        hf = read_model_config(source)
        chunks = build_model(hf, layout, torch.float32)
        load_weights(chunks, hf, source)
        known = {p.untyped_storage()._cdata for chunk in chunks for p in chunk.parameters()}
        size = sum(p.nbytes for chunk in chunks for p in chunk.parameters())
        names = []
        with Live(set(known)) as exporting:
            for name, tensor in export_weights(chunks, hf):
                names.append(name)
                del tensor
        monkeypatch.setattr(weights, "PART_BYTES", size // 16)
        with Live(set(known)) as writing:
            write_checkpoint(chunks, hf, {}, tmp_path / "written")
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers) and set(layers) == set(range(16))
    # Stacked experts, and gate and up of one of them, are views of a sixteenth.
    assert exporting.peak / size < 0.15 and writing.peak / size < 0.2
    assert len(list((tmp_path / "written").glob("model-*-of-*.safetensors"))) > 12
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "written").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.bits
@pytest.mark.parametrize("checkpoint", ["tiny", "mixtral", "moonlight"])
def test_what_is_written_loads_in_transformers(checkpoint, checkpoints, tmp_path):
    run_ranks(2, round_trip, Layout(tp=2, ep=2), checkpoints[checkpoint], tmp_path)
    tokens = torch.arange(20).reshape(2, 10)
    logits = [
        AutoModelForCausalLM.from_pretrained(path)(tokens).logits
        for path in (checkpoints[checkpoint], tmp_path / str(torch.float32))
    ]
    assert torch.equal(*logits)


def load_changed(source, folder, change):
    state = load_file(source / "model.safetensors")
    change(state)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    layout = Layout()
    with process_groups(layout):
        hf = read_model_config(folder)
        load_weights(build_model(hf, layout, torch.float32), hf, folder)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def drop(state):
    del state[Q_PROJ]


def add(state):
    state["model.layers.1.extra"] = torch.zeros(1)


def narrow(state):
    state[Q_PROJ] = state[Q_PROJ][:64].clone()


def narrow_gate(state):
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    state[name] = state[name][:, :32].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["1 tensor(s) are missing", Q_PROJ]),
        (add, ["are not of this model", "model.layers.1.extra"]),
        (narrow, [Q_PROJ, "(64, 64)", "does not fit"]),
        (narrow_gate, ["experts.3.gate_proj.weight", "(32, 32)", "does not fit"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change, words, tiny_checkpoint, tmp_path
):
    with pytest.raises(UserError) as error:
        load_changed(tiny_checkpoint, tmp_path / "changed", change)
    for word in words:
        assert word in str(error.value)


def test_a_truncated_file_is_refused_by_name(tiny_checkpoint, tmp_path):
    layout = Layout()
    (tmp_path / "model.safetensors").write_bytes(
        (tiny_checkpoint / "model.safetensors").read_bytes()[:5000]
    )
    with process_groups(layout):
        hf = read_model_config(tiny_checkpoint)
        model = build_model(hf, layout, torch.float32)
        with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
            load_weights(model, hf, tmp_path)
