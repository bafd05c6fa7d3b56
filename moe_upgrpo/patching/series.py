# SPDX-License-Identifier: Apache-2.0
"""The contents of `patches/`: for each stack and version a folder of diffs and its series.yaml.

    module: megatron.core           # found by it, and what its files are imported as
    distribution: megatron-core     # the version of an installed one
    version: 0.16.1
    repository: https://github.com/NVIDIA/Megatron-LM
    commit: 55ac708…                # the revision of a checkout
    license: Apache-2.0             # of the upstream code that the diffs quote
    patches:
    - file: 0001-….patch            # in the order in which they are applied
      reason: …
      test: tests/….py::test_…      # fails before, passes after
      sha256:                       # of each file before and after; null: there is none
        megatron/core/….py: […, …]

A further stack is a further folder, nothing else; `python patches/checksums.py FOLDER ROOT` fills
in the checksums from a clean copy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from moe_upgrpo.errors import UserError
from moe_upgrpo.patching import diffs

WITHOUT = "verl, slime and miles need none (docs/verl.md, docs/slime.md)"
PACKAGE = Path(__file__).parents[1]


def patches_folder() -> Path:
    """The folder of the patches: in a wheel inside the package (by setup.py), else beside it."""
    inside = PACKAGE / "patches"
    return inside if inside.is_dir() else PACKAGE.parent / "patches"


def checksum(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Patch:
    path: Path
    reason: str
    test: str
    hunks: dict[str, list[diffs.Hunk]]  # by file
    sha256: dict[str, tuple[str | None, str | None]]  # by file: before, after


@dataclass(frozen=True, slots=True)
class Series:
    stack: str
    folder: Path
    module: str
    distribution: str | None
    version: str
    repository: str
    commit: str | None
    license: str
    patches: tuple[Patch, ...]

    @property
    def files(self) -> list[str]:
        return sorted({file for patch in self.patches for file in patch.hunks})

    def of_file(self, file: str) -> list[Patch]:
        return [patch for patch in self.patches if file in patch.hunks]

    def checksums(self, file: str) -> list[str | None]:
        """Checksums of the file as upstream has it, then after each patch that changes it."""
        chain = [patch.sha256[file] for patch in self.of_file(file)]
        return [chain[0][0], *(after for _, after in chain)]

    def move(self, file: str, content: bytes | None, to: int) -> bytes | None:
        """The file's content after its first `to` patches, made from that after any number of them.

        Raises UserError where the content is not what series.yaml says.
        """
        known, patches = self.checksums(file), self.of_file(file)
        at = known.index(checksum(content))
        for step in range(at, to):
            content = diffs.apply(content or b"", patches[step].hunks[file])
        for step in reversed(range(to, at)):
            hunks = diffs.reversed_hunks(patches[step].hunks[file])
            content = diffs.apply(content or b"", hunks)
        if known[to] is None and content == b"":
            content = None
        if checksum(content) != known[to]:
            raise UserError(
                f"{self.folder}: {file} does not come out as series.yaml says, so one of the two "
                "was changed. Nothing was written; reinstall moe_upgrpo."
            )
        return content


def _file_beside(name: str) -> str:
    if "/" in name or not diffs.is_inside(name):
        raise ValueError(f"{name!r} is not the name of a file beside it")
    return name


def load(folder: Path) -> Series:
    """Load a series. Raises UserError where series.yaml and the diffs do not fit together."""
    source = folder / "series.yaml"
    try:
        given = yaml.safe_load(source.read_text(encoding="utf-8"))
        series = Series(
            stack=folder.parent.name,
            folder=folder,
            module=given["module"],
            distribution=given.get("distribution"),
            version=str(given["version"]),
            repository=given["repository"],
            commit=given.get("commit"),
            license=given["license"],
            patches=tuple(
                Patch(
                    path=folder / _file_beside(patch["file"]),
                    reason=patch["reason"],
                    test=patch["test"],
                    hunks=diffs.parse(
                        (folder / _file_beside(patch["file"])).read_bytes(), patch["file"]
                    ),
                    sha256={file: (a, b) for file, (a, b) in patch["sha256"].items()},
                )
                for patch in given["patches"]
            ),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source} cannot be read: {type(error).__name__}: {error}.") from error
    for patch in series.patches:
        if outside := [f for f in patch.sha256 if not diffs.is_inside(str(f))]:
            raise UserError(f"{source}: {outside[0]!r} is not a path below the stack's folder.")
        if patch.sha256.keys() != patch.hunks.keys():
            raise UserError(f"{source}: {patch.path.name} changes other files than it says.")
    for file in series.files:
        chain = [patch.sha256[file] for patch in series.of_file(file)]
        if any(a[1] != b[0] for a, b in pairwise(chain)):
            raise UserError(f"{source}: the checksums of {file} do not follow on each other.")
    return series


def all_series() -> dict[str, list[Series]]:
    """List all series by stack, versions ascending."""
    found: dict[str, list[Series]] = {}
    for path in sorted(patches_folder().glob("*/*/series.yaml")):
        found.setdefault(path.parent.parent.name, []).append(load(path.parent))
    if not found:
        raise UserError(f"There are no patches in {patches_folder()}.")
    return found


def of_stack(stack: str) -> list[Series]:
    """A stack's versions with patches, ascending. Raises UserError where it has none."""
    known = all_series()
    if stack not in known:
        raise UserError(
            f"{stack!r} is not a stack with patches; known: {', '.join(known)}. {WITHOUT}."
        )
    return known[stack]
