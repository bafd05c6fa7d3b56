"""What is read of somebody else's training state runs none of their code.

Three things in torch's distributed checkpoints are pickles, which may call any function when they
are read: the index `.metadata` (filesystem.py:930 of the released torch 2.13.0 takes whatever
comes), objects that are no tensors (default_planner.py:387, the same), and `common.pt`. Tensors are
read by torch with weights_only=True.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from moe_upgrpo.errors import UserError

# All that an index of tensors is made of, whatever the Python and the layout.
_OF_AN_INDEX = {
    "torch": {"Size"} | {n for n, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},  # looks a name up among torch's layouts
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # Python 3.13
}


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _OF_AN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors has")
        return super().find_class(module, name)


def check(folder: Path) -> None:
    """Raise UserError where reading the state in `folder` could run code, or its index is damaged.

    What passes is safe for torch's own reader too: the same bytes name the same things.
    """
    index, common = folder / ".metadata", folder / "common.pt"
    try:
        metadata = _Index(io.BytesIO(index.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        for key, value in metadata.state_dict_metadata.items():
            # Older versions wrote those of Megatron's layers; they are not read.
            if isinstance(value, BytesStorageMetadata) and "_extra_state" not in key:
                raise pickle.UnpicklingError(f"its {key} is no tensor, but a pickle")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"it leads to {info.relative_path}")
    except Exception as error:  # a damaged pickle raises anything
        raise _refused(folder, index, error) from None
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refused(folder, common, error) from None


def _refused(folder: Path, file: Path, error: Exception) -> UserError:
    if isinstance(error, OSError):
        return UserError(
            f"{folder} does not hold this model's training state: {file.name} cannot be read "
            f"({error.strerror})"
        )
    reason = f"{error}".partition("\n")[0][:300] or type(error).__name__
    return UserError(
        f"{file} is not as a run writes it: {reason}. Reading it could run somebody's code, so "
        "nothing was read. Resume from a folder whose origin you know."
    )
