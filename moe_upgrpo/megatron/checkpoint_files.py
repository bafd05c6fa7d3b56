# SPDX-License-Identifier: Apache-2.0
"""The files of a training state: torch's format, written and read without needless copies.

A file (`__0_0.distcp`) holds archives of `torch.save` one after the other, each of one tensor or
object; `.metadata` says which begins where. Line numbers are those of torch 2.13.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import mmap
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import backend

# The objects that torch's writer pickles into `.metadata`.
_OBJECTS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
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
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}
# Threads of a rank; each writes its own file.
_THREADS = 2
_PIECE = 1 << 20  # bytes that are hashed at once, while the processor still has them


class Writer(TorchDistSaveShardedStrategy):
    """Megatron's format, by torch's own writer, in this process.

    `dist_checkpointing.save` hands it the state; `write` writes it, in any thread. Files are not
    synced: `store.checkpoints` does that.

    gathered: memory of tensors that are this state's alone. own: the process group for `write`,
    where training goes on beside it; all other tensors are copied then.

    Megatron's writer forks a process for each file and starts a server to hear from them
    (filesystem_async.py:53). That takes seconds for any save, and it waits forever for a process
    that is killed.
    """

    def __init__(self, gathered: set[int], own: dist.ProcessGroup | None) -> None:
        super().__init__("torch_dist", 1)
        self._gathered, self._own = gathered, own

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        by_key, *_ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        if self._own is not None:
            for part in itertools.chain(*by_key.values()):
                if isinstance(part, ShardedTensor) and not self._is_gathered(part.data):
                    part.data = part.data.detach().to("cpu", copy=True)
        self._state, self._folder = mcore_to_pyt_state_dict(by_key), checkpoint_dir

    def _is_gathered(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._gathered

    def write(self) -> dict[str, dict]:
        """Write this rank's files. A collective. Returns the bytes and SHA-256 of each.

        Raises OSError where a file cannot be written.
        """
        writer = _Files(self._folder, thread_count=_THREADS, sync_files=False)
        try:
            with _without_crc(), backend.suspended():
                torch_checkpoint.save(
                    self._state,
                    storage_writer=writer,
                    planner=_Planner(dedup_replicated_tensors=False, flatten_state_dict=False),
                    process_group=self._own,
                )
        except torch_checkpoint.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        del self._state
        return writer.fs.written


class _Files(torch_checkpoint.FileSystemWriter):
    """torch's writer, which would not tell of a failure in its second thread (filesystem.py:742).

    The index would lack that file's tensors, without an error.
    """

    def __init__(self, *args, **keywords) -> None:
        super().__init__(*args, **keywords)
        self.fs = _Hashing()

    def write_data(self, plan, planner):
        results = super().write_data(plan, planner)
        if self.fs.failures:
            raise self.fs.failures[0]
        return results


class _Planner(MCoreSavePlanner):
    """Gives the writer tensors whose storage is theirs alone: it copies others (filesystem.py:131).

    Weights are parts of one buffer.
    """

    def transform_object(self, write_item, object):  # the name of the base class's
        if not torch.is_tensor(object) or not object.is_cpu or not object.is_contiguous():
            return object
        if not object.numel():
            return object
        bytes_B = torch.from_numpy(object.detach().reshape(-1).view(torch.uint8).numpy())
        return bytes_B.view(object.dtype).view(object.shape)


@contextmanager
def _without_crc() -> Iterator[None]:
    """Let torch leave out the checksums of its archives, which it never reads."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Hashing(FileSystem):
    """A file system that keeps size and SHA-256 of each file of tensors, or why there is none."""

    def __init__(self) -> None:
        self.written: dict[str, dict] = {}
        self.failures: list[Exception] = []

    @contextmanager
    def create_stream(self, path, mode: str) -> Iterator[io.IOBase]:
        if mode != "wb" or not str(path).endswith(DEFAULT_SUFFIX):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            raw = _HashedFile(path, "w")
        except OSError as error:
            self.failures.append(error)
            raise
        try:
            with io.BufferedWriter(raw) as stream:
                yield stream
        except Exception as error:
            self.failures.append(error)  # of any thread, to be raised by one
        else:
            about = {"bytes": raw.size, "sha256": raw.digest.hexdigest()}
            self.written[Path(path).name] = about


class _HashedFile(io.FileIO):
    def __init__(self, path, mode: str) -> None:
        super().__init__(path, mode)
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data) -> int:
        piece = memoryview(data).cast("B")[:_PIECE]
        done = super().write(piece)
        self.digest.update(piece[:done])
        self.size += done
        return done


@contextmanager
def read_in_place() -> Iterator[None]:
    """Let Megatron-Core read states with `_Reader`: `dist_checkpointing.load` takes no reader."""

    def reader(folder, *_, **__) -> _Reader:
        return _Reader(folder)

    with mock.patch.object(torch_strategy, "_get_filesystem_reader", reader):
        yield


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_TAIL = 4096  # bytes; an archive of one tensor has seven records


class _Reader(torch_checkpoint.FileSystemReader):
    """Copies each tensor once, from the file's pages to its place in the model or optimizer.

    torch's reader copies it first into memory of its own (filesystem.py:898).
    """

    def read_metadata(self, *args, **keywords):
        if not hasattr(self, "_metadata"):  # Megatron-Core asks twice
            self._metadata = super().read_metadata(*args, **keywords)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (Path(self.path) / name).open("rb") as file:
                # Private: torch would warn of memory that it may not write to.
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                for item in items:
                    stored = self.storage_data[item.storage_index]
                    if item.type == LoadItemType.BYTE_IO:
                        content = pages[stored.offset : stored.offset + stored.length]
                        planner.load_bytes(item, io.BytesIO(content))
                        continue
                    tensor = _stored_tensor(pages, stored.offset, stored.length)
                    part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    if target.size() != part.size():
                        raise ValueError(
                            f"{item.storage_index} has {part.size()}, {target.size()} are wanted"
                        )
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _stored_tensor(pages: mmap.mmap, offset: int, length: int) -> torch.Tensor:
    """The tensor in an archive of `torch.save` in a file, as a view of the file's bytes.

    Its place need not be a multiple of its element's size: it may be copied from, no more.
    """
    begins = {}
    # The list of an archive's records is at its end, with places before that end.
    tail = pages[max(offset, offset + length - _TAIL) : offset + length]
    for entry in zipfile.ZipFile(io.BytesIO(tail)).infolist():
        local = offset + length - len(tail) + entry.header_offset
        names = int.from_bytes(pages[local + 26 : local + 28], "little")
        extra = int.from_bytes(pages[local + 28 : local + 30], "little")
        record = entry.filename.partition("/")[2]
        begins[record] = (local + 30 + names + extra, entry.file_size)
    begin, size = begins["data.pkl"]
    return _Tensor(pages, begins, io.BytesIO(pages[begin : begin + size])).load()


class _Tensor(pickle.Unpickler):
    """Unpickles one tensor, and nothing else, as a view of its bytes in a file."""

    def __init__(self, pages: mmap.mmap, begins: dict[str, tuple[int, int]], pickled: io.BytesIO):
        super().__init__(pickled)
        self._pages, self._begins = pages, begins

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _viewed
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, saved) -> torch.Tensor:
        _, dtype, key, _, count = saved
        begin, size = self._begins[f"data/{key}"]
        if size != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"{size} bytes for {count} of {dtype}")
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=begin)


def _viewed(flat: torch.Tensor, offset: int, size, stride, *_) -> torch.Tensor:
    return flat.as_strided(size, stride, offset)


class _OnlyOurs(pickle.Unpickler):
    """Unpickles the objects that torch's writer puts into `.metadata`, and refuses all others."""

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in _OBJECTS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def check_objects(folder: Path) -> None:
    """Refuse a folder with pickled objects that do not belong to a state.

    torch unpickles `.metadata` (filesystem.py:930) and the objects beside the tensors
    (default_planner.py:387) unchecked, and so runs whatever code they name.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _OnlyOurs(file).load()
        for index, stored in metadata.storage_data.items():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"it leads to {stored.relative_path}")
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with (folder / stored.relative_path).open("rb") as file:
                    file.seek(stored.offset)
                    torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
        if (folder / "common.pt").exists():  # before Megatron-Core 0.19
            torch.load(folder / "common.pt", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} does not hold this model's training state: {error.filename} is missing."
        ) from None
    except Exception as error:  # damaged pickles raise anything
        raise UserError(
            f"{folder} holds what no checkpoint of moe_upgrpo does ({str(error)[:200]}); none of "
            "its code was run. Resume from a checkpoint whose origin you know."
        ) from error


def told(error: BaseException) -> BaseException:
    """Name a full disk: torch says only at which byte the file ended (inline_container.cc:672)."""
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        return OSError(errno.ENOSPC, f"torch could not write all of a file: {error}")
    return error
