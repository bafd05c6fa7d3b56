"""The hook points of each stack, as data of every tested revision and in a checkout."""

import pytest

from moe_upgrpo.integrations import hooks
from moe_upgrpo.integrations.kit import revisions
from tests.integrations.places import CHECKOUTS, MILES_WHEEL, WHEELS, with_checkout


@pytest.mark.parametrize("stack", hooks.HOOKS)
def test_every_hook_is_kept_at_each_tested_revision(stack):
    kept = hooks.read()[stack]
    run = {WHEELS.get(stack), *CHECKOUTS.get(stack, ())[1:]} - {None}
    assert run and run == hooks.tested(stack).keys()
    assert run | hooks.NOT_RUN.get(stack, set()) == kept.keys()
    for revision, found in kept.items():
        newer = {f"{file}:{name}" for file, name in hooks.NEWER.get(stack, [])}
        assert len(found.keys() - newer) == len(hooks.HOOKS[stack]), revision
        assert found.keys() & newer in (newer, set()), revision
        for hook in hooks.HOOKS[stack]:
            here = [f"{file}:{name}" for file, name in hooks.places(hook)]
            assert len(found.keys() & set(here)) == 1, (revision, here)
        assert all(about["signature"] and about["sha256"] for about in found.values())


@pytest.mark.parametrize(("stack", "checkout"), with_checkout())
def test_a_checkouts_hooks_are_as_they_were_tested(stack, checkout):
    """Where a variable names one: `make test-stacks`. It may be at any tested revision."""
    found = {r: hooks.difference(stack, checkout, r) for r in hooks.read()[stack]}
    assert [] in found.values(), found[CHECKOUTS[stack][1]]


def test_the_released_miles_hooks_are_as_they_were_tested():
    assert MILES_WHEEL.is_dir(), f"no {MILES_WHEEL}: make test makes it"
    assert hooks.difference("miles", MILES_WHEEL, "0.0.2") == []


def test_the_released_verls_hooks_are_as_they_were_tested():
    assert hooks.difference("verl", revisions.locate("verl"), "0.9.1") == []


def test_a_hook_that_moved_is_found_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(hooks.HOOKS, "s", [("new.py", "f")])
    monkeypatch.setitem(hooks.BEFORE, ("new.py", "f"), ("old.py", "A.g"))
    assert hooks.found_in(tmp_path, "s") == {}
    (tmp_path / "old.py").write_text("class A:\n    def g(self): ...\n", encoding="utf-8")
    assert list(hooks.found_in(tmp_path, "s")) == ["old.py:A.g"]
    (tmp_path / "new.py").write_text("def f(x): ...\n", encoding="utf-8")
    assert list(hooks.found_in(tmp_path, "s")) == ["new.py:f"]


def test_what_changed_is_said(tmp_path, monkeypatch):
    source = (
        "class A:\n    def kept(self, x, *, y=1):\n        return x  # one\n\ndef gone(a): ...\n"
    )
    (tmp_path / "m.py").write_text(source, encoding="utf-8")
    monkeypatch.setitem(hooks.HOOKS, "s", [("m.py", "A.kept"), ("m.py", "gone")])
    monkeypatch.setattr(hooks, "FOUND", tmp_path / "hooks.json")
    hooks.main("s", "1", str(tmp_path))
    assert hooks.difference("s", tmp_path, "1") == []

    def after(change, to):
        (tmp_path / "m.py").write_text(source.replace(change, to), encoding="utf-8")
        return hooks.difference("s", tmp_path, "1")

    assert after("# one", "# two") == []
    assert after("return x", "return -x") == ["m.py:A.kept: computes otherwise"]
    assert after("y=1", "z=1") == ["m.py:A.kept: takes (self, x, *, z=1), before (self, x, *, y=1)"]
    assert after("def gone", "def other") == ["m.py:gone: gone"]
    with pytest.raises(SystemExit, match="no gone"):
        hooks.main("s", "2", str(tmp_path))
