"""Files carried from a model folder to the next, with which modes; and that nothing is left."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.export import drop_exports, side_files, try_export, writing
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.megatron.weights import load_weights, write_checkpoint
from moe_upgrpo.rollout.weights_folder import WeightsFolder
from moe_upgrpo.tools.plan import make_plan
from moe_upgrpo.tools.plan_options import PlanConfig
from tests.hugging_face.made import with_stale_files
from tests.tasks.words import save_words

TAKEN = {
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
LEFT = (
    ".cache/huggingface/download/config.json.metadata",
    ".gitattributes",
    "LICENSE",
    "README.md",
    "consolidated.00.pth",
    "figures/benchmark.png",
    "model.gguf",
    "modeling_qwen.py",
    "optimizer.pt",
    "original/tokenizer.model",
    "params.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.bin",
    "training_args.bin",
)


@pytest.fixture(scope="module")
def cluttered(tiny_checkpoint, tmp_path_factory):
    """A model folder as the hub has them."""
    folder = tmp_path_factory.mktemp("cluttered") / "model"
    with_stale_files(tiny_checkpoint, folder)
    words = save_words(folder.parent / "words")
    for path in words.iterdir():
        if path.name != "config.json":
            path.rename(folder / path.name)
    for name in (*TAKEN, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text(f'"{name}"')
    return folder


@pytest.mark.fault(
    "Models that are written",
    "a model folder with sub-folders and old weights",
    "the export has tokenizer, templates and settings, and nothing else of it",
)
def test_the_tokenizer_templates_and_generation_settings_are_taken(cluttered):
    files = side_files(cluttered)
    assert files.keys() == TAKEN
    for name, content in files.items():
        if name != "tokenizer_config.json":
            assert content == (cluttered / name).read_bytes()


@pytest.mark.fault(
    "Models that are written",
    "a server of another user",
    "the exported files have the modes of the umask",
)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_a_written_checkpoint_holds_these_and_has_the_modes_of_the_umask(
    umask, cluttered, tmp_path
):
    """Written twice, in the place of what stood there and of what a killed job left."""
    target = tmp_path / "checkpoints" / "step-000003"
    (target / "old").mkdir(parents=True)
    (target.parent / ".step-000002.part" / "more").mkdir(parents=True)
    (target.parent / ".step-000003.part").mkdir()
    (target.parent / ".mine").mkdir()
    before = os.umask(umask)
    try:
        with process_groups(Layout()):
            hf = read_model_config(cluttered)
            chunks = build_model(hf, Layout(), torch.float32)
            load_weights(chunks, hf, cluttered)
            write_checkpoint(chunks, hf, side_files(cluttered), target)
    finally:
        os.umask(before)
    assert sorted(os.listdir(target.parent)) == [".mine", "step-000003"]
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert found == TAKEN | {"config.json", "model.safetensors"}
    assert len(load_file(target / "model.safetensors")) > 40
    for path in (target, *target.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.fault(
    "Models that are written",
    "writing the export fails",
    "nothing is left of it",
)
def test_nothing_is_left_where_writing_fails(tmp_path):
    with pytest.raises(OSError, match="full"), writing(tmp_path / "step-000001") as part:
        (part / "model.safetensors").touch()
        raise OSError("full")
    assert os.listdir(tmp_path) == []


def test_weights_for_a_server_have_the_modes_of_the_umask_where_a_folder_is_named(tmp_path):
    before = os.umask(0o022)
    try:
        given, own = WeightsFolder("w-", tmp_path), WeightsFolder("moe_upgrpo-test-")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(given.name).st_mode) == 0o755
    assert stat.S_IMODE(os.stat(own.name).st_mode) == 0o700


@pytest.mark.fault(
    "Models that are written",
    "a file of the model folder that cannot be copied",
    "said by plan and at the start, not after the last step",
)
def test_what_cannot_be_copied_is_said_by_plan_and_at_the_start(cluttered, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((cluttered / "config.json").read_bytes())
    make_plan(PlanConfig.of(model=folder, gpus_per_node=2))
    (folder / "tokenizer.json").symlink_to(folder / "gone")
    for read in (side_files, lambda path: make_plan(PlanConfig.of(model=path, gpus_per_node=2))):
        with pytest.raises(UserError, match=r"tokenizer\.json cannot be read \(No such file"):
            read(folder)


@pytest.mark.fault(
    "Models that are written",
    "an export that would fail",
    "tried at the start, and leaves no staging folder",
)
def test_an_export_that_would_fail_is_said_and_leaves_nothing(cluttered, tmp_path):
    hf = read_model_config(cluttered)
    try_export(hf, side_files(cluttered), tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="could not be written"):
        try_export(hf, {}, tmp_path / "absent")


def test_exports_of_later_steps_go(tmp_path):
    names = ("step-000020", "step-000040", "step-1000000", "step-40", "step-000040-mine", ".x")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    dropped = drop_exports(tmp_path, 20)
    assert [path.name for path in dropped] == ["step-000040", "step-1000000"]
    assert sorted(os.listdir(tmp_path)) == sorted(set(names) - {p.name for p in dropped})
    assert drop_exports(tmp_path / "absent", 0) == []
