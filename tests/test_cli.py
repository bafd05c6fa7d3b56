"""The command line itself; what `train` and `probe` do: tests/train/."""

import subprocess
import sys

import pytest

from tests.ranks import run_command
from tests.report.synthetic import make_run

COMMANDS = ("train", "probe", "compare", "report", "plan", "doctor", "patch")


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["none", "help"])
def test_an_interpreter_of_its_own(arguments):
    """The other tests fork one that has imported everything."""
    words = [sys.executable, "-m", "moe_upgrpo", *arguments]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and all(name in result.stdout for name in COMMANDS)


def test_an_unknown_command_names_the_known():
    result = run_command("repotr")
    assert result.returncode == 2
    known = ", ".join(COMMANDS)
    assert result.stderr == f"error: 'repotr' is not a command; known: {known}.\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", "--loss"),
        ("probe", "--rollout-routes"),
        ("report", "--output"),
        ("plan", "--gpus-per-node"),
        ("doctor", "--strict"),
        ("patch", "revert"),
    ],
)
def test_every_command_has_help(name, words):
    result = run_command(name, "--help")
    assert result.returncode == 0 and words in result.stdout, result.stderr


def test_a_report_of_one_run_lies_in_its_folder_and_of_several_here(tmp_path):
    runs = [make_run(tmp_path / name, steps=3, layers=0) for name in ("a", "b")]
    alone = run_command("report", runs[0])
    assert alone.returncode == 0, alone.stderr
    page = runs[0] / "report.html"
    before = page.read_bytes()
    together = run_command("report", *runs, cwd=tmp_path)
    assert together.returncode == 0, together.stderr
    assert (tmp_path / "report.html").is_file() and page.read_bytes() == before
    elsewhere = run_command("report", runs[1], "--output", tmp_path / "page.html")
    assert elsewhere.returncode == 0 and (tmp_path / "page.html").is_file()


def test_a_report_without_a_run_or_of_no_run(tmp_path):
    result = run_command("report")
    assert result.returncode == 2 and "moe-upgrpo report RUN" in result.stderr
    result = run_command("report", tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ")


def test_options_come_from_a_file_named_in_either_way(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("steps: 0\n")
    for words in (("--config", file), (f"--config={file}",)):
        result = run_command("train", *words)
        assert result.returncode == 2 and "steps=0" in result.stderr
