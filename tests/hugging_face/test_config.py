"""config.json: heads that are tied, fields that contradict, and what transformers 4 reads.

transformers 4.57 is in a folder of its own (make test makes it); without it this file fails rather
than skips.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import both_styles, eos_ids, read_config
from moe_upgrpo.hugging_face.export import side_files
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.megatron.weights import export_weights, load_weights, write_checkpoint
from moe_upgrpo.rollout.checkpoint import ModelFolder
from moe_upgrpo.rollout.hf import HFEngine
from tests.hugging_face.made import edit_json
from tests.megatron.conftest import LATENT, SIZES, YARN, save_random
from tests.tasks.words import save_words

ROOT = Path(__file__).parents[2]
TRANSFORMERS_4 = ROOT / ".venv-transformers4"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SMALL = SIZES | dict(num_hidden_layers=2)
THETA = dict(rope_type="default", rope_theta=1_000_000.0)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
LATENTS = LATENT | dict(num_hidden_layers=2, q_lora_rank=16, n_routed_experts=16)
GROUPS = dict(n_group=4, topk_group=2)
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL, rope_parameters=THETA, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **EXPERTS, rope_parameters=THETA, norm_topk_prob=True),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, rope_parameters=THETA),
    "deepseek_v3": DeepseekV3Config(**LATENTS, **GROUPS, rope_parameters=YARN),
}
TOKENS = torch.arange(2, 62).reshape(2, 30)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("saved")
    for name, config in CONFIGS.items():
        save_random(AutoModelForCausalLM.from_config(config), folder / name)
        save_words(folder / "words")
        for path in (folder / "words").iterdir():
            if path.name.startswith(("tokenizer", "chat_template")):
                shutil.copy(path, folder / name)
    return folder


@torch.no_grad()
def logits_of(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def tied(source: Path, folder: Path, head=None) -> Path:
    """The checkpoint with tie_word_embeddings, and `head` beside the embedding (None: its copy)."""
    folder.mkdir()
    state = load_file(source / "model.safetensors")
    state[HEAD] = state[EMBEDDING].clone() if head is None else head(state[EMBEDDING])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return edit_json(folder / "config.json", tie_word_embeddings=True)


@pytest.mark.fault(
    "Models that are read",
    "tied embeddings with an equal `lm_head.weight` in the file",
    "trains, in every family",
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_of_the_embedding_as_head_trains_in_every_family(name, saved, tmp_path):
    """transformers ties the two; the trainer's weights go to engines under the same names."""
    folder = tied(saved / name, tmp_path / "tied")
    expected = logits_of(folder)
    with process_groups(Layout()):
        hf = read_model_config(folder)
        chunks = build_model(hf, Layout(), torch.float32)
        load_weights(chunks, hf, folder)
        exported = {n: t.clone() for n, t in export_weights(chunks, hf)}
    state = load_file(folder / "model.safetensors")
    assert exported.keys() == state.keys() - {HEAD} and len(exported) > 20
    assert all(torch.equal(tensor, state[n]) for n, tensor in exported.items())
    assert ModelFolder.read(folder).shapes.keys() == exported.keys()
    engine = HFEngine(folder, "float32", "cpu")
    torch.testing.assert_close(engine.model(TOKENS).logits, expected)
    exported[EMBEDDING] += 0.5  # the head moves with it
    engine.update_weights(exported.items(), version=1)
    updated = tied(saved / name, tmp_path / "updated", lambda embedding: embedding + 0.5)
    both = load_file(updated / "model.safetensors") | {EMBEDDING: exported[EMBEDDING]}
    save_file(both, updated / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(engine.model(TOKENS).logits, logits_of(updated))
    assert not torch.allclose(logits_of(updated), expected, atol=0.1)


@pytest.mark.fault(
    "Models that are read",
    "tied embeddings with a head that differs",
    "refused by trainer and engines, by the field's name",
)
@pytest.mark.parametrize(
    "head",
    [
        lambda embedding: embedding + (torch.arange(32) == 31) * 1e-3,
        lambda embedding: embedding[:-1].clone(),
    ],
    ids=["other values", "other shape"],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_head_that_differs_is_refused_by_trainer_and_engines(name, head, saved, tmp_path):
    folder = tied(saved / name, tmp_path / "tied", head)
    for read in (read_model_config, HFEngine, ModelFolder.read):
        with pytest.raises(
            UserError, match=r"tie_word_embeddings is true .*lm_head\.weight differs"
        ):
            read(folder)


def test_a_head_that_is_missing_and_not_tied_is_refused(saved, tmp_path):
    """transformers would make one up."""
    shutil.copytree(saved / "qwen3", tmp_path / "untied")
    folder = edit_json(tmp_path / "untied" / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"example lm_head\.weight, .*tie_word_embeddings"):
        read_model_config(folder)
    with pytest.raises(UserError, match=r"1 tensor\(s\) missing, for example lm_head\.weight"):
        HFEngine(folder)


@pytest.mark.fault(
    "Models that are read",
    "config fields that contradict each other, or are of the wrong kind",
    "one message that names the field",
)
@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("qwen3", {"rope_theta": 5e5}, r"rope_theta=1000000\.0 and rope_theta=500000"),
        ("qwen3_moe", {"num_experts": 4}, "num_experts=4 and num_local_experts=8"),
        ("deepseek_v3", {"rope_scaling": None}, "rope_parameters=.*yarn.*rope_scaling=.*default"),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": 2.0}}, "'factor': 4.*'factor': 2"),
        ("qwen3", {"hidden_size": "64"}, "refuses its config.json: .*'hidden_size'"),
        ("qwen3", {"hidden_size": None}, "refuses its config.json: .*'hidden_size'"),
    ],
)
def test_contradictions_and_wrong_kinds_name_the_field(name, fields, words, saved, tmp_path):
    shutil.copytree(saved / name, tmp_path / "c")
    folder = edit_json(tmp_path / "c" / "config.json", **fields)
    with pytest.raises(UserError, match=words) as error:
        read_config(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1_000_000, "rope_scaling": None},
        {"rope_scaling": None, "rope_parameters": THETA | {"partial_rotary_factor": 1.0}},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None},  # of transformers 4
    ],
)
def test_two_names_that_agree_are_no_contradiction(fields, saved, tmp_path):
    shutil.copytree(saved / "qwen3", tmp_path / "c")
    hf = read_model_config(edit_json(tmp_path / "c" / "config.json", **fields))
    assert hf.rope_parameters["rope_theta"] == 1e6
    assert both_styles(hf, "float32")["rope_scaling"] is None


def test_an_adapter_is_refused(saved, tmp_path):
    """transformers would load the model that it names, from the hub."""
    shutil.copytree(saved / "qwen3", tmp_path / "c")
    (tmp_path / "c" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(UserError, match="holds an adapter"):
        read_config(tmp_path / "c")


def test_end_tokens_are_those_of_generation_else_of_the_model(saved, tmp_path):
    shutil.copytree(saved / "qwen3", tmp_path / "c")
    folder = edit_json(tmp_path / "c" / "generation_config.json", eos_token_id=[5, 7])
    assert eos_ids(folder, read_config(folder)) == [5, 7]
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert eos_ids(folder, read_config(folder)) == [1]  # as SIZES says
    edit_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(UserError, match="names no eos_token_id"):
        eos_ids(folder, read_config(folder))


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """Each model as the trainer writes it."""
    folder = tmp_path_factory.mktemp("exported")
    for name in CONFIGS:
        with process_groups(Layout()):
            hf = read_model_config(saved / name)
            chunks = build_model(hf, Layout(), torch.float32)
            load_weights(chunks, hf, saved / name)
            write_checkpoint(chunks, hf, side_files(saved / name), folder / name)
    return folder


READ_WITH_4 = """
import sys, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, out, *names = sys.argv[1:]
found = {}
for name in names:
    model, info = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{name}", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found[name] = model(torch.arange(2, 62).reshape(2, 30)).logits.numpy()
    found[name + "-ids"] = AutoTokenizer.from_pretrained(f"{folder}/{name}")("a b").input_ids
np.savez(out, **found)
"""


@pytest.mark.fault(
    "Models that are written",
    "transformers 4 reads an export",
    "the same model: both key styles are in config.json",
)
def test_transformers_4_reads_the_same_model(saved, exported, tmp_path):
    """As does 5. Read by 4, a config.json of 5 has a base of 10,000 for the positions."""
    assert TRANSFORMERS_4.is_dir(), f"no {TRANSFORMERS_4}: make test makes it"
    result = subprocess.run(
        [sys.executable, "-c", READ_WITH_4, exported, tmp_path / "found.npz", *CONFIGS],
        env=os.environ | {"PYTHONPATH": str(TRANSFORMERS_4), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    assert len(found.files) == 2 * len(CONFIGS)
    for name in CONFIGS:
        expected = logits_of(saved / name)
        np.testing.assert_allclose(found[name], expected, atol=1e-4)
        assert torch.equal(logits_of(exported / name), expected)
        ids = AutoTokenizer.from_pretrained(saved / name)("a b").input_ids
        assert found[f"{name}-ids"].tolist() == ids and len(ids) == 4  # <s> and three letters


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_5_reads_the_same_config(name, saved, exported):
    """And so does this project, which looks for contradictions."""
    written = json.loads((exported / name / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    configs = [
        AutoConfig.from_pretrained(f / name).to_dict() | {"dtype": None, "_name_or_path": None}
        for f in (saved, exported)
    ]
    for config in configs:
        config.pop("torch_dtype", None)
    extra = configs[1].keys() - configs[0].keys()
    assert {n: v for n, v in configs[1].items() if n not in extra} == configs[0]
    read_model_config(exported / name)
