# SPDX-License-Identifier: Apache-2.0
"""An installed or checked-out stack: its revision, its state, and how to change it.

The state is read from the files' checksums alone, so that no stored state can be wrong: each file
has one of the contents of its chain (upstream's, then after each patch), or is modified. A file is
replaced by renaming a finished one over it. A process that is killed half-way leaves each file
whole, either old or new, and `apply` and `revert` can start from either.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from moe_upgrpo.errors import UserError
from moe_upgrpo.patching.series import Series, checksum, of_stack

FIND = """
import importlib.util, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        spec = None
    found[name] = spec and spec.origin
print(json.dumps(found))
"""
IMPORT = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A stack whose revision is known. `root`: the folder with its top-level package."""

    series: Series
    root: Path

    def read(self, file: str) -> bytes | None:
        try:
            return (self.root / file).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.root} cannot be read: {error}.") from error

    def modified(self) -> list[str]:
        """The files whose content is not in their chain."""
        series = self.series
        return [f for f in series.files if checksum(self.read(f)) not in series.checksums(f)]

    @property
    def state(self) -> str:
        """clean, applied, partly applied (by a crash, or not all of the series) or modified."""
        if self.modified():
            return "modified"
        at = {
            (chain.index(checksum(self.read(file))), len(chain) - 1)
            for file in self.series.files
            for chain in [self.series.checksums(file)]
        }
        if all(index == 0 for index, _ in at):
            return "clean"
        return "applied" if all(index == last for index, last in at) else "partly applied"

    def apply(self) -> list[str]:
        """Bring every file to the end of its chain; return the files changed, if any."""
        return self._bring({f: len(self.series.checksums(f)) - 1 for f in self.series.files})

    def revert(self) -> list[str]:
        """Bring every file to upstream's content, bit for bit; return the files changed."""
        return self._bring(dict.fromkeys(self.series.files, 0))

    def _bring(self, ends: dict[str, int]) -> list[str]:
        with _locked(self.root):
            self._refuse_modified()
            changes = {}
            for file, end in ends.items():
                before = self.read(file)
                after = self.series.move(file, before, end)
                if after != before:
                    changes[file] = after
            self._refuse_links(changes)
            self._replace(changes)
        return sorted(changes)

    def _refuse_links(self, files: Iterable[str]) -> None:
        """Refuse links: a file renamed over a link replaces it, and a write through a link, or
        below a folder that is one, changes files outside of the root."""
        below = {part for f in map(PurePath, files) for part in (f, *f.parents) if part.name}
        if links := sorted(str(part) for part in below if (self.root / part).is_symlink()):
            raise UserError(
                f"{self.root} has {', '.join(links)} as links. Nothing was changed. Patch what "
                "they point to, or a copy, with --root."
            )

    def _refuse_modified(self) -> None:
        if modified := self.modified():
            raise UserError(
                f"{self.root} has {', '.join(modified)} neither as {self.series.stack} "
                f"{self.series.version} has it nor patched by this command. Nothing was changed. "
                "Restore it (reinstall, or git restore) first."
            )

    def _replace(self, changes: dict[str, bytes | None]) -> None:
        """Make all changes or none: an error half-way restores the files."""
        done = []
        try:
            try:
                for file, content in changes.items():
                    target, new, old = self._places(file)
                    old.unlink(missing_ok=True)  # left by a killed process
                    if target.exists():
                        shutil.copy2(target, old, follow_symlinks=False)
                        _own(old, target)
                        _sync(old)
                    if content is not None:
                        target.parent.mkdir(parents=True, exist_ok=True)
                        new.unlink(missing_ok=True)  # through a link, others' files would change
                        new.write_bytes(content)
                        if target.exists():
                            _own(new, target)
                            shutil.copymode(target, new)
                        _sync(new)
                for file, content in changes.items():
                    target, new, _ = self._places(file)
                    done.append(file)
                    if content is None:
                        target.unlink()
                    else:
                        os.replace(new, target)
                for folder in {self._places(file)[0].parent for file in changes}:
                    _sync(folder)
            except BaseException:
                for file in done:
                    target, _, old = self._places(file)
                    if old.exists():
                        os.replace(old, target)
                    else:
                        target.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise UserError(
                f"{self.root} cannot be changed: {error}. It is {self.state}. Give yourself write "
                "access, or patch a copy with --root."
            ) from error
        finally:
            for file in self.series.files:
                with suppress(OSError):
                    for left in self._places(file)[1:]:
                        left.unlink(missing_ok=True)

    def _places(self, file: str) -> tuple[Path, Path, Path]:
        """The paths of the file, of its new content and of its old content, side by side."""
        target = self.root / file
        name = f".{target.name}.moe_upgrpo"
        return target, target.with_name(f"{name}.new"), target.with_name(f"{name}.old")

    def verify(self, python: str) -> list[str]:
        """Import the changed modules in a fresh process and return their names. UserError if they
        are not the patched ones or cannot be imported."""
        self._refuse_modified()
        if self.state != "applied":
            raise UserError(
                f"{self.series.stack} in {self.root} is {self.state}, not applied: "
                f"moe-upgrpo patch apply {self.series.stack} first."
            )
        modules = {_module(f): f for f in self.series.files if f.endswith(".py")}
        path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        found = _run(
            python,
            IMPORT,
            list(modules),
            os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        for name, file in modules.items():
            if Path(found[name]).resolve() != (self.root / file).resolve():
                raise UserError(f"{python} imports {name} from {found[name]}, not {self.root}.")
        return list(modules)


class UnknownRevision(UserError):
    """A stack in a revision that has no patches here."""


def find(stack: str, root: Path | None, python: str) -> Checkout:
    """Find the stack below `root`, or else the one that `python` imports.

    Raises UserError where there is none or its revision has no patches here.
    """
    versions = of_stack(stack)
    if root is None:
        root = installed([versions[0].module], python)[versions[0].module]
        if root is None:
            raise UserError(
                f"{python} has no {versions[0].module}: install {stack}, name another --python, "
                "or the folder of a checkout with --root."
            )
    return recognise(versions, root)


def installed(modules: list[str], python: str) -> dict[str, Path | None]:
    """The folder that holds the top-level package of each module that `python` finds."""
    found = _run(python, FIND, modules, dict(os.environ))
    return {
        name: Path(origin).parents[name.count(".") + 1] if origin else None
        for name, origin in found.items()
    }


def recognise(versions: list[Series], root: Path) -> Checkout:
    """Recognise a stack by git's HEAD, the installed distribution, or else by the files themselves.

    Raises UnknownRevision, naming the known revisions, where none of them fits.
    """
    known = " or ".join(f"{s.version}{f' ({s.commit[:10]})' if s.commit else ''}" for s in versions)
    take = "Check out or install that, or go without."
    package = versions[0].module.replace(".", "/")
    stack = versions[0].stack
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder; give the one that holds {package}.")
    if not (root / package).is_dir():
        raise UserError(f"{root} has no {package}: --root is the folder that holds the package.")
    if commit := head(root):
        for series in versions:
            if series.commit == commit:
                return Checkout(series, root)
        raise UnknownRevision(
            f"{root} is {stack} at {commit}; there are patches for {known}. {take}"
        )
    held = {
        (name, found.version)
        for name in {series.distribution for series in versions} - {None}
        for found in importlib.metadata.distributions(name=name, path=[str(root)])
    }
    for series in versions:
        if (series.distribution, series.version) in held:
            return Checkout(series, root)
    for name, version in sorted(held):
        raise UnknownRevision(f"{root} has {name} {version}; there are patches for {known}. {take}")
    for series in versions:
        if not Checkout(series, root).modified():
            return Checkout(series, root)
    others = [(s, Checkout(s, root).modified()) for s in versions]
    nearest, files = min(others, key=lambda found: len(found[1]) / len(found[0].files))
    raise UnknownRevision(
        f"{root} says no revision (neither git nor a distribution that is known here), and its "
        f"files are those of none with patches: {known}. Other than in {nearest.version}: "
        f"{', '.join(files)}. {take}"
    )


def head(root: Path) -> str | None:
    """The commit that is checked out; None where `root` is not a git checkout."""
    git = root / ".git"
    if git.is_file():  # a worktree or a submodule
        git = root / _name_in(git).removeprefix("gitdir:").strip()
    try:
        head = _name_in(git / "HEAD")
    except OSError:
        return None
    if not head.startswith("ref: "):
        return head
    ref = head.removeprefix("ref: ")
    common = git / "commondir"
    folders = [git, git / _name_in(common)] if common.exists() else [git]
    for folder in folders:
        with suppress(OSError):
            return _name_in(folder / ref)
        with suppress(OSError):
            for line in _name_in(folder / "packed-refs").splitlines():
                if line.endswith(f" {ref}"):
                    return line.split()[0]
    return "a commit that cannot be read"


def _name_in(file: Path) -> str:
    """Decode the paths and branch names that git wrote as file names in this locale."""
    return os.fsdecode(file.read_bytes()).strip()


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lock the stack for one change at a time; the lock ends with the process."""
    folder = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process is patching {root}; wait for it.") from error
        yield
    finally:
        os.close(folder)


def _own(path: Path, like: Path) -> None:
    """Restore a file's owner, which only root may do, and must."""
    with suppress(OSError):
        os.chown(path, like.stat().st_uid, like.stat().st_gid)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _run(python: str, code: str, names: list[str], environment: dict[str, str]) -> dict[str, str]:
    try:
        done = subprocess.run(
            [python, "-c", code, *names],
            capture_output=True,
            env=environment,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error}.") from error
    if done.returncode:
        raise UserError(f"{python} cannot import {', '.join(names)}:\n{done.stderr.strip()}")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"--python {python} gave no answer; is it a Python interpreter?") from error
