"""The tolerance of the engines' tests: above what rounding does, far below what a fault does.

The engines themselves: tests/engines. Here transformers stands for one, at the temperatures and
after the weight updates of those tests.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from tests.engines.tolerance import log_prob_tolerance
from tests.engines.trainer import MOE, move_weights, prompts, saved

CONFIG = Qwen3MoeConfig(**MOE)
LENGTH = 90
SEQUENCES = prompts(23, 60, 21, LENGTH, 23, 60, 41, LENGTH)


def tolerance_at(temperature):
    return log_prob_tolerance(CONFIG, length=LENGTH, temperature=temperature)


def plain(folder):
    options = dict(dtype=torch.float32, attn_implementation="eager")
    model = Qwen3MoeForCausalLM.from_pretrained(folder, **options)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def log_probs(model, temperature) -> np.ndarray:
    found = []
    for tokens in map(torch.from_numpy, SEQUENCES):
        logits = model(tokens[None], use_cache=False).logits[0, :-1] / temperature
        found.append(logits.log_softmax(dim=-1).gather(1, tokens[1:, None])[:, 0].double())
    return torch.cat(found).numpy()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The Megatron actor's log-probs at two temperatures, and a plain model of its weights."""
    folder = saved(tmp_path_factory.mktemp("model"), CONFIG)
    torch.manual_seed(3)
    with groups.process_groups(Layout()):
        actor = MegatronActor(folder, Layout())
        for _ in range(3):
            move_weights(actor)
        scored = {}
        for actor.temperature in (1.0, 0.7, 0.3):
            samples = [Sample(tokens=tokens, prompt_length=1) for tokens in SEQUENCES]
            found = np.concatenate([s.log_probs for s in actor.score(samples)])
            scored[actor.temperature] = found.astype(np.float64)
        weights = {name: weight.clone() for name, weight in actor.export_weights()}
    model = plain(folder)
    model.load_state_dict(as_stacked(weights, model))
    return scored, model


def as_stacked(weights, model):
    """transformers keeps the experts of a layer in one tensor, gate above up."""
    stacked = {}
    for name in model.state_dict():
        if name.endswith("mlp.experts.gate_up_proj") or name.endswith("mlp.experts.down_proj"):
            experts, _, kind = name.rpartition(".")
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            stacked[name] = torch.stack([
                torch.cat([weights[f"{experts}.{e}.{part}.weight"] for part in parts])
                for e in range(CONFIG.num_experts)
            ])  # fmt: skip
        else:
            stacked[name] = weights[name]
    return stacked


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.3])
def test_rounding_stays_below_half_of_it(both, temperature):
    """Against transformers in fp32, and in fp64, where next to nothing is rounded."""
    scored, model = both
    tolerance = tolerance_at(temperature)
    for other in (model, copy.deepcopy(model).double()):
        gap = np.abs(scored[temperature] - log_probs(other, temperature)).max()
        assert 0.05 * tolerance < gap < 0.5 * tolerance


def test_it_follows_from_sizes_depth_and_temperature():
    """By hand for 3 layers: sums of 64 + 32 + 128 (attention), 128 (its output), 64 + 64 + 32
    (router and MLP), 64 + 64 (norms) terms in each, 64 + 64 at the end; logits of 4 · .2 · 8."""
    by_hand = 2**-24 * (3 * 640 + 128) ** 0.5 * 6.4 * 2
    found = log_prob_tolerance(CONFIG, length=128)
    assert found == pytest.approx(by_hand) == pytest.approx(3.45e-5, rel=0.01)
    assert log_prob_tolerance(CONFIG, length=128, temperature=0.5) == pytest.approx(2 * by_hand)
    deep = Qwen3MoeConfig(**MOE | {"num_hidden_layers": 12})
    assert 1.9 < log_prob_tolerance(deep, length=128) / by_hand < 2  # the root of the layers
    wide = Qwen3MoeConfig(**MOE | {"initializer_range": 0.4})
    assert log_prob_tolerance(wide, length=128) == pytest.approx(2 * by_hand)


def test_the_largest_logit_is_of_the_size_that_it_takes(both):
    _, model = both
    with torch.no_grad():
        largest = max(float(model(torch.from_numpy(s)[None]).logits.abs().max()) for s in SEQUENCES)
    assert 0.7 < largest / (4 * 0.2 * 8) < 1.5


def another_temperature(model):
    return model, 1e-3


def another_eps(model):
    """1e-5 for 1e-6 in the norms."""
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    assert len(norms) == 3 * 4 + 1  # two of a layer, two of its queries and keys; the last
    for norm in norms:
        norm.variance_epsilon = 1e-5
    return model, 0.0


def in_bf16(name):
    """One matrix product of the model with its inputs rounded to bf16."""

    def change(model):
        layer = model.get_submodule(name)

        def forward(x):
            return torch.nn.functional.linear(x.bfloat16().float(), layer.weight.bfloat16().float())

        layer.forward = forward
        return model, 0.0

    return change


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(another_temperature, id="temperature + 0.001"),
        pytest.param(another_eps, id="eps of the norms"),
        *(
            pytest.param(in_bf16(name), id=f"bf16: {name}")
            for name in ("lm_head", "model.layers.1.self_attn.k_proj",
                         "model.layers.2.self_attn.o_proj")
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_fault_lies_above_ten_times_of_it(both, temperature, fault):
    scored, model = both
    changed, more = fault(copy.deepcopy(model))
    gap = np.abs(scored[temperature] - log_probs(changed, temperature + more)).max()
    assert gap > 10 * tolerance_at(temperature)
