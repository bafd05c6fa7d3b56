# SPDX-License-Identifier: Apache-2.0
"""The command line: `moe-upgrpo COMMAND`, also `python -m moe_upgrpo COMMAND`."""

from __future__ import annotations

import contextlib
import io
import json
import locale
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moe_upgrpo import __version__, ending, extras, kernels, plugins
from moe_upgrpo.errors import (
    LOST_RANK,
    MachineFault,
    UserError,
    machine_fault,
    status_of,
)
from moe_upgrpo.megatron import releases
from moe_upgrpo.train.command_line import parsed
from moe_upgrpo.train.console import Console

COMPUTE = ("train", "probe", "diagnose", "compare", "doctor")  # doctor: what the others would do
WITH_PLUGINS = ("train", "launch", "plan", "compare", "probe", "diagnose")
RANK_0_SPEAKS_S = 20  # imports included, on a busy machine

USAGE = """usage: moe-upgrpo COMMAND [OPTIONS]

  train              train by RL in this process, or on the ranks of a torchrun job
  launch             start the ranks of a training job: launch [TORCHRUN'S OPTIONS] -- [TRAIN'S]
  probe              compare engine and trainer on a checkpoint, or two route dumps; no training
  diagnose RUN       why engine and trainer differ and whether it is too much: of a run folder, of
                     two dumps, or of a checkpoint (--model DIR --prompts FILE)
  compare CONFIG     run arms × seeds as written down beforehand, and report on them
  report RUN [RUN …] write report.html from one run folder or several; --follow serves it live
  plan               what a training run needs of each GPU, and whether it fits; takes its options
  doctor             what is installed here, which code paths that selects, what is missing;
                     --stack NAME: what of verl, slime, … is hooked into, and how it is found here
  patch              list, show, apply, verify, revert: small diffs for the stacks used with it

`moe-upgrpo COMMAND --help` lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. `argv` are words that come before those of the command line."""
    _take_any_locale()
    try:
        _run([*(argv or ()), *sys.argv[1:]])
        sys.stdout.flush()  # here, where a reader that has gone gets a message
    except UserError as error:
        ending.fail(str(error), status_of(error), lost=error.lost)
    except KeyboardInterrupt as end:
        ending.fail("interrupted.", status_of(end))
    except BrokenPipeError:  # as `| head` does, once it has seen enough
        ending.fail("standard output was closed by its reader.", 128 + signal.SIGPIPE)
    except Exception as error:
        if lacking := extras.absent(error) or releases.missing(error):
            ending.fail(str(lacking))
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if what := machine_fault(error):
            ending.fail(
                f"rank {ending.rank()}: {what}: {first}. {ending.how_to_resume()}",
                MachineFault.status,
                lost=what == LOST_RANK,
            )
        ending.fail(
            f"rank {ending.rank()} failed with {type(error).__name__}: {first}",
            status_of(error),
            details="".join(traceback.format_exception(error)),
        )


def _run(arguments: list[str]) -> None:
    commands = {
        "train": _train,
        "launch": _launch,
        "probe": _probe,
        "diagnose": _diagnose,
        "compare": _compare,
        "report": _report,
        "plan": _plan,
        "doctor": _doctor,
        "patch": _patch,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
    elif arguments[0] == "--version":
        print(f"moe-upgrpo {__version__}")
    elif arguments[0] not in commands:
        raise UserError(f"{arguments[0]!r} is not a command; known: {', '.join(commands)}.")
    else:
        if arguments[0] in COMPUTE:
            kernels.pin()  # before torch computes
        if arguments[0] in WITH_PLUGINS:
            plugins.load()
        commands[arguments[0]](arguments[1:])


def _parse(what, arguments: list[str], prog: str):
    """Parse the options; every rank finds the same mistake in them, and rank 0 reports it."""
    try:
        return parsed(what, arguments, prog, speaks=ending.rank() == 0)
    except UserError:
        if ending.rank():  # torchrun ends all ranks once one has failed: let rank 0 speak
            time.sleep(RANK_0_SPEAKS_S)
        raise


def _call(function, arguments: list[str], prog: str) -> None:
    """Call a function with the options of the command line, which are its arguments."""

    @wraps(function)
    def later(*positional, **named):
        return partial(function, *positional, **named)

    _parse(later, arguments, prog)()  # outside of tyro, so that its output and errors stay its own


def _parse_with_files(cls, arguments: list[str], prog: str):
    """Parse the command line over the options of a resumed run and of config files."""
    from moe_upgrpo.train.options import (
        check_own_code,
        check_supported,
        file_arguments,
        named,
        run_arguments,
    )
    from moe_upgrpo.train.parts import ObjectiveOptions
    from moe_upgrpo.train.passed_words import folded
    from moe_upgrpo.train.policy_options import help_for

    check_supported(arguments)
    from_run = [word for run in named("--resume", arguments) for word in run_arguments(run)]
    from_files = [word for file in named("--config", arguments) for word in file_arguments(file)]
    for run in named("--resume", arguments):
        check_own_code(run, [*from_files, *arguments])
    words = folded([*from_run, *from_files, *arguments])
    loss = str((named("--loss", words) or [ObjectiveOptions.loss])[-1])
    try:
        with help_for(loss):
            return _parse(cls, words, prog)
    except UserError as error:
        if not from_files:
            raise
        files = ", ".join(map(str, named("--config", arguments)))
        raise UserError(
            f"{error}. The options come from {files} and from the command line."
        ) from None


def _train(arguments: list[str]) -> None:
    from moe_upgrpo.train.config import TrainConfig

    config = _parse_with_files(TrainConfig, arguments, "moe-upgrpo train")
    config.layout(int(os.environ.get("WORLD_SIZE", 1)))  # before the slow imports
    releases.check()
    silence_upstream()
    if config.trainer.megatron:
        from moe_upgrpo.megatron.passthrough import read

        read(config.trainer.megatron)  # before the ranks meet

    from moe_upgrpo.train.loop import train

    train(config)


def _launch(arguments: list[str]) -> None:
    from moe_upgrpo import launch
    from moe_upgrpo.train.config import TrainConfig

    agent_words, train_words = launch.split(arguments)
    config = _parse_with_files(TrainConfig, train_words, "moe-upgrpo train")

    from moe_upgrpo.train.checks import check_start  # here: --help does without

    silence_upstream()
    check_start(config, launch.world_size(agent_words))
    kernels.pin()
    launch.launch(agent_words, train_words)


def silence_upstream() -> None:
    """Silence dozens of warnings at each start, none of which asks for an action."""
    # Optional packages that are not installed.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # Megatron-Core 0.16 calls collectives by names that newer torch calls deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # schedules.py retains the gradient of activations, leaves or not.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


def _probe(arguments: list[str]) -> None:
    from moe_upgrpo.tools.probe_options import ProbeConfig

    releases.check()
    config = _parse(ProbeConfig, arguments, "moe-upgrpo probe")
    silence_upstream()
    from moe_upgrpo.tools.probe import probe

    probe(config)


def _diagnose(arguments: list[str]) -> None:
    from moe_upgrpo.tools.diagnose_options import DiagnoseConfig

    config = _parse(DiagnoseConfig, arguments, "moe-upgrpo diagnose")
    if config.model is not None:
        releases.check()
    silence_upstream()
    from moe_upgrpo.tools.diagnose.command import diagnose

    diagnose(config, _console())


def _report(arguments: list[str]) -> None:
    def report(
        runs: Positional[tuple[Path, ...]],
        output: Path | None = None,
        follow: bool = False,
        port: int | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        """Write one HTML report of run folders, and its figures' data as JSON beside it.

        Args:
            runs: the folders of one run or several.
            output: the page. Default: report.html in the run's folder; of several runs, here.
            follow: serve the page of one run on this machine, and renew it until the run has ended.
            port: of --follow. Default: any that is free.
            tokenizer: a model folder whose tokenizer gives tokens their texts, which are kept in
                the run folders; for runs of other trainers than this one.
        """
        from moe_upgrpo import report

        if not runs:
            raise UserError("no run given; usage: moe-upgrpo report RUN [RUN …].")
        if port is not None and not follow:
            raise UserError("--port goes with --follow, which serves the page.")
        if follow and len(runs) > 1:
            raise UserError(f"--follow takes one run; {len(runs)} are given.")
        if tokenizer is not None:
            _keep_vocabulary(runs, tokenizer)
        folder = runs[0] if len(runs) == 1 else Path()
        page = output or folder / "report.html"
        if follow:
            report.follow(runs[0], page, port=port or 0, say=lambda line: print(line, flush=True))
        else:
            print(report.write_report(runs, page))

    _call(report, arguments, "moe-upgrpo report")


def _keep_vocabulary(runs: Sequence[Path], model: Path) -> None:
    from moe_upgrpo.hugging_face.tokenizer import keep_vocabulary
    from moe_upgrpo.store import read_config

    for run in runs:
        read_config(run)
        keep_vocabulary(run, model)


def _compare(arguments: list[str]) -> None:
    def compare(
        config: Positional[Path | None] = None,
        output: Path | None = None,
        parallel: int | None = None,
        report_only: bool = False,
    ) -> None:
        """Run every arm with every seed, as many runs at a time as there are cores, and report.

        What was run already is not run again: the same command goes on where it stopped.

        Args:
            config: YAML file of the comparison: examples/compare.
            output: its folder. Default: runs/compare/NAME.
            parallel: runs at a time. Default: one for each core and rank.
            report_only: make report.html and report.json of what is in --output; run nothing.
        """
        from moe_upgrpo.compare.plan import read_plan
        from moe_upgrpo.compare.report import write_report
        from moe_upgrpo.compare.run import compare as run

        if parallel is not None and parallel < 1:
            raise UserError(f"parallel={parallel}: at least 1 is needed.")
        if report_only:
            if output is None:
                raise UserError("--report-only without --output: which comparison?")
            print(write_report(output))
            return
        if config is None:
            raise UserError("no config given; usage: moe-upgrpo compare CONFIG.")
        plan = read_plan(config)
        folder = output or Path("runs/compare") / plan.name
        try:
            left = run(plan, folder, parallel=parallel, say=lambda line: print(line, flush=True))
        except KeyboardInterrupt as end:
            ending.fail("interrupted; the same command goes on from there.", status_of(end))
        print(write_report(folder))
        if left:
            raise MachineFault(left)

    _call(compare, arguments, "moe-upgrpo compare")


def _plan(arguments: list[str]) -> None:
    from moe_upgrpo.tools.plan_options import PlanConfig

    releases.check()
    config = _parse_with_files(PlanConfig, arguments, "moe-upgrpo plan")
    silence_upstream()
    from moe_upgrpo.tools.plan import check_fits, make_plan, show

    plan = make_plan(config)
    show(plan, _console())
    try:
        check_fits(plan)
    except UserError as error:
        ending.fail(str(error), status=1)


def _doctor(arguments: list[str]) -> None:
    def doctor(
        strict: bool = False,
        as_json: Annotated[bool, arg(name="json")] = False,
        stack: str | None = None,
        root: Path | None = None,
    ) -> None:
        """Show what is installed, which code paths that selects, and how to get what is missing.

        Args:
            strict: exit with 1 where nothing can train; with --stack, where a hook is missing.
            as_json: print JSON, for a bug report.
            stack: verl, slime, miles, nemo-rl, megatron-lm or ms-swift: show instead what of it is
                hooked into, and how that is found here against each tested revision.
            root: with --stack, the folder of a checkout. Default: what this Python imports.
        """
        if stack is not None:
            _doctor_of_stack(stack, root, strict, as_json)
            return
        if root is not None:
            raise UserError(f"--root: {root} given without --stack; it is a stack's folder.")
        from moe_upgrpo.tools.doctor import diagnose, show

        silence_upstream()
        found = diagnose()
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            show(found, _console())
        if strict and not found.can_train:
            ending.fail("nothing can train here; doctor's table says why.", status=1)

    _call(doctor, arguments, "moe-upgrpo doctor")


def _doctor_of_stack(stack: str, root: Path | None, strict: bool, as_json: bool) -> None:
    from moe_upgrpo.integrations.stack_doctor import diagnose, show

    found = diagnose(stack, root)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, _console())
    if strict and (gone := found["missing"]["log"]):
        ending.fail(f"{stack} lacks {', '.join(gone)}.", status=1)


def _patch(arguments: list[str]) -> None:
    from moe_upgrpo.patching.command import PatchCommand, run

    run(_parse(PatchCommand, arguments, "moe-upgrpo patch"), _console())


def _console() -> Console:
    """Make a console that prints square brackets as they are, and wide lines without a terminal."""
    plain = partial(Console, _gone, markup=False, highlight=False)
    console = plain()
    return console if console.is_terminal else plain(width=120)


def _gone() -> None:
    raise BrokenPipeError  # reported, with its status, as for a print


def _take_any_locale() -> None:
    """Use UTF-8 for files whatever the locale, and "?" for a sign that the terminal cannot show."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # torch reads its own templates in the locale's encoding (torch/_inductor/utils.py:4770), which
    # fails where that is ASCII. Our own files and pipes name theirs.
    if locale.getencoding().upper() != "UTF-8":
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
