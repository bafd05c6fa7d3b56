"""Which Python `make` and CI take, and what they say of one that they cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def ended(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Environment of a command that finds the stand-ins of `folder` first."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_a_python_that_runs_is_taken_as_it_is(tmp_path):
    found = ended(".ci/python", sys.executable, folder=tmp_path)
    assert found.returncode == 0 and Path(found.stdout.strip()).samefile(sys.executable)


def test_a_python_that_is_there_and_refuses_is_none(tmp_path):
    """As the stand-ins of a version manager do for versions that are not selected."""
    stand_in(tmp_path / "python3.98", "echo 'pyenv: python3.98: command not found' >&2; exit 127")
    stand_in(tmp_path / "pyenv", "echo 3.12.1")
    found = ended(".ci/python", "python3.98", folder=tmp_path)
    assert (found.returncode, found.stdout) == (1, "")


def test_the_version_manager_is_asked_for_the_newest_of_the_version(tmp_path):
    python = f'[ "$PYENV_VERSION" = 3.98.11 ] || exit 127; exec {sys.executable} "$@"'
    stand_in(tmp_path / "python3.98", python)
    stand_in(tmp_path / "pyenv", "printf '3.98.9\\n3.98.11\\n3.9.98\\n3x98\\n'")
    found = ended(".ci/python", "python3.98", folder=tmp_path)
    assert found.returncode == 0 and Path(found.stdout.strip()).samefile(sys.executable)


def test_make_says_that_a_python_does_not_run(tmp_path):
    found = ended("make", "setup", "PYTHON=python3.97", folder=tmp_path)
    assert found.returncode != 0
    message = "python3.97 does not run here. Name one that does, 3.11 to 3.13: make setup PYTHON="
    assert message in found.stdout


def test_make_says_that_a_python_is_too_old_or_too_new(tmp_path):
    says = '[ "$1" = --version ] && echo Python 3.10.2; exit 1'
    old = f'case "$2" in *executable*) echo "$0";; *) {says};; esac'
    stand_in(tmp_path / "python3.10", old)
    found = ended("make", "setup", "PYTHON=python3.10", folder=tmp_path, VENV=str(tmp_path / "v"))
    assert found.returncode != 0
    assert "Python 3.10.2 is not supported: 3.11 to 3.13 are. Name one: make setup" in found.stdout
    assert not (tmp_path / "v").exists()


def test_each_python_has_an_environment_of_its_own(tmp_path):
    version = "{}.{}".format(*sys.version_info)
    said = ended("make", "-n", "setup", f"PYTHON={sys.executable}", folder=tmp_path).stdout
    assert f".venv-{version}/" in said or said == ""  # nothing to do where it is made
    assert (
        f"only make .venv-{version}"
        in ended("make", "help", f"PYTHON={sys.executable}", folder=tmp_path).stdout
    )
    assert "only make .venv\n" in ended("make", "help", folder=tmp_path).stdout


@pytest.mark.parametrize("there", [True, False])
def test_ci_runs_the_newest_megatron_core_or_says_that_it_did_not(there, tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    stand_in(tmp_path / "make", 'echo "make $*"')
    stand_in(tmp_path / "pyenv", "exit 1")
    stand_in(tmp_path / "python3.12", f'exec {sys.executable} "$@"' if there else "exit 127")
    ran = ended("bash", str(tmp_path / ".ci/run"), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("make ")]
    newest = ["make test-megatron PYTHON=python3.12"] if there else []
    first = ["make test", "make test-older-cpu", "make test-triton", "make test-slow"]
    expected = [*first, *newest, "make test-engines"]
    assert lines == expected
    assert ("after 0.16 were NOT tested" in ran.stdout) == (not there)
    assert "were NOT looked at in one" in ran.stdout  # without an environment there is no browser


def test_the_workflows_call_make_targets_that_there_are():
    targets = (ROOT / "Makefile").read_text(encoding="utf-8").split(".PHONY: ")[1].splitlines()[0]
    called = {
        word
        for file in (ROOT / ".github/workflows").glob("*.yml")
        for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
        for word in step.get("run", "").removeprefix("make ").split()
        if "=" not in word
    }
    assert called >= {"lint", "types", "test", "test-wheel"} and called <= {*targets.split()}
