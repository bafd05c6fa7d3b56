"""Every layout computes what one process computes, and one process what transformers computes.

From the same weights: log-probs, entropy, routes, the gradient of the whole loss (UP-GRPO with all
its branches active), and the weights after one SGD step, under Megatron's plain optimizer and under
its DistributedOptimizer. In fp32, where layouts differ in the order of sums only: TOLERANCE is 80
units in the last place of fp32 (1.2e-7), relative to the largest entry of each tensor; 5e-6 was
seen.

Not covered: a second node, NCCL, more than 4 ranks, pipeline and context parallelism.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig, policy_loss
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.ranks import run_ranks

TOLERANCE = 1e-5
TEMPERATURE = 0.7
LOSSES = ("up-grpo", "up-gspo")
LR = 0.1
SGD = OptimizerSettings(algorithm="sgd", lr=LR, warmup_steps=0, clip_grad=0)
# Adam with betas 0 steps by lr·g / (|g| + eps): with a huge eps that is SGD with lr / eps, to a
# relative |g| / eps. Megatron's DistributedOptimizer takes nothing but Adam.
EPS = 1e5
ADAM_AS_SGD = OptimizerSettings(
    lr=LR * EPS, beta1=0.0, beta2=0.0, eps=EPS, warmup_steps=0, clip_grad=0
)

LAYOUTS = {
    "TP2": (2, Layout(tp=2)),
    "EP2": (2, Layout(ep=2)),
    "TP2·EP2": (2, Layout(tp=2, ep=2)),
    "DP2": (2, Layout()),
    "TP2·EP2·DP2": (4, Layout(tp=2, ep=2)),
    "TP2·DP2": (4, Layout(tp=2)),
    "EP2·DP2": (4, Layout(ep=2)),
}


def make_samples() -> list[Sample]:
    """Sequences of mixed lengths with ratios and advantages that put every branch to work."""
    rng = np.random.default_rng(3)
    samples = []
    for i in range(8):
        prompt, response = int(rng.integers(2, 7)), int(rng.integers(1, 9))
        samples.append(
            Sample(
                tokens=rng.integers(2, 64, size=prompt + response),
                prompt_length=prompt,
                old_log_probs=rng.normal(-5, 2, size=response).astype(np.float32),
                rollout_log_probs=rng.normal(-5, 2, size=response).astype(np.float32),
                advantage=float(rng.normal()) if i != 5 else 0.0,
            )
        )
    return samples


def gradients_by_name(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """What the last update left in the gradient buffers, under Hugging Face names."""
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return {name: tensor.clone() for name, tensor in actor.export_weights()}


def measure(layout: Layout, checkpoint, dtype: str = "float32") -> dict:
    with groups.process_groups(layout):
        dp_rank, dp_size = groups.data_parallel()
        samples = make_samples()
        share = len(samples) // dp_size
        mine = samples[dp_rank * share : (dp_rank + 1) * share]

        def actor(optimizer):
            return MegatronActor(
                checkpoint,
                layout,
                dtype=dtype,
                temperature=TEMPERATURE,
                micro_batch_size=3,
                optimizer=optimizer,
            )

        def after_step(optimizer):
            trained = actor(optimizer)
            trained.update(mine, PolicyLossConfig.preset("up-grpo"))
            return {name: tensor.clone() for name, tensor in trained.export_weights()}

        result = {"dp_rank": dp_rank, "scored": actor(None).score(mine), "gradient": {}}
        for loss in LOSSES:
            trained = actor(SGD)
            update = trained.update(mine, PolicyLossConfig.preset(loss))
            result["gradient"][loss] = gradients_by_name(trained)
            result["grad_norm", loss] = update.grad_norm
        result["sgd"] = after_step(SGD)
        result["distributed"] = after_step(ADAM_AS_SGD)
        return result


@pytest.fixture(scope="module")
def one_process(tiny_checkpoint):
    return run_ranks(1, measure, Layout(), tiny_checkpoint)[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tiny_checkpoint):
    world_size, layout = LAYOUTS[request.param]
    return run_ranks(world_size, measure, layout, tiny_checkpoint)


def assert_close(actual: dict, expected: dict, tolerance: float = TOLERANCE):
    assert actual.keys() == expected.keys() and len(expected) > 50
    # A tensor whose terms cancel keeps the rounding of the terms: one unit of the largest entry.
    floor = 1.2e-7 * max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max()
        allowed = tolerance * tensor.abs().max() + floor
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


def scored_in_order(ranks) -> list:
    by_dp_rank = {rank["dp_rank"]: rank["scored"] for rank in ranks}
    return [scored for dp_rank in sorted(by_dp_rank) for scored in by_dp_rank[dp_rank]]


def test_log_probs_entropy_and_whole_sequence_routes_equal_one_process(ranks, one_process):
    for actual, expected, sample in zip(
        scored_in_order(ranks), one_process["scored"], make_samples(), strict=True
    ):
        assert actual.routes.shape == (len(sample.tokens) - 1, 2, 2)
        assert np.array_equal(actual.routes, expected.routes)
        assert np.abs(actual.log_probs - expected.log_probs).max() <= 1e-5
        assert np.abs(actual.entropy - expected.entropy).max() <= 1e-5


def test_the_tensor_parallel_ranks_agree(ranks):
    for rank in ranks:
        twin = next(other for other in ranks if other["dp_rank"] == rank["dp_rank"])
        for a, b in zip(rank["scored"], twin["scored"], strict=True):
            assert np.array_equal(a.routes, b.routes)
            assert np.array_equal(a.log_probs, b.log_probs)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_equals_one_process(loss, ranks, one_process):
    for rank in ranks:
        assert_close(rank["gradient"][loss], one_process["gradient"][loss])
        assert rank["grad_norm", loss] == pytest.approx(one_process["grad_norm", loss], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "distributed"])
def test_the_weights_after_one_step_equal_one_process(optimizer, ranks, one_process):
    for rank in ranks:
        assert_close(rank[optimizer], one_process["sgd"])


def test_one_sgd_step_moves_the_weights_by_the_gradient(one_process, tiny_checkpoint):
    """Ties the two tests above: neither could pass with an update that does nothing."""
    before = hugging_face(tiny_checkpoint)[1]
    gradient = one_process["gradient"]["up-grpo"]
    expected = {name: before[name] - LR * gradient[name] for name in before}
    assert max((LR * g).abs().max() for g in gradient.values()) > 1e-3
    assert_close(one_process["sgd"], expected)


def hugging_face(checkpoint, loss: str | None = None):
    """transformers' log-probs, and its weights or gradient under the names on disk."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    samples = make_samples()
    width = max(s.response_rows.stop for s in samples)
    rows = {key: torch.zeros(len(samples), width) for key in ("lp", "old", "rollout", "adv", "m")}
    log_probs = []
    for b, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.tokens)
        logits = model(tokens[None]).logits[0] / TEMPERATURE
        lp = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0][sample.response_rows]
        log_probs.append(lp)
        where = torch.arange(width)[sample.response_rows]
        rows["lp"] = rows["lp"].index_put((torch.tensor(b), where), lp)
        rows["old"][b, where] = torch.from_numpy(sample.old_log_probs)
        rows["rollout"][b, where] = torch.from_numpy(sample.rollout_log_probs)
        rows["adv"][b, where] = sample.advantage
        rows["m"][b, where] = 1
    if loss is not None:
        policy_loss(
            rows["lp"],
            rows["old"],
            rows["adv"],
            rows["m"].bool(),
            config=PolicyLossConfig.preset(loss),
            rollout_log_probs=rows["rollout"],
        ).loss.backward()
    by_name = {}
    for name, parameter in model.named_parameters():
        tensor = (parameter if loss is None else parameter.grad).detach()
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                stem = name.removesuffix("gate_up_proj")
                by_name[f"{stem}{e}.gate_proj.weight"] = gate
                by_name[f"{stem}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                by_name[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            by_name[name] = tensor
    return [lp.detach().numpy() for lp in log_probs], by_name


def test_log_probs_equal_transformers(one_process, tiny_checkpoint):
    expected, _ = hugging_face(tiny_checkpoint)
    for scored, log_probs in zip(one_process["scored"], expected, strict=True):
        assert np.abs(scored.log_probs - log_probs).max() <= 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_equals_transformers(loss, one_process, tiny_checkpoint):
    _, expected = hugging_face(tiny_checkpoint, loss)
    assert_close(one_process["gradient"][loss], expected, tolerance=2e-5)


def test_expert_gradients_unreduced_by_megatron_are_refused(one_process, tiny_checkpoint):
    """EP1 with ETP≠TP: refused; without the refusal the gradients are wrong and nothing says so."""
    with pytest.raises(UserError, match="etp=1 and tp=2"):
        Layout(tp=2, ep=1, etp=1)
    unchecked = object.__new__(Layout)
    for name, value in {"tp": 2, "ep": 1, "etp": 1, "pp": 1, "vpp": 1}.items():
        object.__setattr__(unchecked, name, value)
    gradient = run_ranks(2, measure, unchecked, tiny_checkpoint)[0]["gradient"]["up-grpo"]
    expected = one_process["gradient"]["up-grpo"]
    expert = "model.layers.0.mlp.experts.0.down_proj.weight"
    attention = "model.layers.0.self_attn.o_proj.weight"
    assert (gradient[expert] - expected[expert]).norm() > 0.1 * expected[expert].norm()
    assert (gradient[attention] - expected[attention]).norm() < 1e-5 * expected[attention].norm()


@pytest.fixture(scope="module")
def one_process_bf16(tiny_checkpoint):
    return run_ranks(1, measure, Layout(), tiny_checkpoint, "bfloat16")[0]


@pytest.mark.parametrize("name", ["TP2", "EP2", "TP2·EP2", "DP2", "TP2·EP2·DP2"])
def test_bf16_layouts_agree_to_bf16(name, one_process_bf16, tiny_checkpoint):
    """bf16 keeps 8 bits (relative 4e-3) and routes may flip: directions are compared."""
    world_size, layout = LAYOUTS[name]
    ranks = run_ranks(world_size, measure, layout, tiny_checkpoint, "bfloat16")
    expected = np.concatenate([s.log_probs for s in one_process_bf16["scored"]])
    actual = np.concatenate([s.log_probs for s in scored_in_order(ranks)])
    assert np.abs(actual).mean() > 0 and np.abs(actual - expected).mean() < 0.1
    for key in ("sgd", "distributed"):
        assert all(tensor.dtype == torch.bfloat16 for tensor in ranks[0][key].values())

    def flat(tensors: dict) -> torch.Tensor:
        return torch.cat([tensors[n].float().flatten() for n in sorted(tensors)])

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    assert cosine(*(flat(r["gradient"]["up-grpo"]) for r in (ranks[0], one_process_bf16))) > 0.99
    before = flat(hugging_face(tiny_checkpoint)[1]).bfloat16().float()
    moved = flat(one_process_bf16["sgd"]) - before
    assert moved.norm() > 0
    for key in ("sgd", "distributed"):
        assert cosine(flat(ranks[0][key]) - before, moved) > 0.98


def measure_replay(layout: Layout, checkpoint) -> dict:
    """Scores and a gradient with routes replayed: the model's own, and planted ones."""
    with groups.process_groups(layout):
        dp_rank, dp_size = groups.data_parallel()
        share = len(make_samples()) // dp_size
        mine = make_samples()[dp_rank * share : (dp_rank + 1) * share]

        def actor(optimizer=None):
            return MegatronActor(
                checkpoint,
                layout,
                temperature=TEMPERATURE,
                micro_batch_size=3,
                optimizer=optimizer,
            )

        def gradient(samples):
            trained = actor(SGD)
            trained.update(samples, PolicyLossConfig.preset("up-grpo"))
            return gradients_by_name(trained)

        native = actor().score(mine)
        own = [replace(s, routes=n.routes[:, :, ::-1]) for s, n in zip(mine, native, strict=True)]
        # Every other expert instead, as an engine might have chosen.
        planted = [replace(s, routes=(n.routes + 3) % 8) for s, n in zip(mine, native, strict=True)]
        return {
            "dp_rank": dp_rank,
            "native": native,
            "own": actor().score(own),
            "planted": actor().score(planted),
            "gradient": {
                "native": gradient(mine),
                "own": gradient(own),
                "planted": gradient(planted),
            },
        }


@pytest.fixture(scope="module")
def replay_in_one_process(tiny_checkpoint):
    return run_ranks(1, measure_replay, Layout(), tiny_checkpoint)[0]


def test_replaying_a_models_own_routes_changes_nothing_to_the_last_bit(replay_in_one_process):
    """Values and gradient, with the experts of each row given in another order."""
    result = replay_in_one_process
    for own, native in zip(result["own"], result["native"], strict=True):
        assert np.array_equal(own.log_probs, native.log_probs)
        assert np.array_equal(own.routes, native.routes)
    for name, tensor in result["gradient"]["native"].items():
        assert torch.equal(result["gradient"]["own"][name], tensor), name


def test_planted_routes_are_the_ones_used(replay_in_one_process, tiny_checkpoint):
    """Against transformers with its expert choice forced by hand: log-probs and gates."""
    result = replay_in_one_process
    model = Qwen3MoeForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for sample, native, planted in zip(
        make_samples(), result["native"], result["planted"], strict=True
    ):
        expected = np.sort((native.routes + 3) % 8, axis=-1)
        assert np.array_equal(planted.routes, expected)
        assert not np.array_equal(planted.log_probs, native.log_probs)

        def force(layer: int, expected=expected):
            def replace_choice(module, args):
                hidden, indices, _ = args
                router = model.model.layers[layer].mlp.gate
                rows = torch.from_numpy(expected[:, layer].astype(np.int64))
                rows = torch.cat([rows, indices[len(rows) :]])  # the last token: native
                probabilities = (hidden @ router.weight.T).softmax(-1).gather(1, rows)
                return hidden, rows, probabilities / probabilities.sum(-1, keepdim=True)

            return replace_choice

        handles = [
            layer.mlp.experts.register_forward_pre_hook(force(i))
            for i, layer in enumerate(model.model.layers)
        ]
        tokens = torch.from_numpy(sample.tokens)
        logits = model(tokens[None]).logits[0] / TEMPERATURE
        lp = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0][sample.response_rows]
        for handle in handles:
            handle.remove()
        assert np.abs(planted.log_probs - lp.detach().numpy()).max() <= 1e-5


@pytest.mark.parametrize("name", ["TP2", "EP2", "TP2·EP2", "TP2·EP2·DP2"])
def test_replay_in_every_layout_equals_one_process(name, replay_in_one_process, tiny_checkpoint):
    world_size, layout = LAYOUTS[name]
    ranks = run_ranks(world_size, measure_replay, layout, tiny_checkpoint)
    by_dp_rank = {rank["dp_rank"]: rank["planted"] for rank in ranks}
    actual = [scored for dp_rank in sorted(by_dp_rank) for scored in by_dp_rank[dp_rank]]
    for a, b in zip(actual, replay_in_one_process["planted"], strict=True):
        assert np.array_equal(a.routes, b.routes)
        assert np.abs(a.log_probs - b.log_probs).max() <= 1e-5
    for rank in ranks:
        assert_close(rank["gradient"]["planted"], replay_in_one_process["gradient"]["planted"])
