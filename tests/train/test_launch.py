"""A whole job as a user starts it, and jobs that go wrong: two ranks, by torchrun where it matters.

Not covered here: that training raises accuracy in earnest (`make train`; the README states it).
"""

import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from benchmarks.micro.growth import of_ranks
from moe_upgrpo.store import (
    overlap_array,
    read_config,
    read_environment,
    read_metrics,
    read_routes,
    read_tokens,
    rows_so_far,
)
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.store.metrics import metric
from moe_upgrpo.store.phases import PHASES
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.ranks import run_command

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/train_moe.sh"
TORCHRUN = Path(sys.executable).with_name("torchrun")
OURS = Path(sys.executable).with_name("moe-upgrpo")
PROMPTS, GROUP, STEPS, LAYERS = 8, 4, 3, 2


def options(output_dir: Path, cache: Path, *more: str) -> list[str]:
    """One-digit sums on a model that is warm-started in seconds."""
    return [
        *("--output-dir", str(output_dir), "--cache-dir", str(cache), "--digits", "1"),
        *("--tiny.layers", str(LAYERS), "--tiny.hidden", "64"),
        *("--warm-start.probe-problems", "64", "--steps", str(STEPS)),
        *("--prompts", str(PROMPTS), "--group", str(GROUP), "--minibatches", "2"),
        *("--eval-every", "2", "--no-report", *more),  # a page takes longer than such a run
    ]


def launch(*command: str, timeout_s: float = 120, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def torchrun(ranks: int, *arguments: str, **keywords) -> subprocess.CompletedProcess:
    return launch(str(TORCHRUN), "--nproc-per-node", str(ranks), SCRIPT, *arguments, **keywords)


def job(ranks: int, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess:
    """The same job without torchrun and the imports of every rank."""
    return run_command("train", *arguments, ranks=ranks, timeout_s=timeout_s)


def warm_started(cache: Path) -> Path:
    """The one model that jobs with the options above share."""
    (folder,) = cache.glob("warm-start-*")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, cache):
    """`torchrun --nproc-per-node 2 examples/train_moe.sh`, TP2·EP2, engine and trainer in fp32."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    more = ("--loss", "up-gspo", "--engine-dtype", "float32", "--epochs", "2")
    more = (*more, "--analyse-every", "2", "--save-rollouts", str(folder.parent / "rollouts"))
    more = (*more, "--report")
    result = torchrun(2, *options(folder, cache, *more), timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_a_run_leaves_its_folder_and_says_what_it_did(run):
    folder, output = run
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "env.json", "metrics.jsonl", "tokens", "checkpoints"}
    assert (folder / "report.html").stat().st_size > 10_000
    config = read_config(folder)
    assert (config["layout"], config["loss"], config["world_size"]) == ("TP2·EP2", "up-gspo", 2)
    environment = json.loads((folder / "env.json").read_text())
    assert environment["versions"]["megatron-core"]
    assert environment["cpu"]["mkl"] != "OFF" and environment["cpu"]["threads"] == 1
    for words in ("up-gspo on TP2·EP2, 2 rank(s)", "sampled tokens/s", "update", str(folder)):
        assert words in output
    assert output.count("\nstep ") == STEPS  # plain lines where there is no terminal


def test_the_metrics_agree_with_the_token_log(run):
    folder, _ = run
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval/greedy" in row] == [0, 2, 3]
    for row in rows[1:]:
        table = read_tokens(folder, steps=[row["step"]])
        column = {n: table[n].to_numpy() for n in table.column_names if n != "overlap"}
        first = np.unique(column["sequence"], return_index=True)[1]
        assert len(first) == PROMPTS * GROUP and row["tokens/sampled"] == len(table)
        assert row["reward/mean"] == pytest.approx(column["reward"][first].mean())
        assert row["response/length_mean"] == pytest.approx(len(table) / len(first))
        gap = column["logp_old"].astype(np.float64) - column["logp_rollout"]
        assert row["logp_gap/mean_abs"] == pytest.approx(np.abs(gap).mean(), rel=1e-5)
        assert row["logp_gap/k3"] == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-3)
        assert row["ratio/max"] == pytest.approx(column["ratio"].max(), rel=1e-6)
        for sign, name in ((1, "positive"), (-1, "negative")):
            assert (row[f"clip/{name}"] is None) == (not (column["advantage"] * sign > 0).any())
        mismatched = column["layers_mismatched"].sum()
        assert row["mismatch/router_rate"] == pytest.approx(mismatched / (len(table) * LAYERS))
        assert row["mismatch/router_denominator"] == len(table) * LAYERS
        assert len(row["mismatch/by_layer"]) == LAYERS
        for name in ("entropy/mean", "grad_norm", "kl/warm_start", "loss/policy", "time/update"):
            assert math.isfinite(row[name]), name
        for phase in PHASES:
            assert 0 <= row[f"time/waiting/{phase}"] <= 1 and row[f"time/{phase}"] > 0
        assert row["kl/warm_start"] >= 0
        for name in row.keys() - {"step"}:
            assert metric(name).meaning


def test_the_token_log_means_what_the_design_says(run):
    folder, _ = run
    table = read_tokens(folder)
    column = {n: table[n].to_numpy() for n in table.column_names if n != "overlap"}
    np.testing.assert_allclose(
        column["ratio"], np.exp(column["logp_train"] - column["logp_old"]), rtol=1e-6
    )
    overlap = overlap_array(table)
    assert overlap.shape == (len(table), LAYERS) and overlap.max() == 2
    np.testing.assert_array_equal((overlap < 2).sum(axis=1), column["layers_mismatched"])
    # "0+0=" is 4 tokens, so responses begin at position 4 and run without a gap.
    for step in range(1, STEPS + 1):
        at = column["step"] == step
        for sequence in np.unique(column["sequence"][at]):
            positions = column["position"][at & (column["sequence"] == sequence)]
            np.testing.assert_array_equal(positions, 4 + np.arange(len(positions)))
    np.testing.assert_array_equal(column["prompt"], column["sequence"] // GROUP)
    # Both sides in fp32 hold the same weights at every step: a row joined wrongly, or weights that
    # did not reach the engine, would differ.
    assert np.abs(column["logp_old"] - column["logp_rollout"]).max() < 1e-4
    assert (overlap == 2).mean() > 0.999
    rollout, train = read_routes(table)
    assert rollout.shape == train.shape == (len(table), LAYERS, 2)
    shared = (rollout[..., :, None] == train[..., None, :]).sum(axis=(2, 3))
    np.testing.assert_array_equal(shared, overlap)
    # Later optimizer steps move the ratio, and what UP-GSPO clips follows from its definition:
    # negatives of a sequence whose ratio is below 1 - 3e-4 at its last visit.
    assert (np.abs(column["ratio"] - 1) > 1e-3).any()
    key = column["step"].astype(np.int64) * 1000 + column["sequence"]
    _, index = np.unique(key, return_inverse=True)
    log_ratio = column["logp_train"].astype(np.float64) - column["logp_old"]
    sequence_ratio = np.exp(np.bincount(index, log_ratio) / np.bincount(index))[index]
    expected = (column["advantage"] < 0) & (sequence_ratio < 1 - 3e-4)
    assert 0 < expected.sum() < len(table)
    near = np.abs(sequence_ratio - (1 - 3e-4)) < 1e-6
    np.testing.assert_array_equal(column["clipped"][~near], expected[~near])
    # Group-normalised advantages, in some group with both outcomes.
    sign = pc.unique(table["advantage"]).to_numpy()
    assert (sign > 0).any() and (sign < 0).any()


# Columns of the token log that a run without an engine cannot fill.
ENGINE_FLOORS = [f"noise_engine_{kind}" for kind in ("repeat", "batch_shape")]


@pytest.mark.bits
def test_saved_rollouts_repeat_the_run_without_an_engine(run, cache, tmp_path):
    """The same token log to the last bit: nothing of an update depends on the engine's presence."""
    folder, _ = run
    saved = str(folder.parent / "rollouts")
    more = ("--loss", "up-gspo", "--epochs", "2", "--analyse-every", "2", "--load-rollouts", saved)
    result = job(2, *options(tmp_path / "r", cache, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    with_engine = read_tokens(folder)
    assert set(ENGINE_FLOORS) <= set(with_engine.column_names)
    assert read_tokens(tmp_path / "r").equals(with_engine.drop_columns(ENGINE_FLOORS))
    rows = read_metrics(tmp_path / "r")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not any("eval/greedy" in row or "noise/engine_repeat/router_rate" in row for row in rows)
    other = job(2, *options(tmp_path / "other", cache, *more, "--seed", "1"))
    assert_fails(other, "rollouts of step 1 do not answer", "seed")


def test_generation_that_overlaps_the_update_is_one_step_off_policy(cache, tmp_path):
    """Both sides in fp32: the gap of an overlapped step is staleness, none of it numerics."""
    more = ("--overlap", "--analyse-every", "1", "--engine-dtype", "float32")
    result = job(2, *options(tmp_path / "r", cache, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(tmp_path / "r")[1:]
    assert [row["staleness/mean"] for row in rows] == [0, 1, 1]
    assert rows[0]["logp_gap/mean_abs"] < 1e-5 and "gap/staleness/mean" not in rows[0]
    for row in rows[1:]:
        assert row["gap/numerics/mean_abs"] < 1e-5 < 1e-4 < row["gap/staleness/mean_abs"]
        assert "noise/engine_repeat/router_rate" in row
        assert "noise/engine_batch_shape/router_rate" not in row
    terms = ("numerics", "staleness", "engine_routing", "update", "routing_shift")
    assert_gap_adds_up(tmp_path / "r", [2, 3], terms)


NOISE = ("trainer_repeat", "trainer_batch_shape", "engine_repeat", "engine_batch_shape")


def test_the_analysed_steps_take_the_gap_apart(run):
    """Steps 1 and 3: four terms that add up to the gap, and the noise floors; engine and trainer in
    fp32, so that nothing is left for numerics and the engine's routing."""
    folder, _ = run
    for row in read_metrics(folder)[1:]:
        tokens, analysed = row["tokens/sampled"], row["step"] in (1, 3)
        for name in ("gap/update/mean_abs", "conditional/router_rate", "time/decomposition"):
            assert (name in row) == analysed
        assert sum(row["mismatch/histogram"]) == tokens
        if analysed:
            for kind in NOISE:
                assert row[f"noise/{kind}/router_rate"] < 1e-3
                assert sum(row[f"noise/{kind}/histogram"]) == tokens
                assert len(row[f"noise/{kind}/by_layer"]) == LAYERS
            assert row["noise/trainer_repeat/logp_mean_abs"] == 0
            assert 0 <= row["noise/trainer_batch_shape/logp_mean_abs"] < 1e-5
            assert row["gap/numerics/mean_abs"] < 1e-5 < row["gap/update/mean_abs"]
            assert row["gap/engine_routing/mean_abs"] < 1e-5
            assert row["conditional/router_rate"] < 1e-3
            assert 0 < row["time/decomposition"] < row["time/total"]
    assert_gap_adds_up(folder, [1, 3], ("numerics", "engine_routing", "update", "routing_shift"))
    assert read_tokens(folder, steps=[1, 2])["gap_update"].null_count > 0


def assert_gap_adds_up(folder: Path, steps: list[int], terms: tuple[str, ...]) -> None:
    table = read_tokens(folder, steps=steps)
    found = {name for name in table.column_names if name.startswith("gap_")}
    assert found == {f"gap_{term}" for term in terms}
    total = sum(table[name].to_numpy().astype(np.float64) for name in found)
    gap = table["logp_train"].to_numpy().astype(np.float64) - table["logp_rollout"].to_numpy()
    np.testing.assert_allclose(total, gap, atol=1e-6)


@pytest.mark.parametrize(
    ("replay", "terms", "unseen"),
    [
        ("R2", ("numerics", "engine_routing", "update"), "routing_shift"),
        ("R3", ("numerics", "update"), "engine_routing"),
    ],
)
def test_replay_trains(replay, terms, unseen, run, cache, tmp_path):
    """bf16 rollouts. That replayed routes are used: tests/megatron/test_layouts.py."""
    more = ("--replay", replay, "--steps", "2", "--token-log", "sampled")
    more = (*more, "--token-log-share", "0.5")
    result = job(2, *options(tmp_path / "r", cache, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(tmp_path / "r")
    assert len(rows) == 3 and all(math.isfinite(row["grad_norm"]) for row in rows[1:])
    assert f"counterfactual/{unseen}/mean_abs" in rows[1]
    assert ("conditional/router_rate" in rows[2]) == (replay == "R3")
    assert_gap_adds_up(tmp_path / "r", [1], terms)
    sequences = read_tokens(tmp_path / "r", steps=[1])["sequence"].unique()
    assert 0 < len(sequences) < PROMPTS * GROUP


def test_a_dense_model_trains_and_says_that_it_has_no_routes(cache, tmp_path):
    more = ("--tiny.experts", "0", "--steps", "1")
    result = job(2, *options(tmp_path / "r", cache / "dense", *more))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "TP2·EP1" in result.stdout and "dense: no routes to record" in result.stdout
    row = read_metrics(tmp_path / "r")[1]
    assert row["noise/trainer_repeat/logp_mean_abs"] == 0 < row["logp_gap/mean_abs"]
    assert not [name for name in row if name.startswith(("mismatch/", "conditional/", "gap/"))]
    table = read_tokens(tmp_path / "r")
    assert len(table) == row["tokens/sampled"] and "overlap" not in table.column_names


@pytest.fixture(scope="module")
def first_step(cache, tmp_path_factory):
    """The token log of step 1, all of it at the start's weights, on two ranks laid out as asked.

    A random model of many experts: its bf16 rollouts differ from the trainer in many places.
    """
    model = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_model_config(layers=2, hidden=64, experts=32, top_k=4, expert_intermediate=32)
    Qwen3MoeForCausalLM(config).save_pretrained(model)
    arithmetic.save_tokenizer(model)

    def start(*layout: str, ranks: int = 2):
        folder = tmp_path_factory.mktemp("layout") / "r"
        more = ("--steps", "1", "--minibatches", "1", "--analyse-every", "1", *layout)
        more = (*more, "--model", str(model), "--max-new-tokens", "8")
        result = job(ranks, *options(folder, cache, *more))
        assert result.returncode == 0, result.stderr[-3000:]
        return read_tokens(folder).sort_by([("sequence", "ascending"), ("position", "ascending")])

    return start


@pytest.fixture(scope="module")
def of_two_ranks(first_step, tmp_path_factory):
    """The token log on TP2·EP2, and what four ranks need to train on the same rollouts."""
    saved = str(tmp_path_factory.mktemp("saved") / "rollouts")
    return first_step("--tp", "2", "--ep", "2", "--save-rollouts", saved), saved


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ("--tp", "1", "--ep", "1", "--pp", "2", "--recompute", "full")),
        (2, ("--tp", "1", "--ep", "2")),
        pytest.param(4, ("--tp", "2", "--ep", "2"), marks=pytest.mark.slow),
    ],
    ids=["pipeline, recomputed", "data parallel: a file for each rank", "four ranks"],
)
def test_the_layouts_leave_the_same_token_log(ranks, layout, of_two_ranks, first_step):
    """As TP2·EP2 does."""
    expected, saved = of_two_ranks
    assert expected["layers_mismatched"].to_numpy().sum() > 10
    more = ("--load-rollouts", saved) if ranks == 4 else ()
    found = first_step(*layout, *more, ranks=ranks)
    if more:  # without an engine
        expected = expected.drop_columns(ENGINE_FLOORS)
    assert found.column_names == expected.column_names
    for name in found.column_names:
        a, b = found[name].combine_chunks(), expected[name].combine_chunks()
        if str(a.type) == "float":
            np.testing.assert_allclose(a.to_numpy(), b.to_numpy(), atol=2e-5, err_msg=name)
        else:
            assert a.equals(b), name


@pytest.mark.bits
def test_old_log_probs_from_the_update_itself_are_those_of_a_forward_before_it(first_step):
    """One optimizer step in a step: an analysed one scores its samples, another does not."""
    scored = first_step("--tp", "1", "--ep", "2")
    own = first_step("--tp", "1", "--ep", "2", "--analyse-every", "0")
    assert set(own["ratio"].to_pylist()) == {1.0}
    assert np.array_equal(own["logp_old"], own["logp_train"])
    for name in ("token_id", "layers_mismatched", "overlap", "clipped"):
        assert own[name].equals(scored[name]), name
    for name in ("logp_old", "logp_train", "logp_rollout", "margin_min", "gradient_weight"):
        np.testing.assert_allclose(own[name], scored[name], atol=2e-5, err_msg=name)


def test_the_trained_weights_load_in_transformers_and_have_moved(run, cache):
    folder, _ = run
    trained = folder / "checkpoints" / f"step-{STEPS:06d}"
    start = warm_started(cache)
    after, before = (load_file(path / "model.safetensors") for path in (trained, start))
    assert after.keys() == before.keys()
    moved = sum(not torch.equal(after[name], before[name]) for name in after)
    assert moved > 0.8 * len(after)  # few tokens: some experts may have seen none
    Qwen3MoeForCausalLM.from_pretrained(trained)
    assert AutoTokenizer.from_pretrained(trained)("1+2=").input_ids == [4, 13, 5, 14]


@pytest.mark.parametrize(
    ("command", "layout"),
    [
        (("bash", SCRIPT), "TP2·EP2, 2 rank(s)"),
        pytest.param((str(TORCHRUN), SCRIPT), "TP1·EP1, 1 rank(s)", marks=pytest.mark.slow),
    ],
    ids=["bash", "plain torchrun"],
)
def test_the_other_ways_to_start(command, layout, run, cache, tmp_path, monkeypatch):
    monkeypatch.delenv("MKL_CBWR")  # as a user has it
    path = f"{TORCHRUN.parent}:{os.environ['PATH']}"
    words = options(tmp_path / "r", cache, "--steps", "1")
    result = launch(*command, *words, PATH=path, MOE_UPGRPO=str(OURS))
    assert result.returncode == 0, result.stderr[-3000:]
    assert layout in result.stdout
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0, 1]
    environment = read_environment(tmp_path / "r")
    assert environment["cpu"]["mkl"] != "OFF"
    assert environment["python"] == platform.python_version()


def assert_fails(result: subprocess.CompletedProcess, *words: str) -> None:
    """Not a success, and one message, above torchrun's own."""
    assert result.returncode != 0
    assert result.stderr.count("\nerror: ") + result.stderr.startswith("error: ") == 1
    message = result.stderr.split("error: ", 1)[1].split("\nTraceback")[0]
    for word in words:
        assert word in message, message


def test_a_layout_that_does_not_divide_the_ranks(cache, tmp_path):
    result = torchrun(2, *options(tmp_path / "r", cache, "--tp", "3"))
    assert_fails(result, "tp=3 does not divide the 2 rank(s)", "--nproc-per-node")
    assert not (tmp_path / "r").exists()


def test_a_layout_that_does_not_divide_the_heads(cache, tmp_path):
    result = job(4, *options(tmp_path / "r", cache, "--tp", "4", "--ep", "1"))
    assert_fails(result, "tp=4 does not divide the model's num_key_value_heads=2")
    assert not list((tmp_path / "r").iterdir())  # the same command, mended, may use it


def test_a_loss_that_does_not_exist(cache, tmp_path):
    result = job(2, *options(tmp_path / "r", cache, "--loss", "grop"))
    assert_fails(result, "'grop'", " grpo,", " gspo,", " up-grpo,", " up-gspo,", "--help")
    assert result.returncode == 2


def test_a_folder_that_holds_another_run(run, cache):
    folder, _ = run
    before = read_metrics(folder)
    result = job(2, *options(folder, cache))
    assert_fails(result, "already holds a run", "--output-dir")
    assert read_metrics(folder) == before


def test_a_folder_that_cannot_be_written(cache):
    result = job(2, *options(Path("/dev/null/run"), cache))
    assert_fails(result, "/dev/null/run cannot be written", "--output-dir")


def test_a_model_that_does_not_speak_the_tasks_tokens(tiny_checkpoint, cache, tmp_path):
    result = job(2, *options(tmp_path / "r", cache, "--model", str(tiny_checkpoint)))
    assert_fails(result, "has no tokenizer", "leave --model out")


def broken_checkpoint(source: Path, target: Path, change) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_a_checkpoint_whose_shapes_do_not_match(run, cache, tmp_path):
    def narrow(state):
        state[NAME] = state[NAME][:, :32].clone()

    start = warm_started(cache)
    model = broken_checkpoint(start, tmp_path / "model", narrow)
    result = job(2, *options(tmp_path / "r", cache, "--model", str(model)))
    assert_fails(result, NAME, "(64, 32)", "does not fit")


@pytest.mark.fault(
    "Numbers",
    "weights that are not finite",
    "the run ends with the sequence and what to look for",
)
def test_non_finite_log_probs(run, cache, tmp_path):
    def break_head(state):
        state["lm_head.weight"][5, 0] = float("nan")

    start = warm_started(cache)
    model = broken_checkpoint(start, tmp_path / "model", break_head)
    result = job(2, *options(tmp_path / "r", cache, "--model", str(model)))
    assert_fails(result, "not finite", "non-finite weights")


@contextmanager
def running(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    """A job that has logged some steps, started as in a shell."""
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MOE_UPGRPO": str(OURS)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 150
        while len(rows_so_far(folder)) < 4:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield job
    finally:
        job.kill()


ENDLESS = ("--steps", "100000", "--eval-every", "100000")


def assert_whole(folder: Path) -> None:
    """Check what was logged until then."""
    steps = [row["step"] for row in read_metrics(folder)]
    assert steps == list(range(len(steps))) and len(steps) >= 4
    assert set(read_tokens(folder)["step"].to_pylist()) >= set(steps[1:])


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "a rank is killed",
    "the job ends within a minute; what was logged is whole",
)
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_under_torchrun_ends_the_job(victim, run, cache, tmp_path):
    folder = tmp_path / "r"
    command = (str(TORCHRUN), "--nproc-per-node", "2", SCRIPT)
    with running(folder, *command, *options(folder, cache, *ENDLESS)) as job:
        os.kill(rank_pid(job.pid, victim), signal.SIGKILL)
        killed = time.monotonic()
        _, errors = job.communicate(timeout=90)
        assert time.monotonic() - killed < 90
    assert job.returncode != 0
    # Whether the survivor says so or torchrun ends it first is a race; torchrun names the victim.
    assert errors.count(f"error: rank {1 - victim}") <= 1
    assert "failed with" not in errors  # how a fault without words of its own is told
    assert "Signal 9 (SIGKILL)" in errors
    assert_whole(folder)


# How rank 1 or the whole job is ended -> the status, and what the last line on the screen says.
ENDS = {
    "a rank is killed": (signal.SIGKILL, 4, "error: rank 1 was ended by SIGKILL (by hand, or by"),
    "a rank is stopped": (signal.SIGSTOP, 4, "gave no sign of life for 6 s: stopped, its host"),
    "Ctrl-C": (signal.SIGINT, 130, "error: stopped by SIGINT, with its state after step "),
}


@pytest.mark.fault(
    "How a command ends",
    "a rank is killed or stopped, or Ctrl-C, under `make train` and bash",
    "one line at the end with the run, the `--resume` line and a status by kind",
)
@pytest.mark.parametrize(
    "how", ["Ctrl-C", *(pytest.param(m, marks=pytest.mark.slow) for m in [*ENDS][:2])]
)
def test_the_last_word_is_ours(how, run, cache, tmp_path):
    """By bash: one line, with the run and how to go on, and a status by kind."""
    number, status, says = ENDS[how]
    folder = tmp_path / "r"
    more = (*ENDLESS, "--save-every", "100000", "--timeout", "0.1")
    with running(folder, "bash", SCRIPT, *options(folder, cache, *more)) as job:
        os.kill(job.pid if how == "Ctrl-C" else rank_pid(job.pid, 1), number)
        begin = time.monotonic()
        _, errors = job.communicate(timeout=120)
        assert time.monotonic() - begin < 6 + 90
    assert job.returncode == status, errors
    last = errors.splitlines()[-1]
    assert says in last and last.endswith(f"to go on: --resume {folder}"), errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors
    assert_whole(folder)


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "the launcher is killed",
    "its ranks write a state and end, with the `--resume` line",
)
def test_no_rank_outlives_its_launcher(run, cache, tmp_path):
    folder, other = tmp_path / "r", socket.socket()
    with suppress(OSError):
        other.bind(("", 29500))  # torchrun's port, as another job on this machine has it
        other.listen()
    with other, running(folder, "bash", SCRIPT, *options(folder, cache, *ENDLESS)) as job:
        ranks = of_ranks(job.pid, 2)
        job.kill()
        _, errors = job.communicate(timeout=60)  # until the ranks, which hold it too, are gone
        assert not psutil.wait_procs(ranks, timeout=10)[1]
    assert errors.splitlines()[-1].endswith(f"to go on: --resume {folder}"), errors
    assert errors.count("stopped by SIGTERM") == 1
    assert_whole(folder)
    assert Checkpoints(folder / "checkpoints").all(), errors


def rank_pid(agent: int, rank: int) -> int:
    return of_ranks(agent, 2)[rank].pid
