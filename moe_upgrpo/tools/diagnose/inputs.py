# SPDX-License-Identifier: Apache-2.0
"""Evidence from files: two dumps, or a run folder of any stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.store import TokenLayout, read_config, read_metrics, read_routes, read_tokens
from moe_upgrpo.store.schema import COLUMNS
from moe_upgrpo.store.token_log import overlap_array, token_files
from moe_upgrpo.tools import route_dumps
from moe_upgrpo.tools.diagnose.evidence import Evidence, Finding
from moe_upgrpo.tools.diagnose.matching import empty, overlaps

STEPS = 8  # of a run, spread over it: the first, the last and some between
TOKENS = 200_000
ROUTERS = 4_000_000
"""(token, layer) pairs of dumps above which a spread of prompts represents all."""


@dataclass(kw_only=True)
class Source:
    """Evidence, and what else its source says.

    by_layer: share of routers that differ, where the source has it without routes. top_k: experts
    per token; 0: not known.
    """

    evidence: Evidence
    named: list[Finding] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    by_layer: list[float] | None = None
    top_k: int = 0
    about: str


def from_dumps(
    *,
    rollout_routes: Path | None,
    train_routes: Path | None,
    num_experts: int | None,
    rollout_logp: Path | None = None,
    train_logp: Path | None = None,
    samples: int | None = None,
) -> Source:
    """Evidence from two dumps of routes, of log-probs, or of both.

    Raises:
        UserError: a dump that cannot be read, or dumps that hold different sequences.
    """
    named: list[Finding] = []
    routes = logps = None
    if rollout_routes is not None and train_routes is not None:
        pair = [route_dumps.read_routes(x) for x in (rollout_routes, train_routes)]
        routes, named = _arranged(*pair)
        least = min(int(x.max()) for x in routes)
        if num_experts is not None and least >= num_experts:
            raise UserError(
                f"--num-experts {num_experts}, and both sides' routes have ids up to {least} or "
                f"more: a layer has {least + 1} experts at least. Give the number in the model's "
                "config; rows of padding are 0 or below."
            )
    if rollout_logp is not None and train_logp is not None:
        logps = [route_dumps.read_log_probs(x) for x in (rollout_logp, train_logp)]
        logps = [x[None] if x.ndim == 1 else x for x in logps]
    sizes = [len(x) for x in (*(routes or ()), *(logps or ()))]
    if len(set(sizes)) != 1:
        names = ("rollout routes", "train routes") if routes else ()
        names += ("rollout log-probs", "train log-probs") if logps else ()
        shown = ", ".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True))
        raise UserError(
            f"the dumps hold other numbers of sequences ({shown}): they belong to different "
            "prompts or batches, and no token of one has a counterpart in the other. Dump both "
            "sides of one batch; still answered without it: what engine and trainer do on the "
            "same tokens, by moe-upgrpo diagnose --model DIR --prompts FILE."
        )
    whole = B = sizes[0]
    if samples is not None and B % samples:
        raise UserError(
            f"--dump-samples {samples}: dumps of whole sequences are needed, their number a "
            f"multiple of {samples}; {B} are given."
        )
    if routes and (kept := _spread(routes, samples or 1)) is not None:
        routes = [x[kept] for x in routes]
        logps = None if logps is None else [x[kept] for x in logps]
        B = len(kept)
    evidence = Evidence(
        prompt=[i // samples if samples else 0 for i in range(B)],
        response=[],
        num_experts=num_experts or 0,
        layer_ids=[],
    )
    if routes:
        _take_routes(evidence, routes)
    if logps:
        _take_log_probs(evidence, logps)
    of = f"{B:,} of {whole:,} sequences, spread over them" if whole != B else f"{B:,} sequence"
    about = f"dumps of {of}{'s' * (whole == B != 1)}"
    return Source(evidence=evidence, named=named, about=about)


def _spread(routes: list[np.ndarray], samples: int) -> np.ndarray | None:
    """Sequences that represent a large batch, in whole prompts; None: all of them."""
    pairs = max(x.size // x.shape[-1] for x in routes)
    prompts = len(routes[0]) // samples
    keep = max(8, prompts * ROUTERS // pairs)
    if keep >= prompts:
        return None
    chosen = np.linspace(0, prompts - 1, keep).round().astype(int)
    return (chosen[:, None] * samples + np.arange(samples)).ravel()


def _arranged(rollout: np.ndarray, train: np.ndarray) -> tuple[list[np.ndarray], list[Finding]]:
    """Arrange both as [B, tokens, layers, top-k]; sequences on another axis are a finding."""
    for name, routes in (("rollout", rollout), ("train", train)):
        if routes.ndim not in (3, 4) or not routes.size:
            raise UserError(
                f"{name} routes have shape {list(routes.shape)}; [tokens, layers, top-k] or "
                "[sequences, tokens, layers, top-k] is needed. Without routes log-probs can still "
                "be compared: --rollout-logp and --train-logp."
            )
    if rollout.ndim != train.ndim:
        raise UserError(
            f"rollout routes are {list(rollout.shape)} and train routes {list(train.shape)}: one "
            "is a batch of sequences and the other a row of tokens. Dump both alike."
        )
    if rollout.ndim == 3:
        return [rollout[None], train[None]], []
    if len(rollout) == len(train):
        return [rollout, train], []
    best: tuple[float, tuple[int, ...], int] | None = None
    for order in permutations(range(4)):
        for side, given, other in ((1, train, rollout), (0, rollout, train)):
            turned = given.transpose(order)
            if order[0] != 0 and turned.shape == other.shape:
                step = max(1, turned[..., 0].size // 20_000)
                flat = [x.reshape(-1, 1, x.shape[-1])[::step] for x in (turned, other)]
                agreed = float(overlaps(*flat).mean())
                if best is None or agreed > best[0] + 0.01:
                    best = agreed, order, side
    if best is None:
        return [rollout, train], []
    agreed, order, side = best
    turned = [rollout, train]
    turned[side] = turned[side].transpose(order)
    who = ("rollout", "trainer")[side]
    said = (
        f"the {who}'s axes taken in the order {list(order)}, which puts sequences first: "
        f"{agreed:.1%} of expert slots agree"
    )
    finding = Finding(
        cause="transposed-axes", kind="fault", share=None, measure="routers", shown_by=said
    )
    return turned, [finding]


def _take_routes(evidence: Evidence, routes: list[np.ndarray]) -> None:
    rollout, train = [], []
    for a, b in zip(*routes, strict=True):
        # Rows at the end that neither side wrote are padding.
        ends = [_written(x) for x in (a, b)]
        if len(a) == len(b):
            ends = [max(ends)] * 2
        rollout.append(a[: ends[0]])
        train.append(b[: ends[1]])
    evidence.rollout_routes, evidence.train_routes = rollout, train
    evidence.response = [slice(0, len(x)) for x in rollout]
    evidence.layer_ids = list(range(rollout[0].shape[1]))


def _written(routes: np.ndarray) -> int:
    """Rows up to the last that is not empty."""
    rows = (~empty(routes).all(axis=1)).nonzero()[0]
    return int(rows[-1]) + 1 if len(rows) else len(routes)


def _take_log_probs(evidence: Evidence, logps: list[np.ndarray]) -> None:
    for side, values in zip(("logp_rollout", "logp_train"), logps, strict=True):
        setattr(evidence, side, [np.asarray(x, np.float64) for x in values])
    if not evidence.response:
        evidence.response = [slice(0, len(x)) for x in evidence.logp_rollout]
    widths = [x.shape[1] for x in logps]
    longer = ("rollout", "train")[int(np.argmax(widths))]
    if np.isfinite(logps[int(np.argmax(widths))][:, min(widths) :]).any():
        raise UserError(
            f"the rollout's log-probs are of {widths[0]} tokens a sequence and the trainer's of "
            f"{widths[1]}: which belong together is not known. Cut the {longer} side to the same "
            "tokens, or put NaN where the other has none."
        )
    both = zip(evidence.logp_rollout, evidence.logp_train, strict=True)
    if not any(np.isfinite(a[: len(b)] + b[: len(a)]).any() for a, b in both):
        numbers = ", ".join(
            f"{name} {int(np.isfinite(x).sum()):,} of {x.size:,} tokens"
            for name, x in zip(("rollout", "train"), logps, strict=True)
        )
        raise UserError(
            f"no token has a log-prob on both sides (numbers: {numbers}; the rest is NaN or "
            "infinite): there is nothing to compare. Dump the log-probs of the same tokens; the "
            "routes can still be compared without --rollout-logp and --train-logp."
        )


_COLUMNS = (
    "layers_mismatched",
    "staleness",
    "margin_min",
    "layers_mismatched_conditional",
    *(name for name in COLUMNS if name.startswith(("gap_", "counterfactual_", "noise_"))),
)


def from_run(run: Path) -> Source:
    """Evidence from a run's token log, from steps spread over it.

    Raises:
        UserError: no run, or one whose log has no rows; it says which questions are still answered.
    """
    config, rows = read_config(run), read_metrics(run)
    steps = sorted({step for _, step in token_files(run / "tokens")})
    if not steps:
        raise UserError(
            f"{run} has no token log (it was kept at level "
            f"{config.get('token_log') or 'aggregate'}): what makes engine and trainer differ "
            "cannot be told from it. Still answered: whether routing is to blame, in which layers, "
            f"and which alarms rang, by moe-upgrpo report {run}; and the causes on its checkpoint, "
            "by moe-upgrpo diagnose --model CHECKPOINT --prompts FILE."
        )
    chosen = np.unique(np.linspace(0, len(steps) - 1, STEPS).round().astype(int))
    table = read_tokens(run, steps=[steps[i] for i in chosen])
    evidence, by_layer = _evidence(table)
    evidence.temperature = config.get("temperature")
    about = f"{run}, {table.num_rows:,} tokens of steps {', '.join(str(steps[i]) for i in chosen)}"
    about += "" if evidence.layer_ids else ", a dense model"
    return Source(
        evidence=evidence,
        config=config,
        rows=rows,
        by_layer=by_layer,
        top_k=TokenLayout.of(table.schema).top_k,
        about=about,
    )


def _evidence(table: pa.Table) -> tuple[Evidence, list[float] | None]:
    layout = TokenLayout.of(table.schema)
    table = table.sort_by([(name, "ascending") for name in ("step", "sequence", "position")])
    keys = [table[name].to_numpy().astype(np.int64) for name in ("step", "sequence", "prompt")]
    ends = (np.diff(keys[0]) != 0) | (np.diff(keys[1]) != 0)
    bounds = np.concatenate([[0], ends.nonzero()[0] + 1, [table.num_rows]])
    if table.num_rows > TOKENS:
        whole = int(np.searchsorted(bounds, TOKENS, side="right")) - 1
        bounds = bounds[: max(whole, 1) + 1]
        table = table.slice(0, int(bounds[-1]))
    cut = [slice(a, b) for a, b in pairwise(bounds.tolist())]
    _, prompt = np.unique((keys[0] << 32) + keys[2], return_inverse=True)

    def column(name: str) -> list[np.ndarray] | None:
        if name not in table.column_names or table[name].null_count == table.num_rows:
            return None
        values = table[name].to_numpy().astype(np.float64)
        return [values[rows] for rows in cut]

    evidence = Evidence(
        prompt=[int(prompt[rows.start]) for rows in cut],
        tokens=[table["token_id"].to_numpy()[rows] for rows in cut],
        response=[slice(0, rows.stop - rows.start) for rows in cut],
        logp_rollout=column("logp_rollout"),
        logp_train=column("logp_old") or column("logp_train"),
        num_experts=layout.num_experts,
        layer_ids=list(layout.layer_ids),
        columns={name: found for name in _COLUMNS if (found := column(name)) is not None},
    )
    by_layer = None
    if layout.num_layers:
        by_layer = (overlap_array(table) < layout.top_k).mean(axis=0).tolist()
        known = {"rollout_experts", "train_experts"} <= {*table.column_names}
        if known and not table["rollout_experts"].null_count + table["train_experts"].null_count:
            both = read_routes(table)
            evidence.rollout_routes, evidence.train_routes = (
                [side[rows].astype(np.int16) for rows in cut] for side in both
            )
    else:
        evidence.columns.pop("layers_mismatched", None)
    return evidence, by_layer
