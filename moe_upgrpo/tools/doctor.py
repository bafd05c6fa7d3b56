# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo doctor`: the installed packages, which of them a run would use, how to get others.

Packages are looked up, not imported (except torch and Megatron-Core, to see that they can be), so a
broken one is found and does no harm.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

from moe_upgrpo import __version__, kernels
from moe_upgrpo.extras import install
from moe_upgrpo.megatron import releases
from moe_upgrpo.rollout.engines import ENGINES

NOT_RUN = "not run (no machine of ours could)"
TE_RUN = "its kernels were not run (no machine of ours could)"
SOURCE = "make setup, or pip install -e '.[train,report]' in the repository"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One package. state: "ok", "missing", "wrong" (installed, but not usable) or "unused"."""

    name: str
    version: str | None
    state: str
    feature: str  # what it is for
    note: str = ""
    get: str = ""  # how to get it, where it is missing or wrong
    base: bool = False  # nothing trains without it


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    python: str
    platform: str
    moe_upgrpo: str = __version__
    torch: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    code_paths: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # why nothing trains here

    @property
    def can_train(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"can_train": self.can_train}


class Installed:
    """The distributions in the folders of `path`, by their names on PyPI."""

    def __init__(self, path: Sequence[str]):
        self.path = list(path)
        self._found = {}
        for found in importlib.metadata.distributions(path=self.path):
            name = found.metadata["Name"]
            if name:  # the first on the path is the one that is imported
                self._found.setdefault(canonicalize_name(name), found)

    def version(self, name: str) -> str | None:
        found = self._found.get(canonicalize_name(name))
        return found and found.version

    def entry_points(self, name: str, group: str) -> list[str]:
        found = self._found.get(canonicalize_name(name))
        return [e.value for e in found.entry_points if e.group == group] if found else []

    def module_file(self, package: str, file: str) -> bool:
        """Whether `package` can be imported and holds `file`; nothing is imported."""
        spec = PathFinder.find_spec(package, self.path)
        folders = (spec and spec.submodule_search_locations) or ()
        return any((Path(folder) / file).is_file() for folder in folders)

    def has_library(self, name: str) -> bool:
        """Whether a compiled library of Transformer Engine is where that package looks for it."""
        places = ("", "transformer_engine", "transformer_engine/wheel_lib")
        folders = [Path(folder) / place for folder in self.path for place in places]
        return any(any(folder.glob(f"{name}*.so")) for folder in folders)


def diagnose(
    path: Sequence[str] | None = None,
    *,
    torch_facts: Callable[[], dict[str, Any]] | None = None,
    code_paths: Callable[[], dict[str, str]] | None = None,
) -> Diagnosis:
    """Look into the folders of `path` (None: this Python's). The other two are for tests: what
    torch says about itself and its devices, and the code paths of `moe_upgrpo.megatron.model`."""
    installed = Installed(sys.path if path is None else path)
    problems: list[str] = []
    facts: dict[str, Any] = {}
    cpu: dict[str, Any] = {}
    items = _base(installed, problems)
    try:
        facts = (torch_facts or _torch_facts)()
        cpu = kernels.facts()
    except Exception as error:  # a broken torch raises anything
        problems.append(f"torch cannot be imported: {error}")
    cuda = bool(facts.get("cuda"))
    items += _gpu_packages(installed, cuda)
    try:
        items += _engines(installed, cuda)
    except Exception as error:  # their modules import torch
        problems.append(f"the engines cannot be looked at: {error}")
    items += _extras(installed)
    paths = {}
    if not problems:
        try:
            paths = (code_paths or _code_paths)()
        except Exception as error:
            problems.append(
                str(releases.missing(error) or f"Megatron-Core cannot be imported: {error}")
            )
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        torch=facts,
        cpu=cpu,
        items=items,
        code_paths=paths,
        problems=problems,
    )


def _base(installed: Installed, problems: list[str]) -> list[Item]:
    """Requirements in this package's own metadata, with those of training."""
    items = []
    try:
        requires = importlib.metadata.requires("moe_upgrpo") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"moe_upgrpo runs from a folder and is not installed: {SOURCE}")
        return []
    for requirement in map(Requirement, requires):
        if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
            continue
        requirement.marker = None  # it holds, and pip would be given an extra it does not belong to
        version = installed.version(requirement.name)
        right = version is not None and requirement.specifier.contains(version, prereleases=True)
        items.append(
            Item(
                name=requirement.name,
                version=version,
                state="ok" if right else "wrong" if version else "missing",
                feature="training",
                note="" if right or not version else f"{requirement.specifier} is needed",
                get="" if right else f"pip install '{requirement}'",
                base=True,
            )
        )
        if not right:
            found = f"{version} is installed" if version else "is not installed"
            problems.append(f"{requirement.name} {found}; {requirement} is needed")
    return items


def _torch_facts() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "built for CUDA": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "backend": "nccl" if cuda else "gloo" if dist.is_gloo_available() else None,
    }


def _code_paths() -> dict[str, str]:
    from moe_upgrpo.megatron import backend, model

    on = "CUDA, NCCL" if backend.has_cuda() else "CPU, gloo: stands in for CUDA's calls"
    return {"device": on} | model.code_paths()


def _gpu_packages(installed: Installed, cuda: bool) -> list[Item]:
    """Packages for GPUs, used where installed and never required."""
    here = "" if cuda else " (needs an NVIDIA GPU; this machine has none)"
    items = [_transformer_engine(installed, here)]
    version = installed.version("flash-attn")
    items.append(
        Item(
            name="flash-attn",
            version=version,
            state="ok" if version else "missing",
            feature="Transformer Engine's attention",
            note=NOT_RUN,
            get="" if version else "pip install --no-build-isolation flash-attn" + here,
        )
    )
    items.append(
        Item(
            name="grouped_gemm",
            version=installed.version("grouped_gemm"),
            state="unused",
            feature="nothing here",
            note="experts run in torch's grouped product, or Transformer Engine's grouped MLP",
        )
    )
    version = installed.version("apex")
    source = (
        "NVIDIA's is built from source: git clone https://github.com/NVIDIA/apex, then "
        "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex" + here
    )
    nvidia = installed.module_file("apex", "optimizers/fused_adam.py")
    if nvidia or not version:
        state = "ok" if nvidia else "missing"
        note, get = NOT_RUN, "" if nvidia else source
    else:
        state = "wrong"
        note = (
            "this is the project `apex` of PyPI, which has nothing to do with NVIDIA Apex (no "
            "apex.optimizers.FusedAdam)"
        )
        get = f"pip uninstall apex. {source}"
    shown = version or ("from source" if nvidia else None)
    items.append(
        Item(
            name="apex",
            version=shown,
            state=state,
            feature="fused Adam on GPUs",
            note=note,
            get=get,
        )
    )
    return items


_TE_PARTS = (  # by their names on PyPI; a build from a checkout is one part
    "transformer_engine",
    "transformer_engine_torch",
    "transformer_engine_cu12",
    "transformer_engine_cu13",
)


def _transformer_engine(installed: Installed, here: str) -> Item:
    """Its parts are installed one by one; without one of them none of it can be imported, and
    neither can Megatron-Core (`releases.missing`)."""
    parts = {name: v for name in _TE_PARTS if (v := installed.version(name))}
    about = dict(name="transformer_engine", feature="faster layers on GPUs")
    about["version"] = parts.get("transformer_engine")
    whole = "pip install --no-build-isolation 'transformer_engine[pytorch]'"
    if not parts:
        return Item(**about, state="missing", note=TE_RUN, get=whole + here)
    if "transformer_engine" not in parts:
        lacking = "the package transformer_engine"
    elif not installed.has_library("transformer_engine_torch"):
        lacking = "its part for PyTorch"
    elif len(set(parts.values())) > 1:
        lacking = "parts of one version: " + ", ".join(f"{n} {v}" for n, v in parts.items())
    else:
        return Item(**about, state="ok", note=TE_RUN)
    return Item(
        **about,
        state="wrong",
        note=f"it lacks {lacking}, and Megatron-Core cannot be imported beside it",
        get=f"{whole}, or pip uninstall {' '.join(parts)}",
    )


def _engines(installed: Installed, cuda: bool) -> Iterator[Item]:
    for name, record in ENGINES.items():
        if record.look is not None:
            found = asdict(record.look(installed, cuda=cuda, source=SOURCE))
            if found.pop("never_run"):
                found["note"] += f"; {NOT_RUN}"
            yield Item(**found, feature=f"--engine {name}")


EXTRAS = (
    ("math-verify", "math", "--data: answers checked"),
    ("matplotlib", "report", "report.html"),
    ("jinja2", "report", "report.html"),
    ("tensorboard", "tracking", "--track tensorboard"),
    ("wandb", "tracking", "--track wandb"),
)


def _extras(installed: Installed) -> list[Item]:
    return [
        Item(
            name=name,
            version=installed.version(name),
            state="ok" if installed.version(name) else "missing",
            feature=feature,
            get="" if installed.version(name) else install(extra),
        )
        for name, extra, feature in EXTRAS
    ]


def show(found: Diagnosis, console: Console) -> None:
    """Print the packages, the code paths, and what prevents training."""
    torch = found.torch
    devices = ", ".join(torch.get("devices", [])) or "no GPU"
    console.print(
        f"moe_upgrpo {found.moe_upgrpo}, Python {found.python}, torch {torch.get('version')}, "
        f"CUDA {torch.get('cuda') or 'none'} ({devices}), collectives by {torch.get('backend')}"
    )
    if torch.get("cuda"):
        console.print(f"CUDA and NCCL: {NOT_RUN}")
    table = Table("package", "version", "state", "for", "note")
    for item in found.items:
        note = ". ".join(text for text in (item.note, item.get and f"Get it: {item.get}") if text)
        table.add_row(item.name, item.version or "–", item.state, item.feature, note)
    console.print(table)
    if found.code_paths:
        paths = Table("code path", "selected here")
        for name, path in found.code_paths.items():
            paths.add_row(name, path)
        console.print(paths)
    if found.cpu:
        used = Table("CPU kernels", "selected here")
        for name, kernel in kernels.describe(found.cpu).items():
            used.add_row(name, kernel)
        console.print(used)
    if found.problems:
        console.print("Nothing trains here:")
        for problem in found.problems:
            console.print(f"- {problem}")
    else:
        console.print("This installation can train.")
