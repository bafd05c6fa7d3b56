"""The command line itself; what its commands do: tests/train/, tests/tools/."""

import signal
import subprocess
import sys

import pytest

from tests.ranks import run_command
from tests.report.synthetic import make_run

COMMANDS = ("train", "launch", "probe", "diagnose", "compare", "report", "plan", "doctor", "patch")


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["none", "help"])
def test_an_interpreter_of_its_own(arguments):
    """The other tests fork one that has imported everything."""
    words = [sys.executable, "-m", "moe_upgrpo", *arguments]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and all(name in result.stdout for name in COMMANDS)


@pytest.fixture(scope="module")
def seconds_of_torch():
    """Processor seconds of importing torch, here and now: a loaded machine takes several times."""
    code = "import os, torch; t = os.times(); print(t.user + t.system)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("train", "--help"),
        ("launch", "--", "--help"),
        ("plan", "--help"),
        ("probe", "--help"),
        ("diagnose", "--help"),
        ("compare", "--help"),
        ("report", "--help"),
        ("doctor", "--help"),
        ("patch", "--help"),
        ("launch", "--nproc-per-node", "2", "--", "--loss", "grop"),
    ],
    ids=" ".join,
)
def test_help_and_wrong_options_wait_for_no_slow_import(words, seconds_of_torch):
    """Half a second of processor time; twice that is allowed here, where others compute too."""
    code = (
        "import os, resource, sys\n"
        "def ends(status):\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    slow = {'torch', 'transformers', 'pyarrow', 'scipy', 'numpy'} & {*sys.modules}\n"
        "    print(used.ru_utime + used.ru_stime, *slow, file=sys.__stderr__, flush=True)\n"
        "    really(status)\n"
        "really, os._exit = os._exit, ends\n"
        "from moe_upgrpo.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    ends(end.code or 0)\n"
        "ends(0)\n"
    )
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == (2 if "grop" in words else 0), result.stderr
    seconds, *slow = result.stderr.split("\n")[-2].split()
    assert not slow and float(seconds) < 2 / 3 * seconds_of_torch, result.stderr


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
        ("diagnose", "--before"),
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


WRONG = {
    "an option": (("--los", "grpo"), "Unrecognized options: --los"),
    "a value": (("--steps", "x"), "--steps: invalid literal"),
    "a loss": (("--loss", "grop"), "'grop' given; allowed: grpo"),
    "a layout": (("--tp", "3"), "tp=3 does not divide the 2 rank(s)"),
    "a model": (("--model", "/nowhere"), "/nowhere does not exist"),
    "problems": (
        ("--model", "/no", "--data", "/no.jsonl", "--max-new-tokens", "9"),
        "/no.jsonl: there is no such file",
    ),
    "a run to resume": (("--resume", "/nowhere"), "/nowhere is not a run folder"),
    "an output folder": (("--output-dir", "/dev/null/run"), "/dev/null/run cannot be written"),
    "rollouts": (("--load-rollouts", "/nowhere"), "/nowhere: there is no such folder"),
}


@pytest.mark.fault(
    "How a command ends",
    "a wrong option, layout, file or folder",
    "refused in one line with status 2 before any rank starts",
)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_start_is_refused_before_any_rank_in_five_lines(what):
    words, says = WRONG[what]
    result = run_command("launch", "--nproc-per-node", "2", "--", *words)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and says in result.stderr
    assert len(result.stderr.splitlines()) == 1 and len(result.stderr) < 800


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--bogus", "3"), "unrecognized arguments: --bogus; torchrun --help lists them."),
        (("--nproc-per-node", "x"), "Unsupported nproc_per_node value: x"),
    ],
)
def test_options_that_torchrun_does_not_have(words, says):
    result = run_command("launch", *words, "--", "--steps", "3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: options before --: {says}\n"


def test_a_launch_without_dashes_says_how():
    result = run_command("launch", "--steps", "3")
    assert result.returncode == 2 and "[OPTIONS OF TORCHRUN] -- [OPTIONS OF" in result.stderr


@pytest.mark.fault(
    "How a command ends",
    "`moe-upgrpo doctor`, piped into `head`",
    "no rank counts as lost, no traceback",
)
@pytest.mark.parametrize("words", ["doctor", "doctor --json", "train --help", "--help"])
def test_a_reader_that_ends_early_is_no_lost_rank(words):
    """The reader is gone before the first line."""
    command = f"{sys.executable} -m moe_upgrpo {words} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 128 + signal.SIGPIPE, result.stderr
    assert result.stderr == "error: standard output was closed by its reader.\n"
