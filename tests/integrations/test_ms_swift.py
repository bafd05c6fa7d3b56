"""ms-swift 4.6.0, the real wheels, on a CPU: its Megatron GRPO trainer, its loss, its replay.

`swift_ranks` says what is not ms-swift's. Not run: vLLM, Transformer Engine, Ray, a GPU.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks, stack_doctor
from moe_upgrpo.integrations.kit.hooking import delegate, replaced
from moe_upgrpo.integrations.kit.presets import served
from moe_upgrpo.integrations.ms_swift import health
from moe_upgrpo.integrations.ms_swift.loss import NOT_HANDED_OVER
from moe_upgrpo.losses import PRESETS, policy_loss
from moe_upgrpo.store import read_metrics, read_tokens
from tests.integrations import swift_ranks
from tests.integrations.places import SWIFT_WHEELS
from tests.integrations.swift_runs import (
    CHANGED,
    JOBS,
    SHARDS,
    L,
    assert_is_of,
    columns,
    generated,
    rows_of,
    run,
    training,
)
from tests.integrations.whole import assert_whole
from tests.losses.batches import random_batch

SCRIPTS = json.loads(Path(__file__).with_name("ms_swift_scripts.json").read_text())
# They look at the router, or at more of the batch than ms-swift hands over.
UNSERVED = {"rspo", "up-rspo", "clip-cov", "up-clip-cov", "kl-cov", "up-kl-cov"}
UNSERVED |= {"vapo", "real", "gtpo"}
SERVED = [name for name in PRESETS if name not in UNSERVED]
TOKENS, SEQUENCES, PARTS = 40, 8, 2  # of the global batch, this micro-batch being half of it
SIZES = {"micro_batch_size": 4, "global_batch_size": 8, "num_microbatches": 2, "num_generations": 4,
         "steps_per_generation": 1, "generation_batch_size": 8,
         "per_device_generation_batch_size": 8}  # fmt: skip


def batch() -> dict:
    """A micro-batch as ms-swift hands it to its loss: four sequences, one of them cut off."""
    data = random_batch(seed=50, lengths=(7, 3, 5, 1), dtype=torch.float32, spread=0.3)
    return {
        "log_probs": data.log_probs,
        "old_per_token_logps": data.old_log_probs,
        "rollout_per_token_logps": data.rollout_log_probs,
        "ref_per_token_logps": data.old_log_probs - 0.1 * data.advantages,
        "advantages": data.advantages,
        "completion_mask": data.mask.bool(),
        "truncated_mask": torch.tensor([False, False, True, False]),
        "seq_lengths": data.mask.sum(1),
        "num_items_in_batch": torch.tensor(TOKENS),
        "entropy": data.old_log_probs.square(),
    }


# ours, theirs: the same loss under either name, with the same other flags
CLIPS = {"epsilon": 0.1, "epsilon_high": 0.15, "delta": 2.5}
BY_SEQUENCE = {"aggregation": "seq-mean-token-mean"}
PAIRS = {
    "grpo": ({"loss_type": "moe_upgrpo/grpo"}, {"loss_type": "dapo"}, CLIPS),
    "grpo by sequence": (
        {"loss_type": "moe_upgrpo/grpo", "settings": BY_SEQUENCE},
        {"loss_type": "grpo"},
        CLIPS,
    ),
    "gspo": (
        {"loss_type": "moe_upgrpo/gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"epsilon": 0.05, "epsilon_high": 0.08},
    ),
    "gspo-token": (
        {"loss_type": "moe_upgrpo/gspo-token"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
        {"epsilon": 0.05, "epsilon_high": 0.08},
    ),
    "cispo": ({"loss_type": "moe_upgrpo/cispo"}, {"loss_type": "cispo"}, {"epsilon_high": 1.2}),
    "sapo": ({"loss_type": "moe_upgrpo/sapo"}, {"loss_type": "sapo"}, {"tau_neg": 2.0}),
}  # fmt: skip
WITH = {
    "nothing": {},
    "KL": {"beta": 0.1},
    "truncated weights": {"rollout_importance_sampling_mode": "token_truncate"},
    "masked weights": {"rollout_importance_sampling_mode": "token_mask",
                       "rollout_importance_sampling_threshold": 1.05},
    "weights of sequences": {"rollout_importance_sampling_mode": "sequence_truncate", "beta": 0.1},
    "overlong filter": {"overlong_filter": True},
    "entropy": {"top_entropy_quantile": 0.5},
}  # fmt: skip
TOGETHER = [
    (pair, name)
    for pair in PAIRS
    for name, more in WITH.items()
    if pair != "gspo"
    or more.get("rollout_importance_sampling_mode", "sequence_truncate") == "sequence_truncate"
]

REFUSED = {
    "clip": (
        {"loss_type": "moe_upgrpo/dppo-tv", "epsilon": 0.1},
        r"--epsilon: 0.1 given; moe",
    ),
    "level": (
        {"loss_type": "moe_upgrpo/up-gspo", "importance_sampling_level": "sequence"},
        r"--importance_sampling_level: sequence given with --loss_type moe_upgrpo/up-gspo",
    ),
    "mask": (
        {"loss_type": "moe_upgrpo/grpo", "off_policy_sequence_mask_delta": 0.01},
        r"--off_policy_sequence_mask_delta: given .* ms-swift 4.6.0 itself ends a job with it",
    ),
    "twice": (
        {"loss_type": "moe_upgrpo/topr", "rollout_importance_sampling_mode": "token_mask"},
        r"--rollout_importance_sampling_mode token_mask: given with a loss that corrects",
    ),
    "coupled": (
        {"loss_type": "moe_upgrpo/gspo", "rollout_importance_sampling_mode": "sequence_mask"},
        r"a weight for each token given with gspo, a loss",
    ),
    "unserved": (
        {"loss_type": "moe_upgrpo/rspo"},
        r"--loss_type: 'rspo' given, a loss that needs router_log_probs, which ms-swift does not",
    ),
    "no preset": ({"loss_type": "moe_upgrpo/up"}, r"--loss_type: 'up' given; allowed: grpo, dapo"),
    "settings": (
        {"loss_type": "grpo", "settings": {"clip_low": 0.1}},
        r"--loss_type: grpo given; .* a loss of ms-swift without MOE_UPGRPO_LOSS_SETTINGS",
    ),
    "no object": (
        {"loss_type": "moe_upgrpo/grpo", "settings": [1]},
        r"MOE_UPGRPO_LOSS_SETTINGS: \[1\] given; allowed: fields of positive",
    ),
    "no prefix": (
        {"loss_type": "up-grpo"},
        r"--loss_type: up-grpo given; allowed: moe_upgrpo/PRESET, or a loss of ms-swift",
    ),
    "ray": ({"use_ray": True}, r"MOE_UPGRPO_RUN: the routing log does not cover --use_ray"),
    "fused": (
        {"router_replay_mode": "R3", "config": {"moe_router_fusion": True}},
        r"does not cover --moe_router_fusion under R3",
    ),
    "top-p": ({"top_p": 0.9}, r"does not cover --top_p other than 1"),
    "top-k": ({"top_k": 20}, r"does not cover --top_k other than -1"),
    "dense": ({"config": {"num_moe_experts": None}}, r"does not cover a model without MoE layers"),
}


def of_script(flags: dict[str, str]) -> dict:
    """A script's flags as ms-swift parses them, as far as our start-up reads them."""
    parsed = {}
    for name, value in flags.items():
        try:
            parsed[name] = json.loads(value) if value else True
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


@pytest.fixture(scope="module")
def results(tiny_checkpoint, tmp_path_factory):
    """All jobs of `make test`, in one process that has imported ms-swift once."""
    folder = tmp_path_factory.mktemp("ms-swift")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    calls = {
        name: {"batch": batch(), "loss_type": f"moe_upgrpo/{name}", **SIZES} for name in SERVED
    }
    for pair, more in TOGETHER:
        ours, theirs, both = PAIRS[pair]
        for side, flags in (("ours", ours), ("theirs", theirs)):
            given = {"batch": batch(), **SIZES, **both, **flags, **WITH[more]}
            calls[pair, more, side] = {"output_dir": str(folder), **given}
    for call in calls.values():
        call["output_dir"] = str(folder)
    starts = {name: dict(given) for name, (given, _) in REFUSED.items()}
    starts["taken"] = {"run": str(folder / "taken")}
    for script, flags in SCRIPTS["scripts"].items():
        given = of_script(flags)
        for mode in ("disabled", "R2", "R3"):
            starts[script, mode] = given | {"router_replay_mode": mode}
        starts |= {(script, name): {name: given[name]} for name in given}
    jobs = {
        "losses": (1, swift_ranks.losses, list(calls.values())),
        "starts": (1, swift_ranks.refused, list(starts.values())),
        "fields": (1, swift_ranks.fields),
    }
    found = run(jobs | training(tiny_checkpoint, folder, ["observe"]), folder)
    return {
        "folder": folder,
        "losses": dict(zip(calls, found["losses"][0], strict=True)),
        "starts": dict(zip(starts, found["starts"][0], strict=True)),
        "fields": found["fields"][0],
        "observe": found["observe"],
    }


# --- losses


@pytest.mark.parametrize("name", SERVED)
def test_every_preset_gives_the_librarys_value_and_gradient(results, name):
    """Divided by the parts of the batch, over which Megatron averages: its share of the mean."""
    data, config, found = batch(), PRESETS[name], results["losses"][name]
    leaf = data["log_probs"].clone().requires_grad_()
    expected = policy_loss(
        leaf,
        data["old_per_token_logps"],
        data["advantages"],
        data["completion_mask"],
        config=config,
        rollout_log_probs=data["rollout_per_token_logps"],
        global_tokens=TOKENS,
        global_sequences=SEQUENCES,
    )
    expected.loss.backward()
    assert found["loss"] / PARTS == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found["grad"] / PARTS, leaf.grad, rtol=1e-5, atol=1e-8)
    assert found["grad"].count_nonzero() > 3
    assert found["metrics"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert not [name for name in found["metrics"] if name.startswith("clip_ratio")]
    for metric, (numerator, denominator) in expected.metrics.items():
        if f"moe_upgrpo/{metric}" in found["metrics"]:
            above, below = found["metrics"][f"moe_upgrpo/{metric}"]
            assert above * float(denominator) == pytest.approx(float(numerator) * below, rel=1e-5)
    assert found["metrics"]["moe_upgrpo/ppo_kl"][1] == 16


@pytest.mark.parametrize(("pair", "more"), TOGETHER)
def test_against_ms_swifts_own_losses(results, pair, more):
    """Its functions are the reference: clips, denominators, KL, weights, masks."""
    ours, theirs = (results["losses"][pair, more, side] for side in ("ours", "theirs"))
    assert isinstance(ours, dict) and isinstance(theirs, dict), (ours, theirs)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(ours["grad"], theirs["grad"], rtol=1e-5, atol=1e-8)
    if more == "KL":
        assert ours["metrics"]["kl"] == pytest.approx(theirs["metrics"]["kl"]) and (
            theirs["metrics"]["kl"] > 0
        )
    if more != "nothing":
        plain = results["losses"][pair, "nothing", "theirs"]
        assert not torch.equal(theirs["grad"], plain["grad"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(results, name):
    with pytest.raises(UserError, match=REFUSED[name][1]):
        raise UserError(results["starts"][name] or "nothing was refused")


def test_a_folder_that_holds_a_run_is_refused(results):
    assert "already holds a run: name a new folder" in results["starts"]["taken"]


@pytest.mark.parametrize("script", SCRIPTS["scripts"])
def test_ms_swifts_own_scripts_are_accepted_flag_by_flag(results, script):
    """Its two scripts of Megatron GRPO for MoE models, with each replay; none of its own has it."""
    flags = SCRIPTS["scripts"][script]
    assert flags.keys() <= {*results["fields"]}
    assert {name: results["starts"][script, name] for name in flags} == dict.fromkeys(flags)
    for mode in ("disabled", "R2", "R3"):
        assert results["starts"][script, mode] is None


def test_presets_that_ms_swift_has_the_inputs_for():
    assert {*served(NOT_HANDED_OVER)} == {*SERVED}


# --- hooks


def test_a_method_is_stood_around_where_there_is_a_log():
    class Log:
        def step(self, original, x):
            return original(x) + 1

    class Trainer:
        log = None

        def step(self, x):
            return 10 * x

    delegate(Trainer, "log", ["step"])
    trainer = Trainer()
    assert trainer.step(2) == 20
    trainer.log = Log()
    assert trainer.step(2) == 21
    with replaced(trainer, log=None, other=3):
        assert (trainer.step(2), trainer.other) == (20, 3)
    assert trainer.step(2) == 21 and not hasattr(trainer, "other")


def test_the_released_hooks_are_as_they_were_tested():
    assert hooks.difference("ms-swift", SWIFT_WHEELS, "4.6.0") == []
    found = stack_doctor.diagnose("ms-swift", SWIFT_WHEELS)
    assert (found["tested_as"], found["version"]) == ("4.6.0", "4.6.0")
    assert found["missing"] == {"loss": [], "log": [], "health": []}


# --- the trainer


def test_the_token_log_of_a_step(results, tiny_checkpoint):
    folder, data = results["folder"] / "observe", generated(tiny_checkpoint)
    assert_is_of(folder, results["observe"][0], data, JOBS["observe"][1])
    assert_whole(folder)
    first, second = read_metrics(folder)
    assert (first["step"], second["step"]) == (1, 2)
    assert second["tokens/sampled"] == first["tokens/sampled"] == len(rows_of(data))
    assert second["logp_gap/mean_abs"] != first["logp_gap/mean_abs"]


@pytest.fixture(scope="module")
def layouts(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ms-swift-layouts")
    names = [name for name in JOBS if name != "observe"]
    shards = {part: (2, swift_ranks.context_parallel, *part) for part in SHARDS}
    return folder, run(training(tiny_checkpoint, folder, names) | shards, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padded", "R2", "R3", "CP", "CP, padded"])
def test_the_token_log_in_other_layouts(layouts, tiny_checkpoint, name):
    """The same rows and routes from ranks that are parallel in each of the five ways."""
    folder, found = layouts
    flags = JOBS[name][1] | {"dp": 2 if name == "padded" else 1}
    with_loss = found[name][-1]  # the rank that ms-swift logs from
    assert_is_of(folder / name, with_loss, generated(tiny_checkpoint), flags)
    assert_whole(folder / name)


def test_a_trainer_without_a_model_is_not_counted():
    """Ray's workers have one for forward_step and loss_func alone (ray/megatron/loss/grpo.py)."""
    stub = SimpleNamespace(
        args=SimpleNamespace(use_ray=True), enable_routing_replay=True, moe_upgrpo_health=None,
        unwrapped_models=[SimpleNamespace(training=True)],
    )  # fmt: skip
    assert health.forward_step(lambda *args: args, stub, "data", "model") == ("data", "model")
    assert stub.moe_upgrpo_health is None


@pytest.mark.slow
def test_health_figures_of_a_replay(layouts, tiny_checkpoint):
    """With the last update of a generation, log or not."""
    found, data = layouts[1], generated(tiny_checkpoint)
    first, last = found["no log"][0]
    assert "replay/rows" not in first[0] and "mismatch/router_rate" not in last[0]
    tokens = sum(len(s["prompt"] + s["response"]) for s in data)
    planted = sum(layer == 0 for *_, layer in CHANGED)
    for m in (*last, last[0]["logged"]):
        assert m["replay/rows"] == L * tokens
        assert m["replay/applied_rate"] == 1 and m["replay/live_rate"] == 0
        # vLLM has no row for a sequence's last token, where ms-swift puts zeros.
        assert m["replay/zero_filled_rate"] == pytest.approx(len(data) / tokens)
        assert m["replay/repeated_rate"] == 0
        assert m["replay/native_differs/layer_0"] == pytest.approx(planted / (tokens - len(data)))
    both = found["R3"][0][-1][0]  # of a tensor-parallel rank, beside the log's own
    assert both["mismatch/router_numerator"] == len(CHANGED) and both["replay/applied_rate"] == 1
    assert both["replay/native_differs/layer_0"] > planted / (tokens - len(data))  # after an update
    ours = found["R2"][-1][-1][0]
    assert ours["replay/rows"] == L * tokens and ours["replay/applied_rate"] == 1
    assert ours["replay/zero_filled_rate"] == 0 < ours["replay/native_differs_rate"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("part", SHARDS)
def test_context_parallel_rows_are_joined(layouts, part):
    assert layouts[1][part] == [[True, True]] * 2


@pytest.mark.slow
def test_r3_tells_native_from_held(layouts, tiny_checkpoint):
    folder, data = layouts[0], generated(tiny_checkpoint)
    sorting = [("sequence", "ascending"), ("position", "ascending")]
    held = columns(read_tokens(folder / "R3" / "tokens").sort_by(sorting))
    total = held["gap_numerics"] + held["gap_update"]
    np.testing.assert_allclose(total, held["logp_train"] - held["logp_rollout"], atol=1e-6)
    at = {(i, row + 1) for i, row, _ in CHANGED}
    changed = np.array([pair in at for pair in rows_of(data)])
    moved = np.abs(held["counterfactual_engine_routing"])
    assert moved[changed].min() > 1e-3 > np.median(moved[~changed])
    assert (held["layers_mismatched_conditional"][changed] >= 1).all()
