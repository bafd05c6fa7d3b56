"""HFEngine on tiny random models, held against forwards that share none of its code.

The reference is a plain transformers model, eager experts, one unpadded sequence at a time, no KV
cache; routes come from its routers. Not covered: CUDA, sharded checkpoints.
"""

import threading
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import SamplingConfig
from moe_upgrpo.rollout.beside import hand_over
from moe_upgrpo.rollout.hf import HFEngine, fp8_rounded, is_rounded
from tests.megatron.live import Live

EOS = 1
VOCABULARY = 16
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=False,
    # Large weights: peaked distributions and well separated experts.
    initializer_range=0.2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=EOS,
    bos_token_id=None,
)
MOE = SIZES | dict(
    num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
)


WITHOUT_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
LATENT = WITHOUT_HEAD_DIM | dict(
    num_key_value_heads=2,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    n_group=4,
    topk_group=2,
)
FAMILIES = {
    "mixtral": MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=8),
    "deepseek_v3": DeepseekV3Config(**LATENT),
    "qwen2_moe": Qwen2MoeConfig(**MOE, mlp_only_layers=[1], shared_expert_intermediate_size=48),
    "olmoe": OlmoeConfig(
        **WITHOUT_HEAD_DIM, num_hidden_layers=2, num_experts=8, num_experts_per_tok=3
    ),
}
ABOUT = {  # layers with experts, experts of a token, experts
    "mixtral": ((0, 1), 2, 8),
    "deepseek_v3": ((1, 2), 4, 16),
    "qwen2_moe": ((0, 2), 2, 8),
    "olmoe": ((0, 1), 3, 8),
}


def saved(folder, config, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is not updated
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.2)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(bias, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("a"), Qwen3MoeConfig(**MOE), 0)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("b"), Qwen3MoeConfig(**MOE), 1)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def engine(model_dir):
    return HFEngine(model_dir, "float32", "cpu")


def prompts(*lengths):
    rng = np.random.default_rng(5)
    return [rng.integers(2, VOCABULARY, size=length) for length in lengths]


def sample(engine, lengths=(3, 7, 1, 5), samples=6, seed=0, temperature=1.0, max_new_tokens=10):
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens)
    return engine.generate(prompts(*lengths), sampling, samples_per_prompt=samples, seed=seed)


@cache
def plain_model(model_dir):
    model = Qwen3MoeForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def reference(model_dir, rollout, temperature):
    """Log-probs `[T]` and sorted routes `[S-1, L, K]` by one forward over the whole sequence."""
    model = plain_model(model_dir)
    sequence = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    out = model(
        input_ids=torch.from_numpy(sequence)[None], output_router_logits=True, use_cache=False
    )
    routes = [layer.topk(2, dim=-1).indices.sort(dim=-1).values for layer in out.router_logits]
    logp = torch.log_softmax(out.logits[0].double() / temperature, dim=-1)
    positions = torch.arange(len(rollout.prompt_ids), len(sequence))
    return (
        logp[positions - 1, torch.from_numpy(rollout.response_ids)].numpy(),
        torch.stack(routes, dim=1)[:-1].numpy(),
    )


@pytest.mark.parametrize("lengths", [(3, 7, 1, 5), (4, 4)], ids=["mixed", "equal"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_log_probs_and_routes_are_those_of_a_teacher_forced_forward(
    engine, model_dir, lengths, temperature
):
    """Also shows that routes shifted by one row would not pass."""
    rollouts = sample(engine, lengths, temperature=temperature)
    shifted_same = rows = 0
    for rollout in rollouts:
        logp, routes = reference(model_dir, rollout, temperature)
        np.testing.assert_allclose(rollout.logp_rollout, logp, atol=2e-5)
        ours = np.sort(rollout.routes, axis=-1)
        np.testing.assert_array_equal(ours, routes)
        assert rollout.routes.dtype == np.uint8
        shifted_same += (ours[1:] == routes[:-1]).all(axis=-1).sum()
        rows += ours[1:, :, 0].size
    assert rows > 200
    # 28 sets of 2 out of 8, so few agree by chance.
    assert shifted_same / rows < 0.5
    # Something to get wrong: sequences of different lengths left the batch at different steps.
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 2
    assert engine.moe_layer_ids == (0, 1, 2)


def test_routes_of_given_sequences_are_those_of_a_teacher_forced_forward(model_dir):
    """Mixed lengths over several batches, against one unpadded sequence at a time."""
    engine = HFEngine(model_dir, "float32", "cpu", max_sequences=5)
    rollouts = sample(engine, samples=2)
    sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
    assert len({len(s) for s in sequences}) > 2
    for rollout, routes in zip(rollouts, engine.routes(sequences), strict=True):
        _, expected = reference(model_dir, rollout, 1.0)
        assert np.array_equal(np.sort(routes, axis=-1), expected)
    with pytest.raises(UserError, match="2 tokens or more"):
        engine.routes([np.array([3])])


def test_responses_are_prompt_major_and_hold_one_eos_if_finished(engine):
    lengths = (3, 7, 1, 5)
    rollouts = sample(engine, lengths, samples=20)
    assert len(rollouts) == 80
    for index, rollout in enumerate(rollouts):
        np.testing.assert_array_equal(rollout.prompt_ids, prompts(*lengths)[index // 20])
        assert len(rollout.routes) == len(rollout.prompt_ids) + len(rollout.response_ids) - 1
        ends = np.flatnonzero(rollout.response_ids == EOS).tolist()
        if rollout.finished:
            assert ends == [len(rollout.response_ids) - 1]
        else:
            assert ends == [] and len(rollout.response_ids) == 10
    finished = sum(rollout.finished for rollout in rollouts)
    assert 0 < finished < 80


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_tokens_are_sampled_from_the_distribution_whose_log_probs_are_returned(engine, temperature):
    """A chi-square test: sampling at 0.8 times the logits gives more than ten times the bound."""
    draws = 8192
    rollouts = engine.generate(
        prompts(4),
        SamplingConfig(temperature=temperature, max_new_tokens=1),
        samples_per_prompt=draws,
        seed=11,
    )
    prob = {int(r.response_ids[0]): float(np.exp(r.logp_rollout[0])) for r in rollouts}
    assert len(prob) > 5
    assert sum(prob.values()) == pytest.approx(1, abs=0.02)
    tokens, counts = np.unique([r.response_ids[0] for r in rollouts], return_counts=True)
    expected = draws * np.array([prob[int(token)] for token in tokens])
    frequent = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[frequent].sum()
    # At most 15 degrees of freedom: the chance of more than 50 is 1e-5.
    assert chi_square < 50


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_array_equal(a.logp_rollout, b.logp_rollout)
        np.testing.assert_array_equal(a.routes, b.routes)
        assert a.finished == b.finished
    return True


def differs(first, second):
    return any(
        not np.array_equal(a.logp_rollout, b.logp_rollout)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.bits
def test_the_seed_decides_and_the_global_generators_are_left_alone(engine, other_dir):
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sample(engine, seed=4)
    torch.rand(3)
    assert same(first, sample(engine, seed=4))
    assert differs(first, sample(engine, seed=5))
    torch.manual_seed(1)
    sample(engine)
    engine.update_weights(weights_of(other_dir).items(), version=1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_nothing_that_transformers_gives_up_is_used(engine):
    """Each rank would print its warning once a step (transformers 5.24: past_key_values)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sample(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_takes_the_best_token_whatever_else_is_in_the_batch(model_dir, dtype):
    """Exact in fp32; in bf16 only that padding, chunks and cuts leave finite, whole rollouts."""
    engine = HFEngine(model_dir, dtype, "cpu")
    together = sample(engine, samples=2, temperature=0)
    small = HFEngine(model_dir, dtype, "cpu", max_sequences=3)
    for chunked, rollout in zip(sample(small, samples=2, temperature=0), together, strict=True):
        assert np.isfinite(rollout.logp_rollout).all()
        if dtype == "float32":
            np.testing.assert_array_equal(chunked.response_ids, rollout.response_ids)
            [alone] = engine.generate(
                [rollout.prompt_ids],
                SamplingConfig(temperature=0, max_new_tokens=10),
                samples_per_prompt=1,
                seed=9,
            )
            np.testing.assert_array_equal(alone.response_ids, rollout.response_ids)
            # Log-probs of greedy tokens are those at temperature 1.
            logp, _ = reference(model_dir, rollout, 1.0)
            np.testing.assert_allclose(rollout.logp_rollout, logp, atol=2e-5)


@pytest.mark.bits
@pytest.mark.parametrize("known", [True, False], ids=["places", "conversion"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updated_weights_are_bit_for_bit_those_of_a_fresh_engine(
    model_dir, other_dir, dtype, known, monkeypatch
):
    if not known:
        monkeypatch.setattr("moe_upgrpo.rollout.hf.places", lambda model, state: {})
    engine = HFEngine(model_dir, dtype, "cpu")
    before = sample(engine)
    engine.update_weights(weights_of(other_dir).items(), version=7)
    after = sample(engine)
    assert engine.weight_version == 7
    assert {r.weight_version for r in before} == {0} and {r.weight_version for r in after} == {7}
    assert differs(before, after)
    assert same(after, sample(HFEngine(other_dir, dtype, "cpu")))
    # Back again: nothing of the weights in between is left.
    engine.update_weights(iter(weights_of(model_dir).items()), version=8)
    assert same(before, sample(engine))


@pytest.mark.bits
def test_reloading_identical_weights_changes_nothing(engine, model_dir):
    before = sample(engine)
    engine.update_weights(weights_of(model_dir).items(), version=1)
    assert same(before, sample(engine))


@pytest.mark.bits
def test_the_engine_keeps_no_hold_of_the_tensors_it_was_given(engine, other_dir):
    given = weights_of(other_dir)
    engine.update_weights(given.items(), version=1)
    after = sample(engine)
    for tensor in given.values():
        tensor.zero_()
    assert same(after, sample(engine))


def test_bf16_tensors_are_taken_by_an_fp32_engine(engine, model_dir):
    rounded = {name: tensor.bfloat16() for name, tensor in weights_of(model_dir).items()}
    before = sample(engine)
    engine.update_weights(rounded.items(), version=1)
    assert differs(before, sample(engine))


def missing(weights):
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]


def unexpected(weights):
    weights["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(32, 32)


def misshapen(weights):
    weights["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(32, 33)


def integers(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].long()


@pytest.mark.bits
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (missing, r"layers.1.mlp.experts.3.up_proj.weight is missing.*nothing is sampled till"),
        (unexpected, r"layers.1.mlp.experts.8.up_proj.weight is unexpected"),
        (misshapen, r"experts.3.up_proj.weight has shape \(32, 33\), not \(32, 32\)"),
        (integers, r"model.norm.weight is torch.int64"),
        (dict.clear, r"is missing.*more faults"),
    ],
)
def test_nothing_is_sampled_from_refused_weights_until_others_are_whole(
    engine, model_dir, other_dir, break_it, message
):
    """All tensors are gone through: making them may be a collective."""
    before = sample(engine)
    weights = weights_of(other_dir)
    break_it(weights)
    left = iter(weights.items())
    with pytest.raises(UserError, match=message):
        engine.update_weights(left, version=1)
    assert not list(left) and engine.weight_version == 0
    for ask in (sample, lambda engine: engine.routes(prompts(3)), lambda e: e.score(prompts(3))):
        with pytest.raises(UserError, match="update to weight version 1 failed half-way"):
            ask(engine)
    engine.update_weights(weights_of(model_dir).items(), version=2)
    assert same(before, sample(engine))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_place_of_every_tensor_is_known(tmp_path, family):
    engine = HFEngine(saved(tmp_path, FAMILIES[family], 0), "bfloat16", "cpu")
    assert engine._places.keys() == engine._checkpoint_shapes.keys()


SIXTEEN = MOE | {"num_hidden_layers": 16, "num_experts": 16}


def test_an_update_copies_each_tensor_to_its_place(tmp_path):
    engine = HFEngine(saved(tmp_path, Qwen3MoeConfig(**SIXTEEN), 0), "float32", "cpu")
    weights = {name: torch.randn_like(tensor) for name, tensor in weights_of(tmp_path).items()}
    with Live({weight.untyped_storage()._cdata for weight in weights.values()}) as live:
        engine.update_weights(weights.items(), version=1)  # the model is counted from now on
        before = live.peak
        engine.update_weights(weights.items(), version=2)
    assert live.peak == live.now == before  # nothing was made
    experts = engine.model.model.layers[5].mlp.experts
    for name, held in (
        ("gate_proj", experts.gate_up_proj[7, :32]),
        ("up_proj", experts.gate_up_proj[7, 32:]),
        ("down_proj", experts.down_proj[7]),
    ):
        assert torch.equal(held, weights[f"model.layers.5.mlp.experts.7.{name}.weight"])


def test_a_tensor_without_a_known_place_goes_through_transformers(tmp_path, monkeypatch):
    """Held are three layers: its copy, experts stacked by projection, and the new layer."""
    monkeypatch.setattr("moe_upgrpo.rollout.hf.places", lambda model, state: {})
    engine = HFEngine(saved(tmp_path, Qwen3MoeConfig(**SIXTEEN), 0), "float32", "cpu")
    whole = sum(weight.nbytes for weight in engine.model.state_dict().values())
    weights = weights_of(tmp_path)
    with Live({weight.untyped_storage()._cdata for weight in weights.values()}) as live:
        engine.update_weights(weights.items(), version=1)  # the model is counted from now on
        live.peak = before = live.now
        engine.update_weights(weights.items(), version=2)
    assert 0.9 < before / whole < 1.05
    assert 1 / 16 < (live.peak - before) / whole < 0.2


def test_non_finite_weights_are_named_when_sampling(engine, model_dir):
    weights = weights_of(model_dir)
    weights["lm_head.weight"][0, 0] = float("nan")
    engine.update_weights(weights.items(), version=3)
    with pytest.raises(UserError, match=r"prompt \[.*not finite.*weight version 3"):
        sample(engine)


def test_a_router_that_is_not_hit_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(engine.model.model.layers[1].mlp, "forward", lambda hidden: hidden)
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.experts.*shapes \[\]"):
        sample(engine)


def test_a_router_that_sees_other_rows_is_an_error(engine, monkeypatch):
    block = engine.model.model.layers[2].mlp
    whole = block.forward
    monkeypatch.setattr(block, "forward", lambda hidden: whole(hidden[:, -1:]) + 0 * hidden)
    with pytest.raises(RuntimeError, match=r"layers\.2\.mlp\.experts"):
        sample(engine)


@torch.no_grad()
def by_gates(model_dir, rollout):
    """Log-probs `[T]` and routes `[S-1, L, K]`, each row ascending, by hooks on the routers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.set_experts_implementation("eager")
    routes = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda gate, _, out: routes.append(out[2]))
    sequence = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    logits = model(torch.from_numpy(sequence)[None], use_cache=False).logits[0].double()
    rows = torch.arange(len(rollout.prompt_ids), len(sequence)) - 1
    logp = logits.log_softmax(dim=-1)[rows, torch.from_numpy(rollout.response_ids)].numpy()
    return logp, np.sort(torch.stack(routes, dim=1)[:-1].numpy(), axis=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    """After an update too: weights of their names on disk, the routers' selection bias in fp32."""
    folders = [saved(tmp_path / str(seed), FAMILIES[family], seed) for seed in (0, 1)]
    engine = HFEngine(folders[0], "float32", "cpu")
    layers, top_k, experts = ABOUT[family]
    assert (engine.moe_layer_ids, engine.num_experts) == (layers, experts)
    for version, folder in enumerate(folders):
        if version:
            engine.update_weights(weights_of(folder).items(), version=version)
        rollouts = sample(engine, samples=3)
        assert len(rollouts) == 12
        for rollout in rollouts:
            logp, routes = by_gates(folder, rollout)
            assert routes.shape[1:] == (len(layers), top_k)
            assert np.array_equal(np.sort(rollout.routes, axis=-1), routes)
            np.testing.assert_allclose(rollout.logp_rollout, logp, atol=1e-5)


def test_dense_layers_have_no_rows(tmp_path):
    config = Qwen3MoeConfig(**MOE | {"mlp_only_layers": [1]})
    engine = HFEngine(saved(tmp_path, config, 0), "float32", "cpu")
    assert engine.moe_layer_ids == (0, 2)
    rollout = sample(engine)[0]
    assert rollout.routes.shape[1:] == (2, 2)
    np.testing.assert_array_equal(
        np.sort(rollout.routes, axis=-1), reference(tmp_path, rollout, 1.0)[1]
    )


def test_a_dense_model_has_no_routes(tmp_path):
    folder = saved(tmp_path, Qwen3Config(**SIZES, num_hidden_layers=2), 0)
    engine = HFEngine(folder, "float32", "cpu")
    for rollout in sample(engine):
        rows = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
        assert rollout.routes.shape == (rows, 0, 0)
    assert engine.moe_layer_ids == ()


def test_absolute_positions_and_tied_embeddings(tmp_path):
    """GPT-2: the padding must not count as positions, and the head is not in the checkpoint."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=32,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    folders = [saved(tmp_path / str(seed), config, seed) for seed in (0, 1)]
    engine = HFEngine(folders[0], "float32", "cpu")
    for version, folder in enumerate(folders):
        engine.update_weights(weights_of(folder).items(), version=version)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for rollout in sample(engine, samples=2):
            whole = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids]))
            with torch.no_grad():
                logp = model(input_ids=whole[None]).logits[0].log_softmax(dim=-1)
            response = torch.arange(len(rollout.prompt_ids), len(whole))
            np.testing.assert_allclose(
                rollout.logp_rollout, logp[response - 1, whole[response]], atol=2e-5
            )


def test_bad_input_is_refused(engine, model_dir, tmp_path):
    with pytest.raises(UserError, match="dtype is 'float16'"):
        HFEngine(model_dir, "float16")
    with pytest.raises(UserError, match="max_sequences is 0"):
        HFEngine(model_dir, "float32", max_sequences=0)
    sampling = SamplingConfig(max_new_tokens=2)
    for some, samples, message in [
        ([], 1, "0 prompts"),
        (prompts(3), 0, "0 samples"),
        ([np.array([], dtype=int)], 1, "empty"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.generate(some, sampling, samples_per_prompt=samples, seed=0)
    Qwen3MoeConfig(**MOE).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        HFEngine(tmp_path)
    endless = saved(tmp_path, Qwen3MoeConfig(**MOE | {"eos_token_id": None}), 0)
    with pytest.raises(UserError, match="eos_token_id"):
        HFEngine(endless)


def test_fp8_rounding_by_hand():
    """e4m3 has three mantissa bits: steps of 1/8 from 1 to 2, of 2 from 16 to 32, and 2^-9 below
    2^-6. The scale is 1 where the largest entry is 448; each stacked expert has its own."""
    given = torch.tensor([[448.0, 1.06, -1.07], [17.0, 19.0, 0.003]])
    expected = torch.tensor([[448.0, 1.0, -1.125], [16.0, 20.0, 2 * 2**-9]])
    assert torch.equal(fp8_rounded(given), expected)
    both = fp8_rounded(torch.stack([given, given / 4]))  # powers of two change no mantissa
    assert torch.equal(both, torch.stack([expected, expected / 4]))
    assert torch.equal(fp8_rounded(torch.zeros(2, 2)), torch.zeros(2, 2))
    assert fp8_rounded(given.bfloat16()).dtype == torch.bfloat16
    gates = ("gate", "shared_expert_gate")  # of experts: kept
    assert not any(is_rounded(f"model.layers.0.mlp.{g}.weight", given) for g in gates)
    assert is_rounded("model.layers.0.mlp.shared_expert.gate_proj.weight", given)


@pytest.mark.bits
def test_fp8_weights_are_rounded_again_after_an_update(model_dir, other_dir):
    engine = HFEngine(model_dir, "float32", "cpu", weights="fp8")
    engine.update_weights(weights_of(other_dir).items(), version=1)
    assert same(sample(engine), sample(HFEngine(other_dir, "float32", "cpu", weights="fp8")))
    assert differs(sample(engine), sample(HFEngine(other_dir, "float32", "cpu")))
    plain = HFEngine(other_dir, "float32", "cpu").model.state_dict()
    rounded = {
        name for name, weight in engine.model.state_dict().items()
        if not torch.equal(weight, plain[name])
    }  # fmt: skip
    assert rounded and not any(
        part in name for name in rounded for part in ("embed", "lm_head", "mlp.gate.", "norm")
    )
    kinds = {name.split("layers.0.")[1] for name in rounded if "layers.0." in name}
    assert kinds == {
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


@pytest.mark.bits
def test_weights_that_arrive_while_it_samples_change_no_response_that_was_begun(
    model_dir, other_dir
):
    """In bf16. They change it at no place: each response is of one version of the weights."""
    engine = HFEngine(model_dir, "bfloat16", "cpu")
    expected = [sample(engine), sample(HFEngine(other_dir, "bfloat16", "cpu"))]
    weights = [weights_of(model_dir), weights_of(other_dir)]
    sampled, ended = [], threading.Event()

    def keep_sampling():
        while not ended.wait(0.01):  # else it would seldom let the other thread have its turn
            sampled.append(sample(engine))

    thread = threading.Thread(target=keep_sampling)
    thread.start()
    puts = [hand_over(engine, weights[v % 2].items(), version=v) for v in range(1, 5)]
    assert engine.weight_version == 0
    for put in puts:
        put()
    ended.set()
    thread.join()
    sampled.append(sample(engine))
    versions = [rollouts[0].weight_version for rollouts in sampled]
    assert versions == sorted(versions) and versions[-1] == 4
    for version, rollouts in zip(versions, sampled, strict=True):
        assert {r.weight_version for r in rollouts} == {version}
        assert same(rollouts, expected[version % 2])
