"""Megatron-LM's own RL loss in `make test`: from the released wheel of miles, which holds a copy.

Its `calculate_grpo_loss` is that of the patched revision to the letter; the other hooks of the
patch came after that copy (docs/megatron-lm.md): `test_megatron_lm.py` runs them, with a checkout.
"""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_upgrpo.integrations import hooks
from moe_upgrpo.losses import PRESETS
from tests.integrations.places import MILES_WHEEL
from tests.integrations.test_megatron_lm import CORRECTED, USABLE, library, same_gradient
from tests.losses.batches import random_batch

LOSS = "megatron/rl/rl_utils.py:calculate_grpo_loss"
CONFIGS = {name: PRESETS[name] for name in USABLE} | {"gspo, corrected": CORRECTED}
CLAMPS = {"clamp_eps_lower": 0.1, "clamp_eps_upper": 0.15}
OWN = replace(PRESETS["grpo"], dual_clip=None, clip_low=0.1, clip_high=0.15)


def batch(packed: bool, **changes) -> tuple[dict, torch.Tensor]:
    """Arguments of calculate_grpo_loss and the loss mask: four sequences, as rows or in a bin."""
    lengths = (7, 3, 1, 6)
    data = random_batch(seed=3, lengths=lengths, dtype=torch.float32)
    columns = {
        "current_logprobs": data.log_probs,
        "old_logprobs": data.old_log_probs,
        "ref_logprobs": data.old_log_probs - 0.1,
        "inference_logprobs": data.rollout_log_probs,
    }
    mask = data.mask
    given: dict = {"advantages": data.advantages[:, 0], "seq_starts": None, "seq_lengths": None}
    if packed:  # a sequence has a token more than log-probs; the bin's end is padding
        starts = [sum(n + 1 for n in lengths[:i]) for i in range(len(lengths))]
        given |= {"seq_starts": starts, "seq_lengths": [n + 1 for n in lengths]}

        def in_bin(rows: torch.Tensor) -> torch.Tensor:
            bin_ = torch.zeros(1, starts[-1] + lengths[-1] + 4)
            for row, start, length in zip(rows, starts, lengths, strict=True):
                bin_[0, start : start + length] = row[:length]
            return bin_

        columns, mask = {name: in_bin(x) for name, x in columns.items()}, in_bin(mask)
    return columns | given | CLAMPS | {"kl_beta": 0.0, "entropy_weight": 0.0} | changes, mask


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """By name and layout, what each job was given and what came of it, in one process."""
    assert MILES_WHEEL.is_dir(), f"no {MILES_WHEEL}: make test makes it"
    jobs = {}
    for packed in (False, True):
        for name, config in CONFIGS.items():
            reads = "rollout_log_probs" in config.arguments
            plain = {} if reads else {"inference_logprobs": None}
            # At Megatron-LM's default the preset's own clips hold.
            clamps = {"clamp_eps_lower": 0.01, "clamp_eps_upper": 0.01}
            jobs[name, packed] = (config, *batch(packed, **plain, **clamps))
        terms = {"kl_beta": 0.1, "entropy_weight": 0.01, "is_truncation_coef": 1.02}
        jobs["theirs", packed] = (None, *batch(packed, **terms))
        jobs["ours", packed] = (OWN, *batch(packed, **terms))
    path = tmp_path_factory.mktemp("megatron-lm") / "jobs.pkl"
    path.write_bytes(pickle.dumps(list(jobs.values())))
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.megatron_lm_wheel", str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = pickle.loads(path.with_name("results.pkl").read_bytes())
    return {
        key: {"given": given | {"loss_mask": mask}, "packed": key[1], "tokens": mask.sum()} | result
        for (key, (_, given, mask)), result in zip(jobs.items(), results, strict=True)
    }


def test_the_wheels_loss_is_that_of_the_patched_revision():
    found = hooks.found_in(MILES_WHEEL, "megatron-lm")
    assert found[LOSS] == hooks.read()["megatron-lm"]["d98e8a6"][LOSS]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses(called, name, packed):
    """By Megatron-LM's division by the tokens the library's value, and its gradient."""
    call = called[name, packed]
    value, grads = library([call], CONFIGS[name])
    assert call["loss"] / call["tokens"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    same_gradient(call, grads[0], call["tokens"])
    assert call["grad"].count_nonzero() > 3


@pytest.mark.parametrize("packed", [False, True])
def test_grpo_is_megatron_lms_own_with_its_settings(called, packed):
    """No dual clip, its clamps: value, gradient, KL and entropy terms, importance weights."""
    theirs, ours = called["theirs", packed], called["ours", packed]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    torch.testing.assert_close(ours["grad"], theirs["grad"], rtol=1e-4, atol=1e-6)
    mask = ours["given"]["loss_mask"] > 0
    for mine, its in zip(ours["terms"][:4], theirs["terms"][:4], strict=True):
        torch.testing.assert_close(mine[mask], its[mask])
    above, below = (x[mask].sum() for x in theirs["terms"][4:])
    assert above and below and (theirs["terms"][1][mask] != 0).any()
