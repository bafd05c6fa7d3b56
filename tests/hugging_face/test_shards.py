"""Weights written in parts, against transformers' and safetensors' own readers."""

import json

import torch
from safetensors.torch import load_file

from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.hugging_face.shards import ShardWriter
from tests.megatron.live import Live


def written(folder, tensors, part_bytes):
    writer = ShardWriter(folder, part_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    return sorted(path.name for path in folder.iterdir())


def test_parts_by_hand(tmp_path):
    """40, 40, 20 and 200 bytes, at most 100 in a file: a larger tensor has one of its own."""
    tensors = {
        name: torch.arange(n, dtype=torch.float32) + n
        for name, n in {"a": 10, "b": 10, "c": 5, "d": 50, "e": 1}.items()
    }
    assert written(tmp_path, tensors, 100) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 304}
    files = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert files == {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3}
    with Weights(tmp_path) as found:
        assert found.names() == tensors.keys()
        for name, tensor in found.tensors():
            assert torch.equal(tensor, tensors[name])


def test_one_part_has_the_name_of_a_single_file(tmp_path):
    """A column of a larger tensor, which is no longer there when the file is written."""
    whole = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    expected = whole[:, 1].clone()
    writer = ShardWriter(tmp_path, 1000)
    writer.add("column", whole[:, 1])
    whole.zero_()
    writer.finish()
    (file,) = tmp_path.iterdir()
    assert file.name == "model.safetensors"
    assert torch.equal(load_file(file)["column"], expected)


def test_a_part_is_held_and_no_more(tmp_path):
    tensors = ((f"{i}", torch.full((256,), float(i))) for i in range(64))  # 1 KiB each
    with Live(set()) as live:
        writer = ShardWriter(tmp_path, 4 << 10)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish()
    assert 4 << 10 <= live.peak <= 7 << 10  # the part, the next one's first, and the generator's
