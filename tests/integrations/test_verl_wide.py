"""verl's wide settings in its real engine, two ranks each: the token log is that of the plain ones.

What is not verl's: `verl_ranks`, `verl_stand_ins`.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from moe_upgrpo.report import write_report
from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens
from tests.integrations.test_verl import fresh, rows_of, sequences
from tests.integrations.whole import assert_whole

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LOSS = "moe_upgrpo/up-grpo"
SHARDED = {
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}
# As in verl's examples/router_replay/run_qwen3_30b_a3b_megatron.sh.
EXAMPLE = {
    "use_fused_kernels": True,
    "override_transformer_config": {
        "moe_enable_deepep": True,
        "moe_token_dispatcher_type": "flex",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
ENGINE = {"dtype": "float32"}  # to rounding
DYNAMIC = {"dynamic_context_parallel": True, "max_seqlen_per_dp_cp_rank": 8}


def job(world, mode="disabled", packed=True, wide=(), epochs=1, steps=1, **settings):
    return dict(world=world, mode=mode, loss_mode=LOSS, packed=packed, sizes=ENGINE | settings,
                steps=steps, epochs=epochs, wide=list(wide))  # fmt: skip


# name -> the plain job that its log is held to, and the job
PLAIN = {
    "one": job(1),
    "replicas": job(2),
    "replicas-R3": job(2, "R3"),
    "sharded-R3": job(2, "R3", **SHARDED),
}
WIDE = {
    "remove-padding": ("replicas", job(2, packed=False)),
    "dynamic-batch": ("replicas", job(2, wide=["dynamic-batch"])),
    "replay-example": (
        "sharded-R3", job(2, "R3", wide=["fused", "deepep"], **SHARDED | EXAMPLE)),
    "context-parallel": ("one", job(2, context_parallel_size=2)),
    "dynamic-context-parallel": ("one", job(2, wide=["dynamic-cp"], **DYNAMIC)),
    "lora": ("replicas", job(2, wide=["lora"], steps=2)),
    "bypass": ("replicas", job(2, wide=["bypass"], epochs=2)),
    "bypass-R3": ("replicas-R3", job(2, "R3", wide=["bypass"])),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tmp_path_factory):
    """The run folder of each job and what its ranks returned."""
    folder, batch = tmp_path_factory.mktemp("verl_wide"), sequences(tiny_checkpoint)
    jobs = PLAIN | {name: wide for name, (_, wide) in WIDE.items()}
    order = (
        "world",
        "sequences",
        "mode",
        "loss_mode",
        "packed",
        "sizes",
        "steps",
        "epochs",
        "wide",
    )
    jobs = {
        name: {key: batch if key == "sequences" else spec[key] for key in order}
        for name, spec in jobs.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = fresh(
        "-m", "tests.integrations.verl_ranks", str(tiny_checkpoint), str(folder), cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = pickle.loads((folder / "results.pkl").read_bytes())
    for name, ranks in results.items():
        assert all(isinstance(rank, dict) for rank in ranks), f"{name}: {ranks}"
    return folder, batch, results


def columns(run: Path, step: int = 1) -> dict:
    table = read_tokens(run / "tokens")
    table = table.filter(np.array(table["step"]) == step)
    table = table.sort_by([("sequence", "ascending"), ("position", "ascending")])
    names = [name for name in table.column_names if "experts" not in name]
    found = {name: np.array(table[name].to_pylist()) for name in names}
    return found | dict(zip(("rollout", "train"), read_routes(table), strict=True))


@pytest.mark.parametrize("name", WIDE)
def test_the_log_is_that_of_the_plain_settings(runs, name):
    folder, batch, _ = runs
    plain_name, _ = WIDE[name]
    plain, wide = columns(folder / plain_name), columns(folder / name)
    assert list(zip(wide["sequence"], wide["position"], strict=True)) == rows_of(batch)
    for column in ("token_id", "reward", "advantage", "prompt"):
        assert np.array_equal(wide[column], plain[column])
    np.testing.assert_allclose(wide["logp_rollout"], plain["logp_rollout"])
    # Where the weights are the same. Those that a second mini-batch sees are the optimizer's, and
    # Adam's first step is of the size of the learning rate for any gradient that rounding leaves.
    first = wide["sequence"] % (8 if plain_name == "one" else 4) < (4 if plain_name == "one" else 2)
    same = first if name.startswith("bypass") else np.ones(len(first), bool)
    assert 0 < first.sum() < len(first)
    for side in ("rollout", "train"):
        assert np.array_equal(np.sort(wide[side][same], -1), np.sort(plain[side][same], -1))
    for column in ("layers_mismatched", "prefix_mismatched"):
        assert np.array_equal(wide[column][same], plain[column][same])
    np.testing.assert_allclose(wide["margin_min"][same], plain["margin_min"][same], atol=1e-5)
    if name.startswith("bypass"):
        return
    for column in ("logp_old", "entropy"):
        np.testing.assert_allclose(wide[column], plain[column], atol=2e-5)
    for column in ("logp_train", "gradient_weight"):
        np.testing.assert_allclose(wide[column][first], plain[column][first], atol=2e-5)
    assert np.array_equal(wide["clipped"][first], plain["clipped"][first])
    if "R3" in plain_name:
        for column in ("gap_numerics", "counterfactual_engine_routing"):
            np.testing.assert_allclose(wide[column], plain[column], atol=4e-5)
    wide_row, plain_row = (read_metrics(folder / n)[0] for n in (name, plain_name))
    for metric, value in plain_row.items():
        if metric.startswith(("mismatch/", "conditional/", "reward/", "logp_gap/", "tokens/")):
            assert wide_row[metric] == pytest.approx(value, abs=2e-5), metric


@pytest.mark.parametrize("name", [name for name in WIDE if not name.startswith("bypass")])
def test_the_record_is_whole(runs, name):
    assert_whole(runs[0] / name)


def test_the_second_mini_batch_is_the_plain_ones_but_for_the_optimizer(runs):
    """Where rounding does not reach the update: fused kernels, DeepEP and recomputation, and the
    same micro-batches in another order."""
    for name in ("dynamic-batch", "remove-padding", "replay-example"):
        plain, wide = columns(runs[0] / WIDE[name][0]), columns(runs[0] / name)
        apart = np.abs(wide["logp_train"] - plain["logp_train"])
        assert np.median(apart) < 1e-4 and (apart < 0.02).mean() > 0.95, name


def test_a_reference_model_without_its_adapters_is_not_the_old_policy(runs):
    """In the second step the adapters have learned; the entropy is that of verl's own forward of
    the old log-probs, which comes after the reference's."""
    folder, batch, results = runs
    found = columns(folder / "lora", step=2)
    of_dp = [rank["entropy"] for rank in results["lora"]]
    expected = [of_dp[i // 4][i % 4][p - 1] for i, p in rows_of(batch)]
    np.testing.assert_allclose(found["entropy"], expected, rtol=1e-6)
    learned = np.abs(found["entropy"] - columns(folder / "lora")["entropy"])
    assert np.median(learned) > 1e-4


@pytest.mark.parametrize("name", ["bypass", "bypass-R3"])
def test_without_old_log_probs_what_cannot_be_known_is_null(runs, name):
    folder = runs[0]
    found = columns(folder / name)
    assert all(value is None for column in ("logp_old", "ratio") for value in found[column])
    assert not {"entropy", "gap_numerics", "gap_update", "staleness"} & found.keys()
    assert read_config(folder / name)["staleness"].startswith("not separable: no forward at")
    assert "staleness" not in read_config(folder / "replicas")
    (row,) = read_metrics(folder / name)
    assert not {"logp_gap/mean_abs", "logp_gap/max_abs", "ratio/max"} & row.keys()
    assert row["mismatch/router_denominator"] == 2 * len(found["position"])
    assert ("conditional/router_rate" in row) == (name == "bypass-R3")
    # The loss saw the rollout's log-probs in the place of the old ones: UP by that ratio.
    r = np.exp(found["logp_train"] - found["logp_rollout"])
    a = found["advantage"]
    assert np.array_equal(found["clipped"], (a < 0) & ((r < 0.8) | (r > 3)))
    assert found["clipped"].any()


def test_bypass_takes_the_first_visit_of_each_sequence(runs):
    """The second mini-batch is first seen after an optimizer step, so that some routes differ."""
    plain, found = (columns(runs[0] / name) for name in ("replicas", "bypass"))
    late = found["sequence"] % 4 >= 2
    differ = (np.sort(found["train"], -1) != np.sort(plain["train"], -1)).any(axis=(1, 2))
    assert not differ[~late].any() and differ[late].any()


def test_the_report_opens_a_run_without_old_log_probs(runs):
    page = write_report([runs[0] / "bypass"], runs[0] / "report.html").read_text()
    assert "not separable" in page
