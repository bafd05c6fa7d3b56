# SPDX-License-Identifier: Apache-2.0
"""The tails of the log-prob gap and of the ratios, step by step, from the metrics."""

import numpy as np

from moe_upgrpo.report.figures import Curves, Entry, Panels, number, only, percent
from moe_upgrpo.report.runs import Run
from moe_upgrpo.stats import QUANTILES


def _says_tails(run: Run, panels: dict[str, list[Entry]]) -> str:
    beyond = run.pooled("logp_gap/beyond_2")
    if beyond is None:
        return "no tails were logged."
    text = f"{percent(beyond)} of tokens have a gap beyond 2×"
    if (far := run.pooled("logp_gap/beyond_10")) is not None:
        text += f", {percent(far)} beyond 10×"
    if (ratio := run.pooled("ratio/beyond_2")) is not None:
        text += f"; {percent(ratio)} an importance ratio beyond 2×"
    quantiles = [name for name in QUANTILES if run.series(f"logp_gap/{name}")[1]]
    if quantiles:
        value = max(run.series(f"logp_gap/{quantiles[-1]}")[1])
        text += (
            f"; in the worst step {100 * QUANTILES[quantiles[-1]]:g}% of tokens lie below "
            f"{number(value)} nats"
        )
    for name, what in (("logp_gap", "exp(gap)"), ("ratio", "the ratio")):
        if values := run.series(f"{name}/pareto_k")[1]:
            text += f"; Pareto k of {what} {number(np.median(values))} in the median step"
    return f"{text}."


TAILS = Panels(
    key="tails",
    title="Tails of the gap and of the ratios",
    parts=(
        Curves(
            key="gap_quantiles",
            title="quantiles of |gap|, nats",
            metrics=only(
                *((f"logp_gap/{name}", f"{100 * q:g}%") for name, q in reversed(QUANTILES.items()))
            ),
            log_scale=True,
        ),
        Curves(
            key="beyond",
            title="tokens beyond 2× and 10×",
            metrics=only(
                ("logp_gap/beyond_2", "gap > 2×"),
                ("logp_gap/beyond_10", "gap > 10×"),
                ("ratio/beyond_2", "ratio > 2×"),
                ("ratio/beyond_10", "ratio > 10×"),
            ),
            is_share=True,
            from_zero=True,
        ),
        Curves(
            key="pareto_k",
            title="Pareto k",
            metrics=only(
                ("logp_gap/pareto_k", "k of exp(gap)"), ("ratio/pareto_k", "k of the ratio")
            ),
        ),
    ),
    read="A mean hides the few tokens that carry an update. Quantiles are of |gap|; beyond 2× "
    "means that two probabilities are more than a factor of 2 apart; k is the tail index of "
    "the ratios: above .5 they have no variance, above .7 no weighting by them is to be "
    "trusted.",
    says=_says_tails,
)
