"""Releases of Megatron-Core that are not supported, or lack a hook, end in one message.

What the supported ones changed is held by the other tests of this folder, on each of them.
"""

import functools
import os
import subprocess
import sys

import pytest
from packaging.version import Version

from moe_upgrpo import cli
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import backend, groups, releases, tap
from moe_upgrpo.megatron.layout import Layout


@pytest.mark.parametrize("version", ["0.16.0", "0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.19.0rc1"])
def test_supported_releases(version, monkeypatch):
    monkeypatch.setattr(releases, "installed", lambda: Version(version))
    releases.check()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.15.3", "Megatron-Core 0.15.3 is installed; moe_upgrpo was tested with >=0.16,<0.20"),
        ("0.20.0", "Megatron-Core 0.20.0 is installed"),
        ("1.0", "pip install 'megatron-core>=0.16,<0.20'"),
        (None, r"not installed.* pip install 'moe_upgrpo\[train\]'"),
    ],
)
def test_other_releases_are_refused(version, words, monkeypatch):
    monkeypatch.setattr(releases, "installed", lambda: version and Version(version))
    with pytest.raises(UserError, match=words):
        releases.check()


@pytest.mark.parametrize("command", ["train", "probe", "plan"])
def test_every_command_that_needs_megatron_says_so(command, tmp_path):
    """Before anything slow is imported: a release of the future found first on the path."""
    (tmp_path / "megatron_core-0.21.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.21.0\n"
    (tmp_path / "megatron_core-0.21.0.dist-info/METADATA").write_text(metadata)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    ended = subprocess.run(
        [sys.executable, "-m", "moe_upgrpo", command],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: Megatron-Core 0.21.0 is installed; moe_upgrpo was tested with")


def test_the_way_in_names_a_hook_that_an_import_misses(monkeypatch):
    def train(arguments):
        from megatron.core.transformer.moe.router import RouterOfTomorrow  # noqa: F401

    def fail(message, status=2, **more):
        raise SystemExit(f"{status}: {message}")

    monkeypatch.setattr(cli, "_train", train)
    monkeypatch.setattr(cli.ending, "fail", fail)
    monkeypatch.setattr(sys, "argv", ["moe-upgrpo", "train"])
    with pytest.raises(SystemExit, match=r"^2: Megatron-Core .* lacks .*RouterOfTomorrow.*>=0.16"):
        cli.main()


def test_imports_of_others_are_not_megatrons_fault():
    with pytest.raises(ImportError) as caught:
        from moe_upgrpo.losses import NoSuchLoss  # noqa: F401
    assert releases.missing(caught.value) is None
    assert releases.missing(ImportError("without a name")) is None


BROKEN = {  # what import transformer_engine.pytorch raised with one of its parts missing
    "FileNotFoundError": "Could not find shared object file for Transformer Engine torch lib.",
    "OSError": "libnccl.so.2: cannot open shared object file: No such file or directory",
    "AssertionError": "Transformer Engine package version mismatch.",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_transformer_engine_that_cannot_be_imported_is_named(kind, tmp_path, monkeypatch):
    """Megatron-Core goes on without it after an ImportError alone."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("from . import pytorch\n")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text(f"raise {kind}({BROKEN[kind]!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)  # where it is installed
    with pytest.raises(Exception) as caught:
        import transformer_engine.pytorch  # noqa: F401
    said = str(releases.missing(caught.value))
    assert f"{kind}: {BROKEN[kind]}" in said
    assert "transformer_engine[pytorch]" in said and "pip uninstall transformer_engine " in said


def test_an_error_of_transformer_engines_functions_is_no_failed_import():
    at_work = {"__name__": "transformer_engine.pytorch"}
    exec("def forward():\n    raise RuntimeError('CUDA error')", at_work)
    with pytest.raises(RuntimeError) as caught:
        at_work["forward"]()
    assert releases.missing(caught.value) is None


def test_a_stand_in_for_nothing_is_an_error(monkeypatch):
    gone = backend.Replacement(backend.moe_utils, "helper_of_old", None, "moe_utils.py:1")
    monkeypatch.setattr(backend, "cpu_replacements", lambda: [gone])
    with pytest.raises(UserError, match=r"lacks .*moe_utils\.helper_of_old \(moe_utils\.py:1\)"):
        backend.apply().__enter__()


def test_routers_without_the_hook_of_replay_are_an_error(monkeypatch):
    class Router:
        layer_number = 1

    class Chunk:
        def modules(self):
            return [Router()]

    monkeypatch.setattr(tap, "TopKRouter", Router)
    with groups.process_groups(Layout()), pytest.raises(UserError, match="router_replay"):
        tap.RouterTap([Chunk()])


def test_the_experts_of_a_layer_are_replaced_in_either_kind_of_spec():
    class Spec:
        def __init__(self, **fields):
            vars(self).update(fields)

    old = Spec(submodules=Spec(experts=Spec(module=list, submodules="mlp")))
    releases.replace_experts(old, dict)
    assert (old.submodules.experts.module, old.submodules.experts.submodules) == (dict, "mlp")
    experts = functools.partial(list, submodules="mlp")
    new = functools.partial(set, submodules=Spec(experts=experts))
    releases.replace_experts(new, dict)
    assert new.keywords["submodules"].experts.func is dict
    assert new.keywords["submodules"].experts.keywords == {"submodules": "mlp"}
    dense = functools.partial(set, submodules=Spec(linear_fc1="fc1"))
    releases.replace_experts(dense, dict)
    assert vars(dense.keywords["submodules"]) == {"linear_fc1": "fc1"}
