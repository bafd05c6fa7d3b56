"""Where the stacks are that the tests run: wheels, and checkouts that variables name."""

import os
from pathlib import Path

import pytest

MILES_WHEEL = Path(__file__).parents[2] / ".venv-miles"  # with nothing else in it: `make test`
SWIFT_WHEELS = Path(__file__).parents[2] / ".venv-swift"  # with mcore-bridge and an older TRL
# Stack → the release that `make test` has a wheel of.
WHEELS = {"verl": "0.9.1", "miles": "0.0.2", "ms-swift": "4.6.0"}
# Stack → the variable that names a checkout of it, and the revisions at which one was run.
CHECKOUTS = {
    "verl": ("MOE_UPGRPO_VERL", "1dda039"),
    "slime": ("MOE_UPGRPO_SLIME", "624b824a8", "v0.3.1", "v0.3.0", "v0.2.4"),
    "miles": ("MOE_UPGRPO_MILES", "31f1ca961", "v0.1.0"),
    "nemo-rl": ("MOE_UPGRPO_NEMO_RL", "7ea279a", "v0.7.0"),
    "megatron-lm": ("MOE_UPGRPO_MEGATRON_LM", "d98e8a6"),
}


def with_checkout(*stacks: str) -> list:
    """Parameters of a test that is given each stack and its checkout; without one it is skipped."""
    found = []
    for stack in stacks or CHECKOUTS:
        variable = CHECKOUTS[stack][0]
        place = os.environ.get(variable)
        none = pytest.mark.skipif(not place, reason=f"{variable} names no checkout of {stack}")
        found.append(pytest.param(stack, Path(place or ""), id=stack, marks=none))
    return found
