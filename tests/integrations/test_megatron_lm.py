"""Megatron-LM's own RL at the patched revision: the patch, the losses, the routing log.

    MOE_UPGRPO_MEGATRON_LM=DIR          a git checkout at the revision of patches/megatron-lm
    MOE_UPGRPO_MEGATRON_LM_PYTHON=FILE  a python that can import it (docs/megatron-lm.md)

The checkout stays as it is: a copy is patched. megatron_lm_ranks.py says what of it is not
Megatron-LM's. Not run: its inference engine, Transformer Engine, a GPU, the training loop around
`forward_step`, the agents and servers.
"""

import io
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from moe_upgrpo import patching
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, PolicyLossConfig, RolloutCorrection, policy_loss
from moe_upgrpo.patching.command import PatchCommand, run
from moe_upgrpo.report import write_report
from moe_upgrpo.store import read_config, read_metrics, read_routes, read_tokens
from tests.integrations import megatron_lm_scripts
from tests.integrations.tried import TRIED
from tests.integrations.whole import assert_whole

REPOSITORY = Path(__file__).parents[2]
CHECKOUT = os.environ.get("MOE_UPGRPO_MEGATRON_LM") or None
PYTHON = os.environ.get("MOE_UPGRPO_MEGATRON_LM_PYTHON", sys.executable)
SERIES = patching.of_stack("megatron-lm")[-1]
VARIABLES = ("MOE_UPGRPO_LOSS", "MOE_UPGRPO_LOSS_SETTINGS", "MOE_UPGRPO_RUN")
WIDTH, EOD = 16, 63
MODES = ((False, 2), (True, 1))  # packed, sequences of a micro-batch

pytestmark = [
    pytest.mark.skipif(
        CHECKOUT is None,
        reason=f"MOE_UPGRPO_MEGATRON_LM names no checkout of Megatron-LM at {SERIES.version}",
    ),
    pytest.mark.timeout(1800),
]


def copied(target: Path) -> Path:
    """The checkout without git's objects: its HEAD says the revision."""
    ignore = shutil.ignore_patterns("objects", "__pycache__")
    return Path(shutil.copytree(CHECKOUT, target, ignore=ignore, symlinks=True))


def say(command: str, root: Path) -> str:
    out = Console(file=io.StringIO(), width=300, markup=False)
    run(PatchCommand(command=command, stack="megatron-lm", root=root, python=PYTHON), out)
    return out.file.getvalue()


def environment(root: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    more = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | more | {"PYTHONPATH": f"{root}{os.pathsep}{REPOSITORY}"} | variables


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    root = copied(tmp_path_factory.mktemp("megatron-lm") / "patched")
    say("apply", root)
    return root


def ranks(root: Path, jobs: list[tuple[str, Path, int, dict[str, str]]], folder: Path) -> None:
    (folder / "jobs.pkl").write_bytes(pickle.dumps([(j, str(f), n, v) for j, f, n, v in jobs]))
    done = subprocess.run(
        [PYTHON, "-m", "tests.integrations.megatron_lm_ranks", str(folder / "jobs.pkl")],
        cwd=REPOSITORY,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-5000:]


# --- the patch


def test_apply_verify_and_revert(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    root = copied(tmp_path / "checkout")
    before = (root / "train_rl.py").read_bytes()
    assert "train_rl.py" in say("apply", root)
    assert (root / "train_rl.py").read_bytes() != before
    assert "train_rl" in say("verify", root)
    say("apply", root)  # a second time there is nothing to do
    say("revert", root)
    assert (root / "train_rl.py").read_bytes() == before


def test_a_dirty_checkout_and_another_revision_are_refused(tmp_path):
    root = copied(tmp_path / "checkout")
    train = root / "train_rl.py"
    train.write_text(train.read_text() + "# mine\n")
    with pytest.raises(UserError, match=r"train_rl\.py neither as megatron-lm d98e8a6 has it"):
        say("apply", root)
    assert train.read_text().endswith("# mine\n")
    (root / ".git/HEAD").write_text("0" * 40)
    with pytest.raises(UserError, match="there are patches for d98e8a6"):
        say("apply", root)


def test_megatron_lms_own_tests_pass_as_before(patched):
    """Those of tests/unit_tests/rl that pass on a CPU; 17 of the others want a GPU."""
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit_tests/rl"]
    running = [
        subprocess.Popen(
            command, cwd=root, env=environment(root), stdout=subprocess.PIPE, text=True
        )
        for root in (Path(CHECKOUT), patched)
    ]
    before, after = (process.communicate(timeout=1700)[0] for process in running)
    passed = [sorted(re.findall(r"^PASSED (\S+)", out, re.MULTILINE)) for out in (before, after)]
    assert len(passed[0]) > 150, before[-3000:]
    assert passed[1] == passed[0], after[-3000:]


# --- losses


def turn(prompt: list[int], length: int, seed: int, eod: bool = True) -> tuple[list[int], int]:
    drawn = np.random.default_rng(seed).integers(1, 60, length).tolist()
    tokens = [*prompt, *drawn][:WIDTH]
    if eod and len(tokens) < WIDTH:
        tokens[-1] = EOD
    return tokens, len(prompt)


def plan_of_losses() -> list[list[dict]]:
    """Three prompts, two responses each, of 2 to 13 tokens."""
    lengths, rewards = [(2, 9), (13, 4), (6, 5)], [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0)]
    draws = np.random.default_rng(7)
    plan = []
    for g, (sizes, values) in enumerate(zip(lengths, rewards, strict=True)):
        plan.append([])
        for r, (size, reward) in enumerate(zip(sizes, values, strict=True)):
            tokens, prompt = turn([g + 1] * (3 + g), size, 10 * g + r)
            logps = (-4.2 + 0.4 * draws.standard_normal(len(tokens) - prompt)).tolist()
            rollout = {"turns": [(tokens, prompt)], "reward": reward, "logprobs": [logps]}
            plan[-1].append(rollout)
    return plan


def tensors(value):
    """Arrays, in lists and dictionaries too, as tensors."""
    if isinstance(value, dict):
        return {name: tensors(x) for name, x in value.items()}
    if isinstance(value, list):
        return [tensors(x) for x in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@pytest.fixture(scope="module")
def called(jobs):
    """Every call of train_rl.forward_step and its loss function, by name of the loss."""
    found: dict[str, list[dict]] = {}
    for call in pickle.loads((jobs / "losses/losses.pkl").read_bytes()):
        call = {name: tensors(value) for name, value in call.items()}
        found.setdefault(call["name"], []).append(call)
    return found


USABLE = TRIED
CORRECTED = PolicyLossConfig.preset(
    "gspo", correction=RolloutCorrection(weight="sequence-tis", positive=True)
)


def sequences_of(call: dict) -> list[tuple]:
    """Arrays of a micro-batch, one by one: log-probs now, old, of inference, mask, advantage."""
    given = call["given"]
    inference = given["inference_logprobs"]
    inference = given["old_logprobs"] if inference is None else inference
    columns = [given["current_logprobs"], given["old_logprobs"], inference, given["loss_mask"]]
    if not call["packed"]:
        return [(*(c[i] for c in columns), a) for i, a in enumerate(given["advantages"])]
    slices = [
        slice(start, start + length - 1)
        for start, length in zip(given["seq_starts"], given["seq_lengths"], strict=False)
    ]
    return [
        (*(c[0, s] for c in columns), a) for s, a in zip(slices, given["advantages"], strict=True)
    ]


def library(calls: list[dict], config: PolicyLossConfig, **totals):
    """Value, and gradient in the log-probs of each call, of all their sequences as one batch."""
    found = [(i, s) for i, call in enumerate(calls) for s in sequences_of(call)]
    pad = torch.nn.utils.rnn.pad_sequence
    sides = [pad([s[k] for _, s in found], batch_first=True) for k in range(4)]
    current, old, inference, mask = sides
    current = current.clone().requires_grad_()
    advantages = torch.stack([s[4] for _, s in found])[:, None].expand(mask.shape)
    rollout = inference if "rollout_log_probs" in config.arguments else None
    result = policy_loss(
        current, old, advantages, mask > 0, config=config, rollout_log_probs=rollout, **totals
    )
    result.loss.backward()
    grads = [current.grad[j][: len(s[0])] for j, (_, s) in enumerate(found)]
    return result.loss.item(), [
        [g for g, (i, _) in zip(grads, found, strict=True) if i == call]
        for call in range(len(calls))
    ]


def same_gradient(call: dict, grads: list[torch.Tensor], scale: float) -> None:
    seen = torch.zeros_like(call["grad"], dtype=torch.bool)
    given = call["given"]
    for i, grad in enumerate(grads):
        start = given["seq_starts"][i] if call["packed"] else 0
        here = (0, slice(start, start + len(grad))) if call["packed"] else i
        seen[here] = True
        torch.testing.assert_close(call["grad"][here], grad * scale, rtol=1e-4, atol=1e-6)
    assert not call["grad"][~seen].any()


@pytest.mark.parametrize("name", [*USABLE, "gspo, corrected"])
def test_losses(called, name):
    """Alone, a micro-batch's loss by Megatron-LM's own normalisation is the library's, and its
    gradient."""
    config = CORRECTED if name == "gspo, corrected" else PRESETS[name]
    alone = [call for call in called[name] if not call["whole"]]
    assert len(alone) >= 3 + 2 and {(c["packed"], c["size"]) for c in alone} == set(MODES)
    for call in alone:
        value, grads = library([call], config)
        assert call["loss"] / call["tokens"] == pytest.approx(value, rel=1e-4, abs=1e-6)
        same_gradient(call, grads[0], call["tokens"])


@pytest.mark.parametrize("name", USABLE)
def test_sequences_of_a_collection_weigh_the_same(called, name):
    """Over the micro-batches of a collection, by either of Megatron-LM's normalisations; a mean
    over tokens is the library's with --calculate-per-token-loss alone."""
    config = PRESETS[name]
    for packed, size in MODES:
        for per_token in (False, True):
            if config.aggregation == "token-mean" and not per_token:
                continue
            key = dict(packed=packed, size=size, per_token=per_token, whole=True)
            calls = [c for c in called[name] if all(c[k] == v for k, v in key.items())]
            tokens = sum(c["tokens"] for c in calls)
            divisors = [tokens if per_token else c["tokens"] * len(calls) for c in calls]
            value, grads = library(calls, config)
            summed = sum(c["loss"] / d for c, d in zip(calls, divisors, strict=True))
            assert len(calls) > 1 and summed == pytest.approx(value, rel=1e-4, abs=1e-6)
            for call, found, divisor in zip(calls, grads, divisors, strict=True):
                same_gradient(call, found, divisor)


def test_grpo_is_megatron_lms_own_with_its_settings(called):
    """No dual clip, its clamps: value, gradient, KL and entropy terms, importance weights."""
    pairs = list(zip(called["upstream's"], called["grpo as upstream's"], strict=True))
    assert len(pairs) >= 3 * (3 + 2)
    for theirs, ours in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        torch.testing.assert_close(ours["grad"], theirs["grad"], rtol=1e-4, atol=1e-6)
        mask = ours["given"]["loss_mask"] > 0
        torch.testing.assert_close(ours["output"][mask], theirs["output"][mask])
        for term, other in zip(ours["terms"][1:3], theirs["terms"][1:3], strict=True):
            torch.testing.assert_close(term, other)
    weights = [c["given"]["inference_logprobs"] - c["given"]["old_logprobs"] for _, c in pairs]
    assert max(w.abs().max() for w in weights) > 0.1


# Layouts in which every preset's gradients are those of one rank (megatron_lm_ranks.gradients).
LAYOUTS = {"one rank": {}, "pp2": {"PP": "2", "FIRST": "2"}, "cp2": {"CP": "2"}}


def gradients_of(folder: Path, layout: str, packed: str) -> dict[str, dict[str, np.ndarray]]:
    """By preset and parameter, of all ranks together."""
    ranks = 1 if layout == "one rank" else 2
    found = [
        pickle.loads((folder / f"gradients/{layout}-{packed}-{rank}.pkl").read_bytes())
        for rank in range(ranks)
    ]
    return {name: {k: x for rank in found for k, x in rank[name].items()} for name in found[0]}


@pytest.mark.parametrize("packed", ["0", "1"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
def test_every_losss_gradients_are_those_of_one_rank(jobs, layout, packed):
    """Under pipeline and context parallelism, with either of Megatron-LM's normalisations."""
    plain = gradients_of(jobs, "one rank", packed)
    wide = gradients_of(jobs, layout, packed)
    assert plain.keys() == wide.keys() == set(USABLE)
    for name, expected in plain.items():
        assert wide[name].keys() == expected.keys()
        scale = max(abs(x).max() for x in expected.values())
        assert scale > 1e-6, name
        for parameter, x in expected.items():
            np.testing.assert_allclose(
                wide[name][parameter], x, rtol=1e-3, atol=1e-4 * scale, err_msg=name
            )


REFUSED = [
    (
        {"MOE_UPGRPO_LOSS": "rspo"},
        "MOE_UPGRPO_LOSS: 'rspo' given, a loss that needs router_log_probs",
    ),
    ({"MOE_UPGRPO_LOSS_SETTINGS": "{}"}, "MOE_UPGRPO_LOSS is not: name a preset"),
    (
        {"MOE_UPGRPO_LOSS": "gspo", "MOE_UPGRPO_LOSS_SETTINGS": '{"clip": 1}'},
        "{'clip': 1} given; allowed: fields of positive, negative, aggregation",
    ),
    (
        {"MOE_UPGRPO_LOSS": "gspo", "MOE_UPGRPO_LOSS_SETTINGS": "clip_low=1"},
        "allowed: a JSON object of positive",
    ),
    (
        {"MOE_UPGRPO_LOSS": "grpo", "MOE_UPGRPO_LOSS_SETTINGS": '{"router_shift_floor": 0.8}'},
        "this loss needs router_log_probs, which Megatron-LM does not hand",
    ),
]


ARGUMENTS = [  # beside those of each script, and what is said
    ({}, "accepted"),
    ({"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, "accepted"),
    ({"rl_inference_tensor_model_parallel_size": 1}, "accepted"),
    ({"rl_training_cuda_graphs": True}, "does not cover --rl-training-cuda-graphs"),
    ({"moe_enable_routing_replay": False}, "needs --moe-enable-routing-replay"),
]


def words_of(script: str) -> list[str]:
    """A script's settings with our line, as words of a command line."""
    given = [*megatron_lm_scripts.read()["scripts"][script], *megatron_lm_scripts.ADDED]
    found = [word for flag, value in given for word in (flag, *value.split())]
    return ["1" if word == "$SEED" else word for word in found]


def test_what_cannot_be_is_refused_at_start(jobs):
    """By the import, and by the first that Megatron-LM does with its arguments."""
    said = pickle.loads((jobs / "settings/said.pkl").read_bytes())
    scripts = megatron_lm_scripts.read()["scripts"]
    messages = [message for _, message in REFUSED]
    messages += [message for _ in scripts for _, message in ARGUMENTS]
    messages.append("the pipeline stages of inference finished other requests (2, 2 of them")
    for line, message in zip(said, messages, strict=True):
        assert message in line


def test_the_scripts_settings_are_those_of_the_checkout():
    assert megatron_lm_scripts.found_in(Path(CHECKOUT)) == megatron_lm_scripts.read()["scripts"]


# --- the routing log

RUNS = {  # ranks, and what the environment of the ranks says (megatron_lm_ranks.split)
    "one rank": (1, {"PACKED": "0", "REFUSED": "1"}),
    "one rank, packed": (1, {"PACKED": "1", "MOE_UPGRPO_LOSS": "up-grpo"}),
    "packed, two data-parallel ranks": (2, {"PACKED": "1", "MOE_UPGRPO_LOSS": "up-grpo"}),
    "tp2, sequence parallel": (2, {"PACKED": "0", "TP": "2", "MOE_UPGRPO_LOSS": "up-gspo"}),
    "pp2": (2, {"PACKED": "0", "PP": "2", "FIRST": "2"}),
    "pp2, a dense stage, packed": (
        2,
        {"PACKED": "1", "PP": "2", "FIRST": "1", "MOE_UPGRPO_LOSS": "up-grpo"},
    ),
    "cp2": (2, {"PACKED": "0", "CP": "2"}),
    "cp2, packed": (2, {"PACKED": "1", "CP": "2", "MOE_UPGRPO_LOSS": "up-grpo"}),
    "CUDA graphs of inference": (1, {"PACKED": "0", "GRAPHS": "1"}),
    "pp2, inference of its own": (
        2,
        {"PACKED": "0", "PP": "2", "FIRST": "2", "INFERENCE_PP": "1", "GRAPHS": "1"},
    ),
    "cp2, inference of its own in two stages": (
        2,
        {"PACKED": "0", "CP": "2", "FIRST": "2", "INFERENCE_PP": "2"},
    ),
}
# Runs of one rank with the same rollouts, whose token log a wide run's has to be.
PLAIN = {
    name: "one rank, packed" if variables["PACKED"] == "1" else "one rank"
    for name, (_, variables) in RUNS.items()
    if name not in ("one rank", "one rank, packed", "packed, two data-parallel ranks")
    and "TP" not in variables
}
LAYERS = 2  # MoE layers, those of index 1 and 2; layer 0 is dense


def plans_of_routes() -> list[list[list[dict]]]:
    """Two collections of four prompts with two rollouts each. In the first: the same response
    twice, a rollout of two turns in one row, one whose turns are rows of their own, an evicted one.

    planted: (turn, position of the token, MoE layer), where inference's choice was changed."""
    same = turn([1, 2, 3], 6, 1)
    first = ([5, 6, 7, 10, 11], 3)
    second = ([5, 6, 7, 10, 11, 20, 21, 30, 31, EOD], 7)
    one = [
        [
            {"turns": [same], "reward": 1.0, "planted": [(0, 4, 0)]},
            {"turns": [same], "reward": 0.0, "planted": [(0, 5, 1), (0, 6, 1)]},
        ],
        [
            # The second request computed the first turn's tokens again; they were not sampled then.
            {"turns": [first, second], "reward": 1.0, "planted": [(0, 4, 1), (1, 3, 0), (1, 8, 0)]},
            {"turns": [turn([5, 6, 7], 7, 2)], "reward": 0.0},
        ],
        [
            {"turns": [turn([9, 9], 5, 3)], "reward": 0.0, "evicted": True, "planted": [(0, 3, 0)]},
            {"turns": [turn([9, 9], 4, 4)], "reward": 1.0, "planted": [(0, 1, 0)]},  # the prompt
        ],
        [
            {"turns": [turn([4], 15, 5)], "reward": 1.0, "planted": [(0, 15, 0), (0, 15, 1)]},
            {"turns": [turn([4], 4, 6), turn([4, 8], 3, 7)], "reward": 0.0, "planted": [(1, 2, 0)]},
        ],
    ]
    two = [
        [{"turns": [turn([g], 3 + r, 20 + 2 * g + r)], "reward": float(r)} for r in range(2)]
        for g in range(4)
    ]
    return [one, two]


def logged_rows(plan: list[list[dict]]) -> dict[tuple, list[tuple[int, int]]]:
    """(tokens, reward) of a row -> the MoE layers planted, by position of its sampled tokens.

    By hand: what is sampled in a turn starts at its prompt's length; a chain of prefixes is a row.
    """
    rows = {}
    for rollout in (r for group in plan for r in group if not r.get("evicted")):
        turns, planted = rollout["turns"], rollout.get("planted", [])
        chain = all(a[0] == b[0][: len(a[0])] for a, b in itertools.pairwise(turns))
        parts = [list(enumerate(turns))] if chain else [[pair] for pair in enumerate(turns)]
        for part in parts:
            tokens = part[-1][1][0]
            sampled = {p: t for t, (ids, prompt) in part for p in range(prompt, len(ids))}
            rows[tuple(tokens), rollout["reward"]] = {
                p: {layer for turn_, at, layer in planted if (turn_, at) == (t, p)}
                for p, t in sampled.items()
            }
    return rows


@pytest.fixture(scope="module")
def jobs(patched, tmp_path_factory):
    """The folder that all jobs have written into."""
    folder = tmp_path_factory.mktemp("jobs")
    given = [(name, folder / name, 1, {}) for name in ("losses", "settings")]
    for name, (size, variables) in RUNS.items():
        variables = variables | {"MOE_UPGRPO_RUN": str(folder / name)}
        given.append(("routes", folder / "routes", size, variables))
    for name, variables in LAYOUTS.items():
        for packed in ("0", "1"):
            named = {"NAME": f"{name}-{packed}", "PACKED": packed}
            size = 1 if name == "one rank" else 2
            given.append(("gradients", folder / "gradients", size, variables | named))
    plans = {
        "losses": plan_of_losses(),
        "gradients": plan_of_losses(),
        "settings": {
            "environments": [variables for variables, _ in REFUSED],
            "arguments": [
                (words_of(script), changes | {"num_experts": 8})
                for script in megatron_lm_scripts.read()["scripts"]
                for changes, _ in ARGUMENTS
            ],
        },
        "routes": plans_of_routes(),
    }
    for name, plan in plans.items():
        (folder / name).mkdir()
        (folder / name / "plan.pkl").write_bytes(pickle.dumps(plan))
    ranks(patched, given, folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_record_is_whole(jobs, name):
    assert_whole(jobs / name, texts=False)  # its tokenizer is a stand-in without a folder


@pytest.mark.parametrize("name", RUNS)
def test_planted_differences_are_found_where_they_were_put(jobs, name):
    steps = {row["step"]: row for row in read_metrics(jobs / name)}
    assert list(steps) == [1, 2]
    for step, plan in enumerate(plans_of_routes(), 1):
        table = read_tokens(jobs / name, steps=[step])
        rollout, train = read_routes(table)
        rows = {n: table[n].to_numpy() for n in ("sequence", "position", "token_id", "reward")}
        counts, found = table["layers_mismatched"].to_numpy(), {}
        for sequence in np.unique(rows["sequence"]):
            here = np.flatnonzero(rows["sequence"] == sequence)
            found[tuple(rows["token_id"][here]), rows["reward"][here[0]]] = {
                int(rows["position"][i]): {
                    layer for layer in range(LAYERS) if {*rollout[i, layer]} != {*train[i, layer]}
                }
                for i in here
            }
            for i in here:
                layers = [{*rollout[i, n]} != {*train[i, n]} for n in range(LAYERS)]
                assert counts[i] == sum(layers)
        expected = {
            (tuple(tokens[p] for p in sorted(by_position)), reward): by_position
            for (tokens, reward), by_position in logged_rows(plan).items()
        }
        assert found == expected
        planted = sum(len(x) for by_position in expected.values() for x in by_position.values())
        tokens = sum(map(len, expected.values()))
        assert planted == (8 if step == 1 else 0)
        assert steps[step]["mismatch/router_numerator"] == planted
        assert steps[step]["mismatch/router_denominator"] == LAYERS * tokens
        assert steps[step]["logp_gap/mean_abs"] == pytest.approx(0.05, abs=1e-4)


EXACT = ["step", "position", "token_id", "reward", "layers_mismatched", "prefix_mismatched",
         "staleness", "clipped"]  # fmt: skip
ROUNDED = ["advantage", "logp_rollout", "logp_old", "logp_train", "ratio", "gradient_weight",
           "margin_min"]  # fmt: skip


def by_content(table):
    """A token log's rows by the tokens and the reward of their sequence."""
    rows = table.to_pandas()
    tokens = rows.groupby(["step", "sequence"])["token_id"]
    rows["tokens"] = tokens.transform(lambda column: str(column.tolist()))
    return table.take(rows.sort_values(["step", "tokens", "reward", "position"]).index.to_numpy())


@pytest.mark.parametrize("name", PLAIN)
def test_the_token_log_of_a_wide_configuration_is_that_of_one_rank(jobs, name):
    """Row by row: the same tokens and routes, log-probs and weights to rounding."""
    tables = [by_content(read_tokens(jobs / run)) for run in (name, PLAIN[name])]
    wide, plain = (table.to_pandas() for table in tables)
    assert len(plain) > 60 and len(wide) == len(plain)
    assert wide[EXACT].equals(plain[EXACT])
    if name != "cp2, packed":  # whose bins hold less: a sequence's part ends at a multiple of 4
        assert wide[["sequence", "prompt"]].equals(plain[["sequence", "prompt"]])
    for column in ROUNDED:
        np.testing.assert_allclose(wide[column], plain[column], rtol=1e-3, atol=2e-5)
    for mine, its in zip(*(read_routes(table) for table in tables), strict=True):
        assert mine.shape[1:] == (LAYERS, 2)
        np.testing.assert_array_equal(np.sort(mine), np.sort(its))
    metrics = [read_metrics(jobs / run) for run in (name, PLAIN[name])]
    for here, there in zip(*metrics, strict=True):
        assert here.keys() == there.keys()
        assert here["loss/policy"] == pytest.approx(there["loss/policy"], rel=1e-3, abs=1e-5)


def test_the_run_says_how_inference_is_split(jobs):
    said = {name: read_config(jobs / name) for name in PLAIN}
    assert said["pp2"]["layout"] == "tp 1, pp 2, ep 1, cp 1"
    assert said["pp2"]["engine"] == "Megatron-Core inference"
    engines = {name: config["engine"] for name, config in said.items() if "own" in config["engine"]}
    assert engines == {
        "cp2": "Megatron-Core inference, a model of its own (cp 1)",
        "cp2, packed": "Megatron-Core inference, a model of its own (cp 1)",
        "pp2, inference of its own": "Megatron-Core inference, a model of its own (pp 1, cp 1)",
        "cp2, inference of its own in two stages": (
            "Megatron-Core inference, a model of its own (pp 2, cp 1)"
        ),
    }


def test_the_updates_side_of_the_log(jobs):
    """Packed, up-grpo, --calculate-per-token-loss: a positive token pulls with A/N, whichever of
    the two passes it was; without, with A over its row's tokens and the rows, pads included."""
    plan = plans_of_routes()[0]
    rows = {k: len(v) for k, v in logged_rows(plan).items()}
    (evicted,) = [r for group in plan for r in group if r.get("evicted")]
    tokens = sum(rows.values()) + len(evicted["turns"][0][0]) - 2
    advantage = 0.5 / (0.5 + 1e-4)  # rewards 1 and 0
    for name, packed in (("packed, two data-parallel ranks", True), ("one rank", False)):
        table = read_tokens(jobs / name, steps=[1]).to_pandas()
        np.testing.assert_allclose(table.advantage.abs(), advantage, rtol=1e-5)
        np.testing.assert_allclose(
            table.ratio, np.exp(table.logp_train - table.logp_old), rtol=1e-4
        )
        positive = table[table.advantage > 0]
        if packed:
            expected = advantage / tokens
            weight = positive.gradient_weight
        else:  # ten micro-batches: eight rollouts, one of which is two rows, and no pad at DP 1
            lengths = positive.groupby("sequence").position.transform("count")
            expected = advantage / 9
            weight = (positive.gradient_weight * lengths)[~positive.clipped]
            weight = weight / positive.ratio[~positive.clipped]
        assert len(weight) > 5
        np.testing.assert_allclose(weight, expected, rtol=1e-3)
        assert (table.ratio - 1).abs().max() > 1e-4  # the second pass is logged
    metrics = read_metrics(jobs / "packed, two data-parallel ranks")
    assert metrics[0]["clip/positive"] == 0 and "loss/ppo_kl" in metrics[0]


def test_requests_without_routes_are_refused(jobs):
    said = (jobs / "routes/refused.txt").read_text()
    assert said.startswith("MOE_UPGRPO_RUN: no finished request has routing_indices")


def test_the_report_opens_the_run(jobs):
    name = "packed, two data-parallel ranks"
    config = read_config(jobs / name)
    assert config["loss"] == "up-grpo" and config["moe_layers"] == [1, 2]
    assert config["stack"].startswith("Megatron-LM")
    page = write_report([jobs / name], jobs / "report.html").read_text()
    assert "up-grpo" in page and "Megatron-Core inference" in page
