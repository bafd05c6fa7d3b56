# SPDX-License-Identifier: Apache-2.0
"""Dumps of other programs: expert ids or log-probs in .npy, .npz or torch files.

A dump may come from a stranger: nothing in it is run (no pickled objects, torch's restricted
unpickler), and a header's claims are checked against the file's contents.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_upgrpo.errors import UserError

NAME, LOG_PROBS = "routes", "logp"
"""The array to read where a file holds several."""
_SHOWN = 200  # characters of a library's error message


def read_routes(path: Path) -> np.ndarray:
    """The integers in a dump; an .npy file is mapped, not read.

    A file of several arrays has one called `routes`.

    Raises:
        UserError: the file cannot be read, is of another kind, truncated or empty, claims more than
            it holds, holds objects, or holds no integers.
    """
    needed = (
        "an .npy, .npz or torch file of integers [tokens, layers, top-k] or [sequences, tokens, "
        "layers, top-k] is needed"
    )
    return _dump(path, NAME, "iu", "expert ids", needed)


def read_log_probs(path: Path) -> np.ndarray:
    """The log-probs in a dump, float64 [tokens] or [sequences, tokens]; NaN where one is missing.

    A file of several arrays has one called `logp`.

    Raises:
        UserError: as for `read_routes`, or a dump of another shape, or a log-prob above 0.
    """
    needed = "an .npy, .npz or torch file of floats [tokens] or [sequences, tokens] is needed"
    found = _dump(path, LOG_PROBS, "f", "log-probs", needed).astype(np.float64)
    if found.ndim not in (1, 2) or not found.size:
        raise UserError(f"{path} has shape {list(found.shape)}: {needed}.")
    if (found > 1e-4).any():
        raise UserError(
            f"{path}: {int((found > 1e-4).sum()):,} of {found.size:,} log-probs are above 0, the "
            f"largest {np.nanmax(found):.4g}; probabilities, or −log p, are not read."
        )
    return found


def _dump(path: Path, name: str, kinds: str, what: str, needed: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header's overflowing sizes, an archive's kind
            array = _array(_read(path, name), name, kinds)
        if array.dtype.kind not in kinds:
            raise _Refused(f"it holds {array.dtype}")
        return array
    except Exception as error:  # the readers raise anything on broken bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as {what}: {reason[:_SHOWN]}. {needed[0].upper()}{needed[1:]}."
        ) from None


class _Refused(Exception):
    """Say in a few words what is wrong with a file."""


def _read(path: Path, name: str) -> Any:
    """Read an array or a tensor, or several by their names."""
    if path.exists() and not path.is_file():
        raise _Refused("it is no file")
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        raise _Refused("it is empty")
    if start.startswith(np.lib.format.MAGIC_PREFIX):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            of_torch = any(one.endswith("/data.pkl") for one in archive.namelist())
        if not of_torch:
            with np.load(path, allow_pickle=False) as arrays:
                return {one: arrays[one] for one in _chosen(arrays.files, name)}
    elif start[:1] != pickle.PROTO:
        raise _Refused("it is of no known kind")
    return torch.load(path, map_location="cpu", weights_only=True)


def _chosen(names: list, wanted: str) -> list:
    """Choose one of several names in a file."""
    if len(names) == 1 or wanted in names:
        return names if len(names) == 1 else [wanted]
    shown = ", ".join(map(str, names)) or "nothing"
    raise _Refused(f"it holds {shown}; one array, or one called {wanted!r}, is needed")


def _array(found: Any, wanted: str, kinds: str) -> np.ndarray:
    if isinstance(found, Mapping):
        (name,) = _chosen(list(found), wanted)
        found = found[name]
    if isinstance(found, np.ndarray):
        return found
    if not isinstance(found, torch.Tensor):
        raise _Refused(f"it holds {type(found).__name__}, no array")
    if found.layout != torch.strided or found.is_quantized or found.device.type != "cpu":
        raise _Refused(f"it holds a tensor without plain data ({found.layout}, {found.device})")
    if found.dtype.is_complex or found.dtype == torch.bool:
        raise _Refused(f"it holds {found.dtype}")
    if found.dtype.is_floating_point != (kinds == "f"):
        raise _Refused(f"it holds {found.dtype}")
    if found.numel() * found.element_size() > found.untyped_storage().nbytes():
        raise _Refused(
            f"a tensor of shape {list(found.shape)} is claimed, with less data than that"
        )
    if found.dtype.is_floating_point:
        found = found.double()  # numpy has no bfloat16
    return found.detach().numpy()
