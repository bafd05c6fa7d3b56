# SPDX-License-Identifier: Apache-2.0
"""The router mismatch that a model of this shape and precision has where nothing is wrong.

From the project's own measurements (`calibration.json`, made by `python -m
benchmarks.diagnose.calibrate`), a rule is fitted by least squares:

    log r = b · (1, log E, log K, log L, FP8, bf16 trainer, trained, trained · FP8)

with r the router mismatch rate, E experts, K of them per token, L MoE layers. Where it is not known
whether the routers are trained, log m replaces the last two, m being the median over tokens of a
token's smallest margin; beside them it adds nothing to the prediction.

The error is that for models left out: a rule is fitted without all rows of one shape and weights,
and misses those by some factor. The interval uses the root mean square of the misses' logarithms,
over all models or, where that is larger, over those whose routers are trained like the given
model's; and Student's t with one degree of freedom for each model.

An fp32 engine differs from an fp32 trainer in no router of the table; its range is the
Clopper-Pearson interval for the tokens seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import numpy as np
from scipy import stats

from moe_upgrpo.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp8")
"""An engine's number type, or bf16 with weights rounded to FP8."""
FIELDS = {
    "engine": str,
    "precision": str,
    "trainer": str,
    "layers": int,
    "experts": int,
    "top_k": int,
    "trained": bool | None,
    "margin": float,
    "differ": int,
    "pairs": int,
    "gap": float,
    "model": str,
    "source": str,
}
"""The columns of a row. trained: whether the routers were; None: not known, and the
rule without margins leaves the row out. differ of pairs (token, MoE layer)
pairs had other experts. gap: mean |log-prob gap|. model: rows of one model share a value."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A 95% range of router mismatch rates, and its source."""

    low: float
    middle: float
    high: float
    source: str

    def says(self, rate: float) -> str:
        """Whether a rate is within it."""
        return "below" if rate < self.low else "above" if rate > self.high else "within"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The fitted coefficients and the error on models left out (see the module)."""

    coefficients: np.ndarray
    with_margin: bool
    misses: np.ndarray  # [models], root mean square of log(predicted / measured)
    trained: np.ndarray  # [models] bool
    rows: int

    def error(self, trained: bool | None = None) -> float:
        """Root mean square of a left-out model's log ratio of predicted to measured: over all, or
        over those with such routers where that is larger."""
        kinds = (
            [self.misses]
            if trained is None
            else [self.misses, self.misses[self.trained == trained]]
        )
        return max(float(np.sqrt((of**2).mean())) for of in kinds)


@cache
def table() -> tuple[dict[str, Any], ...]:
    """The rows of the calibration table."""
    text = resources.files("moe_upgrpo.tools.diagnose").joinpath("calibration.json")
    return tuple(json.loads(text.read_text(encoding="utf-8"))["rows"])


def _features(row: Mapping[str, Any], with_margin: bool) -> list[float]:
    fp8 = float(row["precision"] == "fp8")
    found = [1.0, *(math.log(row[name]) for name in ("experts", "top_k", "layers"))]
    found += [fp8, float(row["trainer"] == "bf16")]
    if with_margin:
        return [*found, math.log(row["margin"])]
    return [*found, float(row["trained"]), row["trained"] * fp8]


def _log_rate(row: Mapping[str, Any]) -> float:
    """log of the rate, with half an event added: 0 of N would give −∞."""
    return math.log((row["differ"] + 0.5) / (row["pairs"] + 1))


def fit(rows: Sequence[Mapping[str, Any]], *, with_margin: bool) -> Rule:
    """The rule over rows that are not fp32 against fp32.

    Raises:
        UserError: too few models to fit a rule and leave one out.
    """
    rows = [r for r in rows if not _is_exact(r["precision"], r["trainer"]) and r["margin"] > 0]
    rows = [r for r in rows if with_margin or r["trained"] is not None]
    x_RF = np.array([_features(row, with_margin) for row in rows])
    y_R = np.array([_log_rate(row) for row in rows])
    models = sorted({row["model"] for row in rows})
    if len(models) < 2 * x_RF.shape[1]:
        raise UserError(f"{len(models)} models are too few to fit a rule of the mismatch")
    misses, trained = [], []
    for model in models:
        out_R = np.array([row["model"] == model for row in rows])
        b_F = np.linalg.lstsq(x_RF[~out_R], y_R[~out_R], rcond=None)[0]
        misses.append(math.sqrt(((x_RF[out_R] @ b_F - y_R[out_R]) ** 2).mean()))
        trained.append(any(row["trained"] for row, out in zip(rows, out_R, strict=True) if out))
    return Rule(
        coefficients=np.linalg.lstsq(x_RF, y_R, rcond=None)[0],
        with_margin=with_margin,
        misses=np.array(misses),
        trained=np.array(trained),
        rows=len(rows),
    )


@cache
def rule(with_margin: bool) -> Rule:
    """The rule of the project's table."""
    return fit(table(), with_margin=with_margin)


def expected_rate(
    num_experts: int,
    top_k: int,
    layers: int,
    precision: str,
    *,
    trainer: str = "fp32",
    margins: float | None = None,
    trained: bool | None = None,
) -> Expected:
    """The range of the router mismatch rate of such a model where nothing is wrong.

    precision: the engine's, see `PRECISIONS`. trainer: fp32 or bf16. layers: MoE layers. margins:
    the median over tokens of a token's smallest margin, where it is known. trained: whether the
    routers are; None: the margins tell, and without them the range covers both.

    Raises:
        UserError: an unknown precision, or numbers that no model has.
    """
    if precision not in PRECISIONS or trainer not in ("fp32", "bf16"):
        raise UserError(
            f"precision={precision!r}, trainer={trainer!r}: an engine is one of "
            f"{', '.join(PRECISIONS)}, a trainer fp32 or bf16."
        )
    if not (layers >= 1 and 1 <= top_k <= num_experts) or (margins is not None and margins < 0):
        raise UserError(
            f"{layers} MoE layers, top-{top_k} of {num_experts} experts, margins={margins}: at "
            "least one layer, and a top-k within the experts, is needed."
        )
    if _is_exact(precision, trainer):
        return _of_fp32()
    with_margin = trained is None and margins is not None and 0 < margins < math.inf
    if trained is None and not with_margin:
        both = [
            expected_rate(
                num_experts,
                top_k,
                layers,
                precision,
                trainer=trainer,
                trained=of,
            )
            for of in (False, True)
        ]
        return Expected(
            low=min(one.low for one in both),
            middle=math.sqrt(both[0].middle * both[1].middle),
            high=max(one.high for one in both),
            source=f"{both[1].source}; trained routers or not",
        )
    row = {
        "experts": num_experts,
        "top_k": top_k,
        "layers": layers,
        "precision": precision,
        "trainer": trainer,
        "trained": trained,
        "margin": margins,
    }
    of = rule(with_margin)
    middle = float(np.array(_features(row, with_margin)) @ of.coefficients)
    reach = stats.t.ppf(0.975, len(of.misses) - 1) * of.error(trained)
    low, middle, high = (min(1.0, math.exp(x)) for x in (middle - reach, middle, middle + reach))
    return Expected(low=low, middle=middle, high=high, source=_source(of, row))


def _is_exact(precision: str, trainer: str) -> bool:
    return precision == trainer == "fp32"


def _of_fp32() -> Expected:
    rows = [row for row in table() if _is_exact(row["precision"], row["trainer"])]
    differ, pairs = (sum(row[name] for row in rows) for name in ("differ", "pairs"))
    interval = stats.binomtest(differ, pairs).proportion_ci(method="exact")
    return Expected(
        low=float(interval.low),
        middle=differ / pairs,
        high=float(interval.high),
        source=f"{differ} of {pairs:,} routers in {len(rows)} measurements of fp32 against fp32",
    )


def _source(of: Rule, row: Mapping[str, Any]) -> str:
    """Numbers of rows and models, the error, and what lies outside the rows whose routers are
    trained like this one's."""
    outside = []
    alike = [r for r in table() if row["trained"] in (None, r["trained"])]
    for name in ("experts", "top_k", "layers"):
        low, high = (end(r[name] for r in alike) for end in (min, max))
        if not low <= row[name] <= high:
            seen = f"{low}–{high}" if low < high else f"{low}"
            outside.append(f"{name.replace('_', '-')} {row[name]} where the rows have {seen}")
    kind = (
        "" if row["trained"] is None else f" of {'trained' if row['trained'] else 'random'} routers"
    )
    beyond = f"; extrapolated: {', '.join(outside)}{kind}" if outside else ""
    margins = " with margins" if of.with_margin else ""
    return (
        f"a rule{margins} over {of.rows} measurements of {len(of.misses)} models, which is off by "
        f"a factor of {math.exp(of.error(row['trained'])):.2f} for a model left out{beyond}"
    )


def expected_of(row: Mapping[str, Any], *, trained: bool | None = None) -> Expected:
    """The range for a row's own model. trained: None where it is not known."""
    return expected_rate(
        row["experts"],
        row["top_k"],
        row["layers"],
        row["precision"],
        trainer=row["trainer"],
        margins=row["margin"],
        trained=trained,
    )


def _types(kind: type | UnionType) -> tuple[type, ...]:
    return get_args(kind) or (kind,)


def contribute(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row as a line of JSON, to be sent to the project; it holds nothing of the prompts.

    Raises:
        UserError: a field is missing or of another type, or the file cannot be written.
    """
    for name, kind in FIELDS.items():
        value = row.get(name)
        good = isinstance(value, (int, float)) if kind is float else type(value) in _types(kind)
        if not good:
            shown = " or ".join("null" if t is NoneType else t.__name__ for t in _types(kind))
            raise UserError(f"a row of the calibration table has {name}: {shown}; got {value!r}.")
    if not 0 <= row["differ"] <= row["pairs"] or row["pairs"] == 0:
        raise UserError(f"{row['differ']} of {row['pairs']} routers differ: nothing to contribute.")
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: row[name] for name in FIELDS}) + "\n")
    except OSError as error:
        raise UserError(f"--contribute {path}: {error.strerror or error}") from None
