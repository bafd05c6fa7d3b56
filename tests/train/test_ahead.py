"""The queue of batches sampled ahead, alone and in whole runs of one process; hf engine.

Kills in the middle, on two ranks, are in test_resume.py.
"""

import shutil
import threading
import time
from functools import partial

import pytest
import tyro

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.rollout.cache import load_rollouts
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.store import read_metrics, read_tokens
from moe_upgrpo.store.checkpoints import Checkpoints
from moe_upgrpo.train import ahead as ahead_module
from moe_upgrpo.train.ahead import Ahead, Patience
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.loop import train
from moe_upgrpo.train.options import run_arguments
from moe_upgrpo.train.rollouts import Rollouts
from moe_upgrpo.train.tiny import TinyModel, WarmStartConfig


@pytest.fixture
def queue(monkeypatch):
    """Makes a queue of one rank."""
    monkeypatch.setattr(ahead_module.groups, "summed_everywhere", lambda values: values)
    return lambda **patience: Ahead(Patience(**{"say": lambda line: None} | patience))


def test_batches_and_weights_are_worked_on_in_the_order_asked_for(queue):
    """However slow they are: a batch is of the weights that were put in last before it."""
    waiting, held = queue(), [0]

    def sample(seconds):
        time.sleep(seconds)
        return held[-1]

    waiting.restore(2, "restored")
    waiting.sample(3, partial(sample, 0.1))
    waiting.put_weights(lambda: held.append(1))
    waiting.sample(4, partial(sample, 0.0))
    waiting.put_weights(lambda: held.append(2))
    waiting.settle()
    assert held == [0, 1, 2]
    assert waiting.waiting() == {2: "restored", 3: 0, 4: 1}
    assert [waiting.take(step) for step in (2, 3, 4)] == ["restored", 0, 1]
    assert 3 not in waiting and waiting.waiting() == {}


def test_after_weights_that_did_not_arrive_nothing_is_sampled(queue):
    waiting, sampled = queue(), []

    def fails():
        raise UserError("the server is gone")

    waiting.put_weights(fails)
    waiting.sample(5, lambda: sampled.append(5))
    for wait in (lambda: waiting.take(5), waiting.settle):
        with pytest.raises(UserError, match="the server is gone"):
            wait()
    assert not sampled


@pytest.mark.fault(
    "Ranks, hosts and workers",
    "the queue of `--staleness` starves: the engine stands still or is too slow",
    "one line, and training waits or ends as `--starved` says; no other batch is taken",
)
def test_a_queue_that_starves_says_so_once_and_goes_on_or_ends(queue):
    said, there = [], threading.Event()

    def late():
        there.wait()
        return ["late"]

    waiting = queue(seconds=0.01, say=said.append)
    waiting.sample(7, late)
    threading.Timer(0.2, there.set).start()
    assert waiting.take(7) == ["late"]
    assert len(said) == 1 and said[0].startswith(
        "step 7 has waited 0.01 s for its batch, which 1 rank(s) still sample. Training waits on"
    )
    there.clear()
    waiting.sample(8, late)
    threading.Timer(0.1, there.set).start()
    assert waiting.take(8) == ["late"] and len(said) == 1

    there.clear()
    ends = queue(seconds=0.01, then="end", say=said.append)
    ends.sample(9, late)
    with pytest.raises(MachineFault, match=r"step 9 has waited 0.01 s .* as --starved end says"):
        ends.take(9)
    there.set()
    assert len(said) == 1


STEPS = 5


def whole_run(folder, cache, steps=STEPS, **more):
    tiny, warm_start = TinyModel(layers=2, hidden=64), WarmStartConfig(probe_problems=64)
    given = dict(digits=1, prompts=4, group=4, minibatches=2, eval_every=3, report=False)
    given |= dict(engine_dtype="float32", reference_kl=False, analyse_every=2, save_every=0)
    given |= dict(tiny=tiny, warm_start=warm_start, cache_dir=cache, steps=steps) | more
    return train(TrainConfig.of(output_dir=folder, **given))


def resumed(run, *more):
    words = [*run_arguments(run), "--resume", str(run), *more]
    return train(tyro.cli(TrainConfig, args=words))


def left(run):
    """Rows without times, and tokens, of a run."""
    rows = [
        {n: v for n, v in row.items() if not n.startswith("time/") and "per_second" not in n}
        for row in read_metrics(run)
    ]
    (weights,) = run.glob("checkpoints/step-*/model.safetensors")
    return rows, read_tokens(run).to_pydict(), weights.read_bytes()


def staleness(run):
    return [row["staleness/mean"] for row in read_metrics(run)[1:]]


@pytest.fixture(scope="module")
def two_behind(tmp_path_factory, cache):
    """A run of --staleness 2 that keeps every state, and the most batches it had in its queue."""
    folder, lengths = tmp_path_factory.mktemp("ahead") / "run", []
    begin = Rollouts.generate_ahead

    def counted(self, step):
        begun = begin(self, step)
        lengths.append(len(self._ahead._batches))
        return begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "generate_ahead", counted)
        run = whole_run(folder, cache, staleness=2, save_every=1, keep=STEPS)
    return run, lengths


@pytest.mark.bits
def test_without_staleness_a_run_is_the_one_that_knows_no_queue(cache, tmp_path, monkeypatch):
    """Sampled, trained and handed over in turn, as it was before there was a queue."""
    expected = whole_run(tmp_path / "0", cache)

    def generated(self, problems, step, refill=0):
        return self._sample(problems, step, refill)

    def update_engine(self, actor, step):
        self.engine.update_weights(actor.export_weights(), version=step)

    monkeypatch.setattr(Rollouts, "_generated", generated)
    monkeypatch.setattr(Rollouts, "update_engine", update_engine)
    monkeypatch.setattr(Rollouts, "generate_ahead", lambda self, step: [])
    monkeypatch.setattr(Rollouts, "settle", lambda self: None)
    run = whole_run(tmp_path / "plain", cache)
    assert left(run) == left(expected)
    assert staleness(run) == [0] * STEPS


def test_each_batch_is_sampled_two_versions_before_those_that_it_trains(two_behind):
    """Batch k by version max(0, k − 3): 0 0 0 1 2. Every token's row says so."""
    run, lengths = two_behind
    assert staleness(run) == [0, 1, 2, 2, 2]
    tokens = read_tokens(run)
    versions = {
        (step, step - 1 - behind)
        for step, behind in zip(
            tokens["step"].to_pylist(), tokens["staleness"].to_pylist(), strict=True
        )
    }
    assert versions == {(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)}
    assert lengths == [2, 2, 2, 1, 0]  # the queue is full, and empty at the end
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "gap/staleness/mean" in row] == [3, 5]
    for row in rows[3::2]:  # both sides in fp32: the gap is staleness, none of it numerics
        assert row["gap/numerics/mean_abs"] < 1e-5 < 1e-4 < row["gap/staleness/mean_abs"]
        assert "noise/engine_repeat/router_rate" in row


@pytest.mark.bits
def test_what_is_slow_does_not_matter(two_behind, cache, tmp_path, monkeypatch):
    """Neither to the versions nor to a bit, with an engine that sleeps before every other batch."""
    generate, calls = HFEngine.generate, []

    def slow(self, *arguments, **keywords):
        calls.append(threading.current_thread().name)
        time.sleep(0.3 * (len(calls) % 2))
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(HFEngine, "generate", slow)
    run = whole_run(tmp_path / "run", cache, staleness=2)
    assert left(run) == left(two_behind[0])
    assert sum(name.startswith("generate") for name in calls) == STEPS - 1


@pytest.mark.bits
@pytest.mark.parametrize("step", [1, 3])
def test_a_run_resumed_with_a_queue_is_the_unbroken_one(step, two_behind, tmp_path):
    """From the state after step 1 (of the first weights) and after step 3."""
    run = shutil.copytree(two_behind[0], tmp_path / "run")
    for state in Checkpoints(run / "checkpoints").all()[step:]:
        shutil.rmtree(state)
    kept = Checkpoints(run / "checkpoints").all()[-1]
    saved = sorted(file.name for file in (kept / "rollouts").iterdir())
    assert saved == [f"step-{step + i:06d}-rank-0000.parquet" for i in (1, 2)]
    resumed(run)
    assert left(run) == left(two_behind[0])


def test_more_steps_begin_with_the_weights_at_hand(two_behind, tmp_path):
    """Nothing was sampled ahead of the end: step 6 is fresh, 7 and 8 are of the same weights."""
    run = shutil.copytree(two_behind[0], tmp_path / "run")
    resumed(run, "--steps", "8")
    assert staleness(run) == [0, 1, 2, 2, 2, 0, 1, 2]


PARTIAL = dict(staleness=2, partial_rollouts=1, old_log_probs="rollout", analyse_every=0)


@pytest.fixture(scope="module")
def going_on(tmp_path_factory, cache):
    """A run whose responses go on after an update, one token before it; it keeps every state."""
    folder = tmp_path_factory.mktemp("partial") / "run"
    return whole_run(folder, cache, **PARTIAL, save_every=1, keep=STEPS)


def test_a_response_goes_on_with_the_weights_of_the_update(going_on):
    """Batch k's first token is of version max(0, k − 3), the others of k − 2; of batch 2, which has
    no update in it, all are of 0."""
    tokens = read_tokens(going_on)
    first, behind = {}, {}
    for step, sequence, position, stale in zip(
        *(tokens[n].to_pylist() for n in ("step", "sequence", "position", "staleness")), strict=True
    ):
        is_first = position == first.setdefault((step, sequence), position)
        behind.setdefault((step, is_first), set()).add(stale)
    assert {step: behind[step, True] for step in range(1, 6)} == {1: {0}, 2: {1}} | {
        step: {2} for step in (3, 4, 5)
    }
    assert {step: behind[step, False] for step in range(1, 6)} == {1: {0}} | {
        step: {1} for step in (2, 3, 4, 5)
    }


def test_the_ratio_of_a_response_that_went_on_is_to_what_sampled_each_token(cache, tmp_path):
    """At a learning rate of 0 every version is the same policy: each token's log-prob is then the
    trainer's, whichever part of its response it is in."""
    optimizer = OptimizerSettings(lr=0.0)
    run = whole_run(tmp_path / "run", cache, **PARTIAL, optimizer=optimizer)
    gaps = [row["logp_gap/mean_abs"] for row in read_metrics(run)[1:]]
    assert max(gaps) < 1e-5


@pytest.mark.bits
def test_a_run_resumed_within_responses_is_the_unbroken_one(going_on, tmp_path):
    """The state after step 2 has batch 3 whole, and of batch 4 the first tokens."""
    run = shutil.copytree(going_on, tmp_path / "run")
    for state in Checkpoints(run / "checkpoints").all()[2:]:
        shutil.rmtree(state)
    (kept,) = Checkpoints(run / "checkpoints").all()[-1:]
    begun = load_rollouts(kept / "rollouts", 4)
    assert {len(rollout.response_ids) for rollout in begun} == {1}
    resumed(run)
    assert left(run) == left(going_on)


def test_a_run_whose_queue_starves_ends_with_one_message(cache, tmp_path, monkeypatch):
    generate, there = HFEngine.generate, threading.Event()

    def stands_still(self, *arguments, **keywords):
        if threading.current_thread() is not threading.main_thread():
            there.wait()
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(HFEngine, "generate", stands_still)
    run = tmp_path / "run"
    words = r"step 2 has waited 0.3 s for its batch, .* --resume .* goes on"
    try:
        with pytest.raises(MachineFault, match=words):
            whole_run(run, cache, staleness=2, starve_after=0.3, starved="end")
    finally:
        there.set()
    assert [row["step"] for row in read_metrics(run)] == [0, 1]
