# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with an engine, from start to end: faults, then knobs against the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moe_upgrpo import __version__
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout.base import Engine
from moe_upgrpo.rollout.engines import EngineWeights
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.tools import pair
from moe_upgrpo.tools.diagnose import faults, tensors
from moe_upgrpo.tools.diagnose.bisection import Bisection, as_table, bisect
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.knobs import KNOBS
from moe_upgrpo.tools.diagnose.live import Live, opened
from moe_upgrpo.tools.diagnose.live_faults import EXPLAINED, LIVE_FAULTS, live_faults

_OF_WEIGHTS = ("half-loaded-weights", "other-weights", "stale-weights")
_BY_MODELS = (
    *_OF_WEIGHTS,
    "experts-permuted",
    "orphan-routers",
    "other-temperature",
    "unrelated-tokens",
)
"""Causes that records suggest and a model settles: the model's findings replace them."""


@dataclass(kw_only=True)
class Examined:
    """The findings, most likely cause first, and what was not tried, with the reason.

    left: the evidence as it would be without the faults that records show. tried: how many tests
    and knobs there were. bisection: None where a fault explains most of the difference: knobs are
    turned once it is mended. row: this measurement as a row of the calibration table; None where
    there is a fault.
    """

    evidence: Evidence
    left: Evidence
    findings: list[Finding]
    not_tried: dict[str, str]
    tried: int
    bisection: Bisection | None
    row: dict | None

    def tables(self) -> list[dict[str, Any]]:
        """The knobs and their effects, for a page: title, says, columns and rows of texts."""
        return [as_table(self.bisection)] if self.bisection else []


def examine(
    options: pair.PairOptions,
    *,
    server_log: Path,
    weights: EngineWeights = "as-trained",
    minutes: float | None = None,
    console: Console | None = None,
    engine: Engine | None = None,
) -> Examined:
    """Start both sides, and say what makes them differ.

    engine: one that already runs. minutes: for the knobs; None: as long as it takes.
    """
    with (
        groups.process_groups(Layout(), seed=options.seed),
        opened(options, server_log=server_log, weights=weights, engine=engine) as live,
    ):
        evidence = live.evidence()
        recorded = faults.find(evidence)
        findings, not_tried = recorded.findings, {}
        sure = [one for one in findings if one.cause not in _BY_MODELS]
        if not _settled(sure):
            told, not_tried = live_faults(live)
            if isinstance(live.engine, HFEngine) and "weights" not in not_tried:
                # Its tensors were compared: they confirm or refute what records say of weights.
                findings = [one for one in findings if one.cause not in _OF_WEIGHTS]
            findings = [*sure, *told] if _settled(told) else [*told, *findings]
        bisection = row = None
        if _settled(findings):
            why = f"the difference is that of a fault: mend {findings[0].cause} first"
            not_tried |= {knob.name: why for knob in KNOBS}
        else:
            if any(one.cause == "fp8" for one in findings):
                live.weights = "fp8"  # so that its twins are rounded too
            bisection = bisect(live, minutes=minutes, console=console)
            known = {one.cause for one in findings}
            findings = findings + [one for one in bisection.findings if one.cause not in known]
            not_tried |= bisection.not_tried
            row = row_of(live)
    return Examined(
        evidence=evidence,
        left=recorded.left,
        findings=findings,
        not_tried=not_tried,
        tried=recorded.tried + len(LIVE_FAULTS) + (len(bisection.turned) if bisection else 0),
        bisection=bisection,
        row=row,
    )


def _settled(findings: Sequence[Finding]) -> bool:
    """Whether a fault is certain (the engine's tensors are not the trainer's), or explains so much
    that nothing else can be seen beside it."""
    return any(
        f.kind == "fault" and (f.share is None or f.share >= EXPLAINED or f.cause in tensors.CAUSES)
        for f in findings
    )


def row_of(live: Live) -> dict | None:
    """The pair as a row of the calibration table; None for a dense model. A checkpoint does not say
    whether its routers are trained."""
    if not live.actor.layer_ids:
        return None
    base, hf = live.base, live.actor.hf
    routers_P, pairs_P = base.sums("routers")
    smallest = [
        native.margins[s.response_rows].min(axis=1)
        for native, s in zip(live.native, live.samples, strict=True)
    ]
    short = {"bfloat16": "bf16", "float32": "fp32"}
    sizes = (len(live.actor.layer_ids), hf.hidden_size, live.actor.num_experts, live.actor.top_k)
    return {
        "engine": live.options.engine,
        "precision": "fp8" if live.weights == "fp8" else short[live.options.engine_dtype],
        "trainer": short[live.options.dtype],
        "layers": sizes[0],
        "experts": sizes[2],
        "top_k": sizes[3],
        "trained": None,
        "margin": float(np.median(np.concatenate(smallest))),
        "differ": int(routers_P.sum()),
        "pairs": int(pairs_P.sum()),
        "gap": base.rate("gap"),
        "model": "-".join(map(str, (hf.model_type, *sizes))),
        "source": f"moe-upgrpo diagnose {__version__}",
    }
