"""Sizes that have to divide others, and the messages where it does not."""

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.families import moe_layers
from moe_upgrpo.megatron.layout import Layout


def test_defaults_by_number_of_ranks():
    assert [str(Layout.for_world(n)) for n in (1, 2, 3, 4)] == [
        "TP1·EP1",
        "TP2·EP2",
        "TP1·EP1",
        "TP2·EP2",
    ]
    assert Layout.for_world(4, tp=4, ep=1) == Layout(tp=4)
    assert str(Layout.for_world(4, pp=2, vpp=2)) == "TP2·EP2·PP2·VPP2"
    assert str(Layout.for_world(2, pp=2)) == "TP1·EP1·PP2"
    assert str(Layout.for_world(6, pp=2)) == "TP1·EP1·PP2"
    assert str(Layout.for_world(2, cp=2)) == "TP1·CP2·EP1"
    assert str(Layout.for_world(8, cp=2, ep=8)) == "TP2·CP2·EP8"


def test_copies_of_the_model():
    assert Layout(tp=2, ep=2).data_parallel(4) == 2
    assert Layout(tp=2, pp=2, ep=2).data_parallel(4) == 1
    assert Layout(pp=2, vpp=2).data_parallel(8) == 4
    assert Layout(tp=2, cp=2, ep=8).data_parallel(8) == 2


def test_layers_with_experts():
    """The second of every two, and not the fourth; a dense model has none."""
    sizes = dict(num_hidden_layers=6, num_experts=8)
    assert moe_layers(Qwen3MoeConfig(**sizes)) == [0, 1, 2, 3, 4, 5]
    assert moe_layers(Qwen3MoeConfig(**sizes, decoder_sparse_step=2, mlp_only_layers=[3])) == [1, 5]
    assert moe_layers(Qwen3Config(num_hidden_layers=6)) == []


@pytest.mark.parametrize(
    ("layout", "expert_tp"),
    [(Layout(tp=2), 2), (Layout(tp=2, ep=2), 1), (Layout(tp=2, etp=2), 2), (Layout(), 1)],
)
def test_expert_tensor_parallelism(layout, expert_tp):
    assert layout.expert_tp == expert_tp


@pytest.mark.parametrize(
    ("sizes", "world_size", "words"),
    [
        ({"tp": 3}, 2, "tp=3 does not divide the 2 rank"),
        ({"ep": 4}, 2, r"ep\*etp=4 does not divide the 2 rank"),
        ({"tp": 2, "ep": 2, "etp": 2}, 4, "ep=2 with etp=2: both above 1 is not supported"),
        ({"tp": 0}, 2, "tp=0: a parallel size is at least 1"),
        ({"pp": 0}, 2, "pp=0: a parallel size is at least 1"),
        ({"tp": 2, "pp": 2}, 2, r"tp\*pp=4 does not divide the 2 rank"),
        ({"ep": 2, "pp": 2}, 6, r"ep\*etp\*pp=4 does not divide the 6 rank"),
        ({"pp": 3}, 4, r"tp\*pp=3 does not divide the 4 rank"),
        ({"cp": 2}, 3, r"tp\*cp=2 does not divide the 3 rank"),
        ({"cp": 0}, 3, "cp=0: a parallel size is at least 1"),
        ({"tp": 2, "cp": 2, "pp": 2}, 4, r"tp\*cp\*pp=8 does not divide the 4 rank"),
        ({"vpp": 2}, 2, "vpp=2 with pp=1"),
        ({"dispatcher": "flex"}, 2, "dispatcher='flex': use one of alltoall, allgather"),
    ],
)
def test_ranks_that_do_not_divide(sizes, world_size, words):
    with pytest.raises(UserError, match=words):
        Layout(**sizes).check_world(world_size)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=3), "tp=3 does not divide the model's num_attention_heads=4"),
        (Layout(tp=4), "tp=4 does not divide the model's num_key_value_heads=2"),
        (Layout(ep=3), "ep=3 does not divide the model's num_experts=8"),
        (Layout(tp=3, etp=3), "tp=3 does not divide the model's num_attention_heads=4"),
        (Layout(pp=3), r"pp\*vpp=3 does not divide the model's num_hidden_layers=4"),
        (Layout(pp=4, vpp=2), r"pp\*vpp=8 does not divide the model's num_hidden_layers=4"),
    ],
)
def test_models_that_do_not_divide(layout, words):
    model = Qwen3MoeConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        num_experts=8,
        moe_intermediate_size=64,
    )
    Layout(tp=2, ep=2).check_model(model)
    with pytest.raises(UserError, match=words):
        layout.check_model(model)


def test_dense_models():
    """Expert sizes are not looked at; expert parallelism is refused."""
    sizes = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
    Layout(tp=2, pp=2).check_model(Qwen3Config(**sizes, intermediate_size=64))
    with pytest.raises(UserError, match="tp=2 does not divide the model's intermediate_size=63"):
        Layout(tp=2).check_model(Qwen3Config(**sizes, intermediate_size=63))
    with pytest.raises(UserError, match="ep=2 for a model of type 'qwen3' without experts"):
        Layout(ep=2).check_model(Qwen3Config(**sizes))
