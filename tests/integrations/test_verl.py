"""verl 0.9.1, the real wheel, on a CPU: its losses' dispatch, its config, its Megatron engine.

What is installed for it: the extra `parity` and `pip install --no-deps verl==0.9.1` (Makefile).
Not run: Ray, the rollout servers, Megatron-Bridge, Transformer Engine, a GPU.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import types
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from transformers import Qwen3MoeForCausalLM
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks
from moe_upgrpo.integrations.verl import LOSSES, LossConfig, check, install, settings
from moe_upgrpo.losses import PRESETS, PolicyLossConfig, finalize_metrics, policy_loss
from moe_upgrpo.report import write_report
from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens
from tests.integrations import verl_settings
from tests.integrations.places import CHECKOUTS, with_checkout
from tests.integrations.whole import assert_whole
from tests.losses.batches import random_batch

REPOSITORY = Path(__file__).parents[2]
CHECKOUT = os.environ.get("MOE_UPGRPO_VERL")
VERSION = (
    Path(CHECKOUT or Path(importlib.util.find_spec("verl").origin).parents[1])
    / "verl/version/version"
).read_text()
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def actor(loss_mode: str, settings: dict | None = None, batch_info: dict | None = None, **fields):
    config = ActorConfig(
        strategy="megatron",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=LossConfig(loss_mode=loss_mode, settings=settings or {}),
        **fields,
    )
    config.global_batch_info.update(batch_info or {})
    return config


def called(loss_mode: str, batch, config, mode: str, weights=None):
    """Value, gradient and metrics, through verl's own look-up and with its keywords."""
    leaf = batch.log_probs.clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(loss_mode)(
        old_log_prob=batch.old_log_probs,
        log_prob=leaf,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.item(), leaf.grad, metrics


def batch():
    return random_batch(seed=50, lengths=(7, 3, 5, 1, 6) * 4, spread=0.3)


@pytest.mark.parametrize("name", LOSSES)
def test_every_preset_gives_the_librarys_value_and_gradient(name):
    preset = name.removeprefix("moe_upgrpo/")
    data, config = batch(), PRESETS[preset]
    leaf = data.log_probs.clone().requires_grad_()
    expected = policy_loss(leaf, data.old_log_probs, data.advantages, data.mask, config=config)
    expected.loss.backward()
    loss, grad, metrics = called(name, data, actor(name), config.aggregation)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-12)
    assert torch.equal(grad, leaf.grad) and grad.count_nonzero() > 3
    for metric, value in finalize_metrics(expected.metrics).items():
        assert metrics[f"actor/{metric}"] == pytest.approx(0.0 if np.isnan(value) else value)


def test_presets_that_need_more_than_verl_hands_over_are_not_registered():
    missing = {f"moe_upgrpo/{name}" for name in PRESETS} - LOSSES.keys()
    needy = (
        *("topr", "deepseek-v3.2", "up-deepseek-v3.2", "vespo", "up-vespo", "rspo", "up-rspo"),
        *("clip-cov", "up-clip-cov", "kl-cov", "up-kl-cov", "vapo", "real", "gtpo"),
    )
    assert missing == {f"moe_upgrpo/{name}" for name in needy}


RANKS = {"dp_size": 4, "batch_num_tokens": 371, "global_batch_size": 96}


@pytest.mark.parametrize("info", [{}, RANKS, RANKS | {"loss_scale_factor": 11}])
@pytest.mark.parametrize("mode", [*MODES, "seq-mean-token-sum-norm"])
@pytest.mark.parametrize(("ours", "theirs"), [("grpo", "vanilla"), ("gspo-token", "gspo")])
def test_against_verls_own_losses_with_its_denominators(ours, theirs, mode, info):
    """verl's functions are the reference: clips, aggregation, ranks, rollout weights, metrics."""
    name, data = f"moe_upgrpo/{ours}", batch()
    clips = dict(clip_ratio_low=0.1, clip_ratio_high=0.15, clip_ratio_c=2.5)
    if ours == "gspo-token":
        clips = dict(clip_ratio_low=0.05, clip_ratio_high=0.08)
    mine = actor(name, batch_info=info, **clips)
    weights = torch.linspace(0.5, 1.5, data.mask.shape[1]).expand(data.mask.shape).double()
    for w in (None, weights):
        loss, grad, metrics = called(name, data, mine, mode, w)
        expected, wanted, reference = called(theirs, data, mine, mode, w)
        assert loss == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-12)
    for metric in ("actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"):
        assert metrics[metric] == pytest.approx(reference[metric], rel=1e-6)
    assert reference["actor/pg_clipfrac"] > 0


def test_settings_change_the_loss():
    name, data = "moe_upgrpo/up-grpo", batch()
    config = actor(name, {"negative": "gspo-token", "clip_low": 0.01})
    _, grad, _ = called(name, data, config, "seq-mean-token-mean")
    ours = PolicyLossConfig(negative="gspo-token", clip_low=0.01, aggregation="seq-mean-token-mean")
    leaf = data.log_probs.clone().requires_grad_()
    policy_loss(leaf, data.old_log_probs, data.advantages, data.mask, config=ours).loss.backward()
    assert torch.equal(grad, leaf.grad)


def test_what_cannot_be_is_refused():
    data = batch()
    with pytest.raises(
        UserError, match=r"policy_loss.settings: .*clip_lo.* given; allowed: fields of positive"
    ):
        LossConfig(loss_mode="moe_upgrpo/up-grpo", settings={"clip_lo": 0.1})
    with pytest.raises(UserError, match="router_log_probs, which verl does not hand"):
        LossConfig(loss_mode="moe_upgrpo/gmpo", settings={"router_shift_floor": 0.8})
    with pytest.raises(UserError, match="loss_mode: 'moe_upgrpo/up' given; allowed: vanilla"):
        LossConfig(loss_mode="moe_upgrpo/up")
    with pytest.raises(UserError, match=r"settings: .* with loss_mode 'gspo'"):
        LossConfig(loss_mode="gspo", settings={"clip_low": 0.1})
    name = "moe_upgrpo/dppo-tv"
    with pytest.raises(UserError, match=r"actor.clip_ratio_low: 0.05 given; .* divergence_limit"):
        called(name, data, actor(name, clip_ratio_low=0.05), "token-mean")
    name = "moe_upgrpo/grpo"
    with pytest.raises(UserError, match="dp_size 2; allowed: with batch_num_tokens"):
        called(name, data, actor(name, batch_info={"dp_size": 2}), "token-mean")
    name = "moe_upgrpo/gspo"
    weights = torch.rand(data.mask.shape, dtype=torch.float64)
    with pytest.raises(UserError, match="rollout_is_weights: one for each token given"):
        called(name, data, actor(name), "seq-mean-token-mean", weights)


def test_check_speaks_up(monkeypatch, capsys):
    assert check("moe_upgrpo/up-grpo") == list(LOSSES)
    assert "in use: moe_upgrpo/up-grpo" in capsys.readouterr().out
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    with pytest.raises(UserError, match="VERL_USE_EXTERNAL_PLUGINS: 'none' given"):
        check()
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "auto")
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "moe_upgrpo/gspo", print)
    with pytest.raises(UserError, match="another loss under: moe_upgrpo/gspo"):
        check()


def test_verls_own_config_takes_the_flags():
    """The documented flags, through verl's hydra config of the Megatron trainer, to its actor."""
    from hydra import compose, initialize_config_dir

    folder = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
    policy = "actor_rollout_ref.actor.policy_loss"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose(
            "ppo_megatron_trainer",
            overrides=[
                f"{policy}._target_=moe_upgrpo.integrations.verl.LossConfig",
                f"{policy}.loss_mode=moe_upgrpo/up-grpo",
                f"+{policy}.settings.negative=gspo-token",
                "actor_rollout_ref.actor.megatron.router_replay.mode=R3",
                "actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
                "actor_rollout_ref.rollout.calculate_log_probs=True",
                "+ray_kwargs.ray_init.runtime_env.env_vars.MOE_UPGRPO_RUN=/runs/one",
            ],
        )
    loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    assert isinstance(loss, LossConfig)
    assert (loss.loss_mode, dict(loss.settings)) == (
        "moe_upgrpo/up-grpo",
        {"negative": "gspo-token"},
    )
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.MOE_UPGRPO_RUN == "/runs/one"


def test_verls_own_replay_example_is_accepted_setting_by_setting():
    """The settings of verl's script with our lines, in verl's own config; what the page says of
    each is what is so."""
    kept, given = verl_settings.read(), verl_settings.given()
    assert len(given) > 70
    config = verl_settings.composed([*verl_settings.as_verl_takes_them(given), *verl_settings.OURS])
    found = verl_settings.verdicts(given, config)
    assert kept["revision"] == CHECKOUTS["verl"][1]  # else no checkout is held to it below
    assert found == [setting[:3] for setting in kept["settings"]]
    refused = {name: verdict for name, _, verdict in found if verdict != "accepted"}
    assert list(refused) == list(verl_settings.INSTEAD)
    with pytest.raises(Exception, match=r"Could not override 'actor_rollout_ref.actor.model_eng"):
        verl_settings.composed(given)
    assert config.actor_rollout_ref.actor.megatron.router_replay.mode == "R3"
    assert config.actor_rollout_ref.model.use_fused_kernels is True
    assert verl_settings.SHOWN.keys() - {name for name, _ in (x[:2] for x in found)} == set()


@pytest.mark.parametrize(("stack", "checkout"), with_checkout("verl"))
def test_the_example_kept_is_the_checkouts(stack, checkout):
    if hooks.difference(stack, checkout, verl_settings.read()["revision"]):
        pytest.skip(f"the checkout is not at {verl_settings.read()['revision']}")
    assert verl_settings.printed(checkout / verl_settings.SCRIPT) == verl_settings.given()


def test_a_job_without_what_the_log_compares_ends_before_the_model_is_built():
    """At verl's worker, with every setting that is wrong."""
    needed = {
        "actor": {"strategy": "megatron"},
        "rollout": {"enable_rollout_routing_replay": True, "calculate_log_probs": True},
    }
    settings.check(needed)
    built, worker = [], SimpleNamespace(role="actor_rollout", config=needed)
    module = SimpleNamespace(ActorRolloutRefWorker=SimpleNamespace(init_model=built.append))
    install._into_worker(module)
    install._into_worker(module)  # the second time it does nothing
    module.ActorRolloutRefWorker.init_model(worker)
    assert built == [worker]
    worker.config = {
        "actor": {"strategy": "fsdp"},
        "rollout": {"enable_rollout_routing_replay": False, "calculate_log_probs": False},
    }
    with pytest.raises(UserError) as error:
        module.ActorRolloutRefWorker.init_model(worker)
    for name in ("actor.strategy: fsdp", "replay: False given", "calculate_log_probs: False given"):
        assert name in str(error.value)
    worker.role = "ref"  # which has no log
    module.ActorRolloutRefWorker.init_model(worker)
    assert len(built) == 2


def fresh(*command: str, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """A process of its own, with the verl that MOE_UPGRPO_VERL names, else the installed one."""
    if CHECKOUT:
        path = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join([CHECKOUT, str(REPOSITORY), path])
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_verls_loader_finds_the_plugin_in_a_fresh_process(tmp_path):
    """Through the installed entry point: `import verl` alone, then the self-check's command."""
    code = (
        "import verl, sys; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; "
        "print(get('moe_upgrpo/up-grpo').preset, 'megatron' in sys.modules)"
    )
    assert fresh("-c", code, cwd=tmp_path).stdout.split()[-2:] == ["up-grpo", "False"]
    command = ("-m", "moe_upgrpo.integrations.verl", "moe_upgrpo/up-grpo")
    off = fresh(*command, cwd=tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    assert off.returncode == 1
    assert off.stderr.splitlines()[-1].startswith("VERL_USE_EXTERNAL_PLUGINS: 'none' given")


# --- the Megatron engine

L, K, E = 2, 2, 8
CHANGED = ((0, 3, 0), (2, 4, 1), (4, 3, 0), (6, 4, 1), (7, 3, 0))  # sequence, route row, layer


def sequences(checkpoint) -> list[dict]:
    """Prompts and responses, with the experts that transformers chooses, changed at `CHANGED`."""
    generator = np.random.default_rng(0)
    hf = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    found = []
    for i in range(8):
        prompt, response = (
            generator.integers(2, 64, size=n).tolist() for n in (2 + i % 3, 4 + i % 4)
        )
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = hf(ids, output_router_logits=True).router_logits
        routes = torch.stack([x.topk(K).indices for x in logits], dim=1)[:-1].tolist()
        for sequence, row, layer in CHANGED:
            if sequence == i:
                used = routes[row][layer]
                routes[row][layer] = [e for e in range(E) if e not in used][:K]
        found.append(
            {
                "uid": f"g{i // 4}",
                "prompt": prompt,
                "response": response,
                # one token that is not the model's own, such as a tool's
                "mask": [int(not (i == 3 and t == 1)) for t in range(len(response))],
                "logp_rollout": (-generator.random(len(response)) - 3).round(3).tolist(),
                "advantage": [1.0, -1.0, 0.5, -0.5][i % 4],
                "reward": float(i % 2),
                "routes": [*routes, [[0] * K] * L],  # verl's padding of the last row
            }
        )
    return found


JOBS = {  # name -> ranks, router_replay.mode, loss, packed, sizes
    "observe": (1, "disabled", "moe_upgrpo/up-grpo", True, {}),
    "unpacked": (2, "disabled", "vanilla", False, {}),  # two data-parallel ranks, padded data
    "R2": (2, "R2", "moe_upgrpo/grpo", True, {"pipeline_model_parallel_size": 2}),
    "R3": (2, "R3", "moe_upgrpo/up-grpo", True, {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tmp_path_factory):
    """One RL step of verl's engine in each layout: the run folders and what each rank returned."""
    folder, batch = tmp_path_factory.mktemp("verl"), sequences(tiny_checkpoint)
    jobs = {
        name: dict(world=world, sequences=batch, mode=mode, loss_mode=loss, packed=packed,
                   sizes=sizes, steps=1, epochs=1)
        for name, (world, mode, loss, packed, sizes) in JOBS.items()
    }  # fmt: skip
    jobs["again"] = jobs["observe"] | dict(steps=2, epochs=2)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = fresh(
        "-m", "tests.integrations.verl_ranks", str(tiny_checkpoint), str(folder), cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = pickle.loads((folder / "results.pkl").read_bytes())
    for name, ranks in results.items():
        assert all(isinstance(rank, dict) for rank in ranks), f"{name}: {ranks}"
    return folder, batch, results


def rows_of(batch) -> list[tuple[int, int]]:
    """(sequence, position) of every token of the response masks."""
    return [
        (i, len(s["prompt"]) + t) for i, s in enumerate(batch) for t, m in enumerate(s["mask"]) if m
    ]


@pytest.mark.parametrize("name", JOBS)
def test_the_token_log_of_an_engine_step(runs, name):
    folder, batch, results = runs
    table = read_tokens(folder / name / "tokens").sort_by(
        [("sequence", "ascending"), ("position", "ascending")]
    )
    column = {n: np.array(table[n].to_pylist()) for n in table.column_names if "experts" not in n}
    expected = rows_of(batch)
    assert list(zip(column["sequence"], column["position"], strict=True)) == expected
    given = np.array([batch[i]["routes"][p - 1] for i, p in expected])
    rollout, train = read_routes(table)
    assert np.array_equal(np.sort(rollout, -1), np.sort(given, -1))
    of = [batch[i] for i, _ in expected]
    tokens = [(s["prompt"] + s["response"])[p] for s, (_, p) in zip(of, expected, strict=True)]
    assert column["token_id"].tolist() == tokens
    logp = [s["logp_rollout"][p - len(s["prompt"])] for s, (_, p) in zip(of, expected, strict=True)]
    np.testing.assert_allclose(column["logp_rollout"], logp, rtol=1e-6)
    assert column["reward"].tolist() == [s["reward"] for s in of]
    assert column["advantage"].tolist() == [s["advantage"] for s in of]
    assert column["prompt"].tolist() == [i // 4 for i, _ in expected]

    # The trainer's native routes are those of transformers, but for what bfloat16 turns over; a
    # random pair of sets would agree in 1 of 28.
    shared = np.array([[len({*a} & {*b}) for a, b in zip(r, t, strict=True)]
                       for r, t in zip(rollout.tolist(), train.tolist(), strict=True)])  # fmt: skip
    changed = {(i, row + 1, layer) for i, row, layer in CHANGED}
    is_changed = np.array([[(i, p, m) in changed for m in range(L)] for i, p in expected])
    assert is_changed.sum() == len(CHANGED)
    assert (shared[is_changed] == 0).all()
    assert (shared[~is_changed] < K).mean() < 0.1
    assert np.array_equal(column["overlap"], shared)

    # The metrics are of these rows, and verl reports the same sums.
    (row,) = read_metrics(folder / name)
    assert row["mismatch/router_numerator"] == (shared < K).sum()
    assert row["mismatch/router_denominator"] == shared.size == 2 * len(expected)
    assert row["mismatch/router_rate"] == pytest.approx((shared < K).mean())
    assert row["reward/mean"] == 0.5
    for rank in results[name]:
        if rank["source"]:
            first, last = rank["metrics"]
            assert "mismatch/router_rate" not in first
            assert last["mismatch/router_numerator"] == (shared < K).sum()
            assert last["mismatch/router_denominator"] == shared.size
    assert sum(rank["source"] for rank in results[name]) == (2 if name == "unpacked" else 1)

    # Tokens of the first mini-batch are visited at the old weights; the second's are not.
    moved = np.abs(column["ratio"] - 1) > 1e-6
    half = len(batch) // (4 if name == "unpacked" else 2)
    early = column["sequence"] % (2 * half) < half
    assert not moved[early].any() and moved[~early].mean() > 0.9
    config = read_config(folder / name)
    assert config["replay"] == ("none" if JOBS[name][1] == "disabled" else name)
    assert (config["loss"], config["stack"]) == (JOBS[name][2], f"verl {VERSION.strip()}")


@pytest.mark.parametrize("name", JOBS)
def test_the_record_is_whole(runs, name):
    assert_whole(runs[0] / name)


def test_steps_and_epochs(runs):
    """Rows are of a token's last visit, once; sums are of all visits; a forward that was followed
    by no update leaves nothing."""
    folder, batch, _ = runs
    tokens = len(rows_of(batch))
    first, second = read_metrics(folder / "again")
    assert (first["step"], second["step"]) == (1, 2)
    assert first["tokens/sampled"] == second["tokens/sampled"] == tokens
    (once,) = read_metrics(folder / "observe")
    for name in ("router_rate", "by_layer", "histogram"):
        assert first[f"mismatch/{name}"] == once[f"mismatch/{name}"]
    for step, row in ((1, first), (2, second)):
        rows = read_tokens(folder / "again" / "tokens")
        rows = rows.filter(pc.equal(rows["step"], step))
        found = list(zip(*(rows[n].to_pylist() for n in ("sequence", "position")), strict=True))
        assert found == rows_of(batch)
        assert np.abs(np.array(rows["ratio"].to_pylist()) - 1).min() > 0  # all in the second epoch
        sums = np.abs(np.array(rows["logp_old"]) - np.array(rows["logp_rollout"])).sum()
        assert row["logp_gap/mean_abs"] == pytest.approx(sums / tokens, rel=1e-5)
    assert second["logp_gap/mean_abs"] != first["logp_gap/mean_abs"]


@pytest.mark.parametrize("name", JOBS)
def test_clipped_and_gradient_weight_are_the_librarys(runs, name):
    """From the log's own ratios by the formulas of PPO and UP, each token's weight being 1/N."""
    folder, batch, _ = runs
    table = read_tokens(folder / name / "tokens")
    r, a, clipped, pull = (
        np.array(table[n].to_pylist()) for n in ("ratio", "advantage", "clipped", "gradient_weight")
    )
    cut = (a < 0) & ((r < 0.8) | (r > 3)) | (a > 0) & (r > 1.2)
    weight = np.where(cut, 0, np.abs(a) * r)
    if JOBS[name][2] == "moe_upgrpo/up-grpo":
        cut, weight = cut & (a < 0), np.where(a > 0, a, weight)
    assert np.array_equal(clipped, cut) and 0 < cut.sum() < len(cut)
    sequence = np.array(table["sequence"].to_pylist())
    per_rank = len(batch) // (2 if name == "unpacked" else 1)
    second = sequence % per_rank >= per_rank // 2
    counts = np.array([second.sum(), (~second).sum()])[np.where(second, 0, 1)]
    np.testing.assert_allclose(pull, weight / counts, rtol=1e-4, atol=1e-7)


def test_r2_keeps_the_routes_that_verl_itself_records(runs):
    """verl's recording of the same forward (router_replay_utils.py:236) is the reference."""
    folder, batch, results = runs
    recorded = results["R2"][0]["recorded"]
    table = read_tokens(folder / "R2" / "tokens")
    _, train = read_routes(table)
    expected = np.array([recorded[i][p - 1] for i, p in rows_of(batch)])
    assert np.array_equal(np.sort(train, -1), np.sort(expected, -1))


def test_r3_tells_native_from_held(runs):
    """The held forward is replayed, the native one is not; both are compared."""
    folder, batch, _ = runs
    held, native = (read_tokens(folder / name / "tokens") for name in ("R3", "observe"))
    column = {n: np.array(held[n].to_pylist()) for n in held.column_names if "experts" not in n}
    total = column["gap_numerics"] + column["gap_update"]
    np.testing.assert_allclose(total, column["logp_train"] - column["logp_rollout"], atol=1e-6)
    # Native at the old weights = R3's held + the counterfactual: the other job, on one rank, has it
    # as logp_old. In bfloat16 the two layouts' own experts differ for a token now and then.
    without = np.array(native["logp_old"].to_pylist())
    apart = np.abs(column["logp_old"] + column["counterfactual_engine_routing"] - without)
    assert np.median(apart) < 0.03 and (apart < 0.15).mean() > 0.9
    at = {(i, row + 1) for i, row, _ in CHANGED}
    changed = np.array([pair in at for pair in rows_of(batch)])
    moved = np.abs(column["counterfactual_engine_routing"])
    assert moved[changed].min() > 0.05 > np.median(moved[~changed])
    # In layer 0 nothing comes before, so that both comparisons see the same flips there.
    assert (column["layers_mismatched_conditional"][changed] >= 1).all()
    (row,) = read_metrics(folder / "R3")
    assert row["conditional/router_rate"] == pytest.approx(
        column["layers_mismatched_conditional"].sum() / (L * len(changed))
    )


def test_health_figures_of_a_replay(runs):
    """By the last mini-batch of a step; of every row that verl holds (router_replay_utils.py:380),
    each but the last of a sequence."""
    _, batch, results = runs
    reported = {
        name: next(rank["metrics"] for rank in results[name] if rank["source"]) for name in JOBS
    }
    for name in ("observe", "unpacked"):
        assert not any(key.startswith("replay/") for row in reported[name] for key in row)
    first, found = reported["R3"]
    assert "replay/rows" not in first
    held = L * sum(len(s["prompt"] + s["response"]) - 1 for s in batch)
    rows = found["replay/rows"]
    assert found["replay/applied_rate"] * rows == pytest.approx(held)
    assert found["replay/live_rate"] == pytest.approx(1 - held / rows)
    assert rows > held and found["replay/zero_filled_rate"] == found["replay/repeated_rate"] == 0
    # In layer 0 those that were planted there, and what bfloat16 and the first update turn over.
    planted = sum(layer == 0 for *_, layer in CHANGED) / (held / L)
    assert planted <= found["replay/native_differs/layer_0"] < planted + 0.1
    layers = [found[f"replay/native_differs/layer_{layer}"] for layer in range(L)]
    assert found["replay/native_differs_rate"] == pytest.approx(np.mean(layers))
    # R2 holds each row to the trainer's own choice before the step's first update.
    found = reported["R2"][-1]
    assert found["replay/live_rate"] == 0 and found["replay/applied_rate"] == 1
    assert 0 < found["replay/native_differs_rate"] < 0.3


def test_without_a_log_the_engine_is_watched_all_the_same(monkeypatch):
    from moe_upgrpo.integrations.verl import install

    class Engine:
        is_value_model, enable_routing_replay = False, True

        def forward_backward_batch(self, data, loss_function, forward_only=False):
            return data, loss_function, forward_only

    monkeypatch.delenv("MOE_UPGRPO_RUN", raising=False)
    for _ in range(2):  # again is harmless
        install._into_engine(types.SimpleNamespace(MegatronEngine=Engine))
    assert Engine.forward_backward_batch.moe_upgrpo_health
    assert Engine().forward_backward_batch(1, 2, forward_only=True) == (1, 2, True)
    with pytest.raises(AttributeError, match="module"):  # an update: its routers are looked for
        Engine().forward_backward_batch(1, 2)


def test_a_model_that_is_made_anew_is_watched_anew(monkeypatch):
    """`TrainingWorker.reset` gives the same engine another one."""
    from moe_upgrpo.integrations.verl import health

    class Engine:
        is_value_model, enable_routing_replay = False, True

        def forward_backward_batch(self, data, loss_function, forward_only=False):
            return {}

    watched = []

    def made(model):
        watched.append(model)
        return SimpleNamespace(counting=nullcontext)

    monkeypatch.setattr(health, "Health", made)
    monkeypatch.setattr(health, "unwrap_model", lambda module: module)
    monkeypatch.setattr(health.tu, "get_non_tensor_data", lambda *_: False)
    health.install(SimpleNamespace(MegatronEngine=Engine))
    engine = Engine()
    for module in (["first"], ["second"]):
        engine.module = module
        for _ in range(2):
            engine.forward_backward_batch({}, None)
    assert watched == [["first"], ["second"]]


def test_the_log_goes_around_a_method_that_verl_itself_wraps():
    from moe_upgrpo.integrations.verl import log

    class Engine:
        initialize = disable_adapter = lambda self: None

        @wraps(print)
        def forward_backward_batch(self, data, loss_function, forward_only=False):
            return data

    module, own = SimpleNamespace(MegatronEngine=Engine), Engine.forward_backward_batch
    log.install(module)
    first = Engine.forward_backward_batch
    assert first is not own and Engine().forward_backward_batch(1, None) == 1
    log.install(module)  # again is harmless
    assert Engine.forward_backward_batch is first


def test_what_the_log_cannot_do_is_refused(runs, monkeypatch):
    from moe_upgrpo.integrations.kit import environment, run_log
    from moe_upgrpo.integrations.verl import log

    with pytest.raises(UserError, match=r"needs .*enable_rollout_routing_replay=True"):
        log._keys({"input_ids": None})
    with pytest.raises(UserError, match="already holds a run: name a new folder"):
        run_log.check_free(runs[0] / "R2")
    monkeypatch.setenv("MOE_UPGRPO_TOKENS", "5%")
    with pytest.raises(UserError, match="MOE_UPGRPO_TOKENS: '5%' given"):
        environment.token_share()


def test_the_report_opens_the_run(runs):
    folder, _, _ = runs
    page = write_report([folder / "R3"], folder / "report.html").read_text()
    assert "verl" in page and "Replay" in page
