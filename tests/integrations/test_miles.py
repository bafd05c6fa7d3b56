"""miles on CPUs, from a checkout that MOE_UPGRPO_MILES names; without one the released 0.0.2."""

import sys

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.slime_miles.revisions import first_module, taken
from tests.integrations.slime_checks import StackChecks


def test_a_module_is_taken_where_the_revision_has_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in {
        "__init__": "",
        "older": "place = 'older'",
        "newer": "place = 'newer'",
        "broken": "import a_package_that_is_not_here",
    }.items():
        (tmp_path / "a_stack").mkdir(exist_ok=True)
        (tmp_path / "a_stack" / f"{name}.py").write_text(source, encoding="utf-8")
    assert first_module("a_stack.newer", "a_stack.older").place == "newer"
    assert first_module("a_stack.hub.newer", "a_stack.older").place == "older"
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        first_module("a_stack.broken", "a_stack.older")
    with pytest.raises(UserError, match=r"a_stack.x and a_stack.y: not in the installed a_stack"):
        first_module("a_stack.x", "a_stack.y")
    for name in [name for name in sys.modules if name.startswith("a_stack")]:
        del sys.modules[name]


def test_a_revision_is_given_what_it_takes():
    def older(a, b=1): ...

    assert taken(older, b=2, c=3) == {"b": 2}
    assert taken(lambda *, c: None, b=2, c=3) == {"c": 3}


class TestMiles(StackChecks):
    stack = "miles"

    @classmethod
    def refused(cls):
        if (cls.source() / "miles/backends/training_utils/replay_data.py").exists():
            return {}
        return {"allgather-cp": "does not cover R3 with --allgather-cp in this release of miles"}

    # Its cross entropy is Megatron's fused one, whose gradient is rounded to bfloat16
    # (fused_cross_entropy.py:82).
    tolerance = 2**-8
    # Their conftest imports SGLang.
    own_tests_flags = ("--noconftest",)
    name_of_own_tests = (
        "tests/fast/backends/training_utils/loss/test_training_logprob_reuse.py "
        "tests/fast/backends/training_utils/loss/test_opd.py "
        "tests/fast/backends/training_utils/test_replay_data.py "
        "tests/fast/utils/test_replay_base.py",
    )
