"""One process computes what transformers computes, and records what its routers did.

For the checkpoints of measured.py: Qwen3-MoE, also with a dense layer and gates that are not
renormalised, dense Qwen3 with tied embeddings, Mixtral, Qwen2-MoE, OLMoE, DeepSeek-V3 with and
without groups of experts, latent queries and YaRN.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_upgrpo.losses import PolicyLossConfig, policy_loss
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.megatron.compare import assert_close
from tests.megatron.measured import LOSSES, TEMPERATURE, make_samples

CHECKPOINTS = ("tiny", "mixed", "dense", "mixtral", "qwen2", "olmoe", "deepseek", "moonlight")
UNNORMALISED = ("mixed", "qwen2", "olmoe")
BIASED = ("deepseek", "moonlight")
BIAS = "e_score_correction_bias"


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def log_probs_of(model, sample) -> torch.Tensor:
    tokens = torch.from_numpy(sample.tokens)
    logits = model(tokens[None]).logits[0] / TEMPERATURE
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0][sample.response_rows]


def by_name_on_disk(tensors, model_type: str) -> dict[str, torch.Tensor]:
    """transformers fuses the experts of a layer; on disk each has tensors of its own."""
    by_name = {}
    for name, tensor in tensors:
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                by_name[f"{stem}{e}.gate_proj.weight"] = gate
                by_name[f"{stem}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                by_name[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            by_name[name] = tensor
    if model_type == "mixtral":
        old = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for here, there in old.items():
            by_name = {name.replace(here, there): tensor for name, tensor in by_name.items()}
    return by_name


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_log_probs_equal_transformers(checkpoint, measured, checkpoints):
    model = load(checkpoints[checkpoint])
    (one,) = measured(checkpoint)
    biases = [tensor for name, tensor in model.named_buffers() if name.endswith(BIAS)]
    assert len(biases) == (len(one["about"][0]) if checkpoint in BIASED else 0)
    assert one["about"][-1] == sum(t.numel() for t in (*model.parameters(), *biases))
    for scored, sample in zip(one["scored"]["native"], make_samples(), strict=True):
        expected = log_probs_of(model, sample).detach().numpy()
        assert np.abs(scored.log_probs - expected).max() <= 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_gradient_equals_transformers(checkpoint, loss, measured, checkpoints):
    model = load(checkpoints[checkpoint])
    samples = make_samples()
    width = max(s.response_rows.stop for s in samples)
    rows = {key: torch.zeros(len(samples), width) for key in ("lp", "old", "rollout", "adv", "m")}
    for b, sample in enumerate(samples):
        where = torch.arange(width)[sample.response_rows]
        lp = log_probs_of(model, sample)
        rows["lp"] = rows["lp"].index_put((torch.tensor(b), where), lp)
        rows["old"][b, where] = torch.from_numpy(sample.old_log_probs)
        rows["rollout"][b, where] = torch.from_numpy(sample.rollout_log_probs)
        rows["adv"][b, where] = sample.advantage
        rows["m"][b, where] = 1
    policy_loss(
        rows["lp"],
        rows["old"],
        rows["adv"],
        rows["m"].bool(),
        config=PolicyLossConfig.preset(loss),
        rollout_log_probs=rows["rollout"],
    ).loss.backward()
    gradients = ((name, p.grad) for name, p in model.named_parameters())
    expected = by_name_on_disk(gradients, model.config.model_type)
    (one,) = measured(checkpoint)
    assert_close(one["gradient"]["native", "none", loss], expected, tolerance=2e-5)


def test_one_expert_a_token_with_its_own_gate_equals_transformers(tmp_path):
    """The tiny model with --tiny.top-k 1; renormalised, its gate would always be 1."""
    config = tiny_model_config(layers=2, hidden=64, top_k=1)
    assert config.norm_topk_prob is False
    config.vocab_size = 64
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    with process_groups(Layout()):
        actor = MegatronActor(tmp_path, Layout(), temperature=TEMPERATURE)
        scored = actor.score(make_samples(), record=("routes",))
    for one, sample in zip(scored, make_samples(), strict=True):
        expected = log_probs_of(model, sample).detach().numpy()
        assert np.abs(one.log_probs - expected).max() <= 1e-5
        assert one.routes.shape[1:] == (2, 1)


def selection_scores(checkpoint, logits_TLE, biases_LE) -> np.ndarray:
    """Scores that the top-k is taken over, in float64."""
    if checkpoint in ("tiny", "mixtral"):  # their gates are renormalised: logits will do
        return logits_TLE
    if checkpoint in UNNORMALISED:
        weights_TLE = np.exp(logits_TLE)
        return weights_TLE / weights_TLE.sum(axis=-1, keepdims=True)
    scores_TLE = 1 / (1 + np.exp(-logits_TLE)) + biases_LE
    if checkpoint == "deepseek":  # the best 2 of 4 groups of 4, by the sum of their best 2
        scores_TLGX = scores_TLE.reshape(*scores_TLE.shape[:2], 4, 4)
        of_group_TLG = np.sort(scores_TLGX, axis=-1)[..., -2:].sum(axis=-1)
        second_TL1 = np.sort(of_group_TLG, axis=-1)[..., -2:-1]
        scores_TLGX[of_group_TLG < second_TL1] = -np.inf
        scores_TLE = scores_TLGX.reshape(scores_TLE.shape)
    return scores_TLE


def all_gates(checkpoint, logits_TLE, routes_TLK) -> np.ndarray:
    if checkpoint in BIASED:
        gates_TLK = np.take_along_axis(1 / (1 + np.exp(-logits_TLE)), routes_TLK, axis=-1)
        return 1.7 * gates_TLK / gates_TLK.sum(axis=-1, keepdims=True)
    weights_TLE = np.exp(logits_TLE)
    weights_TLE /= weights_TLE.sum(axis=-1, keepdims=True)
    gates_TLK = np.take_along_axis(weights_TLE, routes_TLK, axis=-1)
    return gates_TLK if checkpoint in UNNORMALISED else gates_TLK / gates_TLK.sum(-1, keepdims=True)


ABOUT = {
    "tiny": ([0, 1], 2, 8),
    "mixed": ([0, 2, 3], 2, 8),
    "mixtral": ([0, 1], 2, 8),
    "qwen2": ([0, 2], 3, 6),
    "olmoe": ([0, 1], 2, 8),
    "deepseek": ([1, 2, 3], 4, 16),
    "moonlight": ([1], 4, 8),
}


@pytest.mark.parametrize("checkpoint", ABOUT)
def test_routes_margins_and_gates_by_hand(checkpoint, measured, checkpoints):
    """From the inputs of transformers' routers and their weights, with numpy."""
    model = load(checkpoints[checkpoint])
    seen, biases_LE = {}, []
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(
                lambda gate, args, _, i=i: seen.update({i: (args[0] @ gate.weight.T).detach()})
            )
            biases_LE.append(getattr(layer.mlp.gate, BIAS, torch.zeros(1)).numpy())
    (one,) = measured(checkpoint)
    layers, top_k, experts, _ = one["about"]
    assert (layers, top_k, experts) == ABOUT[checkpoint]
    for scored, sample in zip(one["scored"]["native"], make_samples(), strict=True):
        log_probs_of(model, sample)
        rows = len(sample.tokens) - 1
        logits_TLE = np.stack([seen[i].reshape(-1, experts)[:rows].numpy() for i in layers], axis=1)
        logits_TLE = logits_TLE.astype(np.float64)
        scores_TLE = selection_scores(checkpoint, logits_TLE, np.stack(biases_LE))
        routes_TLK = np.sort(np.argsort(-scores_TLE, axis=-1)[..., :top_k], axis=-1)
        descending = -np.sort(-scores_TLE, axis=-1)
        assert np.array_equal(scored.routes, routes_TLK)
        gates_TLK = all_gates(checkpoint, logits_TLE, routes_TLK)
        np.testing.assert_allclose(scored.gates, gates_TLK, atol=1e-5)
        margins_TL = descending[..., top_k - 1] - descending[..., top_k]
        np.testing.assert_allclose(scored.margins, margins_TL, atol=1e-5)
        assert scored.margins.dtype == scored.gates.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_selection_bias_stays_as_the_checkpoint_has_it(dtype, measured, checkpoints):
    """To the bit, in fp32 also where the model is bf16, after an optimizer step."""
    source = load_file(checkpoints["deepseek"] / "model.safetensors")
    biases = {name: tensor for name, tensor in source.items() if name.endswith(BIAS)}
    assert len(biases) == 3
    (one,) = measured("deepseek", dtype)
    for name, bias in biases.items():
        assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float())
        for weights in (one["weights"], one["sgd"], one["distributed"]):
            assert weights[name].dtype == torch.float32 and torch.equal(weights[name], bias)


@pytest.mark.parametrize("checkpoint", ["tiny", "deepseek"])
def test_planted_routes_are_the_ones_used(checkpoint, measured, checkpoints):
    """Against transformers with its expert choice forced by hand: log-probs and gates.

    Those of deepseek lie in more groups than its router would choose.
    """
    model = load(checkpoints[checkpoint])
    scored = measured(checkpoint)[0]["scored"]
    layers, _, experts, _ = measured(checkpoint)[0]["about"]
    for sample, native, planted in zip(
        make_samples(), scored["native"], scored["planted"], strict=True
    ):
        expected = np.sort((native.routes + 3) % experts, axis=-1)
        assert np.array_equal(planted.routes, expected)
        assert not np.array_equal(planted.log_probs, native.log_probs)
        gates_TLK = np.empty(expected.shape)

        def force(row: int, layer: int, expected=expected, gates_TLK=gates_TLK):
            def replace_choice(module, args):
                hidden, indices, _ = args
                router = model.model.layers[layer].mlp.gate
                rows = torch.from_numpy(expected[:, row].astype(np.int64))
                rows = torch.cat([rows, indices[len(rows) :]])  # the last token: native
                logits = hidden @ router.weight.T
                biased = checkpoint in BIASED
                scores_NK = (logits.sigmoid() if biased else logits.softmax(-1)).gather(1, rows)
                gates_NK = scores_NK / scores_NK.sum(-1, keepdim=True) * (1.7 if biased else 1)
                gates_TLK[:, row] = gates_NK[:-1].detach()
                return hidden, rows, gates_NK

            return replace_choice

        handles = [
            model.model.layers[layer].mlp.experts.register_forward_pre_hook(force(row, layer))
            for row, layer in enumerate(layers)
        ]
        log_probs = log_probs_of(model, sample).detach().numpy()
        for handle in handles:
            handle.remove()
        assert np.abs(planted.log_probs - log_probs).max() <= 1e-5
        np.testing.assert_allclose(planted.gates, gates_TLK, atol=1e-5)
        # What the router would have done: in the first layer, what it did natively.
        assert np.array_equal(planted.own_routes[:, 0], native.routes[:, 0])
        np.testing.assert_allclose(planted.margins[:, 0], native.margins[:, 0], atol=1e-6)
        assert not np.array_equal(planted.own_routes, planted.routes)
