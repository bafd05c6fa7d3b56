"""Tokenizers of model folders: none, broken, with code of their own; and what ends an answer."""

import json
import re
import shutil

import pytest
from transformers import AutoTokenizer, dynamic_module_utils

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.export import side_files
from moe_upgrpo.hugging_face.tokenizer import read_tokenizer
from moe_upgrpo.tasks import MathTask
from tests.hugging_face.made import edit_json
from tests.tasks.words import save_words


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_words(tmp_path_factory.mktemp("words"))


@pytest.fixture
def folder(words, tmp_path):
    shutil.copytree(words, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.fault(
    "Models that are read",
    "a model folder without a tokenizer",
    "one message",
)
def test_a_folder_without_a_tokenizer(folder):
    """transformers 5 makes one of a single token."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        with pytest.raises(UserError, match=r"model has no tokenizer that can be loaded") as error:
            read_tokenizer(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_line(name, text, folder):
    if name == "tokenizer_config.json" and text in ("{}", '{"model": {"type": "BPE"}}'):
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value) and "model" in str(error.value)


CODE = """
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .spelling import FILE

Path({ran!r}).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {{"vocab_file": FILE}}

    def __init__(self, vocab_file, **settings):
        settings.pop("tokenizer_object", None)
        super().__init__(tokenizer_object=Tokenizer.from_file(vocab_file), **settings)
"""


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A tokenizer of a class that is code of the folder, and of a file that only it knows."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "tokenizer.json").rename(folder / "own.vocab")
    (folder / "own_tokenizer.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    (folder / "spelling.py").write_text('FILE = "own.vocab"\n')
    (folder / "unrelated.py").write_text("1 / 0")
    mapped = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=mapped)
    return folder


@pytest.mark.fault(
    "Models that are read",
    "a tokenizer that is code of the model folder",
    "refused; run with `--trust-remote-code`, which the log says",
)
def test_code_of_the_folder_runs_only_where_it_is_asked_for(own, words, tmp_path):
    refused = r"code of its own \(own_tokenizer\.py, spelling\.py\).*--trust-remote-code"
    with pytest.raises(UserError, match=refused):
        read_tokenizer(own)
    assert not (tmp_path / "ran").exists()
    ids = read_tokenizer(own, trust_remote_code=True)("a b").input_ids
    assert ids == AutoTokenizer.from_pretrained(words)("a b").input_ids and len(ids) == 4
    assert (tmp_path / "ran").exists()


def test_code_that_transformers_can_do_without_does_not_run(own, tmp_path):
    (own / "own.vocab").rename(own / "tokenizer.json")
    edit_json(own / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert len(read_tokenizer(own)("a b").input_ids) == 4
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["own_tokenizer", "org/other--own_tokenizer", "../own_tokenizer"])
def test_code_that_is_not_there_is_missed_only_where_it_is_needed(where, own, tmp_path):
    """Never looked for on the hub, nor outside the folder."""
    for name in ("spelling.py", "own_tokenizer.py"):
        (own / name).unlink()
        mapped = {"AutoTokenizer": [None, f"{where}.OwnTokenizer"]}
        edit_json(own / "tokenizer_config.json", auto_map=mapped)
        with pytest.raises(UserError, match="no tokenizer that can be loaded") as error:
            read_tokenizer(own, trust_remote_code=True)
        assert "\n" not in str(error.value)
    (own / "own.vocab").rename(own / "tokenizer.json")
    edit_json(own / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert len(read_tokenizer(own)("a b").input_ids) == 4
    assert {"tokenizer.json", "tokenizer_config.json"} < side_files(own).keys()
    assert not (tmp_path / "ran").exists()


def test_the_export_has_the_code_and_the_files_that_it_names(own, tmp_path):
    files = side_files(own)
    assert {"own_tokenizer.py", "spelling.py", "own.vocab"} < files.keys()
    assert "unrelated.py" not in files
    assert not (tmp_path / "ran").exists()


def chatml(end):
    return (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )


@pytest.mark.fault(
    "Models that are read",
    "a chat template that ends turns on no end token",
    "a note at the start",
)
@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("</s>", None),
        ("\n</s>\n", None),
        ("<s>", "ends an answer with '<s>', token 0, .* stops at </s> \\(1\\)"),
        ("\n", "ends an answer with '\\\\n', token"),
        ("", "ends an answer with ''"),
        ("{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}", None),
    ],
)
def test_a_template_that_ends_answers_with_no_end_token_is_noted(end, words, tmp_path):
    model = save_words(tmp_path / "model", template=chatml(end))
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "1+1?", "answer": 2}) + "\n")
    task = MathTask([data], model_dir=model)
    task.close()
    notes = [note for note in task.notes if "end token" in note]
    if words is None:
        assert notes == []
    else:
        (note,) = notes
        assert re.search(words, note), note


def test_several_templates_without_a_default_need_a_choice(tmp_path):
    named = {"rag": chatml("</s>"), "tools": chatml("</s>")}
    model = save_words(tmp_path / "model", template=named)
    with pytest.raises(UserError, match="Give --chat-template FILE"):
        MathTask([], model_dir=model)
