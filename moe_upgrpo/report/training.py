# SPDX-License-Identifier: Apache-2.0
"""Learning and updates of a run: figures from the metrics of training."""

import numpy as np

from moe_upgrpo.report.figures import (
    Curves,
    absent,
    only,
    percent,
    says_trend,
)
from moe_upgrpo.report.runs import Run


def accuracy(run: Run, name: str) -> str | None:
    """'31% → 52%' of a held-out accuracy, or its one value; None where it was not evaluated."""
    _, values = run.series(name)
    if not values:
        return None
    return percent(values[0]) + (f" → {percent(values[-1])}" if len(values) > 1 else "")


def _says_accuracy(run: Run) -> str:
    steps, greedy = run.series("eval/greedy")
    if not greedy:
        return absent(run, "a held-out evaluation")
    _, problems = run.series("eval/problems")
    if len(greedy) == 1:
        text = f"greedy accuracy is {percent(greedy[0])} at step {steps[0]}"
    else:
        text = (
            f"greedy accuracy goes from {percent(greedy[0])} at step {steps[0]} to "
            f"{percent(greedy[-1])} at step {steps[-1]}"
        )
    if problems:
        error = max(np.sqrt(p * (1 - p) / problems[-1]) for p in (greedy[0], greedy[-1]))
        text += f", on {problems[-1]:.0f} problems (standard error up to {percent(error)})"
    return text + "."


def _says_clip(run: Run) -> str:
    means = {}
    for sign in ("positive", "negative"):
        _, values = run.series(f"clip/{sign}")
        if not values:
            return absent(run, "the clip fraction")
        means[sign] = float(np.mean(values))
    return (
        f"on average the loss's rule takes the gradient from {percent(means['positive'])} of the "
        f"tokens with positive and {percent(means['negative'])} of those with negative advantage."
    )


def _evaluations(run: Run) -> list[tuple[str, str]]:
    passes = [(name, name.removeprefix("eval/")) for name in run.pass_at_k()]
    return [("eval/greedy", "greedy"), *passes]


OUTCOME: list[Curves] = [
    Curves(
        key="reward",
        title="Reward",
        metrics=only(("reward/mean", "mean reward")),
        read="Mean reward of the responses sampled in each step, on training problems; "
        "upward is learning.",
        says=says_trend("reward/mean", "mean reward"),
    ),
    Curves(
        key="held_out",
        title="Held-out accuracy",
        metrics=_evaluations,
        read="Share of held-out problems solved: greedily, and by one (pass@1) or one of K "
        "(pass@K) sampled answers. Step 0 is the warm start.",
        says=_says_accuracy,
        is_share=True,
        points_only=True,
        from_zero=True,
    ),
]

UPDATES: list[Curves] = [
    Curves(
        key="clip",
        title="Clip fraction by sign of the advantage",
        metrics=only(
            ("clip/positive", "advantage > 0"),
            ("clip/negative", "advantage < 0"),
        ),
        read="Share of tokens of that sign whose gradient the loss's own rule took away; a "
        "branch without a ratio never clips.",
        says=_says_clip,
        is_share=True,
        from_zero=True,
    ),
    Curves(
        key="kl",
        title="KL to the warm start",
        metrics=only(("kl/warm_start", "KL (k3)")),
        read="Distance travelled from the warm start, estimated on the sampled tokens, in nats "
        "per token.",
        says=says_trend("kl/warm_start", "KL per token"),
        from_zero=True,
    ),
    Curves(
        key="entropy",
        title="Entropy",
        metrics=only(("entropy/mean", "entropy")),
        read="Mean entropy of the next-token distribution, in nats; a fall to 0 means that "
        "sampling no longer explores.",
        says=says_trend("entropy/mean", "entropy"),
        from_zero=True,
    ),
    Curves(
        key="length",
        title="Response length",
        metrics=only(("response/length_mean", "tokens")),
        read="Mean length of the sampled responses in tokens; a jump often comes before a "
        "collapse, or from responses that no longer end.",
        says=says_trend("response/length_mean", "mean length"),
        from_zero=True,
    ),
    Curves(
        key="grad_norm",
        title="Gradient norm",
        metrics=only(("grad_norm", "gradient norm")),
        read="Global norm before clipping, mean over the step's optimizer steps; spikes mark "
        "batches that moved the weights far.",
        says=says_trend("grad_norm", "the gradient norm"),
        from_zero=True,
    ),
]
