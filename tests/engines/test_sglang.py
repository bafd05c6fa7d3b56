"""SGLangEngine on a real SGLang server, held against the Megatron trainer: `make test-engines`.

Run on a CPU with sglang 0.5.23 in an environment of its own. Not covered: CUDA, tensor-parallel
servers, MoE families other than Qwen3. Answers that the real server never gives are made by a
proxy that alters its answers (`sglang_proxy`).
"""

import base64
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face import shards
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout import engines, handover, sglang
from moe_upgrpo.rollout.server_key import headers
from moe_upgrpo.rollout.sglang import SGLangEngine
from moe_upgrpo.routing import compare_routes
from tests.engines.sglang_proxy import altering
from tests.engines.tolerance import log_prob_tolerance
from tests.engines.trainer import (
    EOS,
    MOE,
    SIZES,
    agrees_with_trainer,
    move_weights,
    prompts,
    sample,
    saved,
    score,
    weights_of,
    whole,
)
from tests.ranks import run_ranks

CHUNK = 16  # prompt tokens in one pass of the server
LAYERS, EXPERTS, TOP_K = (
    MOE[name] for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok")
)
LONG = dict(max_position_embeddings=1024)  # room for what is killed, or takes too long


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("a"), Qwen3MoeConfig(**MOE | LONG), 0)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("b"), Qwen3MoeConfig(**MOE | LONG), 1)


@pytest.fixture(scope="module", autouse=True)
def key():
    """Key of the server that is started, and of whoever is given its URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_API_KEY", "of-the-tests")
        yield


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    """As in the trainer: gloo runs, and Megatron's CPU backend is applied."""
    with groups.process_groups(Layout()):
        yield


OPTIONS = dict(
    chunked_prefill_size=CHUNK, max_total_tokens=4096, max_running_requests=12, timeout=30
)


@pytest.fixture(scope="module")
def server(model_dir):
    engine = SGLangEngine(model_dir, "float32", **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture
def engine(server, model_dir):
    """The one server of this file, up and on the weights of `model_dir` as version 0."""
    server.timeout, server.generate_timeout = OPTIONS["timeout"], 120
    try:
        server.update_weights(weights_of(model_dir).items(), version=0)
    except UserError:  # the test before left it ended
        server.restart()
        server.update_weights(weights_of(model_dir).items(), version=0)
    return server


@pytest.fixture
def cached_tokens(monkeypatch):
    """Prompt tokens that the engines' calls took from the prefix cache, by request."""
    seen, ask = [], SGLangEngine._ask

    def spy(self, bodies):
        answers = ask(self, bodies)
        seen.extend(item["meta_info"]["cached_tokens"] for items in answers for item in items)
        return answers

    monkeypatch.setattr(SGLangEngine, "_ask", spy)
    return seen


@pytest.mark.fault(
    "Servers and other people's files",
    "another user of the machine asks a server of SGLang, or reads its log",
    "401; the log has no key",
)
def test_nobody_else_is_answered(server, model_dir):
    for path in ("/generate", "/update_weights_from_disk", "/pause_generation", "/server_info"):
        for given in (None, "another"):
            request = urllib.request.Request(server.url + path, b"{}", headers(given))
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=15)
    with pytest.raises(UserError, match="asks for another key than it was given: set SGLANG_API_K"):
        SGLangEngine(model_dir, "float32", url=server.url, api_key="another")
    log = server._server.log.read_text()
    assert "'api_key': '***'" in log and "of-the-tests" not in log
    command = Path(f"/proc/{server._server.process.pid}/cmdline").read_text()
    assert "--host" in command and "of-the-tests" not in command


def same(first, second):
    """The same responses, log-probs and routes but for the rounding of other batch shapes."""
    assert len(first) == len(second) > 0
    tolerance = log_prob_tolerance(Qwen3MoeConfig(**MOE), length=max(len(whole(r)) for r in first))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_allclose(a.logp_rollout, b.logp_rollout, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(np.sort(a.routes), np.sort(b.routes))
    return True


def differs(first, second):
    pairs = zip(first, second, strict=True)
    return any(not np.array_equal(a.response_ids, b.response_ids) for a, b in pairs)


def checksum(engine):
    return engine._call("/weights_checker", {"action": "checksum"})["per_engine_checksum"]


@contextmanager
def meanwhile(action, after_s):
    thread = threading.Timer(after_s, action)
    thread.start()
    yield
    thread.join()


@contextmanager
def raises_within(seconds, match):
    begin = time.monotonic()
    with pytest.raises(UserError, match=match):
        yield
    assert time.monotonic() - begin < seconds


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fp32_log_probs_and_routes_are_the_trainers_through_three_updates(
    engine, model_dir, cached_tokens, temperature
):
    """Prompts of mixed lengths, shared by many samples, and longer than a chunk.

    Also shows that routes shifted by one row would not pass.
    """
    torch.manual_seed(3)
    actor = MegatronActor(model_dir, Layout(), temperature=temperature)
    lengths = set()
    for version in range(4):
        if version:
            move_weights(actor)
            engine.update_weights(actor.export_weights(), version=version)
        rollouts = sample(engine, samples=6, temperature=temperature, seed=version)
        assert agrees_with_trainer(actor, rollouts) > 1000
        assert {r.weight_version for r in rollouts} == {engine.weight_version} == {version}
        # There was a cache to go wrong, and the longest prompt took five passes.
        assert sum(cached_tokens) > 100 and max(cached_tokens) > CHUNK
        cached_tokens.clear()
        sorted_routes = [np.sort(r.routes) for r in rollouts]
        assert any((r[1:] != r[:-1]).mean() > 0.3 for r in sorted_routes)
        lengths |= {len(r.response_ids) for r in rollouts}
    assert len(lengths) > 3
    assert engine.moe_layer_ids == (0, 1, 2) == tuple(actor.layer_ids)


def test_reloading_identical_weights_changes_nothing(engine, model_dir):
    before, sums = sample(engine), checksum(engine)
    for version in (1, 2):
        engine.update_weights(weights_of(model_dir).items(), version=version)
        assert checksum(engine) == sums  # to the bit
        assert same(before, sample(engine))
    assert engine.weight_version == 2


def test_updated_weights_are_those_of_a_server_started_with_them(engine, other_dir):
    """Also: `restart` brings back the weights that were held, under their version."""
    before = sample(engine)
    given = weights_of(other_dir)
    engine.update_weights(iter(given.items()), version=7)
    after, sums = sample(engine), checksum(engine)
    assert differs(before, after)
    for tensor in given.values():  # the engine keeps no hold of them
        tensor.zero_()
    engine.restart()
    assert checksum(engine) == sums
    assert same(after, sample(engine))
    assert {r.weight_version for r in after} == {engine.weight_version} == {7}


def test_bfloat16_weights_are_taken(engine, model_dir):
    half = {name: tensor.bfloat16() for name, tensor in weights_of(model_dir).items()}
    engine.update_weights(half.items(), version=1)
    rounded = sample(engine)
    engine.update_weights(((n, t.float()) for n, t in half.items()), version=2)
    assert same(rounded, sample(engine))


def test_weights_in_several_files(engine, other_dir, monkeypatch):
    engine.update_weights(weights_of(other_dir).items(), version=1)
    sums = checksum(engine)
    engine.update_weights(
        ((n, torch.zeros_like(t)) for n, t in weights_of(other_dir).items()), version=2
    )
    assert checksum(engine) != sums
    monkeypatch.setattr(handover, "PART_BYTES", 50_000)
    engine.update_weights(weights_of(other_dir).items(), version=3)
    assert checksum(engine) == sums
    assert len(list(engine._held_dir.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("transfer", ["tensor", "distributed"])
@pytest.mark.parametrize("part_bytes", [1 << 30, 40_000], ids=["whole", "in parts"])
def test_weights_sent_are_to_the_bit_those_loaded_from_files(
    engine, model_dir, other_dir, monkeypatch, transfer, part_bytes
):
    """Distributed over gloo; NCCL is not run."""
    engine.update_weights(weights_of(other_dir).items(), version=1)
    expected, sums = sample(engine), checksum(engine)
    monkeypatch.setattr(sglang, "PART_BYTES", part_bytes)
    # To a server that it did not start: version 0 is then sent as well.
    sender = SGLangEngine(model_dir, "float32", url=engine.url, transfer=transfer, timeout=30)
    assert checksum(engine) != sums
    for version in (1, 2):
        sender.update_weights(weights_of(other_dir).items(), version=version)
        assert checksum(engine) == sums
        assert same(expected, sample(sender))
    sender.close()


@pytest.mark.parametrize("transfer", ["tensor", "distributed"])
def test_a_sent_update_that_fails_half_way_is_never_sampled_from(
    engine, model_dir, other_dir, monkeypatch, transfer
):
    """The second of several parts has a tensor that does not fit."""
    expected = sample(engine)
    sender = SGLangEngine(model_dir, "float32", url=engine.url, transfer=transfer, timeout=30)
    parts = sglang._parts

    def broken(state):
        first, *rest = parts(state)
        name, _ = rest[0][0]
        return [first, [(name, torch.zeros(5, 7))], *rest[1:]]  # SGLang would broadcast a row

    monkeypatch.setattr(sglang, "PART_BYTES", 40_000)
    with monkeypatch.context() as patch:
        patch.setattr(sglang, "_parts", broken)
        with raises_within(40, "SGLang"):
            sender.update_weights(weights_of(other_dir).items(), version=1)
    with pytest.raises(UserError, match="failed half-way"):
        sample(sender)
    if engine.health():  # refused; else it ended
        sender.update_weights(weights_of(model_dir).items(), version=2)
        assert same(expected, sample(sender))
    sender.close()


def test_sending_to_a_server_that_does_not_listen_ends(engine, model_dir):
    """SGLang takes tensors only in an update that was begun; in the broadcast nobody would join."""
    sender = SGLangEngine(model_dir, "float32", url=engine.url, transfer="distributed", timeout=30)
    part = list(weights_of(model_dir).items())
    with raises_within(10, "must run between begin_weight_update"):
        sender._group.broadcast(part, {})
    sender.close()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "dtype"])
def test_wrong_weights_are_refused_and_change_nothing(engine, other_dir, fault):
    given = weights_of(other_dir)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    if fault == "missing":
        del given[name]
    elif fault == "unexpected":
        given["model.layers.7.mlp.gate.weight"] = torch.zeros(8, 64)
        name = "model.layers.7.mlp.gate.weight"
    elif fault == "shape":
        given[name] = given[name].T.contiguous()
    else:
        given[name] = given[name].half()
    before, sums = sample(engine), checksum(engine)
    with pytest.raises(UserError, match=f"{name} .*version 0 stays in use"):
        engine.update_weights(given.items(), version=1)
    assert checksum(engine) == sums and engine.weight_version == 0
    assert same(before, sample(engine))


def test_bf16_engine_differs_from_the_fp32_trainer_and_replay_closes_most_of_it(tmp_path):
    """8.5M parameters, random; the k3 divergence falls at least twentyfold on replayed routes.

    The model of test_vllm.py: two large experts per token, where a wrong one weighs most.
    """
    config = SIZES | dict(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_experts=20,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        initializer_range=0.05,
    )
    folder = saved(tmp_path, Qwen3MoeConfig(**config))
    actor = MegatronActor(folder, Layout())
    engine = SGLangEngine(folder, "bfloat16")
    try:
        rollouts = sample(engine, lengths=(8, 16, 24, 32), samples=16, new_tokens=32)
        begin = time.perf_counter()
        engine.update_weights(actor.export_weights(), version=1)
        seconds = time.perf_counter() - begin
    finally:
        engine.close()
    native, replayed = (score(actor, rollouts, replay=replay) for replay in (False, True))
    gap, replayed_gap = (
        np.concatenate([s.log_probs - r.logp_rollout for s, r in zip(side, rollouts, strict=True)])
        for side in (native, replayed)
    )
    assert len(gap) > 1000
    k3, replayed_k3 = (np.mean(np.exp(d) - 1 - d) for d in (gap, replayed_gap))
    routes = compare_routes(
        torch.from_numpy(np.concatenate([r.routes for r in rollouts]).astype(np.int64)),
        torch.from_numpy(np.concatenate([s.routes for s in native]).astype(np.int64)),
        num_experts=20,
    )
    print(
        f"k3 {k3:.2e}, replayed {replayed_k3:.2e}: {k3 / replayed_k3:.0f} times less; "
        f"{routes.router_mismatch_rate:.2%} of routers, {routes.token_any_rate:.1%} of tokens; "
        f"update in {seconds:.2f} s"
    )
    assert routes.router_mismatch_rate > 0
    assert k3 > 20 * replayed_k3


def test_routes_of_given_sequences_are_computed_and_not_remembered(
    engine, model_dir, cached_tokens
):
    actor = MegatronActor(model_dir, Layout())
    rollouts = sample(engine, lengths=(70, 40, 3), samples=3)
    rollouts += rollouts[:2]  # the same sequences twice, also in one call
    cached_tokens.clear()
    found = engine.routes([whole(r) for r in rollouts])
    assert len(cached_tokens) == len(found) == 11 and sum(cached_tokens) == 0
    for routes, scored in zip(found, score(actor, rollouts), strict=True):
        np.testing.assert_array_equal(np.sort(routes), np.sort(scored.routes))


def test_responses_are_prompt_major_and_hold_one_eos_if_finished(engine):
    lengths = (3, 7, 1, 5)
    rollouts = sample(engine, lengths, samples=20)
    assert len(rollouts) == 80
    for index, rollout in enumerate(rollouts):
        np.testing.assert_array_equal(rollout.prompt_ids, prompts(*lengths)[index // 20])
        ends = np.flatnonzero(rollout.response_ids == EOS).tolist()
        if rollout.finished:
            assert ends == [len(rollout.response_ids) - 1]
        else:
            assert ends == [] and len(rollout.response_ids) == 20
    assert 0 < sum(rollout.finished for rollout in rollouts) < 80


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_tokens_are_sampled_from_the_distribution_whose_log_probs_are_returned(engine, temperature):
    """A chi-square test; sampling at 0.8 times the logits would be far beyond the bound."""
    draws = 2048
    rollouts = sample(engine, (4,), samples=draws, temperature=temperature, new_tokens=1)
    prob = {int(r.response_ids[0]): float(np.exp(r.logp_rollout[0])) for r in rollouts}
    assert len(prob) > 10 and sum(prob.values()) == pytest.approx(1, abs=0.05)
    tokens, counts = np.unique([r.response_ids[0] for r in rollouts], return_counts=True)
    expected = draws * np.array([prob[int(token)] for token in tokens])
    frequent = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[frequent].sum()
    # At most 63 degrees of freedom: the chance of more than 125 is 5e-6.
    assert chi_square < 125


def test_a_seed_gives_the_same_responses_and_another_seed_others(engine):
    first, again, other = (sample(engine, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    for a, b in ((first, other), (first[:3], first[1:4])):  # also the samples of one prompt
        assert differs(a, b)


def test_greedy_takes_the_best_token_with_log_probs_at_temperature_1(engine, model_dir):
    actor = MegatronActor(model_dir, Layout(), temperature=1.0)
    rollouts = sample(engine, samples=1, temperature=0)
    agrees_with_trainer(actor, rollouts)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for rollout in rollouts:
        logits = model(torch.from_numpy(whole(rollout))[None]).logits[0]
        best = logits.argmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        np.testing.assert_array_equal(rollout.response_ids, best)


def test_an_update_during_generation_leaves_no_response_of_two_versions(
    engine, model_dir, other_dir, monkeypatch
):
    """Responses cut off are sampled again; each is the trainer's at its own version."""
    unusable, reasons = sglang._unusable, []
    monkeypatch.setattr(sglang, "_unusable", lambda a: reasons.append(unusable(a)) or reasons[-1])
    actors = [MegatronActor(folder, Layout()) for folder in (model_dir, other_dir)]
    given = weights_of(other_dir)
    with meanwhile(lambda: engine.update_weights(given.items(), version=1), after_s=0.5):
        rollouts = sample(engine, (3, 20) * 3, samples=8, new_tokens=300)
    versions = [r.weight_version for r in rollouts]
    assert any(reason.startswith("aborted") for reason in reasons)
    assert set(versions) <= {0, 1} and 1 in versions and engine.weight_version == 1
    for version, actor in enumerate(actors):
        mine = [r for r in rollouts if r.weight_version == version]
        assert not mine or agrees_with_trainer(actor, mine) > 0


# --- Faults of the real server -------------------------------------------------------------------


def test_a_server_killed_in_a_batch_is_an_error_at_once_and_restarts_with_its_weights(
    engine, other_dir
):
    engine.update_weights(weights_of(other_dir).items(), version=4)
    expected = sample(engine)
    kill = os.killpg
    with (
        meanwhile(lambda: kill(engine._server.process.pid, signal.SIGKILL), after_s=0.5),
        raises_within(20, "is not there"),
    ):
        sample(engine, samples=32, new_tokens=500)
    assert not engine.health()
    with raises_within(5, "is not there"):
        engine.update_weights(weights_of(other_dir).items(), version=5)
    engine.restart()
    assert same(expected, sample(engine)) and engine.weight_version == 4


def test_a_server_that_hangs_is_an_error_after_the_timeout(engine):
    expected = sample(engine)
    engine.timeout = 4
    group = engine._server.process.pid
    with meanwhile(lambda: os.killpg(group, signal.SIGSTOP), after_s=0.5):
        try:
            with raises_within(15, "no sign of life for 4 s"):
                sample(engine, samples=32, new_tokens=500)
            with raises_within(10, "has not answered within 4 s"):
                engine.update_weights([*load_held(engine).items()], version=1)
        finally:
            os.killpg(group, signal.SIGCONT)
    engine.timeout = OPTIONS["timeout"]
    engine.update_weights([*load_held(engine).items()], version=2)
    assert same(expected, sample(engine))


def load_held(engine):
    (file,) = engine._held_dir.glob("*.safetensors")
    return load_file(file)


def test_a_request_that_takes_too_long_is_given_up_and_the_next_one_served(engine):
    expected = sample(engine)
    engine.generate_timeout = 1
    with raises_within(8, "generate_timeout=1 s"):
        sample(engine, samples=64, new_tokens=900)
    engine.generate_timeout = 120
    assert same(expected, sample(engine))


def test_an_update_that_fails_half_way_is_never_sampled_from(engine, other_dir, monkeypatch):
    """Real failures: SGLang meets a tensor that does not fit, after it has loaded others, and ends.

    Its rollback reads the same files. Ours, which would have met it before, is left out.
    """
    expected, sums = sample(engine), checksum(engine)

    def save_broken(tensors, path, **about):
        broken = tensors | {"lm_head.weight": tensors["lm_head.weight"][:10].clone()}
        save_file(broken, path, **about)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", save_broken)
        patch.setattr(sglang, "check_whole", lambda *_, **__: None)
        with raises_within(30, "sglang|SGLang"):
            engine.update_weights(weights_of(other_dir).items(), version=1)
    for use in (sample, lambda e: e.routes(prompts(5))):
        with pytest.raises(UserError, match="update to weight version 1 failed half-way"):
            use(engine)
    assert engine.weight_version == 0
    engine.restart()
    assert checksum(engine) == sums
    assert same(expected, sample(engine))


def test_an_update_that_the_server_refuses_is_seen_by_all_who_share_it(
    engine, model_dir, other_dir, monkeypatch
):
    expected = sample(engine)
    follower = SGLangEngine(model_dir, "float32", url=engine.url, leader=False, timeout=5)
    assert same(expected, sample(follower))
    with monkeypatch.context() as patch:
        # A folder without weights.
        patch.setattr(sglang, "written", lambda given, folder, beside: (dict(given), "", None))
        patch.setattr(sglang, "check_whole", lambda *_, **__: None)
        with pytest.raises(UserError, match=r"SGLang refused /update_weights_from_disk \(400\)"):
            engine.update_weights(weights_of(other_dir).items(), version=1)
    with raises_within(3, r"weights '\w+:1-failed'; '\w+:1' were expected"):
        follower.update_weights(weights_of(other_dir).items(), version=1)
    for each in (engine, follower):
        with pytest.raises(UserError, match="failed half-way"):
            sample(each)
    # Both go on with the next update, no restart needed.
    engine.update_weights(weights_of(model_dir).items(), version=2)
    follower.update_weights(weights_of(model_dir).items(), version=2)
    assert same(expected, sample(engine)) and same(expected, sample(follower))
    follower.close()
    assert engine.health()  # a follower ends no server


def test_weights_that_another_trainer_gave_the_server_are_not_sampled_from(engine, other_dir):
    other = SGLangEngine(other_dir, "float32", url=engine.url)  # version 0 as well
    for use in (sample, lambda e: e.routes(prompts(5))):
        with pytest.raises(UserError, match=rf"weights '{other._run}:0'"):
            use(engine)
    other.close()


def test_the_server_ends_with_a_trainer_that_is_killed(model_dir, tmp_path):
    """While it generates, and without a word to the server."""
    program = (
        "import sys, numpy as np\n"
        "from moe_upgrpo.rollout import SamplingConfig\n"
        "from moe_upgrpo.rollout.sglang import SGLangEngine\n"
        "engine = SGLangEngine(sys.argv[1], 'float32', log=sys.argv[2], weights_dir=sys.argv[3])\n"
        "print(engine._server.process.pid, flush=True)\n"
        "engine.generate([np.array([3])] * 64, SamplingConfig(max_new_tokens=900),\n"
        "                samples_per_prompt=64, seed=0)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, model_dir, tmp_path / "log", tmp_path],
        stdout=subprocess.PIPE,
    )
    group = int(trainer.stdout.readline())
    time.sleep(1)
    os.killpg(group, 0)  # it is there
    trainer.kill()
    assert trainer.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
    trainer.stdout.close()


# --- Answers that the real server does not give: altered on their way ----------------------------


def int32(meta):
    return np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4")


def encoded(array):
    return base64.b64encode(np.ascontiguousarray(array, "<i4").tobytes()).decode()


def without_routes(item):
    del item["meta_info"]["routed_experts"]


def one_row_short(item):
    meta = item["meta_info"]
    meta["routed_experts"] = encoded(int32(meta)[: -LAYERS * TOP_K])


def wrong_width(item):
    meta = item["meta_info"]
    meta["routed_experts"] = encoded(int32(meta).reshape(-1, LAYERS, TOP_K)[..., :1])


def other_expert(item):
    meta = item["meta_info"]
    routes = int32(meta).copy()
    routes[LAYERS * TOP_K] = EXPERTS  # row 1, layer 0
    meta["routed_experts"] = encoded(routes)


def other_tokens(item):
    item["meta_info"]["output_token_logprobs"][0][1] ^= 1


def not_finite(item):
    item["meta_info"]["output_token_logprobs"][0][0] = float("nan")


def two_versions(item):
    item["meta_info"]["weight_versions"] = [
        {"version": "0", "start": 0, "end": 1},
        {"version": "1", "start": 1, "end": 2},
    ]


def cut_off(item):
    item["meta_info"]["finish_reason"] = {"type": "length", "length": 1}
    item["output_ids"] = item["output_ids"][:1]
    item["meta_info"]["output_token_logprobs"] = item["meta_info"]["output_token_logprobs"][:1]


NAMED = r"the sequence \[\d+, \d+, \d+\] -> \[\d+"


@pytest.mark.parametrize(
    "alter, message",
    [
        (without_routes, rf"no routes for {NAMED}.*--enable-return-routed-experts"),
        (one_row_short, rf"bytes of routes for {NAMED}.*10 rows x 3 layers x 2 experts x 4"),
        (wrong_width, rf"120 bytes of routes for {NAMED}.* = 240 are needed"),
        (other_expert, rf"expert 8 in row 1, MoE layer 0 of the routes for {NAMED}"),
        (other_tokens, rf"log-probs do not belong to the tokens of {NAMED}"),
        (not_finite, rf"logp_rollout of {NAMED}.* is nan"),
        (two_versions, r"cut off 3 times \(sampled from weight versions \['0', '1'\]\)"),
        (cut_off, rf"cut {NAMED}\d*\] off after 1 of 20"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_answers_are_errors_that_name_the_sequence(engine, model_dir, alter, message):
    with altering(engine.url, alter) as url:
        through = SGLangEngine(model_dir, "float32", url=url)
        with pytest.raises(UserError, match=message):
            # A response of 8 tokens.
            sample(through, (3,), samples=1, seed=3)
        through.close()


def test_a_proxy_that_alters_nothing_is_not_noticed(engine, model_dir):
    expected = sample(engine)
    with altering(engine.url, lambda item: None) as url:
        through = SGLangEngine(model_dir, "float32", url=url)
        assert same(expected, sample(through)) and through.health()
        through.close()


def test_dense_layers_have_no_routes(engine, model_dir, monkeypatch):
    """The real server's routes with those of layer 1 set to zero, as it sends dense layers'.

    SGLang 0.5.23 makes MoE layers of Qwen3-MoE's dense ones; routes there are refused.
    """
    expected = sample(engine)

    def zero(item):
        meta = item["meta_info"]
        routes = int32(meta).reshape(-1, LAYERS, TOP_K).copy()
        routes[:, 1] = 0
        meta["routed_experts"] = encoded(routes)

    for alter in (zero, lambda item: None):
        with altering(engine.url, alter) as url:
            through = SGLangEngine(model_dir, "float32", url=url)
            monkeypatch.setattr(through, "moe_layer_ids", (0, 2))
            if alter is zero:
                for rollout, whole_routes in zip(sample(through), expected, strict=True):
                    kept = whole_routes.routes[:, [0, 2]]
                    np.testing.assert_array_equal(np.sort(rollout.routes), np.sort(kept))
            else:
                with pytest.raises(UserError, match=rf"routed {NAMED}|in a dense layer.*\[1\]"):
                    sample(through, (3,), samples=1, seed=3)
            through.close()


# --- Ranks, and starting -------------------------------------------------------------------------


def shared_by_ranks(model_dir, other_dir, options):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    engine = SGLangEngine.shared(model_dir, "float32", **options)
    try:
        before = sample(engine, seed=rank)
        torch.distributed.barrier()  # in the trainer, its own collectives
        engine.update_weights(weights_of(other_dir).items(), version=1)
        after = sample(engine, seed=rank)
        floors = engine.routes([whole(r) for r in after])
        torch.distributed.barrier()
        return engine.leader, engine.url, before, after, floors
    finally:
        engine.close()


def test_ranks_share_one_server(model_dir, other_dir):
    ranks = run_ranks(2, shared_by_ranks, model_dir, other_dir, OPTIONS, timeout_s=200)
    assert [r[0] for r in ranks] == [True, False] and ranks[0][1] == ranks[1][1]
    actors = [MegatronActor(folder, Layout()) for folder in (model_dir, other_dir)]
    for _, _, before, after, floors in ranks:
        for version, (actor, rollouts) in enumerate(zip(actors, (before, after), strict=True)):
            assert agrees_with_trainer(actor, rollouts) > 500
            assert {r.weight_version for r in rollouts} == {version}
        for rollout, routes in zip(after, floors, strict=True):
            np.testing.assert_array_equal(np.sort(rollout.routes), np.sort(routes))


def fails_on_all_ranks(model_dir):
    torch.distributed.init_process_group("gloo")
    try:
        SGLangEngine.shared(model_dir, "float32", python="/nowhere/python")
    except UserError as error:
        return str(error)


def test_where_the_leader_cannot_start_every_rank_says_why(model_dir):
    messages = run_ranks(2, fails_on_all_ranks, model_dir)
    assert all("There is no /nowhere/python" in m and "make .venv-sglang" in m for m in messages)


def test_a_server_that_does_not_start_is_an_error_with_the_end_of_its_log(model_dir):
    """The trainer's own environment has no sglang."""
    with raises_within(60, r"ended with code 1 at its start(.|\n)*sglang"):
        SGLangEngine(model_dir, "float32", python=sys.executable)


@pytest.mark.parametrize("kept", [True, False])
def test_the_log_stays_where_it_was_asked_for_and_else_no_lost_file_is_named(
    model_dir, tmp_path, kept
):
    """After a failed start; the message ends with the last lines that the server wrote."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nfor i in $(seq 40); do echo line $i; done; exit 3\n")
    python.chmod(0o755)
    log = tmp_path / "engine.log"
    with pytest.raises(UserError, match="ended with code 3 at its start") as error:
        SGLangEngine(model_dir, python=python, weights_dir=tmp_path, log=log if kept else None)
    message = str(error.value)
    assert message.endswith("\n".join(f"line {i}" for i in range(29, 41)))
    if kept:
        assert f"From its log {log}:" in message
        assert log.read_text().splitlines() == [f"line {i}" for i in range(1, 41)]
    else:
        assert "log=FILE keeps it" in message and str(tmp_path) not in message


def test_make_engine_hands_the_path_of_the_log_on(model_dir, tmp_path, monkeypatch):
    """Train and probe give it a path in their run folder; such runs are not made here."""
    monkeypatch.setenv("SGLANG_PYTHON", "/bin/false")
    log = tmp_path / "run" / "engine.log"
    log.parent.mkdir()
    with pytest.raises(UserError, match=f"ended with code 1 at its start. From its log {log}"):
        engines.make_engine(
            "sglang",
            model_dir,
            dtype="float32",
            device=torch.device("cpu"),
            max_tokens=8,
            server_log=log,
        )
    assert log.exists()


def test_a_server_that_takes_too_long_to_start_is_ended(model_dir):
    with raises_within(20, "not up after start_timeout=1 s"):
        SGLangEngine(model_dir, "float32", start_timeout=1)


def test_bad_arguments(model_dir, tmp_path, engine):
    for arguments, message in (
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"transfer": "ipc"}, "disk, tensor, distributed"),
        ({"url": engine.url, "max_total_tokens": 9}, "max_total_tokens given with a url"),
        ({"leader": False}, "needs the url"),
        ({"url": "localhost:30000"}, "http://HOST:PORT is needed"),
        ({"url": "http://127.0.0.1:1"}, "is not there"),
    ):
        with raises_within(10, message):
            SGLangEngine(model_dir, **arguments)
    with pytest.raises(UserError, match="at least one of both"):
        sample(engine, samples=0)
    with pytest.raises(UserError, match="prompt is empty"):
        sample(engine, (3, 0))
    with pytest.raises(UserError, match="of 2 tokens or more"):
        engine.routes(prompts(5, 1))
    with pytest.raises(UserError, match="maximum context length of 1024"):
        sample(engine, (1000,), new_tokens=100)


def test_dense_models_have_routes_without_layers(engine, tmp_path):
    folder = saved(tmp_path, Qwen3Config(**SIZES))
    dense = SGLangEngine(folder, "float32", **OPTIONS)
    try:
        actor = MegatronActor(folder, Layout())
        rollouts = sample(dense)
        assert dense.moe_layer_ids == () and rollouts[0].routes.shape == (22, 0, 0)
        tolerance = log_prob_tolerance(actor.hf, length=max(len(whole(r)) for r in rollouts))
        for rollout, scored in zip(rollouts, score(actor, rollouts), strict=True):
            np.testing.assert_allclose(
                rollout.logp_rollout, scored.log_probs, rtol=0, atol=tolerance
            )
    finally:
        dense.close()
