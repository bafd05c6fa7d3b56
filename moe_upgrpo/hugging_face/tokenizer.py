# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import read_config
from moe_upgrpo.hugging_face.folder import check_folder, read_json
from moe_upgrpo.store.texts import write_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: str | Path, *, trust_remote_code: bool = False):
    """The tokenizer of a model folder.

    Raises UserError: there is none, it cannot be loaded, or it needs Python code of its own from
    the folder, which runs only with `trust_remote_code`.
    """
    from transformers import AutoTokenizer

    folder = check_folder(folder)
    hf = read_config(folder)
    code = own_code(folder)
    if code and not trust_remote_code and _needs_code(folder):
        raise UserError(
            f"{folder}: its tokenizer is code of its own ({', '.join(code)}), which is not run "
            "unless asked for. Read it, and give --trust-remote-code if you trust it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            # With the config passed in, no code of the folder is run for it.
            folder,
            config=hf,
            local_files_only=True,
            trust_remote_code=trust_remote_code and bool(code),
        )
        empty = _is_empty(tokenizer)
    except Exception as error:  # transformers, the Rust library and code of the folder raise any
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"{folder} has no tokenizer that can be loaded: {type(error).__name__}: {lines[0]}"
        ) from None
    if empty:
        # Without a file, transformers makes a tokenizer of its own special tokens.
        raise UserError(
            f"{folder} has no tokenizer that can be loaded: no tokenizer.json, tokenizer.model, "
            "vocab.json or the like. Copy those of the model into the folder."
        )
    return tokenizer


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    return set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)


def _auto_map(folder: Path) -> list[str]:
    """`module.Class` of the tokenizer's own code, as tokenizer_config.json or config.json says."""
    for name in ("tokenizer_config.json", "config.json"):
        found = _settings(folder / name).get("auto_map")
        found = found.get("AutoTokenizer") if isinstance(found, dict) else found
        if found:
            listed = found if isinstance(found, list | tuple) else [found]
            return [one for one in listed if isinstance(one, str)]
    return []


def own_code(folder: Path) -> list[str]:
    """The names of the files with the tokenizer's own code, imports among them included."""
    from transformers.dynamic_module_utils import get_relative_import_files

    found: dict[str, None] = {}
    for one in _auto_map(folder):
        file = folder / Path(f"{one.rpartition('.')[0]}.py").name  # never from elsewhere
        found[file.name] = None
        with suppress(OSError):  # it, or a file it imports, is missing: loading it says so
            found |= {Path(n).name: None for n in get_relative_import_files(file)}
    return list(found)


def _needs_code(folder: Path) -> bool:
    """Whether no class of transformers would serve as well."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = _settings(folder / "tokenizer_config.json").get("tokenizer_class") or ""
    known = tokenizer_class_from_name(name) is not None
    return not known or not (folder / "tokenizer.json").is_file()


def _settings(file: Path) -> dict[str, Any]:
    settings = read_json(file) if file.is_file() else {}
    return settings if isinstance(settings, dict) else {}


_ANSWER = "forty-two"  # in a turn that is written to see what follows it


def note_on_turns(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    kwargs: dict[str, Any],
    ends: Sequence[int],
) -> str | None:
    """A line for the screen where the template ends an answer with no end token of the model.

    Sampling then goes on behind the end of the turn that the model was taught.
    """
    if template is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **kwargs
        )
    except Exception:  # a template may refuse these messages; those of the data are tried later
        return None
    _, found, after = text.rpartition(_ANSWER)
    ids = tokenizer(after, add_special_tokens=False).input_ids
    if not found or set(ids) & set(ends):
        return None
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ends)
    first = f", token {ids[0]}" if ids else ""
    return (
        f"note: the chat template ends an answer with {after!r}{first}, in which there is no end "
        f"token of the model: its generation stops at {names}. If it is to stop there, add the "
        "token to eos_token_id in generation_config.json."
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes that each token id of a tokenizer stands for.

    Tokens are decoded after another token, since some tokenizers drop the space of a text's first;
    one that is a part of a character is read from its name (GPT-2's bytes, or <0xE2> as
    SentencePiece has it).
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    names = tokenizer.convert_ids_to_tokens(ids)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(ids[:1], **options)
    texts = tokenizer.batch_decode([[ids[0], i] for i in ids], **options)
    of_sign = _bytes_of_signs()
    found = {}
    for i, name, text in zip(ids, names, texts, strict=True):
        text = text.removeprefix(before)
        if "\ufffd" not in text:
            found[i] = text.encode()
        elif byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            found[i] = bytes([int(byte[1], 16)])
        elif all(sign in of_sign for sign in name):
            found[i] = bytes(of_sign[sign] for sign in name)
        else:
            found[i] = text.encode()
    return found


def keep_vocabulary(run: str | Path, model: str | Path, *, trust_remote_code: bool = False) -> None:
    """Write the texts of a model's tokens into a run folder, where its report reads them.

    Raises UserError: there is no tokenizer, or one that does not tell its tokens' texts.
    """
    tokenizer = read_tokenizer(model, trust_remote_code=trust_remote_code)
    try:
        texts = token_bytes(tokenizer)
    except Exception as error:  # as where it is loaded
        lines = str(error).splitlines() or ["no reason given"]
        raise UserError(
            f"{model}: its tokenizer does not tell the texts of its tokens: "
            f"{type(error).__name__}: {lines[0]}"
        ) from None
    write_vocabulary(run, texts)


def _bytes_of_signs() -> dict[str, int]:
    """GPT-2's signs for bytes: printable ones are themselves, the others are U+0100 and up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    signs = {chr(byte): byte for byte in plain}
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}
