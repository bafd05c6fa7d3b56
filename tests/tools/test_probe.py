"""`moe-upgrpo probe`: two dumps with mismatches planted by hand, and a checkpoint with an engine.

That engine and trainer are compared rightly: tests/train/test_record.py and test_launch.py.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import ratio_interval
from moe_upgrpo.store import read_metrics, read_tokens
from moe_upgrpo.tasks import arithmetic
from moe_upgrpo.tools.probe_options import ProbeConfig
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.ranks import run_command


def probe(*arguments) -> subprocess.CompletedProcess:
    return run_command("probe", *arguments)


def dumps(folder, train) -> list[str]:
    """A rollout dump of ten tokens, two layers, experts {0, 1} everywhere, and the trainer's."""
    rollout = np.tile(np.array([0, 1], np.uint8), (10, 2, 1))
    np.save(folder / "rollout.npy", rollout)
    np.save(folder / "train.npy", train(rollout.astype(np.int16)))
    return [
        *("--rollout-routes", folder / "rollout.npy", "--train-routes", folder / "train.npy"),
        *("--num-experts", 4, "--output-dir", folder / "out"),
    ]


def test_two_dumps(tmp_path):
    def train(routes):
        routes[0, 0] = (2, 3)  # both slots of one router
        routes[0, 1] = (1, 2)  # one slot of another, same token
        routes[7, 1] = (1, 0)  # only another order
        return routes

    result = probe(*dumps(tmp_path, train))
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "routers that differ 10.000% 20" in lines
    assert "expert slots that differ 7.500% the same" in lines
    assert "tokens that differ in any layer 10.000% 10" in lines
    (row,) = read_metrics(tmp_path / "out")
    assert row["mismatch/by_layer"] == [0.1, 0.1] and row["mismatch/histogram"] == [9, 0, 1]
    assert (tmp_path / "out" / "report.html").is_file()


def batch(folder) -> list:
    """Nine prompts of two sequences with ten tokens; prompt p differs in p routers of its twenty
    in layer 0. Experts {0, 1} against {0, 2}."""
    rollout = np.tile(np.array([0, 1], np.uint8), (18, 10, 2, 1))
    train = rollout.copy()
    for p in range(9):
        train[2 * p].reshape(10, 2, 2)[:p, 0, 1] = 2
    np.save(folder / "rollout.npy", rollout)
    np.save(folder / "train.npy", train)
    return [
        *("--rollout-routes", folder / "rollout.npy", "--train-routes", folder / "train.npy"),
        *("--num-experts", 4),
    ]


def test_intervals_of_dumps_are_by_prompt(tmp_path):
    """36 of 360 pairs, 0 to 8 of the 40 of each prompt; with three prompts there is none."""
    _, low, high = ratio_interval(np.arange(9), np.full(9, 40))
    for samples, words in (
        (2, f"routers that differ 10.000% {low:.3%} to {high:.3%} 360"),
        (6, "routers that differ 10.000% none: 3 of 8 prompts 360"),
        (None, "no intervals: they are by prompt, and --dump-samples says"),
    ):
        given = () if samples is None else ("--dump-samples", samples)
        found = probe(*batch(tmp_path), *given, "--output-dir", tmp_path / f"out{samples}")
        assert words in " ".join(found.stdout.split()), found.stderr
    refused = probe(*batch(tmp_path), "--dump-samples", 4, "--output-dir", tmp_path / "refused")
    assert refused.returncode == 2 and "B a multiple of 4" in refused.stderr


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (lambda routes: routes[:9], "same tokens"),
        (lambda routes: routes * 0, "zero-filled"),
        (lambda routes: routes + 3, "expected 2 ids in 0..3"),
    ],
    ids=["a row short", "zero-filled", "ids out of range"],
)
def test_dumps_that_cannot_be_routes_of_the_same_tokens(train, words, tmp_path):
    result = probe(*dumps(tmp_path, train))
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert words in result.stderr
    assert not list((tmp_path / "out").iterdir())  # the same command, mended, may use it


def test_zero_filled_routes_of_top_1_raise_their_alarm(tmp_path):
    """One expert a token: a row that was never written passes for a choice of expert 0."""
    ids = np.random.default_rng(0).integers(0, 8, (50, 2, 1))
    np.save(tmp_path / "rollout.npy", ids * 0)
    np.save(tmp_path / "train.npy", ids.astype(">i4"))  # another byte order is no fault
    dumps = ("--rollout-routes", tmp_path / "rollout.npy", "--train-routes", tmp_path / "train.npy")
    result = probe(*dumps, "--num-experts", 8, "--output-dir", tmp_path / "out")
    assert result.returncode == 0 and "ALARM zero-filled-routes" in result.stdout
    (row,) = read_metrics(tmp_path / "out")
    assert row["alarms"] == ["mismatch-above-noise", "zero-filled-routes"]
    assert row["alarms/zero-filled-routes"] == 1


def test_two_dumps_that_share_nothing_are_an_alarm(tmp_path):
    """There is no noise floor in dumps: the absolute limit holds, and can be set."""
    options = dumps(tmp_path, lambda routes: routes + 2)
    result = probe(*options)
    said = " ".join(result.stdout.split())
    assert "ALARM mismatch-above-noise (1, limit 0.3): more than 30% of routers" in said
    assert "Next: moe-upgrpo report RUN" in said
    quiet = probe(*options[:-1], tmp_path / "quiet", "--alarm.mismatch", 1)
    assert quiet.returncode == 0 and "ALARM" not in quiet.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"temperature": 0.0}, "temperature=0.0: above 0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"engine_url": "http://h:1"}, "engine_url=http://h:1 with engine=hf"),
        ({"dump_samples": 2}, "--dump-samples goes with two dumps"),
    ],
)
def test_bad_options(option, words):
    with pytest.raises(UserError, match=words):
        ProbeConfig(model=Path("m"), prompts=Path("p"), **option)


def test_a_checkpoint(tmp_path):
    model, prompts, output = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "out"
    Qwen3MoeForCausalLM(tiny_model_config(layers=2, hidden=64)).save_pretrained(model)
    arithmetic.save_tokenizer(model)
    prompts.write_text("1+2=\n34+5=\n")
    options = ("--model", model, "--prompts", prompts, "--output-dir", output)
    result = probe(*options, "--samples", 4, "--engine-dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert "noise floor: trainer 0.000%, engine 0.000% of routers" in result.stdout
    assert "(95% interval none: 2 of 8 prompts)" in result.stdout
    (row,) = read_metrics(output)
    assert row["logp_gap/mean_abs"] < 1e-5 and row["mismatch/router_rate"] < 0.01
    assert row["mismatch/router_denominator"] == 2 * len(read_tokens(output)) > 0
    assert (output / "report.html").is_file()
    assert row["alarms"] == []
    prompts.write_text("1+2=\n" + "1+" * 40 + "\n")
    long = probe("--model", model, "--prompts", prompts, "--output-dir", tmp_path / "long")
    assert long.returncode == 2 and "prompt 2 (80 tokens)" in long.stderr
    assert "max_position_embeddings=64" in long.stderr
    again = probe(*options)
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_a_dense_checkpoint_is_recognised(tmp_path):
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    config = tiny_model_config(layers=2, hidden=64, experts=0)
    Qwen3ForCausalLM(config).save_pretrained(model)
    arithmetic.save_tokenizer(model)
    prompts.write_text("1+2=\n")
    result = probe("--model", model, "--prompts", prompts, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "a dense model: no routes to compare" in result.stdout
    (row,) = read_metrics(tmp_path / "out")
    assert row["logp_gap/mean_abs"] > 0 and "mismatch/router_rate" not in row


def test_neither_model_nor_dumps():
    result = probe("--samples", 4)
    assert result.returncode == 2 and "--rollout-routes" in result.stderr
