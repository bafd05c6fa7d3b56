"""The presets that are run through each stack: those that it hands the inputs for.

Of the losses that reach a stack in one way (by log-probs and advantages of single tokens, with
numbers of their own) one stands for the others: what a loss computes, tests/losses holds.
"""

from moe_upgrpo.losses import PRESETS

ALIKE = {
    *("hinge-ratio", "hinge-probability", "hinge-log", "hinge-root", "copg", "ipo"),
    *("up-hinge-ratio", "up-hinge-log", "up-copg", "up-ipo", "up-dro", "up-fipo", "up-luspo"),
    *("ppo-early-stop", "up-ppo-early-stop"),
}
TRIED = [
    name
    for name, preset in PRESETS.items()
    if name not in ALIKE and preset.arguments <= {"rollout_log_probs"}
]
