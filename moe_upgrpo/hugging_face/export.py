# SPDX-License-Identifier: Apache-2.0
"""Files beside the weights of a model folder, carried from one folder to the next."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import both_styles
from moe_upgrpo.hugging_face.folder import INDEX, SINGLE, WEIGHT_SUFFIXES, Weights, check_folder
from moe_upgrpo.hugging_face.tokenizer import own_code
from moe_upgrpo.store.files import publish, sync, write_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SIDE_FILES = (
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "tokenizer.model.v*",
)


def side_files(folder: str | Path) -> dict[str, bytes]:
    """Name -> content of the files of a model's tokenizer, chat templates and generation.

    They are kept in memory from the start of a run: unreadable files are noticed then, and the
    folder may be gone when the weights are written. Everything else stays behind: other formats of
    the old weights, figures, caches.
    """
    folder = check_folder(folder)
    paths = [path for pattern in SIDE_FILES for path in folder.glob(pattern)]
    paths += _with_own_code(folder)
    found = {}
    for path in sorted(set(paths)):
        if path.is_dir():
            continue
        try:
            found[str(path.relative_to(folder))] = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): the trained model is to have a copy."
            ) from None
    if (name := "tokenizer_config.json") in found:
        found[name] = _tokenizer_for_both(found[name])
    return found


def _with_own_code(folder: Path) -> list[Path]:
    """The tokenizer's own code, where it has some, and the files that the code names."""
    # Missing files are not needed: the tokenizer was loaded without them.
    code = [folder / name for name in own_code(folder) if (folder / name).is_file()]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in code)
    return code + [
        file
        for file in folder.iterdir()
        if file.is_file()
        and file.suffix not in WEIGHT_SUFFIXES
        and file.name != "config.json"
        and (f'"{file.name}"' in text or f"'{file.name}'" in text)
    ]


def _tokenizer_for_both(content: bytes) -> bytes:
    """A tokenizer_config.json under the names of transformers 4, which transformers 5 reads too."""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    if not isinstance(config, dict) or config.get("tokenizer_class") != "TokenizersBackend":
        return content
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def write_beside(
    folder: Path, hf: PretrainedConfig, dtype: str, files: Mapping[str, bytes]
) -> None:
    """Write config.json for weights of `dtype`, and the `side_files`."""
    config = json.dumps(both_styles(hf, dtype), indent=2)
    write_text(folder / "config.json", config + "\n")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def try_export(hf: PretrainedConfig, files: Mapping[str, bytes], folder: Path | None) -> None:
    """Write the files beside the weights below `folder` (None: anywhere), and remove them again.

    Raises UserError where the export at the end of a run would fail.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as tried:
            write_beside(Path(tried), hf, "float32", files)
            by_umask(Path(tried))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"the trained model could not be written to {folder}: {error}.") from None


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """An empty folder that gets the name `folder` once it is filled, and is removed if that fails.

    Such folders that killed jobs of a run left are removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = _part(folder)
    for left in folder.parent.iterdir():
        if re.fullmatch(r"\.step-\d+\.part", left.name) or left == part:
            shutil.rmtree(left)
    part.mkdir()
    try:
        yield part
        by_umask(part)
        for path in part.rglob("*"):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # if it has not got its name


def _part(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def by_umask(folder: Path) -> None:
    """Give a folder and everything in it the modes that the umask asks for.

    tempfile and safetensors keep other users out, even those whose server is to read the weights.
    """
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        made = Path(probe, "folder"), Path(probe, "file")
        made[0].mkdir()
        made[1].touch()
        of_folders, of_files = (path.stat().st_mode & 0o777 for path in made)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(of_folders if path.is_dir() else of_files)


def drop_exports(folder: Path, step: int) -> list[Path]:
    """Remove the folders step-… in a run's checkpoints that hold weights of steps after `step`."""
    there = folder.iterdir() if folder.is_dir() else ()
    found = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in there)
    later = sorted(path for match, path in found if match and int(match[1]) > step)
    for path in later:  # renamed first: a folder with the name is whole
        shutil.rmtree(path.rename(_part(path)))
    return later


def needs_view(weights: Weights) -> bool:
    """Whether a reader of all *.safetensors, such as vLLM, would find other tensors."""
    if again := weights.twice():
        raise UserError(
            f"{weights.folder}: {again} lies in two of its files, of which this engine would take "
            "any. Load and save the model with transformers, or use the Hugging Face engine."
        )
    return bool(weights.ignored()) or {f.parent for f in weights.files} != {weights.folder}


def make_view(weights: Weights, view: Path) -> None:
    """Fill the empty folder `view` with links to the model's own files, and nothing else."""
    for path in weights.folder.iterdir():
        if path.suffix not in WEIGHT_SUFFIXES and path.name != INDEX and path.is_file():
            (view / path.name).symlink_to(path.absolute())
    count = len(weights.files)
    placed = {}
    for i, file in enumerate(weights.files, start=1):
        name = SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        (view / name).symlink_to(file.absolute())
        placed |= dict.fromkeys(weights.held(file), name)
    if count > 1:
        write_text(view / INDEX, json.dumps({"metadata": {}, "weight_map": placed}))
