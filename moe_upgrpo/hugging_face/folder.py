# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model folder: its config.json and its weights, by their index.

The trainer, the engines, plan and probe read weights through `Weights`, so that they read the same
tensors: those of the files that model.safetensors.index.json names, where it exists; else those of
model.safetensors. Every other file is ignored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # the second under any prefix
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def check_folder(path: str | Path) -> Path:
    """Check that the path is a folder of this machine, and return it.

    Raises UserError without asking the network; transformers would take any other text for a name
    on the Hugging Face hub.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return path
        there = path.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL byte, no permission
        raise UserError(f"the model folder {str(path)!r} cannot be read: {error}.") from None
    if there:
        raise UserError(
            f"{path} is a file: a Hugging Face model folder is needed (config.json, *.safetensors, "
            "tokenizer files)."
        )
    name = str(path)
    hint = ""
    if HUB_NAME.fullmatch(name):
        hint = (
            " If it is a name on the Hugging Face hub, download it first (hf download "
            f"{name} --local-dir DIR) and give that folder."
        )
    raise UserError(
        f"the model folder {name} does not exist: a folder of this machine is needed.{hint}"
    )


def downloaded(name: str | Path) -> Path:
    """The folder of a model, by path or, if this machine's cache has it, by name on the hub.

    Raises UserError, without asking the network, where neither is here.
    """
    if HUB_NAME.fullmatch(str(name)) and not os.path.isdir(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        # The hub's own rule for names is narrower: no "--", no "." at an end.
        with suppress(LocalEntryNotFoundError, HFValidationError):
            return Path(snapshot_download(str(name), local_files_only=True))
    return check_folder(name)


def read_json(file: Path) -> Any:
    """Read a JSON file; UserError where it is not readable as one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {str(error).splitlines()[0]}.") from None


def has_weights(folder: Path) -> bool:
    """Whether there is any safetensors file or index; for plan, a config.json alone is enough."""
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


class Weights:
    """The tensors of a model folder, read one at a time.

    tied: config.json's tie_word_embeddings. A copy of the embedding stored as lm_head is then not a
    tensor of its own; a head that differs from the embedding is refused.

    Raises:
        UserError: no weights, or an index that cannot be followed: not JSON, a file outside the
            folder, a missing or torn file, a tensor that is not where it says.
    """

    def __init__(self, folder: str | Path, *, tied: bool = False):
        self.folder = check_folder(folder)
        self._placed = self._read_index()
        self.files = [self.folder / name for name in self._names()]
        self._check_there()
        self._opened = {file: _open(file) for file in self.files}
        self._held = {file: set(opened.keys()) for file, opened in self._opened.items()}
        self._by_name = {n: f for f in self.files for n in sorted(self._held[f])}
        self._follow_index()
        self._leave_out_tied_head(tied)

    def _read_index(self) -> dict[str, str] | None:
        """Tensor -> name of its file; None without an index."""
        file = self.folder / INDEX
        if not file.exists():
            return None
        index = read_json(file)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not placed:
            raise UserError(
                f"{file} has no weight_map from tensors to files: it is damaged. Download or save "
                "the model again."
            )
        for tensor, name in placed.items():
            if not isinstance(name, str) or not _is_inside(name):
                raise UserError(
                    f"{file} puts {tensor} into {name!r}: files of the model folder alone are "
                    "read. Download or save the model again."
                )
        return placed

    def _names(self) -> list[str]:
        if self._placed is not None:
            return sorted(set(self._placed.values()))
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        others = sorted(f.name for f in self.folder.iterdir() if f.suffix in WEIGHT_SUFFIXES)
        found = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
        raise UserError(
            f"{self.folder} holds no weights that can be read: a {SINGLE}, or an {INDEX} and the "
            "*.safetensors files that it names, is needed"
            + (f"; there is {found}. Load and save the model with transformers." if others else ".")
        )

    def _check_there(self) -> None:
        if missing := [file for file in self.files if not file.exists()]:
            linked = (
                " (it is a link to a file that is not there)" if missing[0].is_symlink() else ""
            )
            raise UserError(
                f"{self.folder}: {len(missing)} of the {len(self.files)} weight files are missing, "
                f"for example {missing[0].name}{linked}: the download or copy is not complete."
            )

    def _follow_index(self) -> None:
        """Each tensor from the file in which the index puts it."""
        for name, file_name in (self._placed or {}).items():
            file = self.folder / file_name
            if name not in self._held[file]:
                raise UserError(
                    f"{file} does not hold {name}, which {INDEX} puts there: they are of different "
                    "models, or of different times. Download or save the model again."
                )
            self._by_name[name] = file

    def _leave_out_tied_head(self, tied: bool) -> None:
        embedding = [name for name in self._by_name if name.endswith(EMBEDDING)]
        if not tied or HEAD not in self._by_name or len(embedding) != 1:
            return
        head, embedded = self.read(HEAD), self.read(embedding[0])
        if not _equal(head, embedded):
            raise UserError(
                f"{self.folder}: tie_word_embeddings is true in config.json, but {HEAD} differs "
                f"from {embedding[0]}; readers disagree on what that means (transformers 5 uses "
                f"both, others the embedding alone). Set tie_word_embeddings to false to train "
                f"with this head, or take {HEAD} out of the weights."
            )
        del self._by_name[HEAD]

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc) -> None:
        for opened in self._opened.values():
            opened.__exit__(*exc)

    def names(self) -> set[str]:
        return set(self._by_name)

    def read(self, name: str) -> torch.Tensor:
        return self._opened[self._by_name[name]].get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self.read(name)) for name in self._by_name)

    def dtypes(self) -> dict[str, str]:
        """Name -> dtype as safetensors has it, F32, BF16, ..., from the headers."""
        return {name: self._slice(name).get_dtype() for name in self._by_name}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, from the headers."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._by_name}

    def _slice(self, name: str):
        return self._opened[self._by_name[name]].get_slice(name)

    def held(self, file: Path) -> set[str]:
        """The tensors in one of `files`."""
        return self._held[file]

    def ignored(self) -> list[str]:
        """Names of other safetensors files beside those that are read."""
        return sorted({f.name for f in self.folder.glob("*.safetensors")} - set(self._top_level()))

    def _top_level(self) -> list[str]:
        return [file.name for file in self.files if file.parent == self.folder]

    def note(self) -> str | None:
        """A line for the screen if the folder holds weights that are not read."""
        if not (ignored := self.ignored()):
            return None
        named = f"those that {INDEX} names" if self._placed is not None else SINGLE
        return f"{self.folder}: the weights are {named}; ignored: {', '.join(ignored[:3])}" + (
            f" and {len(ignored) - 3} more" if ignored[3:] else ""
        )

    def twice(self) -> str | None:
        """The name of a tensor that is in several of the files, if there is one."""
        seen: set[str] = set()
        for held in self._held.values():
            if again := seen & held:
                return min(again)
            seen |= held
        return None


def _is_inside(name: str) -> bool:
    """Whether an index's name is that of a file in the folder; links in it may lead elsewhere.

    The hub's cache is made of such links.
    """
    path = PurePosixPath(name)
    return (
        name.isprintable()
        and "\\" not in name
        and not path.is_absolute()
        and ".." not in path.parts
        and path.suffix == ".safetensors"
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return torch.equal(a, b)


def _open(file: Path):
    try:
        return safe_open(file, framework="pt").__enter__()
    except SafetensorError as error:
        raise UserError(
            f"{file} is truncated or not a safetensors file: {error}{_lfs(file)}"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _lfs(file: Path) -> str:
    with file.open("rb") as opened:
        pointer = opened.read(40).startswith(b"version https://git-lfs")
    return ". It is a pointer of Git LFS: git lfs pull brings the file" if pointer else ""
