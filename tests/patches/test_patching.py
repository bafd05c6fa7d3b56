"""The patch command on a toy stack and on copies of what is installed of Megatron-Core."""

import difflib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from moe_upgrpo import patching
from moe_upgrpo.errors import UserError
from moe_upgrpo.patching import diffs, series
from moe_upgrpo.patching.command import PatchCommand, run

REPOSITORY = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Three states of the toy stack's files: as upstream has them, after one patch, after both.
LINES = [f"line_{i} = {i}\n" for i in range(40)]
STATES = [
    {
        "toy/__init__.py": "",
        "toy/a.py": "".join(LINES),
        "toy/b.py": "x = 1\r\ny = 2",  # no newline at its end
        "toy/c.py": "unchanged = True\n",
    },
    {
        "toy/a.py": "".join([*LINES[:3], "new = 1\n", *LINES[4:30], *LINES[33:]]),
        "toy/n.py": "n=1\n",
    },
    {
        "toy/a.py": "".join([*LINES[:3], "new = 2\n", *LINES[4:30], *LINES[33:]]),
        "toy/b.py": "x = 3",
    },
]
PATCHES = [
    patch
    for versions in patching.all_series().values()
    for version in versions
    for patch in version.patches
]
LINE = re.compile(r"[^\n]*\n|[^\n]+")  # a carriage return is of its line
FILES = ["toy/a.py", "toy/b.py", "toy/n.py"]


def whole(step: int) -> dict[str, bytes]:
    files = {}
    for state in STATES[: step + 1]:
        files |= {name: text.encode() for name, text in state.items()}
    return files


def diff(old: dict, new: dict) -> str:
    """By the standard library, and git's words for what has no newline at its end."""
    found = "A message.\n--- of several lines\n\n"
    for name in sorted(new):
        before, after = old.get(name, b"").decode(), new[name].decode()
        if before == after:
            continue
        for line in difflib.unified_diff(
            LINE.findall(before),
            LINE.findall(after),
            f"a/{name}" if name in old else "/dev/null",
            f"b/{name}",
        ):
            found += line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
    return found


def files_below(root: Path) -> dict[str, bytes]:
    """Everything, leftovers included."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder of patches with the toy stack, made as its authors would."""
    folder = tmp_path_factory.mktemp("patches") / "toy" / "1.0"
    folder.mkdir(parents=True)
    names = ["0001-one.patch", "0002-two.patch"]
    for step, name in enumerate(names):
        (folder / name).write_bytes(diff(whole(step), whole(step + 1)).encode())
    given = {
        "module": "toy",
        "distribution": "toy-dist",
        "version": "1.0",
        "repository": "https://example.org/toy",
        "commit": COMMIT,
        "license": "MIT",
        "patches": [{"file": n, "reason": f"reason of {n}", "test": "tests"} for n in names],
    }
    (folder / "series.yaml").write_text(yaml.safe_dump(given))
    checksums = REPOSITORY / "patches" / "checksums.py"
    clean = make(tmp_path_factory.mktemp("clean"))
    subprocess.run([sys.executable, checksums, folder, clean], check=True)
    return folder.parents[1]


@pytest.fixture
def patches(built, tmp_path, monkeypatch):
    """A copy of it, in place of this package's."""
    shutil.copytree(built, tmp_path / "patches")
    monkeypatch.setattr(series, "patches_folder", lambda: tmp_path / "patches")
    return tmp_path / "patches/toy/1.0"


def make(root: Path, step: int = 0) -> Path:
    for name, content in whole(step).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "root")


def toy(root: Path) -> patching.Checkout:
    return patching.find("toy", root, sys.executable)


def say(command: str, stack=None, root=None, python=sys.executable) -> str:
    out = Console(file=io.StringIO(), width=200, markup=False)
    run(PatchCommand(command=command, stack=stack, root=root, python=python), out)
    return out.file.getvalue()


def test_apply_verify_and_revert(patches, root):
    (root / "toy/a.py").chmod(0o640)
    before = files_below(root)
    assert toy(root).state == "clean"
    assert toy(root).apply() == FILES
    assert files_below(root) == whole(2) and toy(root).state == "applied"
    assert (root / "toy/a.py").stat().st_mode & 0o777 == 0o640
    assert toy(root).apply() == []  # a second time there is nothing to do
    assert files_below(root) == whole(2)
    assert toy(root).revert() == FILES
    assert files_below(root) == before and toy(root).state == "clean"
    assert (root / "toy/a.py").stat().st_mode & 0o777 == 0o640
    assert toy(root).revert() == []
    with pytest.raises(UserError, match="clean, not applied: moe-upgrpo patch apply toy"):
        toy(root).verify(sys.executable)


@pytest.mark.parametrize("after", ["apply", "revert"])
@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_killed_process_leaves_what_both_commands_start_from(patches, root, after, call, start):
    """At each of its file operations; what is left is whole files, and nothing after the next."""
    kills = 0
    while True:
        shutil.rmtree(root)
        make(root, start)
        if start == 0:
            assert "toy/n.py" not in files_below(root)
        if not killed(toy(root), call, kills, apply=start == 0):
            break
        kills += 1
        for name, content in files_below(root).items():
            assert content in (whole(0).get(name), whole(2).get(name)) or ".moe_upgrpo." in name
        assert toy(root).state in ("clean", "applied", "partly applied")
        getattr(toy(root), after)()
        assert files_below(root) == whole(2 if after == "apply" else 0)
    assert kills >= 1


def killed(checkout: patching.Checkout, call: str, at: int, apply: bool) -> bool:
    """Whether the change, in a process of its own, got to its `at`-th call and was killed there."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(os, call), 0

        def last(*args, **kwargs):
            nonlocal calls
            if calls == at:
                os._exit(9)
            calls += 1
            return original(*args, **kwargs)

        setattr(os, call, last)
        try:
            checkout.apply() if apply else checkout.revert()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_half_way_changes_nothing(patches, root, monkeypatch, at):
    original, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        return original(source, target)

    before = files_below(root)
    with monkeypatch.context() as context:
        context.setattr(os, "replace", replace)
        with pytest.raises(UserError, match=r"No space left on device.*It is clean"):
            toy(root).apply()
    assert len(calls) > at and files_below(root) == before


def test_what_a_killed_process_left_is_not_what_was_there(patches, root, monkeypatch):
    (root / "toy/.n.py.moe_upgrpo.old").write_text("stale = 1\n")

    original = os.replace

    def replace(source, target):
        if source.name == ".n.py.moe_upgrpo.new":
            raise OSError(5, "Input/output error")
        return original(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", replace)
        with pytest.raises(UserError, match=r"Input/output error.*It is clean"):
            toy(root).apply()
    assert files_below(root) == whole(0)


def test_a_read_only_folder(patches):
    """Also as root, whom no permission keeps from writing: the child is nobody then."""
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder))
        root.chmod(0o755)
        (root / "toy").chmod(0o555)
        before = files_below(root)
        checkout = toy(root)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                checkout.apply()
                os.write(writing, b"changed")
            except (UserError, OSError) as error:
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        message = os.read(reading, 10000).decode()
        assert "Permission denied" in message and "It is clean" in message
        assert files_below(root) == before
        (root / "toy").chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: others cannot give files away")
def test_a_file_stays_its_owners(patches, root, monkeypatch):
    def owners():
        return {p.name: (p.stat().st_uid, p.stat().st_gid) for p in root.rglob("*.py")}

    for path in root.rglob("*.py"):
        os.chown(path, 65534, 65533)
    before = owners()
    toy(root).apply()
    assert owners() == before | {"n.py": (os.geteuid(), os.getegid())}
    toy(root).revert()
    assert owners() == before
    original = os.replace

    def replace(source, target):
        if source.name == ".b.py.moe_upgrpo.new":
            raise OSError(5, "Input/output error")
        return original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="Input/output error"):
        toy(root).apply()
    assert owners() == before


def test_links_are_refused_and_left(patches, root, tmp_path):
    """Such as those of uv's link mode: what they point to is shared with other environments."""
    (root / "toy/b.py").rename(tmp_path / "b.py")
    (root / "toy/b.py").symlink_to(tmp_path / "b.py")
    before = files_below(root)
    with pytest.raises(UserError, match=r"toy/b.py as links. Nothing was changed"):
        toy(root).apply()
    assert files_below(root) == before and (root / "toy/b.py").is_symlink()


@pytest.mark.fault(
    "Servers and other people's files",
    "a patch series with `..` or an absolute name",
    "refused before anything changes",
)
@pytest.mark.parametrize("path", ["../out.py", "{outside}", "toy/../../out.py", "/out.py"])
def test_a_series_that_leads_outside_of_its_root_is_refused(path, patches, root, tmp_path):
    """A diff that makes a file, and a series.yaml that agrees with it."""
    outside = tmp_path / "out.py"
    path = path.format(outside=outside)
    new = f"A message.\n--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+n=1\n"
    (patches / "0001-one.patch").write_text(new)
    manifest = yaml.safe_load((patches / "series.yaml").read_text())
    sums = {path: [None, hashlib.sha256(b"n=1\n").hexdigest()]}
    manifest["patches"] = [manifest["patches"][0] | {"sha256": sums}]
    (patches / "series.yaml").write_text(yaml.safe_dump(manifest))
    before = files_below(tmp_path)
    with pytest.raises(UserError, match="is not a path below"):
        patching.Checkout(patching.load(patches), root).apply()
    assert files_below(tmp_path) == before and not outside.exists()


@pytest.mark.parametrize("name", ["../0001-one.patch", "/etc/hostname", "..", "a/b.patch"])
def test_a_series_names_files_beside_it(name, patches):
    manifest = yaml.safe_load((patches / "series.yaml").read_text())
    manifest["patches"][0]["file"] = name
    (patches / "series.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(UserError, match="is not the name of a file beside it"):
        patching.load(patches)


@pytest.mark.fault(
    "Servers and other people's files",
    "a linked folder below a patch's root",
    "refused; nothing is written through it",
)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_nothing_is_written_through_a_linked_folder(where, patches, root, tmp_path):
    real = (root if where == "inside" else tmp_path) / "real"
    (root / "toy").rename(real)
    (root / "toy").symlink_to(real)
    before = files_below(real)
    with pytest.raises(UserError, match=r"has toy as links\. Nothing was changed"):
        toy(root).apply()
    assert files_below(real) == before


def test_nothing_is_written_through_a_link_that_waits_beside_a_file(patches, root, tmp_path):
    """By the names that the command uses for what a file becomes and was."""
    theirs = tmp_path / "theirs"
    theirs.write_text("keep")
    for name in (".a.py.moe_upgrpo.new", ".a.py.moe_upgrpo.old"):
        (root / "toy" / name).symlink_to(theirs)
    assert toy(root).apply() == FILES
    assert theirs.read_text() == "keep" and files_below(root) == whole(2)


def test_modified_files_are_refused_and_left(patches, root):
    (root / "toy/b.py").write_text("mine = 1\n")
    before = files_below(root)
    for command in ("apply", "revert"):
        # Of no revision that is written down anywhere: then the files decide.
        with pytest.raises(
            patching.UnknownRevision, match=r"none with patches: 1\.0.*in 1\.0: toy/b\.py\."
        ):
            say(command, "toy", root)
    installed_as(root, "1.0")
    before = files_below(root)
    for command in ("apply", "revert", "verify"):
        with pytest.raises(UserError, match=r"has toy/b.py neither as toy 1.0 has it.*Nothing"):
            say(command, "toy", root)
    assert files_below(root) == before
    assert "modified" in say("list", root=root)


def test_a_patch_of_the_series_applied_by_hand_is_gone_on_from(patches, root):
    make(root, 1)
    assert toy(root).state == "partly applied"
    assert toy(root).apply() == ["toy/a.py", "toy/b.py"]
    assert files_below(root) == whole(2)
    (root / "toy/n.py").unlink()
    assert toy(root).state == "partly applied"
    toy(root).revert()
    assert files_below(root) == whole(0)


def installed_as(root: Path, version: str) -> None:
    info = root / f"toy_dist-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-dist\nVersion: {version}\n")


def test_another_version_is_refused(patches, root):
    installed_as(root, "1.1")
    before = files_below(root)
    for command in ("apply", "verify", "revert"):
        with pytest.raises(patching.UnknownRevision, match=r"toy-dist 1.1; there are.*1.0"):
            say(command, "toy", root)
    assert files_below(root) == before
    assert "unknown revision" in say("list", root=root)


@pytest.mark.parametrize("kind", ["detached", "branch", "packed", "worktree"])
def test_a_git_checkout_is_known_by_its_commit(patches, root, kind):
    git = root / ".git"
    git.mkdir()
    for commit, known in ((COMMIT, True), ("f" * 40, False)):
        (git / "HEAD").write_text(f"{commit}\n" if kind == "detached" else "ref: refs/heads/main\n")
        if kind == "branch":
            (git / "refs/heads").mkdir(parents=True, exist_ok=True)
            (git / "refs/heads/main").write_text(f"{commit}\n")
        if kind == "packed":
            (git / "packed-refs").write_text(
                f"# pack-refs\n{'e' * 40} refs/x\n{commit} refs/heads/main\n"
            )
        if kind == "worktree":
            main, tree = root / "elsewhere", root / "elsewhere/worktrees/one"
            (main / "refs/heads").mkdir(parents=True, exist_ok=True)
            (main / "refs/heads/main").write_text(f"{commit}\n")
            tree.mkdir(parents=True, exist_ok=True)
            (tree / "HEAD").write_text("ref: refs/heads/main\n")
            (tree / "commondir").write_text("../..\n")
            shutil.rmtree(git, ignore_errors=True)
            git.unlink(missing_ok=True)
            git.write_text(f"gitdir: {tree}\n")
        if known:
            assert toy(root).state == "clean"
        else:
            with pytest.raises(patching.UnknownRevision, match=r"toy at fff.*1.0 \(0123456789\)"):
                toy(root)
        if kind == "worktree":
            git.unlink()
            git.mkdir()


def test_a_folder_that_cannot_be_entered(patches, root, monkeypatch):
    def is_dir(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as context:  # root may enter any
        context.setattr(Path, "is_dir", is_dir)
        for command in ("apply", "list"):
            with pytest.raises(UserError, match=r"Permission denied.*Give yourself access"):
                say(command, "toy", root)


def test_two_at_a_time_are_refused(patches, root):
    held = os.open(root, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="Another process is patching"):
        toy(root).apply()
    os.close(held)
    assert toy(root).apply()


def test_what_is_not_there_is_named(patches, root, tmp_path):
    with pytest.raises(
        UserError, match=r"'nothing' is not a stack with patches; known: toy\. verl"
    ):
        say("apply", "nothing")
    with pytest.raises(UserError, match=r"no stack given; usage: moe-upgrpo patch apply STACK"):
        say("apply")
    with pytest.raises(UserError, match="has no toy: --root is the folder that holds"):
        say("apply", "toy", tmp_path)
    with pytest.raises(UserError, match="has no toy: install toy"):
        say("apply", "toy")
    with pytest.raises(UserError, match="/no/python cannot be run"):
        say("list", python="/no/python")
    with pytest.raises(UserError, match=r"--python .*true gave no answer"):
        say("apply", "toy", python=shutil.which("true"))
    for command in ("list", "apply"):
        with pytest.raises(UserError, match="nowhere is not a folder"):
            say(command, "toy", tmp_path / "nowhere")
    with pytest.raises(UserError, match="'nothing' is not a stack with patches; known: toy"):
        say("list", "nothing")
    assert "not installed" in say("list") and "not installed" in say("list", "toy")
    shown = say("show", "toy")
    assert "reason of 0002-two.patch" in shown and "+new = 2" in shown and "MIT" in shown


def test_verify_imports_the_patched_files_and_no_others(patches, root, tmp_path, monkeypatch):
    toy(root).apply()
    monkeypatch.setenv("PYTHONPATH", str(make(tmp_path / "other")))
    assert toy(root).verify(sys.executable) == ["toy.a", "toy.b", "toy.n"]
    assert "imported by" in say("verify", "toy", root)
    (root / "toy/__init__.py").write_text(f"__path__ = [{str(tmp_path / 'other/toy')!r}]\n")
    make(tmp_path / "other", 2)
    with pytest.raises(UserError, match=r"imports toy.a from .*other/toy/a.py, not"):
        toy(root).verify(sys.executable)
    (root / "toy/__init__.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"cannot import toy.a, (.|\n)*nothing_of_that_name"):
        toy(root).verify(sys.executable)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing at all\n", "no change found"),
        ("--- a/x\n+++ x\n@@ -1 +1 @@\n-a\n+b\n", "'x' is not a path below b/"),
        ("--- a/x\n+++ b/../x\n@@ -1 +1 @@\n-a\n+b\n", "is not a path below b/"),
        ("--- a/x\n+++ b//x\n@@ -1 +1 @@\n-a\n+b\n", "'b//x' is not a path below b/"),
        ("--- a/x\n+++ b/a/./x\n@@ -1 +1 @@\n-a\n+b\n", "is not a path below b/"),
        ("--- a/x\n+++ b/\n@@ -1 +1 @@\n-a\n+b\n", "is not a path below b/"),
        ("--- a/x\n+++ b/x\0\n@@ -1 +1 @@\n-a\n+b\n", "is not a path below b/"),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n a\n-b\n", "is not complete"),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n a\n?b\n", "line 5 is not of a unified diff"),
    ],
)
def test_what_is_not_a_diff_is_refused(content, message):
    with pytest.raises(UserError, match=message):
        diffs.parse(content.encode(), "x.patch")


def test_lines_elsewhere_are_not_taken():
    """Without fuzz: the old lines are there, one line further down."""
    hunks = diffs.parse(b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "x.patch")["x"]
    assert diffs.apply(b"a\nc\n", hunks) == b"b\nc\n"
    with pytest.raises(ValueError, match="lines 1"):
        diffs.apply(b"z\na\nc\n", hunks)


def test_a_carriage_return_within_a_line_does_not_end_it():
    hunks = diffs.parse(b"--- a/x\n+++ b/x\n@@ -2 +2 @@\n-a\rb\n+c\r\n", "x.patch")["x"]
    assert diffs.apply(b"a\rz\na\rb\n", hunks) == b"a\rz\nc\r\n"


def test_a_diff_that_was_changed_since_is_refused(patches, root):
    diff = patches / "0002-two.patch"
    diff.write_text(diff.read_text().replace("+new = 2", "+new = 3"))
    with pytest.raises(UserError, match=r"toy/a.py does not come out as series.yaml says"):
        toy(root).apply()
    assert files_below(root) == whole(0)


def test_a_manifest_that_does_not_fit_its_diffs_is_refused(patches, root):
    manifest = patches / "series.yaml"
    given = yaml.safe_load(manifest.read_text())
    given["patches"][1]["sha256"]["toy/a.py"][0] = "0" * 64
    manifest.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=r"checksums of toy/a.py do not follow"):
        toy(root)
    del given["patches"][1]["sha256"]["toy/a.py"]
    manifest.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=r"0002-two.patch changes other files than it says"):
        toy(root)
    manifest.write_text("module: toy\n")
    with pytest.raises(UserError, match=r"series.yaml cannot be read: KeyError"):
        toy(root)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_of_several_versions_the_installed_one_is_taken(version, patches, root):
    shutil.copytree(patches, patches.with_name("2.0"))
    manifest = patches.with_name("2.0") / "series.yaml"
    given = yaml.safe_load(manifest.read_text()) | {"version": "2.0"}
    manifest.write_text(yaml.safe_dump(given))
    metadata = root / f"toy_dist-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: toy-dist\nVersion: {version}\n")
    assert toy(root).series.version == version
    metadata.write_text("Metadata-Version: 2.1\nName: toy-dist\nVersion: 3.0\n")
    with pytest.raises(patching.UnknownRevision, match=r"toy-dist 3.0; .* 1.0 .* or 2.0"):
        toy(root)


def test_megatron_core_is_patched_and_reverted_to_the_last_bit(copy):
    before = files_below(copy)
    checkout = patching.find("megatron-core", copy, sys.executable)
    assert checkout.state == "clean"
    files = {"0.16.1": 8, "0.19.2": 4}[checkout.series.version]
    assert len(checkout.apply()) == files and checkout.state == "applied"
    assert checkout.revert() and files_below(copy) == before


def test_another_megatron_core_is_refused(copy):
    metadata = next(copy.glob("*.dist-info")) / "METADATA"
    text = re.sub(r"^Version: .*$", "Version: 0.17.0", metadata.read_text(), flags=re.MULTILINE)
    metadata.write_text(text)
    known = r"megatron-core 0.17.0; .*0.16.1 \(55ac7.*\) or 0.19.2"
    with pytest.raises(patching.UnknownRevision, match=known):
        patching.find("megatron-core", copy, sys.executable)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.path.name)
def test_each_patch_says_why_and_names_a_test_and_is_in_the_docs(patch):
    file, name = patch.test.split("::")
    assert f"def {name}(" in (REPOSITORY / file).read_text()
    assert len(patch.reason) > 40
    assert patch.path.name.removesuffix(".patch") in (REPOSITORY / "docs/patches.md").read_text()
    assert patch.path.read_text()[:3] not in ("---", "@@ ")  # a message first


def test_a_built_package_brings_the_patches(tmp_path):
    """Patches go into a wheel; imported from there, not from this checkout."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    code = "from moe_upgrpo.patching.series import *; print(patches_folder(), *all_series())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found[0] == str(tmp_path / "moe_upgrpo/patches")
    assert {"megatron-core", "vllm"} <= set(found[1:])
