"""Texts that a run keeps: prompts by step, and the bytes of tokens."""

from itertools import pairwise

import numpy as np
import pytest

from moe_upgrpo.hugging_face.tokenizer import keep_vocabulary, token_bytes
from moe_upgrpo.store.texts import as_texts, read_prompts, read_vocabulary, write_prompts
from moe_upgrpo.tasks.arithmetic import save_tokenizer


def byte_level(texts):
    """A byte-level tokenizer that merges what GPT-2's would: é is of two bytes, 日 of three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: i for i, sign in enumerate(signs)}
    merges = []
    for text in texts:
        for pair in pairwise(text):
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_parts_of_a_character_are_bytes_and_become_text_together():
    tokenizer = byte_level(["Ġa"])
    text = "a a 日é\n"
    ids = tokenizer(text).input_ids
    found = token_bytes(tokenizer)
    assert b"".join(found[i] for i in ids) == text.encode()
    assert as_texts(ids, found) == ["a", " a", " ", "◌", "◌", "日", "◌", "é", "\n"]
    assert as_texts([ids[3], 99_999], found) == ["◌", "�[99999]"]


def test_the_task_s_own_tokenizer(tmp_path):
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "run").mkdir()
    keep_vocabulary(tmp_path / "run", tmp_path / "model")
    found = read_vocabulary(tmp_path / "run", range(100))
    from moe_upgrpo.tasks.arithmetic import encode

    assert as_texts(encode("12+7="), found) == list("12+7=")
    assert found[1] == b"<eos>"
    assert read_vocabulary(tmp_path, [1]) is None


def test_prompts_come_back_by_step(tmp_path):
    (tmp_path / "tokens").mkdir()
    for step, rank, prompts in ((1, 0, {0: [5, 6]}), (2, 0, {0: [7]}), (2, 1, {1: [8, 9]})):
        write_prompts(tmp_path / "tokens", step, rank, {k: np.array(v) for k, v in prompts.items()})
    assert {k: v.tolist() for k, v in read_prompts(tmp_path, 2).items()} == {0: [7], 1: [8, 9]}
    assert read_prompts(tmp_path, 3) == {}
    damaged = tmp_path / "tokens" / "prompts-000001-rank-0000.parquet"
    damaged.write_bytes(b"PAR1")
    assert read_prompts(tmp_path, 1) == {}


def test_no_vocabulary_without_a_token(tmp_path):
    from moe_upgrpo.errors import UserError
    from moe_upgrpo.store.texts import write_vocabulary

    with pytest.raises(UserError, match="nothing to write"):
        write_vocabulary(tmp_path, {})
