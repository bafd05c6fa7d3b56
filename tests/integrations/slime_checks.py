"""Tests of slime and of miles alike; `slime_ranks` runs the stack.

Not run: Ray, SGLang, Transformer Engine, a GPU, virtual pipeline stages.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from moe_upgrpo.integrations import hooks
from moe_upgrpo.losses import (
    BRANCHES,
    GLOSSARY,
    PRESETS,
    PolicyLossConfig,
    RolloutCorrection,
    policy_loss,
)
from moe_upgrpo.report import write_report
from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens
from tests.integrations.places import CHECKOUTS, MILES_WHEEL
from tests.integrations.slime_wide import OBSERVE, ROUTES, UP, WideChecks
from tests.integrations.test_verl import CHANGED, K, L, rows_of, sequences
from tests.integrations.tried import TRIED
from tests.integrations.whole import assert_whole

REPOSITORY = Path(__file__).parents[2]
ANY = [
    name
    for name in TRIED
    if all(
        "token-mean" in BRANCHES[side].aggregations
        for side in (PRESETS[name].positive, PRESETS[name].negative)
    )
]
STOCK = {"loss_type": "policy_loss", "custom_loss_function_path": None}
# Ours, and what the stack has of the same kind: the flags of both, ours' preset, the stack's own.
PAIRS = {
    "grpo": ({"eps_clip_c": 3.0}, "grpo", {}),
    "clips": ({"eps_clip": 0.1, "eps_clip_high": 0.15, "eps_clip_c": 2.0}, "grpo", {}),
    "tokens": ({"eps_clip_c": 3.0, "calculate_per_token_loss": True}, "grpo", {}),
    "tis": ({"eps_clip_c": 3.0, "use_tis": True}, "grpo", {}),
    "opsm": ({"eps_clip_c": 3.0, "use_opsm": True, "opsm_delta": 0.01}, "grpo", {}),
    "kl": (
        {"eps_clip_c": 3.0, "entropy_coef": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1},
        "grpo",
        {},
    ),
    "bypass": ({"eps_clip_c": 3.0, "use_rollout_logprobs": True}, "grpo", {}),
    "gspo": ({"eps_clip": 0.05, "eps_clip_high": 0.04}, "gspo", {"advantage_estimator": "gspo"}),
}
SETTINGS = {  # moe_upgrpo_settings -> the same as a config
    "sums": ({"aggregation": "seq-mean-token-sum"}, {"aggregation": "seq-mean-token-sum"}),
    "norm": (
        {"aggregation": "seq-mean-token-sum-norm", "token_sum_norm": 7},
        {"aggregation": "seq-mean-token-sum-norm", "token_sum_norm": 7},
    ),
    "correction": (
        {"correction": {"weight": "sequence-tis", "high": 1.05}},
        {
            "correction": RolloutCorrection(weight="sequence-tis", high=1.05),
            "aggregation": "seq-mean-token-mean",
        },
    ),
}
JOBS = {  # name -> ranks, flags, rollouts
    "observe": (1, UP | OBSERVE, 2),
    # two data-parallel ranks, the stack's own loss, a mean over tokens
    "stock": (2, STOCK | OBSERVE | {"calculate_per_token_loss": True}, 1),
    "R2": (
        2,
        {"moe_upgrpo_loss": "grpo", "moe_upgrpo_replay": "R2", "pipeline_model_parallel_size": 2}
        | ROUTES,
        1,
    ),
    "R3": (
        2,
        UP
        | ROUTES
        | {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        1,
    ),
    "cp": (2, {"moe_upgrpo_loss": "up-gspo", "context_parallel_size": 2} | ROUTES, 1),
    # no forward of the old log-probs by the stack: the log makes its own
    "bypass": (1, UP | ROUTES | {"use_rollout_logprobs": True}, 1),
}


def loss_batch() -> dict:
    """Four sequences, one with a response of one token, one with a token that does not count."""
    generator = torch.Generator().manual_seed(5)

    def random(*size):
        return torch.randn(*size, generator=generator)

    total, response = [9, 7, 14, 6], [5, 4, 9, 1]
    logits = [random(t, 16) for t in total]
    tokens = [torch.randint(16, (t,), generator=generator) for t in total]
    masks = [torch.ones(r, dtype=torch.int) for r in response]
    masks[2][4] = 0
    current = log_probs_of(logits, tokens, response)
    return {
        "logits": logits,
        "tokens": tokens,
        "total_lengths": total,
        "response_lengths": response,
        "loss_masks": masks,
        "advantages": [
            torch.full((r,), a) for r, a in zip(response, (1.0, -1.0, 0.5, -0.7), strict=True)
        ],
        **{
            name: [x + 0.2 * random(len(x)) for x in current]
            for name in ("log_probs", "rollout_log_probs", "ref_log_probs")
        },
    }


def log_probs_of(logits, tokens, response) -> list[torch.Tensor]:
    return [
        x.log_softmax(-1)[-r - 1 : -1].gather(1, t[-r:, None])[:, 0]
        for x, t, r in zip(logits, tokens, response, strict=True)
    ]


def librarys(data: dict, config: PolicyLossConfig):
    """Value, gradients on the logits and metrics, by the library alone."""
    leaves = [x.clone().requires_grad_() for x in data["logits"]]
    current = log_probs_of(leaves, data["tokens"], data["response_lengths"])
    result = policy_loss(
        *(
            pad_sequence(list(x), batch_first=True)
            for x in (current, data["log_probs"], data["advantages"], data["loss_masks"])
        ),
        config=config,
        rollout_log_probs=pad_sequence(data["rollout_log_probs"], batch_first=True),
    )
    result.loss.backward()
    return result.loss.item(), [x.grad for x in leaves], result.metrics


def joined(ranks: list[dict]) -> tuple[float, list[torch.Tensor]]:
    """Sums over context-parallel ranks, as Megatron makes them of their losses and gradients.

    With a mean over tokens it divides by their number in the end; each rank has all of them.
    """
    scale = len(ranks) * ranks[0]["tokens"]
    grads = [sum(parts) / scale for parts in zip(*(r["grads"] for r in ranks), strict=True)]
    return sum(r["loss"] for r in ranks) / scale, grads


def assert_same(found, expected, tolerance: float = 1e-4) -> None:
    """tolerance: of a gradient, relative."""
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-6)
    assert any(x.count_nonzero() for x in found[1])


@pytest.mark.timeout(1800)  # the stack's jobs are one fixture
class StackChecks(WideChecks):
    stack: str
    tolerance = 1e-4
    name_of_own_tests: tuple[str, ...]
    own_tests_flags: tuple[str, ...] = ()

    @pytest.fixture(scope="class")
    def runs(self, tiny_checkpoint, tmp_path_factory):
        """The stack once, in a process of its own: the run folders and what each rank returned."""
        folder = tmp_path_factory.mktemp(self.stack)
        batch = sequences(tiny_checkpoint)
        flags = [{"moe_upgrpo_loss": name} for name in TRIED]
        flags += [{"moe_upgrpo_loss": name, "calculate_per_token_loss": True} for name in ANY]
        flags += [UP | {"moe_upgrpo_settings": given} for given, _ in SETTINGS.values()]
        for common, preset, own in PAIRS.values():
            flags += [common | {"moe_upgrpo_loss": preset}, common | STOCK | own]
        jobs = {
            f"losses{size}": {"world": size, "arguments": (flags, loss_batch(), size)}
            for size in (1, 2)
        }
        for name, (world, given, steps) in JOBS.items():
            jobs[name] = {"world": world, "arguments": (batch, given, steps)}
        results = self.run_jobs(folder, tiny_checkpoint, jobs)
        found = {
            size: [list(ranks) for ranks in zip(*results[f"losses{size}"], strict=True)]
            for size in (1, 2)
        }
        return folder, batch, results, found

    # --- losses

    @pytest.mark.parametrize("size", [1, 2])
    def test_every_preset_gives_the_librarys_value_and_gradient(self, runs, size):
        """Through the stack's loss_function; with 2, on two context-parallel ranks."""
        data, found = loss_batch(), iter(runs[3][size])
        for name in TRIED:
            config, ranks = PRESETS[name], next(found)
            if config.aggregation == "token-mean":  # the stack's default reducer
                config = PolicyLossConfig.preset(name, aggregation="seq-mean-token-mean")
            expected = librarys(data, config)
            assert_same(joined(ranks), expected, self.tolerance)
            for metric, sums in expected[2].items():
                mine = [
                    sum(r["values"][f"{metric}_{part}"] for r in ranks)
                    for part in ("numerator", "denominator")
                ]
                if mine[1] and not metric.endswith("effective_sample_size"):
                    value = GLOSSARY[metric].value(*map(float, sums))
                    assert mine[0] / mine[1] == pytest.approx(value, rel=1e-4, abs=1e-6)
                else:
                    assert bool(mine[1]) == bool(sums[1])
        for name in ANY:
            config = PolicyLossConfig.preset(name, aggregation="token-mean")
            assert_same(joined(next(found)), librarys(data, config), self.tolerance)
        for _, changes in SETTINGS.values():
            config = PolicyLossConfig.preset("up-grpo", **changes)
            assert_same(joined(next(found)), librarys(data, config), self.tolerance)

    @pytest.mark.parametrize("size", [1, 2])
    def test_against_the_stacks_own_losses(self, runs, size):
        """Its reducers, TIS, OPSM, KL and entropy stand around ours as around its own."""
        pairs = runs[3][size][-2 * len(PAIRS) :]
        for i, name in enumerate(PAIRS):
            ours, theirs = pairs[2 * i : 2 * i + 2]
            assert_same(joined(ours), joined(theirs))
            for mine, its in zip(ours, theirs, strict=True):
                for metric, value in its["values"].items():
                    if (name, metric) not in (("gspo", "ppo_kl"), ("gspo", "ess_ratio")):
                        assert mine["values"][metric] == pytest.approx(value, rel=1e-4, abs=1e-6)

    def pytest_generate_tests(self, metafunc):
        if "own_tests" in metafunc.fixturenames:
            metafunc.parametrize("own_tests", self.name_of_own_tests)

    def test_the_stacks_own_tests_pass_with_the_plugin_loaded(self, own_tests):
        """Those of losses and replay that run on a CPU."""
        checkout = self.source()
        if checkout == MILES_WHEEL:
            pytest.skip(f"the wheel of miles does not hold its tests: {own_tests}")
        if not (checkout / own_tests.split()[0]).exists():
            newest = CHECKOUTS[self.stack][1]  # the list is of its tests
            assert hooks.difference(self.stack, checkout, newest), f"{newest} has {own_tests}"
            pytest.skip(f"this revision of {self.stack} has no {own_tests}")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *("-p", "stack_plugin", *self.own_tests_flags, *own_tests.split()),
            ],
            cwd=checkout,
            capture_output=True,
            text=True,
            env=os.environ
            | {
                "MOE_UPGRPO_STACK": self.stack,
                "TORCHDYNAMO_DISABLE": "1",
                "PYTHONPATH": f"{checkout}:{Path(__file__).parent}:{REPOSITORY}",
            },
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    # --- routes

    @pytest.mark.parametrize("name", JOBS)
    def test_the_record_is_whole(self, runs, name):
        assert_whole(runs[0] / name)

    @pytest.mark.parametrize("name", JOBS)
    def test_the_token_log_of_an_actor_step(self, runs, name):
        folder, batch, results, _ = runs
        table = read_tokens(folder / name / "tokens")
        table = table.filter(np.array(table["step"].to_pylist()) == 0)
        column = {n: np.array(table[n].to_pylist()) for n in table.column_names if "exp" not in n}
        # Each data-parallel rank has every second sequence, here the order of the log.
        order = list(range(0, 8, 2)) + list(range(1, 8, 2)) if name == "stock" else range(8)
        ordered = [batch[i] for i in order]
        expected = rows_of(ordered)
        at = sorted(
            range(len(expected)), key=lambda i: (column["sequence"][i], column["position"][i])
        )
        column = {n: x[at] for n, x in column.items()}
        assert list(zip(column["sequence"], column["position"], strict=True)) == expected
        rollout, train = (routes[at] for routes in read_routes(table))
        given = np.array([ordered[i]["routes"][p - 1] for i, p in expected])
        assert np.array_equal(np.sort(rollout, -1), np.sort(given, -1))
        of = [ordered[i] for i, _ in expected]
        ids = [(s["prompt"] + s["response"])[p] for s, (_, p) in zip(of, expected, strict=True)]
        assert column["token_id"].tolist() == ids
        logp = [
            s["logp_rollout"][p - len(s["prompt"])] for s, (_, p) in zip(of, expected, strict=True)
        ]
        np.testing.assert_allclose(column["logp_rollout"], logp, rtol=1e-6)
        assert column["reward"].tolist() == [s["reward"] for s in of]
        np.testing.assert_allclose(column["advantage"], [s["advantage"] for s in of], rtol=1e-6)

        # The trainer's native routes are those of transformers, but for what bfloat16 turns over;
        # a random pair of sets would agree in 1 of 28. The planted ones are where they were put.
        pairs = zip(rollout.tolist(), train.tolist(), strict=True)
        shared = np.array([[len({*a} & {*b}) for a, b in zip(r, t, strict=True)] for r, t in pairs])
        changed = {(i, row + 1, layer) for i, row, layer in CHANGED}
        is_changed = np.array(
            [[(order[i], p, m) in changed for m in range(L)] for i, p in expected]
        )
        assert is_changed.sum() == len(CHANGED)
        assert (shared[is_changed] == 0).all()
        assert (shared[~is_changed] < K).mean() < 0.1
        assert np.array_equal(column["overlap"], shared)

        # The metrics are of these rows, and the stack's tracker gets them.
        row = read_metrics(folder / name)[0]
        assert row["mismatch/router_numerator"] == (shared < K).sum()
        assert row["mismatch/router_denominator"] == shared.size == L * len(expected)
        assert row["reward/mean"] == 0.5
        gap = np.abs(column["logp_old"] - column["logp_rollout"]).mean()
        assert row["logp_gap/mean_abs"] == pytest.approx(gap, rel=1e-5)
        reports = [
            x
            for rank in results[name]
            for x in rank["reported"]
            if "rollout/mismatch/router_rate" in x
        ]
        assert len(reports) == JOBS[name][2]
        assert reports[0]["rollout/mismatch/router_rate"] == row["mismatch/router_rate"]
        config = read_config(folder / name)
        mode = {"observe": "none", "stock": "none", "R2": "R2"}.get(name, "R3")
        assert (config["stack"], config["replay"]) == (self.stack, mode)
        assert config["loss"] == JOBS[name][1].get("moe_upgrpo_loss", "policy_loss grpo")

        # Tokens of the first optimizer step are visited at the old weights; the second's are not.
        moved = np.abs(column["ratio"] - 1) > 1e-6
        half = 2 if name == "stock" else 4
        early = column["sequence"] % (2 * half) < half
        assert not moved[early].any() and moved[~early].mean() > 0.9

    @pytest.mark.parametrize("name", ["observe", "stock", "R2", "R3"])
    def test_clipped_and_gradient_weight(self, runs, name):
        """From the log's own ratios by the formulas of PPO and UP, and the stack's denominators."""
        table = read_tokens(runs[0] / name / "tokens")
        table = table.filter(np.array(table["step"].to_pylist()) == 0)
        r, a, clipped, pull, sequence = (
            np.array(table[n].to_pylist())
            for n in ("ratio", "advantage", "clipped", "gradient_weight", "sequence")
        )
        ours = name != "stock"  # the stack has no dual clip by default
        cut = (a < 0) & ((r < 0.8) | ours & (r > 3)) | (a > 0) & (r > 1.2)
        weight = np.where(cut, 0, np.abs(a) * r)
        if JOBS[name][1].get("moe_upgrpo_loss") == "up-grpo":
            cut, weight = cut & (a < 0), np.where(a > 0, a, weight)
        assert np.array_equal(clipped, cut) and 0 < cut.sum() < len(cut)
        if name == "stock":  # a mean over the tokens of each optimizer step
            second = sequence % 4 >= 2
            counts = np.array([(~second).sum(), second.sum()])[second.astype(int)]
        else:  # 1/(4 rollouts · length)
            counts = 4 * np.bincount(sequence)[sequence]
        np.testing.assert_allclose(pull, weight / counts, rtol=1e-4, atol=1e-7)

    def test_steps_are_rollouts(self, runs):
        folder, batch, _, _ = runs
        first, second = read_metrics(folder / "observe")
        assert (first["step"], second["step"]) == (0, 1)
        assert first["tokens/sampled"] == second["tokens/sampled"] == len(rows_of(batch))
        assert first["loss/positive_fraction"] == pytest.approx(
            np.mean([batch[i]["advantage"] > 0 for i, _ in rows_of(batch)])
        )
        assert second["logp_gap/mean_abs"] != first["logp_gap/mean_abs"]

    def test_r2_keeps_the_routes_that_the_stack_itself_records(self, runs):
        """The stack's recording of the same forward, by pipeline stage, is the reference."""
        folder, batch, results, _ = runs
        table = read_tokens(folder / "R2" / "tokens").sort_by(
            [("sequence", "ascending"), ("position", "ascending")]
        )
        _, train = read_routes(table)
        microbatches = results["R2"][0]["microbatches"]
        assert len(microbatches) == 4
        assert [i for indices in microbatches for i in indices] != list(range(8))
        recorded: dict[int, list] = {}
        for number, indices in enumerate(microbatches):
            layers = [rank["recorded"][number].numpy() for rank in results["R2"]]
            start = 0
            for i in indices:
                length = len(batch[i]["prompt"] + batch[i]["response"])
                recorded[i] = np.stack([x[start : start + length] for x in layers], axis=1)
                start += length
        expected = np.array([recorded[i][p - 1] for i, p in rows_of(batch)])
        assert np.array_equal(np.sort(train, -1), np.sort(expected, -1))

    def test_health_figures_of_a_replay(self, runs):
        """Once for each rollout that is replayed, of all rows of its update."""
        _, batch, results, _ = runs
        for name, (_, _, rollouts) in JOBS.items():
            reports = [
                row for rank in results[name] for row in rank["reported"]
                if "rollout/replay/rows" in row
            ]  # fmt: skip
            if name in ("observe", "stock"):
                assert reports == []
                continue
            assert len(reports) == rollouts
            found = {key.removeprefix("rollout/replay/"): x for key, x in reports[0].items()}
            # The last row of a sequence, and padding, are held to nothing of the rollout's.
            held = L * sum(len(s["prompt"] + s["response"]) - 1 for s in batch)
            assert held <= found["applied_rate"] * found["rows"]
            assert found["rows"] < 1.5 * held  # not the log's own forwards
            assert found["applied_rate"] + found["live_rate"] <= 1 + 1e-9
            assert found["zero_filled_rate"] == found["repeated_rate"] == 0
            layers = [found[f"native_differs/layer_{layer}"] for layer in range(L)]
            assert found["native_differs_rate"] == pytest.approx(np.mean(layers))
            planted = sum(layer == 0 for *_, layer in CHANGED) / (held / L)
            if name == "R2":  # held to its own choice before the rollout's first update
                assert 0 < found["native_differs_rate"] < 0.3
            else:
                assert 0.7 * planted < found["native_differs/layer_0"]

    @pytest.mark.parametrize("name", ["R3", "cp", "bypass"])
    def test_r3_tells_native_from_held(self, runs, name):
        """The held forward is replayed, the native one is not; both are compared."""
        folder, batch, _, _ = runs
        keys = [("sequence", "ascending"), ("position", "ascending")]
        held = read_tokens(folder / name / "tokens").sort_by(keys)
        native = read_tokens(folder / "observe" / "tokens")
        native = native.filter(np.array(native["step"].to_pylist()) == 0).sort_by(keys)
        column = {n: np.array(held[n].to_pylist()) for n in held.column_names if "exp" not in n}
        total = column["gap_numerics"] + column["gap_update"]
        np.testing.assert_allclose(total, column["logp_train"] - column["logp_rollout"], atol=1e-6)
        # Native at the old weights = held + the counterfactual; the observing job has it as
        # logp_old. In bfloat16 the two layouts' own experts differ for a token now and then.
        without = np.array(native["logp_old"].to_pylist())
        apart = np.abs(column["logp_old"] + column["counterfactual_engine_routing"] - without)
        assert np.median(apart) < 0.03 and (apart < 0.15).mean() > 0.9
        at = {(i, row + 1) for i, row, _ in CHANGED}
        changed = np.array([pair in at for pair in rows_of(batch)])
        moved = np.abs(column["counterfactual_engine_routing"])
        assert moved[changed].min() > 0.05 > np.median(moved[~changed])
        # In layer 0 nothing comes before, so that both comparisons see the same flips there.
        assert (column["layers_mismatched_conditional"][changed] >= 1).all()
        row = read_metrics(folder / name)[0]
        assert row["conditional/router_rate"] == pytest.approx(
            column["layers_mismatched_conditional"].sum() / (L * len(changed))
        )

    def test_the_report_opens_the_run(self, runs):
        page = write_report([runs[0] / "R3"], runs[0] / "report.html").read_text()
        assert self.stack in page and "Replay" in page
