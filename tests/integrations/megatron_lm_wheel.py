# ruff: noqa: E402
"""Megatron-LM's own RL loss, and ours in its place, out of the released wheel of miles. A script.

    python -m tests.integrations.megatron_lm_wheel JOBS

JOBS: a pickled list of (config or None, arguments, loss mask); beside it results.pkl gets of each
the output of `calculate_grpo_loss`, the sum over the mask and its gradient in the log-probs. The
wheel's Megatron-LM is imported here, before any other. Not its own are the modules below, which the
loss does not use and which want packages that are not here.
"""

import pickle
import sys
import warnings
from pathlib import Path

from tests.integrations.places import MILES_WHEEL
from tests.integrations.stack_plugin import NAMES, StandIns

warnings.filterwarnings("ignore")
NAMES += [
    *("megatron.rl.server", "megatron.rl.inference.megatron", "wandb"),
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
]
sys.meta_path.insert(0, StandIns())
sys.path.insert(0, str(MILES_WHEEL))

import torch
from megatron.rl import rl_utils

from moe_upgrpo.integrations.megatron_lm.install import Hooks
from moe_upgrpo.losses import PolicyLossConfig


def called(config: PolicyLossConfig | None, given: dict, loss_mask: torch.Tensor) -> dict:
    leaf = given["current_logprobs"].clone().requires_grad_()
    terms = Hooks(config, set()).calculate_grpo_loss(
        loss_mask=loss_mask, tokens=None, **given | {"current_logprobs": leaf}
    )
    loss = (terms[0] * loss_mask).sum()
    loss.backward()
    return {"terms": [x.detach() for x in terms], "loss": loss.item(), "grad": leaf.grad}


def main(path: Path) -> None:
    assert Path(rl_utils.__file__).is_relative_to(MILES_WHEEL)
    results = [called(*job) for job in pickle.loads(path.read_bytes())]
    path.with_name("results.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
