"""A folder with what a machine without network lacks: pure-Python packages, and a warm start.

    python -m benchmarks.gpu --carry [--carry-mb 40]

Compiled packages (torch, numpy, pyarrow, …) run on one Python only and must already be installed;
so must anything that does not fit the limit. A distribution is carried with all its requirements.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "moe_upgrpo"
FIRST = "megatron-core"  # no GPU image has it
# Distributions with compiled files that also work without them.
WITHOUT_BINARIES = {
    "megatron-core": "an index of pre-training data sets, which is not used here",
    "pyyaml": "the faster of two parsers",
}
_BINARY = re.compile(r"\.(so|pyd|dll|dylib)(\.|$)")
# The files in a distribution's metadata that say where it was installed from.
_LEFT_OUT = ("direct_url.json", "RECORD", "INSTALLER", "REQUESTED")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    name: str
    version: str
    mb: float  # 1e6 bytes
    carried: bool
    why: str


def parts(limit_mb: float) -> list[Part]:
    """Every distribution that training requires, smallest first after Megatron-Core, and whether it
    is carried, together with what it requires in turn."""
    found, left = [], limit_mb
    waiting, seen = [PACKAGE, FIRST], set()
    level: list[Distribution] = []
    while waiting:
        for name in waiting:
            if _canonical(name) not in seen:
                seen.add(_canonical(name))
                level.append(importlib.metadata.distribution(name))
        waiting = []
        level.sort(key=lambda d: (d.name not in (PACKAGE, FIRST), _megabytes(d)))
        for distribution in level:
            size, why = _megabytes(distribution), ""
            if _compiled(distribution):
                why = "compiled: has to be there"
            elif size > left:
                why = f"over the limit of {limit_mb:g} MB: has to be there"
            else:
                left -= size
                waiting += _required(distribution)
            found.append(
                Part(
                    name=distribution.name,
                    version=distribution.version,
                    mb=round(size, 2),
                    carried=not why,
                    why=why,
                )
            )
        level = []
    return found


def build(folder: Path, found: list[Part]) -> float:
    """Make `folder` anew with the carried parts under site/; returns its size in MB."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for part in found:
        if part.carried:
            for source, target in _files(importlib.metadata.distribution(part.name)):
                (site / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, site / target)
    return size_mb(folder)


def take_warm_start(folder: Path, source: Path, limit_mb: float) -> str:
    """Copy the newest warm start below `source`, as `make train` leaves it; says what was done."""
    made = sorted(source.glob("warm-start-*"), key=lambda path: path.stat().st_mtime)
    if not made:
        return f"no warm start in {source}: make train leaves one; without it the run is random"
    size = sum(file.stat().st_size for file in made[-1].rglob("*") if file.is_file()) / 1e6
    if size > limit_mb:
        return f"{made[-1].name} has {size:.1f} MB, {limit_mb:.1f} are left: not carried"
    shutil.rmtree(folder / "cache", ignore_errors=True)
    shutil.copytree(made[-1], folder / "cache" / made[-1].name)
    return f"{made[-1].name}, {size:.1f} MB: carried"


def size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _files(distribution: Distribution) -> Iterator[tuple[Path, Path]]:
    """(file, its place below site/) for imported files and metadata."""
    for file in distribution.files or ():
        if ".." in file.parts or "__pycache__" in file.parts or _BINARY.search(file.name):
            continue
        if file.name in _LEFT_OUT or file.suffix == ".pth" or file.name.startswith("__editable__"):
            continue
        source = Path(file.locate())
        if source.is_file():
            yield source, Path(*file.parts)


def _megabytes(distribution: Distribution) -> float:
    return sum(source.stat().st_size for source, _ in _files(distribution)) / 1e6


def _compiled(distribution: Distribution) -> bool:
    if _canonical(distribution.name) in WITHOUT_BINARIES:
        return False
    return any(_BINARY.search(file.name) for file in distribution.files or ())


def _required(distribution: Distribution) -> list[str]:
    """Names of the requirements for training that are installed here; others without extra."""
    extra = "train" if _canonical(distribution.name) == _canonical(PACKAGE) else ""
    names = []
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        names.append(requirement.name)
    return names


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
