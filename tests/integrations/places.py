"""Where the stacks are that the tests run: wheels, and checkouts that variables name."""

from pathlib import Path

MILES_WHEEL = Path(__file__).parents[2] / ".venv-miles"  # with nothing else in it: `make test`
# Stack → the release that `make test` has a wheel of.
WHEELS = {"verl": "0.9.1", "miles": "0.0.2"}
# Stack → the variable that names a checkout of it, and the revisions of which it has to be one.
CHECKOUTS = {
    "verl": ("MOE_UPGRPO_VERL", "1dda039"),
    "slime": ("MOE_UPGRPO_SLIME", "624b824a8"),
    "miles": ("MOE_UPGRPO_MILES", "31f1ca961"),
    "nemo-rl": ("MOE_UPGRPO_NEMO_RL", "7ea279a", "v0.7.0"),
    "megatron-lm": ("MOE_UPGRPO_MEGATRON_LM", "d98e8a6"),
}
