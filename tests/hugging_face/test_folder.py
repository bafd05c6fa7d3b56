"""Which tensors a model folder holds, for every reader of it; and folders that cannot be read."""

import glob
import json
import re
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.folder import Weights, check_folder, downloaded
from moe_upgrpo.hugging_face.tokenizer import read_tokenizer
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.megatron.weights import export_weights, load_weights
from moe_upgrpo.rollout import sglang
from moe_upgrpo.rollout.checkpoint import ModelFolder
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.tasks import ArithmeticTask, MathTask
from moe_upgrpo.tools.plan import make_plan
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.tiny import TinyModel
from tests.hugging_face.made import INDEX, sharded, with_stale_files

TENSOR = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def stale(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stale") / "model"
    return folder, with_stale_files(tiny_checkpoint, folder)


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and len(expected) > 40
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.fault(
    "Models that are read",
    "stale shards, or files that it does not name, beside an index",
    "the index says what is read; trainer, engine and plan read the same",
)
def test_the_index_says_which_files_count(stale):
    folder, expected = stale
    with Weights(folder) as weights:
        assert_equal(dict(weights.tensors()), expected)
        assert weights.shapes() == {name: tuple(t.shape) for name, t in expected.items()}
        assert weights.note() == (
            f"{folder}: the weights are those that {INDEX} names; ignored: "
            "consolidated.safetensors, model-00001-of-00004.safetensors, "
            "model-00002-of-00004.safetensors and 2 more"
        )


def test_trainer_engine_and_transformers_hold_the_same(stale, tiny_checkpoint):
    folder, expected = stale
    with process_groups(Layout()):
        hf = read_model_config(folder)
        chunks = build_model(hf, Layout(), torch.float32)
        load_weights(chunks, hf, folder)
        assert_equal(dict(export_weights(chunks, hf)), expected)
    engine = HFEngine(folder, "float32", "cpu").model.state_dict()
    for clean in (folder, tiny_checkpoint):
        assert_equal_state(engine, AutoModelForCausalLM.from_pretrained(clean).state_dict())


def assert_equal_state(found, expected):
    assert found.keys() == expected.keys() and len(expected) > 15
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.fault(
    "Models that are read",
    "other weight files beside `model.safetensors`",
    "they are ignored",
)
def test_without_an_index_the_single_file_counts(tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    expected = sharded(tiny_checkpoint, folder, 1)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    with Weights(folder) as weights:
        assert_equal(dict(weights.tensors()), expected)
        assert "the weights are model.safetensors; ignored: consolidated" in weights.note()
    assert read_model_config(folder).num_experts == 8


def test_of_a_tensor_in_two_files_the_index_names_one(tiny_checkpoint, tmp_path):
    """Engines that read whole files would take any of the two."""
    expected = sharded(tiny_checkpoint, tmp_path / "m")
    placed = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    other = max(set(placed.values()) - {placed[TENSOR]})
    state = load_file(tmp_path / "m" / other) | {TENSOR: expected[TENSOR] + 1}
    save_file(state, tmp_path / "m" / other, metadata={"format": "pt"})
    with Weights(tmp_path / "m") as weights:
        assert_equal(dict(weights.tensors()), expected)
    assert torch.equal(
        HFEngine(tmp_path / "m", "float32", "cpu").model.state_dict()[TENSOR], expected[TENSOR]
    )
    with pytest.raises(UserError, match=rf"{re.escape(TENSOR)} lies in two of its files"):
        ModelFolder.read(tmp_path / "m")


@pytest.mark.fault(
    "Models that are read",
    "an engine that reads every file of a model folder",
    "it is given a folder of links to those that count",
)
def test_engines_that_read_by_themselves_get_links_to_what_counts(stale, tiny_checkpoint):
    """vLLM and SGLang take every *.safetensors where there is no index."""
    clean = ModelFolder.read(tiny_checkpoint)
    assert clean.view == tiny_checkpoint and clean.links is None
    folder, expected = stale
    model = ModelFolder.read(folder)
    assert model.view != folder
    found = {}
    for file in glob.glob(f"{model.view}/*.safetensors"):
        found |= load_file(file)
    assert_equal(found, expected)
    read = AutoModelForCausalLM.from_pretrained(model.view).state_dict()
    assert_equal_state(read, AutoModelForCausalLM.from_pretrained(tiny_checkpoint).state_dict())
    view = model.view
    del model
    assert not view.exists()


def test_a_server_of_sglang_is_started_on_the_links(stale, tiny_checkpoint, monkeypatch):
    started = []

    class Server:
        url = "http://127.0.0.1:1"

        def __init__(self, *args, **kwargs):
            pass

        def start(self, folder, name):
            started.append(folder)

        def stop(self):
            pass

        def log_end(self):
            return ""

    monkeypatch.setattr(sglang, "ServerProcess", Server)
    monkeypatch.setattr(sglang, "find_python", lambda python: None)
    for folder in (tiny_checkpoint, stale[0]):
        engine = sglang.SGLangEngine(folder, "float32")
        assert started[-1] == engine._model.view and engine.moe_layer_ids == (0, 1)
        engine.close()
    assert started[0] == tiny_checkpoint and started[1] != stale[0]


def change_index(folder, **placed):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= placed
    (folder / INDEX).write_text(json.dumps(index))


def drop(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def link_to_nothing(folder):
    drop(folder)
    (folder / "model-00002-of-00003.safetensors").symlink_to(folder / "gone")


def tear(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def leave_pointer(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")


def climb(folder):
    (folder.parent / "other.safetensors").write_bytes(
        (folder / "model-00001-of-00003.safetensors").read_bytes()
    )
    change_index(folder, **{TENSOR: "../other.safetensors"})


def move(folder):
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    change_index(folder, **{TENSOR: max(set(placed.values()) - {placed[TENSOR]})})


FAULTS = {
    "missing shard": (drop, ["1 of the 3", "model-00002-of-00003", "not complete"]),
    "link to nothing": (link_to_nothing, ["model-00002-of-00003", "a link to a file"]),
    "torn shard": (tear, ["model-00002-of-00003.safetensors is truncated"]),
    "pointer": (leave_pointer, ["model-00002-of-00003", "git lfs pull"]),
    "climbs out": (climb, [TENSOR, "'../other.safetensors'", "files of the model folder alone"]),
    "absolute": (
        lambda folder: change_index(folder, **{TENSOR: "/etc/x.safetensors"}),
        ["'/etc/x.safetensors'", "files of the model folder alone"],
    ),
    "no name": (lambda f: change_index(f, **{TENSOR: None}), ["None", "model folder alone"]),
    "NUL": (lambda f: change_index(f, **{TENSOR: "a\0.safetensors"}), ["model folder alone"]),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), [INDEX, "is not JSON"]),
    "deep": (lambda folder: (folder / INDEX).write_text("[" * 10**5), [INDEX, "is not JSON"]),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "has no weight_map"]),
    "another place": (move, [TENSOR, "does not hold"]),
    "no index": (
        lambda folder: (folder / INDEX).unlink(),
        ["model.safetensors.index.json", "there is model-00001-of-00003.safetensors"],
    ),
}


@pytest.mark.fault(
    "Models that are read",
    "a missing or truncated shard, an index that contradicts it or leads elsewhere",
    "one line that names it, of trainer, engine and plan",
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_followed_is_one_line_everywhere(fault, tiny_checkpoint, tmp_path):
    make, words = FAULTS[fault]
    folder = tmp_path / "model"
    sharded(tiny_checkpoint, folder)
    make(folder)
    for read in (read_model_config, HFEngine, ModelFolder.read):
        with pytest.raises(UserError) as error:
            read(folder)
        message = str(error.value)
        assert "\n" not in message and str(folder) in message
        for word in words:
            assert word in message, message


def test_other_formats_alone_are_no_weights(tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no weights .*there is pytorch_model\.bin.*transformers"):
        Weights(tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


READERS = {
    "trainer": read_model_config,
    "engine": HFEngine,
    "engines of others": ModelFolder.read,
    "tokenizer": read_tokenizer,
    "plan": lambda path: make_plan(PlanConfig.of(model=path, gpus_per_node=1)),
    "stand-in": lambda path: TinyModel(like=path).hugging_face(),
    "arithmetic": lambda path: ArithmeticTask().check_model(path),
    "problems": lambda path: MathTask([], model_dir=path),
}


@pytest.mark.fault(
    "Models that are read",
    "a model folder that does not exist",
    "one line that names the path, without a look at the network",
)
@pytest.mark.parametrize("reader", READERS)
def test_a_folder_that_is_not_there_is_said_without_the_network(
    reader, no_network, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    for name in ("absent", "./absent", "a/b/c", "Qwen/Qwen3-0.6B", str(tmp_path / "absent")):
        with pytest.raises(UserError, match=f"{re.escape(name.removeprefix('./'))} does not exist"):
            READERS[reader](name)
    assert time.monotonic() - begin < 20


def test_a_download_of_the_hub_is_found_without_the_network(no_network, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    there = model / "snapshots" / ("0" * 40)
    there.mkdir(parents=True)
    (there / "config.json").write_text("{}")
    assert downloaded("org/tiny") == there
    assert downloaded(there) == there
    with pytest.raises(UserError, match="hf download org/other"):
        downloaded("org/other")
    # Names that the hub itself would refuse, or that no folder can have.
    for name in ("a--b/c", "org/x..y", "org/" + "a" * 120, "a" * 300 + "/b"):
        with pytest.raises(UserError, match=r"does not exist|cannot be read"):
            downloaded(name)


def test_a_name_of_the_hub_is_to_be_downloaded_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen3-0\.6B --local-dir DIR"):
        check_folder("Qwen/Qwen3-0.6B")
    for name in ("absent", "/absent/model", "a/b/c"):
        with pytest.raises(UserError) as error:
            check_folder(name)
        assert "hf download" not in str(error.value)
    (tmp_path / "Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert str(check_folder("Qwen/Qwen3-0.6B")) == "Qwen/Qwen3-0.6B"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        check_folder(tmp_path / "file")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError):
            check_folder(name)
