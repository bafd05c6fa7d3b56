"""`--deterministic`: what it sets and puts back, what it refuses, and a step with it.

Not covered: a GPU, where alone it changes what kernels do (make gpu-check looks at it there).
"""

import os
import re

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import backend
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.groups import process_groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import transformer_config
from tests.megatron.measured import NO_STEP, gradients_by_name, make_samples
from tests.ranks import run_command

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_it_is_set_inside_and_nowhere_else(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")  # the user's own
    hf = read_model_config(tiny_checkpoint)

    def found() -> tuple:
        config = transformer_config(hf, Layout(), torch.float32)
        enabled = torch.are_deterministic_algorithms_enabled()
        return enabled, config.deterministic_mode, *map(os.environ.get, NAMES)

    with process_groups(Layout(), deterministic=True):
        assert found() == (True, True, ":4096:8", "Ring", "0")
        # Slow, and of no use where nothing reads what was not written.
        assert not torch.utils.deterministic.fill_uninitialized_memory
    with process_groups(Layout()):
        assert found() == (False, False, None, "Ring", None)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_kernel_without_such_a_form_is_named():
    """torch's put_ has none on any device."""
    target, index, source = torch.zeros(3), torch.tensor([1]), torch.ones(1)
    with (
        pytest.raises(UserError, match=r"^--deterministic: .*put_ does not have.*Leave") as error,
        process_groups(Layout(), deterministic=True),
    ):
        target.put_(index, source)
    assert "\n" not in str(error.value)
    assert not torch.are_deterministic_algorithms_enabled()
    with process_groups(Layout()):
        target.put_(index, source)


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^out of luck$"), backend.deterministic():
        raise RuntimeError("out of luck")


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":8:8"), (NAMES[2], "1")])
def test_a_setting_that_forbids_it_is_refused_by_the_command(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    result = run_command("train", "--deterministic", "--steps", "1")
    assert result.returncode == 2
    assert re.search(rf"^error: --deterministic with {name}={value}: .* allowed", result.stderr)


@pytest.mark.bits
def test_a_step_with_it(tiny_checkpoint):
    """Twice the same gradient to the last bit; without it, but for the order of sums, that too."""

    def gradient(deterministic: bool) -> dict[str, torch.Tensor]:
        with process_groups(Layout(), deterministic=deterministic):
            actor = MegatronActor(tiny_checkpoint, Layout(), optimizer=NO_STEP)
            actor.update(make_samples(), PolicyLossConfig.preset("grpo"))
            return gradients_by_name(actor)

    once, twice, plain = gradient(True), gradient(True), gradient(False)
    assert len(once) > 10 and once.keys() == plain.keys()
    used = [name for name, expected in plain.items() if expected.any()]
    assert len(used) > 0.9 * len(plain)  # all but those of experts without a token
    for name, expected in plain.items():
        assert torch.equal(once[name], twice[name]), name
        largest = float(expected.abs().max())
        torch.testing.assert_close(once[name], expected, rtol=0, atol=1e-5 * largest)
