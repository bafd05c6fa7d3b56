"""A run that is killed and resumed: two ranks, SIGKILL to one.

In the same layout the resumed run leaves what an unbroken one does, bit for bit: the token log, the
metrics but times, the checkpoint after the last step with weights and optimizer. hf engine.

Not covered here: several nodes; the death of the whole machine, for which files are synced before
they get their names; engines other than hf, which need not repeat a response bit for bit.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tyro

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.store import (
    RunFolder,
    TokenLogWriter,
    read_config,
    read_environment,
    read_metrics,
    read_tokens,
    rows_so_far,
)
from moe_upgrpo.store.checkpoints import Checkpoints, read_manifest
from moe_upgrpo.store.token_log import token_files
from moe_upgrpo.train import resume, start
from moe_upgrpo.train.config import OPTIONS, TrainConfig
from moe_upgrpo.train.found import Checkpoint, find
from moe_upgrpo.train.options import MAY_CHANGE, changes, mapping_arguments, run_arguments
from moe_upgrpo.train.progress import Display
from moe_upgrpo.train.tiny import TinyModel
from moe_upgrpo.train.writing import TokenLogThread
from tests.ranks import run_command
from tests.store.rows import full_columns
from tests.train.killed import kill_at, kill_at_call
from tests.train.test_launch import TORCHRUN, assert_fails, job, launch, options, warm_started

STEPS, SAVE_EVERY = 4, 2
MORE = ("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--engine-dtype", "float32")
MORE = (*MORE, "--analyse-every", "1", "--eval-every", "2")
OVERLAP = ("--overlap", "--save-every", "1")


def killed(place: str, nth: int, rank: int, *arguments: str) -> None:
    """A job of two ranks of which one is killed there. It keeps one checkpoint."""
    first = partial(kill_at, place, nth, rank)
    result = run_command("train", *arguments, "--keep", "1", ranks=2, first=first)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]


def killed_under_torchrun(place: str, nth: int, rank: int, *arguments: str) -> None:
    command = (str(TORCHRUN), "--nproc-per-node", "2", "tests/train/killed.py")
    where = (place, str(nth), str(rank))
    result = launch(*command, *where, *arguments, "--keep", "1")
    assert result.returncode != 0
    assert f"Signal {signal.SIGKILL.value}" in result.stderr, result.stderr[-3000:]
    assert f"rank      : {rank}" in result.stderr


def stopped(place: str, nth: int, rank: int, by: int, *arguments: str, ranks: int = 2):
    """A job of which one rank gets a signal there that it can hear."""
    first = partial(kill_at, place, nth, rank, by)
    return run_command("train", *arguments, "--keep", "1", ranks=ranks, first=first)


def signals_in_update(numbers: list[int]) -> None:
    """Have the second step's update send itself signals, and take a minute."""
    update = MegatronActor.update
    calls = 0

    def slow(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 3:  # two in each step
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.5)
            time.sleep(60)
        return update(*arguments, **keywords)

    MegatronActor.update = slow


def stopped_with_slow_rows(place: str, nth: int, by: int) -> None:
    """Have this rank get a signal there, and the writing of its token rows take its time."""
    kill_at(place, nth, 0, by)
    write = TokenLogWriter.write

    def slow(*arguments):
        time.sleep(2)
        return write(*arguments)

    TokenLogWriter.write = slow


def whole_run(folder: Path, cache: Path, *more: str) -> Path:
    result = job(2, *options(folder, cache, *MORE, *more), timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("whole")
    return whole_run(folder / "run", cache, "--save-rollouts", str(folder / "rollouts"))


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory, cache):
    return whole_run(tmp_path_factory.mktemp("overlapped") / "run", cache, *OVERLAP)


def assert_same_run(run: Path, expected: Path) -> None:
    """All that two runs leave, but for times."""
    assert read_tokens(run).equals(read_tokens(expected))

    def rows(folder):
        return [
            {n: v for n, v in row.items() if not n.startswith("time/") and "per_second" not in n}
            for row in read_metrics(folder)
        ]

    assert rows(run) == rows(expected)
    last = f"state-{STEPS:06d}"
    manifests = [read_manifest(folder / "checkpoints" / last) for folder in (run, expected)]
    # Tensors (two files of each rank), schedule, rollouts sampled ahead; torch's index of them
    # has the folder's name in it.
    files = [{n: f for n, f in m["files"].items() if n != ".metadata"} for m in manifests]
    assert files[0] == files[1] and sum(name.endswith(".distcp") for name in files[0]) == 4
    weights = [
        (folder / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors").read_bytes()
        for folder in (run, expected)
    ]
    assert weights[0] == weights[1]
    assert sorted(os.listdir(run / "checkpoints")) == [last, f"step-{STEPS:06d}"]
    left = [path for path in run.rglob(".*") if path.name not in (".lock", ".metadata")]
    assert not left, left


# name -> function that one rank enters no more, at which call of the rank, and the rank; and the
# steps that had a metrics row and the newest whole checkpoint. Rank 0 writes both: where the other
# one is killed, a collective has told that rank 0 came so far.
# 2 mini-batches; 1 score of the step, 1 of the reference, and those of the analysis.
MOMENTS = {
    "in the update": ("moe_upgrpo.megatron.actor:MegatronActor.update", 6, 1, [0, 1, 2], 2),
    "before the checkpoint gets its name": (
        *("moe_upgrpo.store.checkpoints:publish", 2, 0),
        *([0, 1, 2, 3, 4], 2),
    ),
}
SLOW_MOMENTS = {
    "in the first evaluation": ("moe_upgrpo.train.evaluate:finish", 1, 0, [], None),
    "before the first step": ("moe_upgrpo.train.rollouts:Rollouts.problems", 1, 0, [0], None),
    "in generation": ("moe_upgrpo.train.rollouts:save_rollouts", 3, 0, [0, 1, 2], 2),
    "in the old log-probs": ("moe_upgrpo.train.learner:Learner.score_old", 3, 1, [0, 1, 2], 2),
    "in the analysis": (
        *("moe_upgrpo.train.analysis:trainer_noise_floor", 3, 0),
        *([0, 1, 2], 2),
    ),
    "in the weight hand-over": (
        *("moe_upgrpo.rollout.hf:HFEngine._finish_weights", 4, 0),  # one is its own at the start
        *([0, 1, 2], 2),
    ),
    "before the token file gets its name": (
        *("moe_upgrpo.store.token_writer:publish", 3, 0),
        *([0, 1, 2], 2),
    ),
    "before the metrics row": ("moe_upgrpo.store:RunFolder.append_metrics", 4, 0, [0, 1, 2], 2),
    "after the metrics row": ("moe_upgrpo.train.resume:save", 2, 0, [0, 1, 2, 3, 4], 2),
    "as the first checkpoint is begun": (
        *("moe_upgrpo.store.checkpoints:Checkpoints.begin", 1, 0),
        *([0, 1, 2], None),
    ),
    "in the writing of tensors": (
        *("torch.distributed.checkpoint:FileSystemWriter.write_data", 2, 1),
        *([0, 1, 2, 3, 4], 2),
    ),
    "before the tensors' index": (
        *("torch.distributed.checkpoint:FileSystemWriter.finish", 2, 0),
        *([0, 1, 2, 3, 4], 2),
    ),
    "before the manifest": (
        *("moe_upgrpo.store.checkpoints:Checkpoints.commit", 2, 0),
        *([0, 1, 2, 3, 4], 2),
    ),
    "before the pruning": (
        *("moe_upgrpo.store.checkpoints:Checkpoints.prune", 2, 0),
        *([0, 1, 2, 3, 4], 4),
    ),
    "as the trained model is written": (
        *("moe_upgrpo.megatron.weights:ShardWriter.finish", 1, 0),
        *([0, 1, 2, 3, 4], 4),
    ),
    "in the report": ("moe_upgrpo.report:write_report", 1, 0, [0, 1, 2, 3, 4], 4),
}


# With --async-save: training is in step 3 while the state after step 2 is written.
MEANWHILE = {
    "in the writing of tensors, meanwhile": (
        *("torch.distributed.checkpoint:FileSystemWriter.write_data", 1, 1),
        *([0, 1, 2], None),
    ),
    "before the manifest, meanwhile": (
        *("moe_upgrpo.store.checkpoints:Checkpoints.commit", 1, 0),
        *([0, 1, 2], None),
    ),
    "before the checkpoint gets its name, meanwhile": (
        *("moe_upgrpo.store.checkpoints:publish", 1, 0),
        *([0, 1, 2], None),
    ),
    "before the pruning, meanwhile": (
        *("moe_upgrpo.store.checkpoints:Checkpoints.prune", 1, 0),
        *([0, 1, 2], 2),
    ),
    "before the last checkpoint's index, meanwhile": (
        *("torch.distributed.checkpoint:FileSystemWriter.finish", 2, 0),
        *([0, 1, 2, 3, 4], 2),
    ),
}


@pytest.mark.fault(
    "Run folders",
    "a rank is killed in any phase, and the run resumed",
    "log, metrics, weights and optimizer of the unbroken run, bit for bit on one type of CPU",
)
@pytest.mark.bits
@pytest.mark.parametrize(
    "moment",
    [*MOMENTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MOMENTS | MEANWHILE)],
)
def test_a_killed_run_resumed_equals_an_unbroken_one(moment, whole, cache, tmp_path):
    place, nth, rank, steps, newest = (MOMENTS | SLOW_MOMENTS | MEANWHILE)[moment]
    run, rollouts = tmp_path / "run", tmp_path / "rollouts"
    more = ("--save-rollouts", str(rollouts), "--report" if "report" in moment else "--no-report")
    more += ("--async-save",) if moment in MEANWHILE else ()
    kill = killed_under_torchrun if moment == "in the old log-probs" else killed
    kill(place, nth, rank, *options(run, cache, *MORE, *more))
    done = [row["step"] for row in rows_so_far(run)]
    # Another thread writes the token file: the metrics row may be there already.
    assert done == steps or (
        (moment in MEANWHILE or moment == "before the token file gets its name")
        and done == [*steps, 3]
    )
    found = Checkpoints(run / "checkpoints").all()
    assert [path.name for path in found[-1:]] == ([f"state-{newest:06d}"] if newest else [])

    result = job(2, "--resume", str(run))
    if moment == "in the report":  # the run itself is whole
        assert_fails(result, "has done 4 steps and --steps is 4")
    else:
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"resumed after step {newest or 0}" in result.stdout
        resumed = read_environment(run)["resumed"]
        assert [(start["step"], start["changed"]) for start in resumed] == [(newest or 0, {})]
    assert_same_run(run, whole)
    for saved in sorted(rollouts.iterdir()):
        assert saved.read_bytes() == (whole.parent / "rollouts" / saved.name).read_bytes()
    assert len(list(rollouts.iterdir())) == STEPS


@pytest.fixture(scope="module")
def calls(tmp_path_factory, cache, whole) -> list[int]:
    """How many of the package's functions each of two ranks calls in a whole run.

    After `whole`: the warm start, with calls of its own, is in the cache by then.
    """
    counts = []
    for rank in range(2):
        folder = tmp_path_factory.mktemp("counted")
        first = partial(kill_at_call, 0, rank, str(folder / "calls"))
        words = options(folder / "run", cache, *MORE)
        result = run_command("train", *words, ranks=2, first=first, timeout_s=240)
        assert result.returncode == 0, result.stderr[-3000:]
        counts.append(int((folder / "calls").read_text()))
    return counts


@pytest.mark.fault(
    "Run folders",
    "a rank is killed at any of its calls, 39 seeded ones",
    "the resumed run is the unbroken one, bit for bit",
)
@pytest.mark.slow
@pytest.mark.bits
@pytest.mark.parametrize("seed", [*range(34), *range(35, 40)])
def test_a_run_killed_at_any_moment_equals_an_unbroken_one(seed, calls, whole, cache, tmp_path):
    """The campaign: a seeded rank, killed at a seeded one of all the calls that it makes.

    From 30 on with `--async-save`. Seed 34 kills a rank while the processes first meet, before
    there is a run: the other waits longer for it than this does.
    """
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(2))
    nth = int(rng.integers(1, 0.98 * calls[rank]))  # how often a rank looks for files varies
    run = tmp_path / "run"
    words = options(run, cache, *MORE, *(("--async-save",) if seed >= 30 else ()))
    first = partial(kill_at_call, nth, rank)
    result = run_command("train", *words, "--keep", "1", ranks=2, first=first)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    if not (run / "config.json").exists():  # nothing had begun
        result = job(2, *words, "--keep", "1")
    else:
        result = job(2, "--resume", str(run))
    if "has done 4 steps and --steps is 4" not in result.stderr:
        assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [5, 7], ids=["mini-batch 1 of step 3", "mini-batch 1 of step 4"])
def test_overlapped_generation_is_resumed_too(nth, overlapped, cache, tmp_path):
    """The batch that was sampled ahead comes from the checkpoint, with the weights behind it."""
    run = tmp_path / "run"
    place = "moe_upgrpo.megatron.actor:MegatronActor.update"
    killed(place, nth, 1, *options(run, cache, *MORE, *OVERLAP))
    result = job(2, "--resume", str(run))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, overlapped)
    assert [row["staleness/mean"] for row in read_metrics(run)[1:]] == [0, 1, 1, 1]


@pytest.fixture(scope="module")
def stale(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("stale")
    return whole_run(folder / "run", cache, "--staleness", "2", "--analyse-every", "2")


@pytest.mark.slow
@pytest.mark.bits
@pytest.mark.parametrize(
    ("place", "nth", "rank"),
    [
        ("moe_upgrpo.megatron.actor:MegatronActor.update", 6, 1),
        ("moe_upgrpo.rollout.hf:HFEngine._finish_weights", 4, 0),  # in the queue's thread
        ("moe_upgrpo.rollout.hf:HFEngine.generate", 5, 1),
        ("moe_upgrpo.train.resume:save_rollouts", 2, 0),
    ],
    ids=["update", "weights", "generation", "queue"],
)
def test_a_queue_of_two_batches_is_resumed_too(place, nth, rank, stale, cache, tmp_path):
    run = tmp_path / "run"
    words = options(run, cache, *MORE, "--staleness", "2", "--analyse-every", "2")
    killed(place, nth, rank, *words)
    result = job(2, "--resume", str(run))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, stale)
    assert [row["staleness/mean"] for row in read_metrics(run)[1:]] == [0, 1, 2, 2]


@pytest.mark.slow
def test_more_steps_after_an_overlapped_run_begin_on_policy(overlapped, tmp_path):
    """Nothing was sampled ahead of its end."""
    run = shutil.copytree(overlapped, tmp_path / "run")
    result = job(2, "--resume", str(run), "--steps", "6")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["staleness/mean"] for row in read_metrics(run)[1:]] == [0, 1, 1, 1, 0, 1]


@pytest.mark.slow
@pytest.mark.bits
def test_a_run_with_a_budget_of_tokens_is_resumed_and_logs_the_rows_of_one_without(cache, tmp_path):
    """On two data-parallel ranks that exchange sequences, in every step an analysis. Its log has
    the sequences of a run without a budget, on the same rollouts, in the same order."""
    rollouts, ranks = tmp_path / "rollouts", ("--tp", "1", "--ep", "2")
    budget = (*ranks, "--micro-batch-tokens", "32")
    expected = whole_run(
        tmp_path / "whole", cache, *budget, "--save-rollouts", str(rollouts), "--replay", "R3"
    )
    run = tmp_path / "run"
    more = (*budget, "--save-rollouts", str(tmp_path / "others"), "--replay", "R3")
    place = "moe_upgrpo.megatron.actor:MegatronActor.update"
    killed(place, 6, 1, *options(run, cache, *MORE, *more))
    result = job(2, "--resume", str(run))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, expected)

    counted = whole_run(
        tmp_path / "counted", cache, *ranks, "--load-rollouts", str(rollouts), "--replay", "R3"
    )
    found, fixed = read_tokens(run), read_tokens(counted)
    assert len(found) == len(fixed) > 100
    for name in ("step", "sequence", "position", "token_id", "reward", "logp_rollout", "overlap"):
        first = found["step"].to_numpy() == 1
        a, b = (table[name].to_pylist() for table in (found, fixed))
        if name == "overlap":  # from step 2 on routes may flip by rounding
            a, b = ([x for x, of in zip(values, first, strict=True) if of] for values in (a, b))
        assert a == b, name
    for name in ("logp_old", "logp_train"):
        a, b = (table[name].to_numpy() for table in (found, fixed))
        assert np.abs(a - b).max() < 1e-2 and np.abs(a - b).mean() < 1e-4, name


def as_of_step_2(whole: Path, folder: Path, **settings) -> Path:
    """A copy of the run as if it had been killed in step 3, and started with `settings`."""
    run = shutil.copytree(whole, folder)
    shutil.rmtree(run / "checkpoints" / "state-000004")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "config.json").write_text(json.dumps(read_config(run) | settings))
    return run


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ()),
        pytest.param(2, ("--tp", "1", "--ep", "1", "--pp", "2"), marks=pytest.mark.slow),
        pytest.param(4, ("--tp", "2", "--ep", "2", "--pp", "2"), marks=pytest.mark.slow),
        pytest.param(2, ("--tp", "1", "--cp", "2", "--ep", "2"), marks=pytest.mark.slow),
        pytest.param(
            2, ("--tp", "2", "--micro-batch-tokens", "32", "--packing"), marks=pytest.mark.slow
        ),
    ],
    ids=["one rank", "PP2", "TP2·EP2·PP2", "CP2·EP2", "packed"],
)
def test_another_layout_goes_on_with_the_same_training(ranks, layout, whole, tmp_path):
    """From TP2·EP2, on the same rollouts: to the rounding of fp32 that grows over two steps."""
    rollouts = str(whole.parent / "rollouts")
    run = as_of_step_2(whole, tmp_path / "run", save_rollouts=None, load_rollouts=rollouts)
    result = job(ranks, "--resume", str(run), *layout, timeout_s=180)
    assert result.returncode == 0, result.stderr[-3000:]
    order = [("step", "ascending"), ("sequence", "ascending"), ("position", "ascending")]
    found, expected = (read_tokens(folder).sort_by(order) for folder in (run, whole))
    assert len(found) == len(expected) > 100
    for name in ("step", "token_id", "reward", "advantage"):
        assert found[name].equals(expected[name]), name
    for name in ("logp_old", "logp_train"):
        a, b = (table[name].to_numpy() for table in (found, expected))
        assert np.abs(a - b).max() < 1e-2 and np.abs(a - b).mean() < 1e-4, name
    for a, b in zip(read_metrics(run)[1:], read_metrics(whole)[1:], strict=True):
        for name in ("grad_norm", "entropy/mean", "kl/warm_start", "loss/policy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    assert read_config(run)["world_size"] == ranks


def test_more_steps(whole, tmp_path):
    """From a checkpoint whose run had come to its end, and with other settings that may change."""
    run = shutil.copytree(whole, tmp_path / "run")
    config = read_config(run) | {"save_rollouts": None}
    (run / "config.json").write_text(json.dumps(config))
    more = ("--steps", "5", "--keep", "1", "--eval-every", "5", "--no-reference-kl")
    result = job(2, "--resume", str(run), *more)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert "kl/warm_start" in rows[4] and "kl/warm_start" not in rows[5]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["state-000005", "step-000004", "step-000005"]
    (start,) = read_environment(run)["resumed"]
    assert start["changed"] == {
        "steps": [4, 5],
        "keep": [2, 1],
        "eval_every": [2, 5],
        "reference_kl": [True, False],
    }
    assert read_config(run)["steps"] == 5


@pytest.mark.fault(
    "Models that are written",
    "a resume from an earlier state than the export's",
    "the export is written anew",
)
def test_after_a_resume_from_an_earlier_state_the_export_is_written_anew(whole, tmp_path):
    """Not the old run's weights beside the new run's log; nor those of steps that are not run."""
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "state-000004")
    (checkpoints / "step-000004" / "model.safetensors").write_bytes(b"those of another run")
    (checkpoints / "step-000004").rename(checkpoints / "step-000009")
    shutil.copytree(checkpoints / "step-000009", checkpoints / "step-000004")
    result = job(2, "--resume", str(tmp_path / "run"), "--keep", "1", timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("step-000004", "step-000009"):
        assert f"{name} is removed: its steps are run again" in result.stdout
    assert_same_run(tmp_path / "run", whole)


def test_what_may_not_change_is_named_with_both_values(whole):
    before = read_metrics(whole)
    result = job(2, "--resume", str(whole), "--seed", "3", "--optimizer.lr", "0.5")
    assert_fails(result, "seed was 0, now 3", "optimizer.lr was 0.0001, now 0.5", "another run")
    assert read_metrics(whole) == before and not (whole / ".lock").read_bytes()


@pytest.mark.fault(
    "Run folders",
    "a state with a truncated file",
    "refused, with the file and the state before it",
)
def test_a_truncated_checkpoint(whole, tmp_path):
    run = RunFolder(shutil.copytree(whole, tmp_path / "run"))
    broken = run.checkpoints / "state-000004" / "__1_0.distcp"
    broken.write_bytes(broken.read_bytes()[:-1])
    with groups.process_groups(Layout()):
        model = read_config(run.path)["model"]
        actor = MegatronActor(model, Layout(), optimizer=OptimizerSettings())
        with pytest.raises(UserError, match=f"{broken} has .* is damaged. Delete .*before it"):
            resume.load(find(run, steps=5), actor, None)
    shutil.rmtree(broken.parent)
    assert find(run, steps=5).step == 2


@pytest.mark.fault(
    "Run folders",
    "the disk is full while a state is written",
    "status 4 with the `--resume` line; no half of a state is taken for one",
)
@pytest.mark.parametrize("how", [(), pytest.param(("--async-save",), marks=pytest.mark.slow)])
def test_a_full_disk_while_a_checkpoint_is_written(how, whole, cache, tmp_path):
    """No file may grow above 1000 KiB here."""
    run = tmp_path / "run"
    more = (*MORE, *how, "--save-rollouts", str(tmp_path / "rollouts"))
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000 * 1024, 1000 * 1024))
    result = run_command("train", *options(run, cache, *more), ranks=2, first=limit)
    assert_fails(result, "no space is left on the disk", f"--resume {run}")
    assert result.returncode == 4
    assert not Checkpoints(run / "checkpoints").all()
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == [0, 1, 2] or (how and steps == [0, 1, 2, 3])


@pytest.mark.fault(
    "Run folders",
    "the disk is full under metrics or token log",
    "status 4 with the `--resume` line; a resume finds whole rows",
)
@pytest.mark.parametrize("what", ["metrics", "tokens"])
def test_a_full_disk_under_the_logs(what, tmp_path):
    """/dev/full has no space, for any user."""
    run = RunFolder.create(tmp_path / "run", {})
    writer = TokenLogWriter(run.tokens, rank=0, layer_ids=range(3), top_k=2, num_experts=8)
    run.append_metrics({"step": 0})
    if what == "metrics":
        shutil.move(run.metrics_path, tmp_path / "metrics")
        run.metrics_path.symlink_to("/dev/full")
    else:
        (run.tokens / ".step-000001-rank-0000.parquet.tmp").symlink_to("/dev/full")
    told = pytest.raises(MachineFault, match=f"no space is left .* --resume {run.path}")
    log = TokenLogThread(writer)
    with told, start.machine_fault_named(run):
        log.write(1, full_columns(), {})
        log.settle()  # as before a checkpoint
        run.append_metrics({"step": 1})
    if what == "metrics":
        shutil.move(tmp_path / "metrics", run.metrics_path)
    RunFolder.resume(run.path, step=0)
    assert [row["step"] for row in read_metrics(run.path)] == [0]
    assert list(run.tokens.iterdir()) == []


def test_a_checkpoint_of_another_model(whole, tiny_checkpoint):
    """As where a folder was copied from another run."""
    with groups.process_groups(Layout()):
        actor = MegatronActor(tiny_checkpoint, Layout(), optimizer=OptimizerSettings())
        found = find(RunFolder(whole), steps=9)
        with pytest.raises(UserError, match=r"of another model: its \w+ is .*, that of .*tiny is"):
            resume.load(found, actor, None)


OTHERS = TrainConfig.of(
    loss="up-gspo",
    seed=7,
    instruction="-- Think:\n- step by step",
    data=(Path("a file.jsonl"), Path("b.parquet")),
    model=Path("some/model"),
    prompt_field="question",
    max_new_tokens=9,
    max_prompt_tokens=30,
    reward_wrong=-1.0,
    epochs=2,
    reference_kl=False,
    optimizer=OptimizerSettings(algorithm="sgd", lr=3e-7),
    tiny=TinyModel(experts=4),
)


@pytest.mark.parametrize("config", [TrainConfig(), OTHERS], ids=["defaults", "others"])
def test_the_settings_of_a_run_come_back_from_its_folder(config, tmp_path):
    """The model's path apart, which config.json has in the place of None."""
    run = RunFolder.create(tmp_path / "run", config.flat() | {"layout": "TP2·EP2", "top_k": 2})
    arguments = [*run_arguments(run.path), "--resume", str(run.path)]
    resumed = tyro.cli(TrainConfig, args=arguments)
    assert resumed == config.but(resume=run.path)
    assert changes(read_config(run.path), resumed) == {}


def test_settings_that_a_run_did_not_know_had_their_defaults():
    """Its config.json was written before they were there."""
    stored = json.loads(json.dumps(TrainConfig().flat(), default=str))
    del stored["replay"], stored["optimizer"]["beta2"], stored["keep"]
    now = TrainConfig.of(resume=Path("runs/a"))
    assert changes(stored, now) == {}
    assert changes(stored, now.but(keep=5)) == {"keep": [2, 5]}
    with pytest.raises(UserError, match="replay was none, now R3"):
        changes(stored, now.but(replay="R3"))
    with pytest.raises(UserError, match="continued in its own folder"):
        changes(stored, now.but(output_dir=Path("runs/b")))
    assert changes(stored, now.but(output_dir=Path("runs/../runs/a"))) == {}


@pytest.mark.parametrize("name", [*MAY_CHANGE, *OTHERS.flat()])
def test_every_setting_may_or_may_not_change(name):
    assert name in OPTIONS
    science = ("loss", "seed", "model", "data", "optimizer", "prompts", "group", "engine", "dtype")
    assert not (name in MAY_CHANGE and name in science)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it holds no config\.json"):
        run_arguments(tmp_path)


def test_fewer_steps_than_are_done(whole):
    with pytest.raises(UserError, match="has done 4 steps and --steps is 3: nothing is left"):
        find(RunFolder(whole), steps=3)
    assert find(RunFolder(whole), steps=5).step == 4
    assert find(RunFolder(whole.parent / "none"), steps=5).step == 0


def logged(
    folder: Path, steps: int, *, save_every: int, of: int = 60, async_save: bool = False
) -> RunFolder:
    """The folder of a run of `of` steps that has logged so many, without any state."""
    config = {"save_every": save_every, "steps": of, "async_save": async_save}
    run = RunFolder.create(folder, config)
    for step in range(steps + 1):
        run.append_metrics({"step": step})
    return run


@pytest.mark.fault(
    "Run folders",
    "a resume where no state is left",
    "refused where it would delete logged rows; `--restart` does it",
)
@pytest.mark.parametrize(
    ("steps", "save_every", "of", "last_state", "refused"),
    [
        (0, 0, 60, None, None),  # nothing is lost but an evaluation
        (3, 0, 60, None, "--save-every 0 keeps no state"),
        (3, 20, 60, None, None),  # killed before its first state was due
        (20, 20, 60, None, None),  # killed while its first state was written
        (20, 20, 60, 20, "its states were removed"),
        (25, 20, 60, 20, "its states were removed"),
        (25, 20, 60, None, "its states were removed"),
        (4, 20, 4, 4, "its states were removed"),  # the last step has a state
        (4, 20, 4, None, None),
    ],
)
def test_a_run_begins_again_only_where_no_step_is_lost(
    steps, save_every, of, last_state, refused, tmp_path
):
    run = logged(tmp_path / "run", steps, save_every=save_every, of=of)
    if last_state:
        run.remember_state(last_state)
    if refused is None:
        assert find(run, of + 1) == Checkpoint()
    else:
        with pytest.raises(UserError, match=rf"logged {steps} steps.*{refused}.*give --restart"):
            find(run, of + 1)
    assert find(run, of + 1, restart=True) == Checkpoint()
    # A run of a version that did not keep which states it made: the doubtful case is refused.
    run.memory_path.unlink()
    if refused is None and steps in (0, 3):
        assert find(run, of + 1) == Checkpoint()
    else:
        with pytest.raises(UserError, match="give --restart"):
            find(run, of + 1)


def test_a_first_state_that_was_written_meanwhile_is_none_that_was_removed(tmp_path):
    """The second state waits for it: no step after that is logged without it."""
    for steps in (25, 40):
        assert (
            find(logged(tmp_path / str(steps), steps, save_every=20, async_save=True), 61).step == 0
        )
    with pytest.raises(UserError, match="its states were removed"):
        find(logged(tmp_path / "41", 41, save_every=20, async_save=True), 61)


def test_restart_is_for_a_run_without_a_state(whole):
    with pytest.raises(UserError, match=r"--restart begins .*state-000004 is one\. Leave"):
        find(RunFolder(whole), steps=9, restart=True)
    with pytest.raises(UserError, match="restart without resume"):
        TrainConfig.of(restart=True)
    with pytest.raises(UserError, match="an option of the command line only"):
        mapping_arguments({"restart": True})


def test_a_run_whose_states_were_removed(whole, tmp_path):
    """It loses nothing unasked; with --restart it begins again, by the config as it stands."""
    run = shutil.copytree(whole, tmp_path / "run")
    for state in Checkpoints(run / "checkpoints").all():
        shutil.rmtree(state)
    config = read_config(run)
    (run / "config.json").write_text(json.dumps(config | {"steps": 1, "save_rollouts": None}))
    before = read_metrics(run), read_tokens(run)
    result = job(1, "--resume", str(run), "--steps", "9")
    assert_fails(result, f"{run} has logged 4 steps and has no state", "give --restart")
    assert (read_metrics(run), read_tokens(run)) == before
    result = job(1, "--resume", str(run), "--restart")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "config.json was edited since the run wrote it" in result.stdout
    assert "steps 4 → 1" in result.stdout
    (start,) = read_environment(run)["resumed"]
    edited = {"steps": [4, 1], "save_rollouts": [config["save_rollouts"], None]}
    assert start["edited"] == edited and start["step"] == 0
    assert [row["step"] for row in read_metrics(run)] == [0, 1]
    assert read_tokens(run)["step"].unique().to_pylist() == [1]


# Where one of two ranks hears the signal -> the steps whose rows are there, and the newest state.
# An evaluation generates twice.
HEARD = {
    "in generation": ("moe_upgrpo.rollout.hf:HFEngine.generate", 8, 1, [0, 1, 2, 3], 3),
    "in the update": ("moe_upgrpo.megatron.actor:MegatronActor.update", 5, 0, [0, 1, 2, 3], 3),
    "while it logs": ("moe_upgrpo.store:RunFolder.append_metrics", 4, 0, [0, 1, 2, 3], 3),
}


@pytest.mark.fault(
    "How a command ends",
    "SIGTERM in any part of a step",
    "a state of the last whole step, status 143; the resumed run is the unbroken one, bit for bit",
)
@pytest.mark.bits
@pytest.mark.parametrize(
    "moment",
    ["in generation", *(pytest.param(m, marks=pytest.mark.slow) for m in [*HEARD][1:])],
)
def test_a_stopped_run_keeps_its_last_step_and_goes_on_as_if_unbroken(
    moment, whole, cache, tmp_path
):
    """The state of step 3 is none that is due: it is written for the signal."""
    place, nth, rank, steps, newest = HEARD[moment]
    run = tmp_path / "run"
    arguments = options(run, cache, *MORE, "--save-rollouts", str(tmp_path / "rollouts"))
    result = stopped(place, nth, rank, signal.SIGTERM, *arguments)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr[-3000:]
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: stopped by ") and f"--resume {run}" in message
    assert f"with its state after step {newest} kept" in message
    assert [row["step"] for row in read_metrics(run)] == steps
    assert Checkpoints(run / "checkpoints").all()[-1].name == f"state-{newest:06d}"
    result = job(2, "--resume", str(run), "--keep", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, whole)


@pytest.mark.fault(
    "How a command ends",
    "Ctrl-C before the first step",
    "status 130 and one line; no state",
)
def test_a_run_stopped_before_its_first_step_keeps_nothing(cache, tmp_path):
    run = tmp_path / "run"
    place = ("moe_upgrpo.rollout.hf:HFEngine.generate", 3, 0)  # after the first evaluation's two
    result = stopped(*place, signal.SIGINT, *options(run, cache, *MORE), ranks=1)
    assert result.returncode == 128 + signal.SIGINT, result.stderr
    assert "stopped by SIGINT, before its first step was done" in result.stderr
    assert not Checkpoints(run / "checkpoints").all()
    run = tmp_path / "early"
    place = ("moe_upgrpo.train.start:read_model_config", 1, 0)
    more = ("--model", str(warm_started(cache)))
    result = stopped(*place, signal.SIGINT, *options(run, cache, *MORE, *more), ranks=1)
    assert result.returncode == 128 + signal.SIGINT, result.stderr
    assert result.stderr.splitlines()[-1].endswith("No run folder was made yet: start again.")
    assert not list(run.iterdir())


@pytest.mark.fault(
    "How a command ends",
    "an update that outlasts `--stop-within`",
    "the ranks end without a new state; the last one stays",
)
def test_a_signal_waits_no_longer_than_it_may(cache, tmp_path):
    """The update that hears it takes a minute; a state of what was done before is there."""
    run = tmp_path / "run"
    more = (*MORE, "--save-every", "1", "--stop-within", "2")
    begin = time.monotonic()
    first = partial(signals_in_update, [signal.SIGTERM])
    result = run_command("train", *options(run, cache, *more), ranks=1, first=first)
    assert time.monotonic() - begin < 50
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "no state was written within --stop-within 2 s" in result.stderr
    assert [p.name for p in Checkpoints(run / "checkpoints").all()] == ["state-000001"]


@pytest.mark.fault(
    "How a command ends",
    "a second signal",
    "the ranks end at once",
)
def test_a_second_signal_ends_a_run_at_once(cache, tmp_path):
    begin = time.monotonic()
    first = partial(signals_in_update, [signal.SIGINT, signal.SIGINT])
    result = run_command("train", *options(tmp_path / "run", cache, *MORE), ranks=1, first=first)
    assert time.monotonic() - begin < 50
    assert result.returncode == 128 + signal.SIGINT, result.stderr
    assert "stopped by SIGINT, at once" in result.stderr


def test_a_run_that_keeps_no_state_says_so_when_it_is_stopped(cache, tmp_path):
    place = ("moe_upgrpo.megatron.actor:MegatronActor.update", 1)
    more = (*MORE, "--save-every", "0")
    arguments = options(tmp_path / "run", cache, *more)
    first = partial(stopped_with_slow_rows, *place, signal.SIGTERM)
    result = run_command("train", *arguments, ranks=1, first=first)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "after step 1; --save-every 0 keeps no state" in result.stderr
    # The rows of the step are there as its metrics are, though nothing settled them.
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1]
    assert [step for _, step in token_files(tmp_path / "run" / "tokens")] == [1]
    assert result.stderr.strip().endswith(f"--resume {tmp_path / 'run'} --restart")
    assert not (tmp_path / "run" / "checkpoints").exists()


def closed_output(step: int) -> None:
    """Have rank 0 write to a pipe that nobody reads, once it has told of a step.

    And take its time to name the state after the next: the other rank may not end before it.
    """
    if os.environ["RANK"] != "0":
        return
    tell, commit = Display.step, Checkpoints.commit

    def slowly(self, part, of_step, *arguments):
        time.sleep(1.5 * (of_step == step + 1))
        return commit(self, part, of_step, *arguments)

    def told(self, row, raised):
        tell(self, row, raised)
        if row["step"] == step:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, sys.stdout.fileno())

    Display.step, Checkpoints.commit = told, slowly


@pytest.mark.fault(
    "How a command ends",
    "the reader of standard output ends (`make train` piped into `head`)",
    "a state, and status 141; no rank counts as lost",
)
def test_a_reader_that_ends_early_stops_the_run_with_a_state(cache, tmp_path):
    """`make train | head` loses no rank."""
    run = tmp_path / "run"
    first = partial(closed_output, 2)
    words = options(run, cache, *MORE, "--eval-every", "10")
    result = run_command("train", *words, ranks=2, first=first)
    assert result.returncode == 128 + signal.SIGPIPE, result.stderr[-3000:]
    assert "reader of standard output is gone), with its state after step 3" in result.stderr
    assert Checkpoints(run / "checkpoints").all()[-1].name == "state-000003"


@pytest.mark.slow
def test_overlap_is_stopped_after_a_step_with_what_it_sampled_ahead(overlapped, cache, tmp_path):
    run = tmp_path / "run"
    place = ("moe_upgrpo.megatron.actor:MegatronActor.update", 3, 1)
    arguments = options(run, cache, *MORE, *OVERLAP)
    result = stopped(*place, signal.SIGTERM, *arguments)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert Checkpoints(run / "checkpoints").all()[-1].name == "state-000002"
    result = job(2, "--resume", str(run), "--keep", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, overlapped)


@pytest.mark.fault(
    "Run folders",
    "two jobs on one run folder",
    "the second is refused",
)
def test_two_jobs_do_not_write_into_one_run(whole, tmp_path):
    """The lock is of the process, and ends with it. Jobs take it: the unbroken one had it."""
    assert (whole / ".lock").is_file()
    run = RunFolder.create(tmp_path / "run", {})
    holder = (
        "import sys, time; from pathlib import Path; from moe_upgrpo.store import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('locked', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", holder, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(UserError, match="another job is writing into"), run.locked():
                pass
        finally:
            other.kill()
    with run.locked():
        pass
