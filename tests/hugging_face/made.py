"""Model folders as they are found in the wild, made of a tiny checkpoint."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def save_sharded(state: dict, folder: Path, count: int) -> list[str]:
    """Write tensors into `count` shards with their index; the names of the files."""
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed = {tensor: names[i % count] for i, tensor in enumerate(sorted(state))}
    for name in names:
        shard = {n: t for n, t in state.items() if placed[n] == name}
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index))
    return names


def sharded(source: Path, folder: Path, count: int = 3) -> dict:
    """The checkpoint `source` in shards below `folder`; its tensors."""
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    state = load_file(source / "model.safetensors")
    save_sharded(state, folder, count)
    return state


def with_stale_files(source: Path, folder: Path) -> dict:
    """As `sharded`, beside what an earlier save and another format left; the right tensors.

    Names sorted, and the last to be read winning, the stale ones would win.
    """
    state = sharded(source, folder)
    index = (folder / INDEX).read_bytes()
    old = {name: tensor * 1.5 for name, tensor in state.items()}
    save_sharded(old, folder, 4)
    (folder / INDEX).write_bytes(index)
    save_file({"layers.0.attention.wq.weight": old["lm_head.weight"]},
              folder / "consolidated.safetensors")  # fmt: skip
    return state


def edit_json(file: Path, **fields) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file.parent
