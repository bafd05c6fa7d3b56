"""A stack's revision at start-up, and `moe-upgrpo doctor --stack`: a toy stack, verl's wheel."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_upgrpo import cli
from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks, stack_doctor
from moe_upgrpo.integrations.kit import revisions

SOURCE = "def loss(x): ...\n\nclass Engine(Base):\n    def step(self, batch): return batch\n"
OLD = "def step_of(batch): return batch\n"
HEAD = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An installed stack `toy` of two hooks; tested: 1.0, and 0.9, which has one elsewhere."""
    package = tmp_path / "site/toy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the stack was imported')\n")
    (package / "m.py").write_text(SOURCE)
    step = ("toy/m.py", "Engine.step")
    monkeypatch.setitem(hooks.HOOKS, "toy", [("toy/m.py", "loss"), step])
    monkeypatch.setitem(hooks.BEFORE, step, ("toy/old.py", "step_of"))
    monkeypatch.setitem(hooks.LOSS, "toy", {"loss"})
    monkeypatch.setitem(hooks.HEALTH, "toy", {"loss", "Engine.step"})
    monkeypatch.setitem(revisions.MODULES, "toy", ("toy", "toy-dist"))
    monkeypatch.setattr(hooks, "FOUND", tmp_path / "hooks.json")
    monkeypatch.setattr(revisions, "_said", set())
    monkeypatch.syspath_prepend(tmp_path / "site")
    hooks.main("toy", "1.0", str(tmp_path / "site"))
    before = tmp_path / "before/toy"
    before.mkdir(parents=True)
    (before / "m.py").write_text("def loss(x): ...\n")
    (before / "old.py").write_text(OLD)
    hooks.main("toy", "0.9", str(tmp_path / "before"))
    return package


def version(package: Path, number: str) -> None:
    for info in package.parent.glob("*.dist-info"):
        (info / "METADATA").unlink()
        info.rmdir()
    info = package.parent / f"toy_dist-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-dist\nVersion: {number}\n")


def said(capsys) -> str:
    revisions._said.clear()
    capsys.readouterr()
    revisions.check("toy", "log")
    return capsys.readouterr().out


def test_a_tested_revision_runs_in_silence(toy, capsys):
    assert said(capsys) == ""  # its files are those of 1.0
    version(toy, "1.0")
    assert said(capsys) == ""


def test_another_one_runs_with_a_warning_that_names_it(toy, capsys):
    version(toy, "1.1")
    assert said(capsys) == (
        "moe_upgrpo: toy 1.1 was not tested (tested: 0.9, 1.0). What is hooked into is there, as "
        "at 1.0. moe-upgrpo doctor --stack toy has all of it\n"
    )
    (toy / "m.py").write_text(SOURCE.replace("self, batch", "self, batch, *, more"))
    revisions.check("toy", "loss")
    assert capsys.readouterr().out == ""  # once in a process
    assert (
        "but not as at 1.0: toy/m.py:Engine.step takes (self, batch, *, more), before (self, "
        "batch)." in said(capsys)
    )
    (toy.parent / ".git").mkdir()
    (toy.parent / ".git/HEAD").write_text(HEAD + "\n")
    assert "toy 012345678 was not tested" in said(capsys)
    version(toy, "1.0")  # a number does not make it 1.0
    assert "was not tested" in said(capsys)


def test_ranks_but_the_first_are_silent(toy, capsys, monkeypatch):
    version(toy, "1.1")
    monkeypatch.setenv("RANK", "1")
    assert said(capsys) == ""


def test_only_a_missing_hook_is_refused_and_named(toy):
    (toy / "m.py").write_text("def loss(x): ...\n")
    version(toy, "2.0")
    revisions.check("toy", "loss")
    with pytest.raises(
        UserError,
        match=r"toy 2.0 lacks what the routing log of moe_upgrpo needs of it: toy/m.py: "
        r"Engine.step. Tested: 0.9, 1.0; install one of them, or unset MOE_UPGRPO_RUN",
    ):
        revisions.check("toy", "log")
    (toy / "m.py").unlink()
    with pytest.raises(UserError, match=r"needs of it: toy/m.py: loss\. .* the stack's own loss"):
        revisions.check("toy", "loss")


def test_figures_whose_hooks_are_missing_are_left_out_with_a_word(toy, capsys, monkeypatch):
    version(toy, "2.0")
    assert revisions.has("toy", "health") and capsys.readouterr().out == ""
    (toy / "m.py").write_text("def loss(x): ...\n")
    assert [revisions.has("toy", "health") for _ in range(2)] == [False, False]
    assert capsys.readouterr().out == (
        "moe_upgrpo: the report of a replay's health is left out: toy 2.0 lacks toy/m.py: "
        "Engine.step\n"
    )
    revisions._said.clear()
    monkeypatch.setenv("RANK", "1")
    assert not revisions.has("toy", "health") and capsys.readouterr().out == ""
    assert revisions.has("slime", "health")  # not there as files: what is missing shows later


@pytest.mark.parametrize(
    "source",
    [
        "from toy.new import loss, Engine\n",
        "try:\n    from a import loss\nexcept ImportError:\n    loss = None\n"
        "if True:\n    class Old:\n        def step(self): ...\nclass Engine(Old): ...\n",
        "loss: object = 1\nEngine = 2\n",
        "async def loss(): ...\nclass Engine:\n    if True:\n        step = 1\n",
    ],
)
def test_a_name_that_is_bound_otherwise_is_found_too(toy, source):
    (toy / "m.py").write_text(source)
    assert revisions.installed("toy").missing("log") == []


def test_a_method_of_a_base_is_looked_for_where_the_base_is(toy):
    imports = "from abc import ABC\nfrom .base import Base as B\n"
    engine = f"{imports}def loss(x): ...\nclass Engine(ABC, B): ...\n"
    (toy / "m.py").write_text(engine)
    assert revisions.installed("toy").missing("log") == ["toy/m.py: Engine.step"]  # no such file
    (toy / "base.py").write_text("class Base:\n    def other(self): ...\n")
    assert revisions.installed("toy").missing("log") == ["toy/m.py: Engine.step"]
    (toy / "base.py").write_text("from toy.m import Engine as Base\n")  # round and round
    assert revisions.installed("toy").missing("log") == ["toy/m.py: Engine.step"]
    (toy / "base.py").write_text("class Base:\n    def step(self): ...\n")
    assert revisions.installed("toy").missing("log") == []
    (toy / "base.py").write_text("from toy.deep import Base\n")
    (toy / "deep.py").write_text("class Base:\n    def step(self): ...\n")
    assert revisions.installed("toy").missing("log") == []


@pytest.mark.parametrize("text", [b"type X[T] = = 1\n", b"x = 1\x00\n", b"# \xff\n"])
def test_a_file_that_this_python_cannot_read_is_named(toy, text):
    """As one of a stack for a newer Python may be, read by doctor."""
    (toy / "m.py").write_bytes(text)
    with pytest.raises(UserError, match=r"toy/m\.py: not Python 3\.\d+ \(.*Python of the stack"):
        stack_doctor.diagnose("toy")


def test_bases_in_a_circle_end(toy):
    (toy / "m.py").write_text("def loss(x): ...\nclass Engine(B): ...\nclass B(Engine): ...\n")
    assert revisions.installed("toy").missing("log") == ["toy/m.py: Engine.step"]


def test_doctor_says_of_each_hook_how_it_is_against_each_revision(toy):
    (toy / "m.py").write_text(SOURCE.replace("return batch", "return -batch"))
    found = stack_doctor.diagnose("toy")
    loss, step = found["hooks"]
    assert loss["needed_by"] == "loss, health, log" and step["needed_by"] == "health, log"
    assert loss["against"] == {"0.9": "same", "1.0": "same"}
    assert step["against"] == {
        "0.9": "moved and changed from toy/old.py:step_of",
        "1.0": "computes otherwise",
    }
    assert found["tested_as"] is None and found["missing"] == {"loss": [], "log": [], "health": []}
    out = Console(file=io.StringIO(), width=120)
    (toy / "m.py").write_text(SOURCE.replace("(self, batch)", "(self, batch, more)"))
    stack_doctor.show(stack_doctor.diagnose("toy"), out)
    assert "other arguments" in out.file.getvalue() and "--json" in out.file.getvalue()
    assert "more" not in out.file.getvalue().replace("moe", "")
    found = stack_doctor.diagnose("toy", toy.parents[1] / "before")
    assert found["tested_as"] == "0.9" and found["hooks"][1]["name"] == "step_of"
    with pytest.raises(UserError, match=r"before/toy has no toy: "):
        stack_doctor.diagnose("toy", toy.parents[1] / "before/toy")


def test_doctor_on_the_command_line(tmp_path, capsys, monkeypatch):
    """verl's wheel is found as it was tested; the others are not installed here."""

    def doctor(*words: str) -> str:
        cli._doctor(["--stack", *words])
        return capsys.readouterr().out

    whole = doctor("verl")
    assert "MegatronEngine.forward_backward_batch" in whole and "verl 0.9.1" in whole
    assert "the routing log has all that it needs" in whole
    data = json.loads(doctor("verl", "--json"))
    assert data["tested_as"] == "0.9.1" and len(data["hooks"]) == len(hooks.HOOKS["verl"])
    assert {hook["against"]["0.9.1"] for hook in data["hooks"]} == {"same"}
    for words, message in {
        ("--stack", "slime"): r"slime is not installed here \(slime\): start doctor in",
        ("--stack", "verl2"): "--stack: 'verl2' given; allowed: verl, slime, miles, nemo-rl, meg",
        ("--stack", "slime", "--root", str(tmp_path)): "has no slime: start doctor",
        ("--root", str(tmp_path)): "given without --stack",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            cli._doctor(list(words))
        assert "\n" not in str(error.value)
    file = tmp_path / "slime/utils/misc.py"
    file.parent.mkdir(parents=True)
    file.write_text("def load_function(path): ...\n")
    ends = []
    monkeypatch.setattr(cli.ending, "fail", lambda message, status: ends.append((message, status)))
    out = doctor("slime", "--root", str(tmp_path), "--strict")
    ((message, status),) = ends
    assert status == 1 and message.startswith("slime lacks slime/backends/megatron_utils/")
    assert "MISSING" in out and "a loss is refused here: it needs" in out
    assert "the report of a replay's health is left out here: it needs" in " ".join(out.split())


def test_every_stack_has_hooks_and_what_its_losses_and_figures_need():
    assert revisions.MODULES.keys() == hooks.HOOKS.keys()
    for part in (hooks.LOSS, hooks.HEALTH):
        assert part.keys() == hooks.HOOKS.keys()
        for stack, names in part.items():
            assert names <= {name for _, name in hooks.HOOKS[stack]}, stack
