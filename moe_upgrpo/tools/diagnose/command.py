# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo diagnose`: from records or a model to a verdict, on the terminal and as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from moe_upgrpo.errors import UserError
from moe_upgrpo.record.alarms import ALARMS
from moe_upgrpo.report.figures import plural
from moe_upgrpo.tools.diagnose import faults, matching, show, signs, verdict
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.expected import Expected, contribute, expected_rate
from moe_upgrpo.tools.diagnose.inputs import Source, from_dumps, from_run
from moe_upgrpo.tools.diagnose.verdict import Diagnosis
from moe_upgrpo.tools.diagnose_options import DiagnoseConfig

_PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}


def diagnose(config: DiagnoseConfig, console: Console | None = None) -> Diagnosis:
    """Say why the two sides differ; write diagnosis.html and diagnosis.json."""
    console = console or Console(highlight=False, markup=False)
    before = verdict.read_before(config.before) if config.before else None
    found = _of_records(config) if config.model is None else _of_model(config, console)
    if before is not None:
        found.since = verdict.since(before, found)
    page = show.write(found, config.folder)
    show.on_terminal(found, console)
    console.print(f"page: {page}", soft_wrap=True)
    return found


def _of_records(config: DiagnoseConfig) -> Diagnosis:
    """The diagnosis of a run folder or of dumps."""
    if config.run is not None:
        source = from_run(config.run)
        _check_known(source.evidence, f"{config.run}'s token log")
    else:
        source = from_dumps(
            rollout_routes=config.rollout_routes,
            train_routes=config.train_routes,
            num_experts=config.num_experts,
            rollout_logp=config.rollout_logp,
            train_logp=config.train_logp,
            samples=config.dump_samples,
        )
    replay = str(_option(source.config, "replay") or "none")
    looked = verdict.look(source.evidence, named=source.named, replay=replay)
    about = _Model.of_records(config, source)
    return conclude(
        source.evidence,
        looked.findings,
        left=looked.left,
        tried=looked.tried,
        not_tried=faults.not_asked(source.evidence),
        model=about,
        about=source.about,
        by_layer=source.by_layer,
        alarms=_alarms(source.rows),
    )


def _of_model(config: DiagnoseConfig, console: Console) -> Diagnosis:
    """The diagnosis of a checkpoint with an engine."""
    from moe_upgrpo.tools.diagnose.examine import examine  # imports Megatron

    show.make_folder(config.folder)
    examined = examine(
        config,
        server_log=config.folder / "engine.log",
        weights=config.engine_weights,
        minutes=config.minutes,
        console=console,
    )
    evidence, findings = examined.evidence, list(examined.findings)
    told = {one.cause for one in findings if one.kind == "fault"}
    by_records = told <= {one.cause for one in faults.find(evidence).findings}
    if not told and evidence.rollout_routes:
        explained = any((one.share or 0) >= 0.5 for one in findings)
        # Listed last: it names no cause, and a knob may have named one.
        beyond = None if explained else signs.large_margins(evidence, matching.rate(evidence))
        findings = [one for one in (beyond, *findings, signs.near_ties(evidence)) if one]
    if config.contribute is not None:
        if examined.row is None:
            raise UserError(
                f"--contribute: there is a fault ({', '.join(sorted(told)) or 'no routes'}), and "
                "the table is of pairs without any. Mend it and run again."
            )
        contribute(config.contribute, examined.row)
        console.print(f"added to {config.contribute}: a row to send", soft_wrap=True)
    name = config.engine if config.engine_url is None else f"{config.engine} at {config.engine_url}"
    return conclude(
        evidence,
        findings,
        left=examined.left if by_records else None,
        tried=examined.tried,
        not_tried=faults.not_asked(evidence) | examined.not_tried,
        model=_Model(
            precision=config.precision
            or ("fp8" if config.engine_weights == "fp8" else _PRECISIONS[config.engine_dtype]),
            trainer=_PRECISIONS[config.dtype],
            trained=None,
        ),
        about=f"{config.model} with engine {name}, {plural(len(evidence.response), 'response')}",
        row=examined.row,
        tables=examined.tables(),
    )


def _check_known(evidence: Evidence, where: str) -> None:
    """Refuse records without anything to compare."""
    if not evidence.rollout_routes and "layers_mismatched" not in evidence.columns:
        sides = (evidence.logp_rollout, evidence.logp_train)
        if any(x is None for x in sides):
            raise UserError(
                f"{where} holds neither routes nor the log-probs of both sides: no question can "
                "be answered from it. Run moe-upgrpo diagnose --model CHECKPOINT --prompts FILE."
            )


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The precision that an expectation is made for.

    top_k: experts of each token, where routes do not say it. said: which of this is assumed.
    """

    precision: str
    trainer: str
    trained: bool | None
    top_k: int = 0
    said: str = ""

    @classmethod
    def of_records(cls, config: DiagnoseConfig, source: Source) -> _Model:
        written = _option(source.config, "engine_dtype")
        weights = _option(source.config, "engine_weights")
        precision = "fp8" if weights == "fp8" else _PRECISIONS.get(str(written))
        said = ""
        if config.precision is not None:
            precision = config.precision
        elif precision is None:
            precision = "bf16"
            said = "; the engine is taken to be in bf16, --precision says otherwise"
        trainer = _PRECISIONS.get(str(_option(source.config, "dtype")), "fp32")
        trained = None
        if source.config:
            trained = not _option(source.config, "random_router")
        return cls(
            precision=precision, trainer=trainer, trained=trained, top_k=source.top_k, said=said
        )

    def expected(self, evidence: Evidence) -> tuple[Expected | None, str]:
        """The expected range, or why there is none."""
        if not evidence.layer_ids:
            return None, "there is no MoE layer in these records"
        routes = evidence.rollout_routes
        top_k = routes[0].shape[-1] if routes else self.top_k
        found = expected_rate(
            evidence.num_experts,
            top_k,
            len(evidence.layer_ids),
            self.precision,
            trainer=self.trainer,
            margins=_median_margin(evidence),
            trained=self.trained,
        )
        return replace(found, source=f"{found.source}{self.said}"), ""


def _median_margin(evidence: Evidence) -> float | None:
    """The median over tokens of a token's smallest margin."""
    if evidence.margins is not None:
        pairs = zip(evidence.margins, evidence.response, strict=True)
        smallest = np.concatenate([m[rows].min(axis=1) for m, rows in pairs])
    elif "margin_min" in evidence.columns:
        smallest = np.concatenate(evidence.columns["margin_min"])
    else:
        return None
    smallest = smallest[np.isfinite(smallest)]
    return float(np.median(smallest)) if len(smallest) else None


def conclude(
    evidence: Evidence,
    findings: Sequence[Finding],
    *,
    left: Evidence | None,
    tried: int,
    not_tried: dict[str, str],
    model: _Model,
    about: str,
    by_layer: Sequence[float] | None = None,
    alarms: list[str] | None = None,
    row: dict[str, Any] | None = None,
    tables: list[dict[str, Any]] | None = None,
) -> Diagnosis:
    """The verdict on findings, however they were made.

    left: the evidence without its faults; None where a model showed them.
    """
    measured = verdict.measure(evidence, left, by_layer)
    of = evidence if left is None else left
    fits = matching.fit(of) if of.rollout_routes and of.train_routes else True
    expected, why = model.expected(of) if fits else (None, "the two sides do not fit")
    return Diagnosis(
        about=about,
        measured=measured,
        findings=list(findings),
        not_tried=not_tried,
        tried=tried,
        sentences=verdict.sentences(measured, findings, tried, expected, why),
        expected=expected,
        row=row,
        alarms=alarms or [],
        tables=tables or [],
    )


def _option(config: dict[str, Any], name: str) -> Any:
    """An option of a run, at the top of its config or in one of its parts."""
    if name in config:
        return config[name]
    parts = [part for part in config.values() if isinstance(part, dict)]
    return next((part[name] for part in parts if name in part), None)


def _alarms(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The alarms that rang, how often, and what they say."""
    rang = Counter(name for row in rows for name in row.get("alarms") or ())
    return [
        f"{name} at {plural(times, 'step')}: {ALARMS[name].rings if name in ALARMS else ''}"
        for name, times in rang.items()
    ]
